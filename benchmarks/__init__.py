"""Measurements that write JSON: those of `minimac-mlx bench NAME`, and the rest as `python -m benchmarks.NAME`."""

BENCH = ("tokens", "train", "route", "startup", "curves", "learn")
"""What `minimac-mlx bench` can measure, the longest last."""

REPETITIONS = 5
