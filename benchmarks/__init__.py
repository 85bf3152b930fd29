"""Measurements that write JSON: those of `minimac-mlx bench NAME`, and the rest as `python -m benchmarks.NAME`."""

BENCH = ("tokens", "train", "learn", "route", "startup", "curves")
"""What `minimac-mlx bench` can measure."""

REPETITIONS = 5
