"""Runs before any test file: what must be set before MLX is imported, and how hypothesis behaves here.

Helpers that tests share are functions in `comparing.py`, not fixtures.
"""

import os
import signal

os.environ["MLX_ENABLE_TF32"] = "0"  # read when MLX starts; on recent GPUs fp32 products have else 10 bits

import hypothesis

import mlx_impl  # noqa: F401  loads the fast BLAS, which only works before anything imports MLX

# The same examples on every run: a test that fails here fails for whoever looks into it.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, database=None, max_examples=40)
hypothesis.settings.load_profile("suite")

# A shell starts background jobs with Ctrl-C ignored, and so would be what the tests start and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
