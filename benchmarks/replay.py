"""Seconds that a replay buffer takes for an insert and for a sample, full with a thousand to a million windows.

Every insert that is timed is admitted and evicts: its source is new to a full buffer. What is drawn is gathered and
waited for; with priorities, they are refreshed.

    python -m benchmarks.replay [--length 64] [--rows 4]
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import mlx_impl  # noqa: F401  before MLX, for the fast BLAS

# isort: split
import mlx.core as mx
import numpy as np

from benchmarks.common import record
from mlx_impl.config import REPLAY_STRATEGIES
from mlx_impl.replay import ReplayBuffer

SIZES = (10**3, 10**4, 10**5, 10**6)
SOURCES = 10
CALLS = 100
BLOCK = 1000


def main() -> None:
    """Measure every strategy at every size and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=64, help="targets a window  [default: 64]")
    parser.add_argument("--rows", type=int, default=4, help="windows a call  [default: 4]")
    arguments = parser.parse_args()
    figures = {strategy: measure(strategy, arguments.length, arguments.rows) for strategy in REPLAY_STRATEGIES}
    scale = {
        "length": arguments.length,
        "windows_a_call": arguments.rows,
        "calls": CALLS,
        "unit": "microseconds a call",
    }
    record("replay", {**scale, "strategies": figures})


def measure(strategy: str, length: int, rows: int) -> dict[str, Any]:
    """Microseconds a call, by size of the buffer; the sizes take turns, because the machine's speed drifts."""
    random = np.random.default_rng(0)
    buffers = {size: full(strategy, size, length) for size in SIZES}
    mask = np.ones((rows, length), np.float32)

    def insert(buffer: ReplayBuffer, call: int) -> None:
        tokens = random.integers(0, 50000, (rows, length + 1))
        # Few windows a source, so that it stays small and is let in; a single reservoir always admits heavy ones.
        importance = 1e6 if strategy == "reservoir" else 1.0
        assert buffer.insert(tokens, mask, f"late {call // 10}", 2, importance) == rows

    def sample(buffer: ReplayBuffer, call: int) -> None:
        drawn = buffer.sample(rows, excluding=2)
        mx.eval(drawn.tokens, drawn.mask, drawn.weights)
        if strategy == "importance":
            buffer.update_priorities(drawn.rows, random.random(rows) * 4)

    return {"sample": timed(sample, buffers), "insert": timed(insert, buffers)}


def full(strategy: str, size: int, length: int) -> ReplayBuffer:
    """A buffer full of random windows from ten sources."""
    random = np.random.default_rng(size)
    mask = np.ones((BLOCK, length), np.float32)
    buffer = ReplayBuffer(length, size, strategy, 0)
    while len(buffer) < size:
        tokens = random.integers(0, 50000, (BLOCK, length + 1))
        buffer.insert(tokens, mask, f"source {len(buffer) * SOURCES // size}", 1)
    return buffer


def timed(call: Callable[[ReplayBuffer, int], None], buffers: dict[int, ReplayBuffer]) -> dict[str, Any]:
    """Median and quartiles by size, the first tenth of the calls not counted, and how the largest compares."""
    seconds: dict[int, list[float]] = {size: [] for size in buffers}
    for number in range(CALLS):
        for size, buffer in buffers.items():
            started = time.perf_counter()
            call(buffer, number)
            seconds[size].append(time.perf_counter() - started)
    quartiles = {size: np.quantile(np.array(s[CALLS // 10 :]) * 1e6, (0.25, 0.5, 0.75)) for size, s in seconds.items()}
    return {
        **{
            str(size): {"median": float(q[1]), "quartiles": [float(q[0]), float(q[2])]} for size, q in quartiles.items()
        },
        "million_to_thousand": float(quartiles[max(quartiles)][1] / quartiles[min(quartiles)][1]),
    }


if __name__ == "__main__":
    main()
