"""Lessons as mlx-lm's users would give them: its LoRA trainer, resumed from the last lesson's adapter each time.

What `mlx_lm.lora --resume-adapter-file` does, in this process: a fresh optimizer, a constant learning rate, no replay.
Rank, scale, layers, windows and rows a step are those of our lessons. Its adapters have the names that ours have, so
that they are measured on our model by the same code.
"""

import contextlib
import sys
import time
from pathlib import Path
from typing import Any

import mlx_impl  # noqa: F401  before MLX, for the fast BLAS

# isort: split
import mlx.core as mx
import mlx.optimizers
import numpy as np

from mlx_impl import files
from mlx_impl.arrays import flatten
from mlx_impl.config import ContinualLearningConfig
from mlx_impl.data import Tokens
from mlx_impl.device import compute_dtype
from mlx_impl.windows import Windows

ADAPTER = "adapters.safetensors"


def train_lesson(
    model: Path,
    tokens: Tokens,
    resumed: Path | None,
    target: Path,
    steps: int,
    rate: float,
    config: ContinualLearningConfig,
) -> dict[str, Any]:
    """Train `steps` steps on a lesson's tokens and write the folder `target`; returns seconds and tokens trained on.

    `resumed` is the folder of the lesson before. The seconds include loading the model, as a command would.
    """
    from mlx_lm.tuner.trainer import TrainingArgs, train
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    started = time.perf_counter()
    mx.random.seed(config.seed % 2**32)
    np.random.seed(config.seed % 2**32)  # its order of batches
    network, _ = load_model(model)
    network.set_dtype(compute_dtype())
    network.freeze()
    linear_to_lora_layers(network, len(network.layers), parameters(network, config))
    if resumed is not None:
        network.load_weights(str(resumed / ADAPTER), strict=False)
    rows = _rows(tokens, config)
    microbatches = steps * config.gradient_accumulation_steps
    with files.atomic_folder(target, replace=True) as folder, contextlib.redirect_stdout(sys.stderr):
        arguments = TrainingArgs(
            batch_size=min(config.batch_size, len(rows)),
            iters=microbatches,
            grad_accumulation_steps=config.gradient_accumulation_steps,
            steps_per_report=microbatches,
            steps_per_save=microbatches + 1,
            max_seq_length=len(rows[0][0]),
            adapter_file=str(folder / ADAPTER),
        )
        train(network, mlx.optimizers.Adam(learning_rate=rate), rows, None, arguments)
        if not all(mx.isfinite(array).all().item() for array in flatten(network.trainable_parameters()).values()):
            raise ValueError(f"mlx-lm's loss exploded at a learning rate of {rate}; leave it out of --rates")
    return {
        "seconds": time.perf_counter() - started,
        "trained_tokens": microbatches * arguments.batch_size * (len(rows[0][0]) - 1),
    }


def _rows(tokens: Tokens, config: ContinualLearningConfig) -> list[tuple[list[int], int]]:
    """The text's windows as mlx-lm takes them, (ids, where the loss begins); it drops a last batch that is not full."""
    windows = Windows(tokens, config.seq_len)
    ids, _ = windows.batch(range(len(windows)))  # (N, L + 1)
    rows = [(row.tolist(), 0) for row in ids]
    return rows + rows[: -len(rows) % min(config.batch_size, len(rows))]


def parameters(network: Any, config: ContinualLearningConfig) -> dict[str, Any]:
    """The LoRA layers of our lessons, in mlx-lm's words."""
    names = [name for name, _ in network.layers[0].named_modules()]
    return {
        "rank": config.lora_r,
        "scale": config.lora_alpha / config.lora_r,
        "dropout": config.lora_dropout,
        "keys": [name for name in names if name.rpartition(".")[2] in config.lora_target_modules],
    }
