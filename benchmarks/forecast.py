"""How good the prediction is that `train` prints: predicted against measured time and memory of a training step.

Random tokens, one microbatch a step, eager and compiled. The time is the median of the steps after the first two; the
prediction is made just before, because the machine's speed drifts.

    python -m benchmarks.forecast [--steps 7]
"""

import argparse
import statistics
import time
from dataclasses import replace
from typing import Any

import mlx_impl  # noqa: F401  before MLX, for the fast BLAS

# isort: split
import mlx.core as mx

from benchmarks.common import record
from mlx_impl.config import PRESETS
from mlx_impl.loss import loss_of
from mlx_impl.memory import pretraining_bytes
from mlx_impl.model import ContinualLLM
from mlx_impl.optim import AdamW, Stepper
from mlx_impl.recipe import predicted_step_seconds

CASES = (("tiny", 2000, 8, 128), ("small", 8000, 4, 256), ("medium", 8000, 2, 256))
"""Preset, vocabulary, rows, tokens a row."""


def main() -> None:
    """Measure every case and write the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7, help="steps a case, the first two not counted  [default: 7]")
    arguments = parser.parse_args()
    cases = [measure(*case, compiled, arguments.steps) for case in CASES for compiled in (False, True)]
    record("forecast", {"cases": cases})


def measure(preset: str, vocabulary: int, rows: int, length: int, compiled: bool, steps: int) -> dict[str, Any]:
    """Seconds (the median) and peak bytes of a step, and what was predicted."""
    config = replace(PRESETS[preset], vocab_size=vocabulary)
    model = ContinualLLM(config)
    stepper = Stepper(model.parameters(), AdamW(1e-3), loss_of(model), 1.0, compiled)
    tokens = mx.random.randint(0, vocabulary, (rows, length + 1), key=mx.random.key(0))
    predicted = predicted_step_seconds(config, rows * length, length)
    mx.clear_cache()
    mx.reset_peak_memory()
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        stepper.step([(tokens, mx.ones((rows, length)))], 1e-3)
        mx.eval(stepper.parameters)
        seconds.append(time.perf_counter() - started)
    median, memory = statistics.median(seconds[2:]), pretraining_bytes(config, rows, length, False, False)
    return {
        "model": preset,
        "vocabulary": vocabulary,
        "windows": [rows, length],
        "compiled": compiled,
        "first_step_seconds": seconds[0],
        "step_seconds": median,
        "spread": [min(seconds[2:]), max(seconds[2:])],
        "predicted_over_measured_time": predicted / median,
        "predicted_over_measured_memory": memory / mx.get_peak_memory(),
    }


if __name__ == "__main__":
    main()
