"""The two sides of LoRA training: our lesson's steps, and those of mlx-lm's trainer, with the same adapter and text.

Ours go through `Session`, as every lesson does, without its measuring and its store. mlx-lm's go through the trainer
that `mlx_lm.lora` calls; what it pads its batches with is not counted as learned. Both can be stopped and go on, so
that they can take turns.
"""

import contextlib
import io
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import mlx_impl  # noqa: F401  before MLX, for the fast BLAS

# isort: split
import mlx.core as mx
import mlx.optimizers
import numpy as np

from benchmarks import peer
from mlx_impl import lora
from mlx_impl.base import BaseModel
from mlx_impl.config import Budget, ContinualLearningConfig
from mlx_impl.data import Tokens
from mlx_impl.device import compute_dtype
from mlx_impl.foreign import open_model
from mlx_impl.past import Past
from mlx_impl.replay import ReplayBuffer
from mlx_impl.session import Session

Batch = tuple[mx.array, mx.array]
"""mlx-lm's: tokens (B, T), padded, and for each row where its loss begins and its length (B, 2)."""


def taught_model(directory: Path, config: ContinualLearningConfig) -> BaseModel:
    """A base with a fresh adapter, as a first lesson begins."""
    model = open_model(directory, compute_dtype())
    shape = lora.LoRAConfig(config.lora_r, config.lora_alpha, config.lora_dropout, tuple(config.lora_target_modules))
    lora.attach(model, shape, mx.random.key(config.seed))
    mx.eval(model.parameters())
    return model


class OurSteps:
    """The optimizer steps of a domain's first lesson on `tokens`, as many at a time as are asked for."""

    def __init__(self, model: BaseModel, config: ContinualLearningConfig, tokens: Tokens, planned: int = 1000) -> None:
        past = Past(ReplayBuffer(config.seq_len, config.replay_buffer_size, config.replay_strategy, 0), 1)
        budget = Budget(steps=planned)
        self.session = Session(model, config, tokens, past, config.seed, budget, math.inf, speed=1.0)

    def run(self, steps: int, report: Callable[[dict[str, Any]], None] = lambda event: None) -> tuple[float, int]:
        """Seconds of the next `steps` steps, and the tokens that were learned in them."""
        before = self.session.tokens
        self.session.total = self.session.step + steps
        self.session.run(report)
        return self.session.seconds, self.session.tokens - before


def peer_model(directory: Path, config: ContinualLearningConfig) -> Any:
    """The same base opened by mlx-lm, with its LoRA layers of the same rank, scale and place."""
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    network, _ = load_model(directory)
    network.set_dtype(compute_dtype())
    network.freeze()
    mx.random.seed(config.seed % 2**32)
    linear_to_lora_layers(network, len(network.layers), peer.parameters(network, config))
    mx.eval(network.parameters())
    return network


def peer_batches(documents: list[list[int]], rows: int, longest: int, count: int, seed: int) -> list[Batch]:
    """`count` batches as mlx-lm makes them of documents: rows of like length together, padded to the longest."""
    from mlx_lm.tuner.trainer import iterate_batches

    dataset = [(ids, 0) for ids in documents]
    rows = min(rows, len(dataset))
    return list(islice(iterate_batches(dataset, rows, longest, loop=True, seed=seed % 2**32), count))


def all_batches(documents: list[list[int]], rows: int, longest: int) -> list[Batch]:
    """mlx-lm's batches of documents in one pass, from the shortest rows to the longest."""
    count = len(documents) // min(rows, len(documents))
    return sorted(peer_batches(documents, rows, longest, count, seed=0), key=useful)


def spaced_turns(ordered: list[Batch], each: int, turns: int) -> list[list[Batch]]:
    """`turns` times `each` of the batches in order, at even distances, dealt out back and forth.

    So few that were drawn at random would stand for a text of shorter or longer documents than this one.
    """
    chosen = [ordered[int((number + 0.5) * len(ordered) / (each * turns))] for number in range(each * turns)]
    dealt = [
        chosen[start : start + turns][:: -1 if start // turns % 2 else 1] for start in range(0, len(chosen), turns)
    ]
    return [list(turn) for turn in zip(*dealt, strict=True)]


def useful_share(batches: Sequence[Batch]) -> float:
    """Of the targets that are computed, those that are text."""
    return sum(map(useful, batches)) / sum(batch.size - len(batch) for batch, _ in batches)


def useful(batch: Batch) -> int:
    """Targets of a batch that are text: all tokens of its rows but each first."""
    lengths = np.array(batch[1])[:, 1]
    return int((lengths - 1).sum())


def train_peer(
    network: Any,
    batches: Iterable[Batch],
    count: int,
    rate: float,
    after: Callable[[int, float], None] = lambda step, seconds: None,
) -> list[float]:
    """Train on the first `count` batches with mlx-lm's trainer and its default optimizer; returns seconds of each step.

    The seconds are those that it counts itself: neither making the batch nor what its reports take is in them. `after`
    is called with the step's number, from 1, and its seconds; what it does is not counted either.
    """
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.trainer import TrainingArgs, train

    seconds: list[float] = []

    class Reports(TrainingCallback):
        def on_train_loss_report(self, train_info: dict) -> None:
            seconds.append(1 / train_info["iterations_per_second"])
            after(len(seconds), seconds[-1])

    def feed(**settings: Any) -> Iterator[Batch]:
        for batch in batches:  # noqa: UP028  `yield from` would close `batches` before what comes after its last
            yield batch

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        arguments = TrainingArgs(
            iters=count, steps_per_report=1, steps_per_save=count + 1, adapter_file=str(Path(folder) / peer.ADAPTER)
        )
        optimizer = mlx.optimizers.Adam(learning_rate=rate)
        train(network, optimizer, [], None, arguments, iterate_batches=feed, training_callback=Reports())
    return seconds
