"""Memory of training: the peak of a LoRA step beside mlx-lm's, and whether it stays where it is over many steps.

Each side runs in a process of its own. `mx.get_peak_memory` counts MLX's arrays, the weights with them, and is what
mlx-lm itself reports; the process's peak beyond what it took with the weights loaded is told as well, but not on macOS,
where a process's peak is that of its loading too.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx_impl  # noqa: F401  before MLX, for the fast BLAS

# isort: split
import mlx.core as mx
import numpy as np

from benchmarks import child, sides
from benchmarks.harness import OURS, Options
from mlx_impl import lora
from mlx_impl.config import ContinualLearningConfig, ModelConfig
from mlx_impl.data import Tokens
from mlx_impl.loss import loss_of
from mlx_impl.model import ContinualLLM
from mlx_impl.optim import AdamW, Stepper

SAMPLES = 50
"""How often the memory is looked at over a run."""


def peaks(model: Path, quick: bool) -> dict[str, Any]:
    """Bytes at the peak of LoRA steps of both sides, and our share of mlx-lm's: 0.6 is 40 % less."""
    rows, length = (1, 32) if quick else (4, 512)
    found = {
        name: child.call(function, model=str(model), rows=rows, length=length, steps=2)
        for name, function in ((OURS, our_peak), ("mlx-lm", peer_peak))
    }
    ours, theirs = found.values()
    known = ours["process_growth"] is not None and theirs["process_growth"]
    return {
        "windows": f"{rows} x {length}",
        "bytes": found,
        "mlx_peak": ours["mlx_peak"] / theirs["mlx_peak"],
        "process_growth": ours["process_growth"] / theirs["process_growth"] if known else None,
    }


def our_peak(model: str, rows: int, length: int, steps: int) -> dict[str, int | None]:
    """Bytes before and at the peak of our steps."""
    config = ContinualLearningConfig(batch_size=rows, seq_len=length)
    taught = sides.taught_model(Path(model), config)
    tokens = _text(steps * rows * length + 1, taught.vocab_size)
    return _watched(lambda: sides.OurSteps(taught, config, tokens).run(steps))


def peer_peak(model: str, rows: int, length: int, steps: int) -> dict[str, int | None]:
    """Bytes before and at the peak of mlx-lm's steps on rows of the same length, none of them padded."""
    config = ContinualLearningConfig(batch_size=rows, seq_len=length)
    network = sides.peer_model(Path(model), config)
    vocabulary = network.args.vocab_size
    batches = [
        (mx.array(_random(rows * (length + 1), vocabulary, step).reshape(rows, -1)), mx.array([[0, length + 1]] * rows))
        for step in range(steps)
    ]
    return _watched(lambda: sides.train_peer(network, batches, steps, 1e-4))


def _watched(work: Callable[[], Any]) -> dict[str, int | None]:
    mx.clear_cache()
    mx.reset_peak_memory()
    known = child.reset_peak()
    before = {"process_loaded": child.resident(), "mlx_loaded": mx.get_active_memory()}
    work()
    grown = child.peak_resident() - before["process_loaded"] if known else None
    return {**before, "process_growth": grown, "mlx_peak": mx.get_peak_memory()}


def _random(count: int, vocabulary: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocabulary, count).astype(np.int32)


def _text(count: int, vocabulary: int) -> Tokens:
    return Tokens(_random(count, vocabulary), None, 1, 0)


def flat(options: Options) -> dict[str, Any]:
    """Memory of a process over many steps of a tiny model, lessons and pretraining, each in its own process."""
    steps = 100 if options.quick else 10_000
    found = {}
    for name, function in (("LoRA", lesson_memory), ("pretraining", pretraining_memory)):
        samples = child.call(function, steps=steps)
        settled = len(samples) // 5  # caches fill at first
        found[name] = {
            "steps": steps,
            "settled": steps * settled // len(samples),
            "bytes": samples,
            "growth": max(samples[settled:]) / samples[settled],
        }
    return found


def _tiny() -> ContinualLLM:
    return ContinualLLM(ModelConfig(500, 32, 2, 4, 2, 64, 64))


def lesson_memory(steps: int) -> list[int]:
    """Bytes of the process, looked at `SAMPLES` times over the steps of a lesson."""
    model, config = _tiny(), ContinualLearningConfig(batch_size=2, seq_len=32)
    lora.attach(model, lora.LoRAConfig(4, 8.0), mx.random.key(0))
    samples: list[int] = []

    def look(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] % (steps // SAMPLES) == 0:
            samples.append(child.resident())

    sides.OurSteps(model, config, _text(64 * 32 + 1, 500), steps).run(steps, look)
    return samples


def pretraining_memory(steps: int) -> list[int]:
    """The same over the steps of pretraining."""
    model = _tiny()
    stepper = Stepper(model.parameters(), AdamW(1e-3), loss_of(model), 1.0, compiled=False)
    batch = mx.array(_random(2 * 33, 500).reshape(2, 33)), mx.ones((2, 32))
    samples = []
    for step in range(1, steps + 1):
        stepper.step([batch], 1e-3).read()
        if step % (steps // SAMPLES) == 0:
            samples.append(child.resident())
    return samples
