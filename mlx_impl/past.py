"""What a domain brings into a lesson: the windows of earlier lessons, and what holds the adapter near their outcome.

Both come from the disk as the domain's head left them, so that undo takes them back with the adapter. The Fisher of a
lesson is estimated when the next one begins, from the windows that the buffer kept of it; a single lesson pays nothing.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import mlx.core as mx

from mlx_impl import lora
from mlx_impl.adapters import read_fisher
from mlx_impl.arrays import Arrays, Tree
from mlx_impl.base import BaseModel
from mlx_impl.config import Budget, ContinualLearningConfig
from mlx_impl.ewc import consolidate, ewc_penalty, fisher_diagonal, logits_of
from mlx_impl.replay import ReplayBuffer, unpack
from mlx_impl.store import Replay, Store, Version

FISHER_SHARE = 0.05
"""Share of the time that estimating the Fisher may take."""


@dataclass
class Past:
    """The domain's buffer, which takes up the new lesson's windows too, and the pull towards the version before.

    `lesson` numbers the one that begins; `source` and `importance` are its own. `anchor` is the adapter of the version
    before, `fisher` the accumulated one, in nats^2 per token, and `penalty` the distance from the anchor in nats per
    token; they are None where there is nothing to be held near.
    """

    buffer: ReplayBuffer
    lesson: int
    source: str = "text"
    importance: float = 1.0
    anchor: Arrays | None = None
    fisher: Arrays | None = None
    penalty: Callable[[Tree], mx.array] | None = None

    def record(self) -> Replay:
        """The buffer as a version keeps it, with the windows that came in with this lesson."""
        new = {row.id: row.window for row in self.buffer.rows(self.lesson)}
        return Replay(**self.buffer.membership(), windows=new)


def recall(
    store: Store,
    parent: Version | None,
    model: BaseModel,
    config: ContinualLearningConfig,
    seed: int,
    budget: Budget,
    length: int,
) -> Past:
    """The past that the lesson after `parent` has; the parent's adapter is attached to the model, in evaluation mode.

    `seed` is the lesson's, `length` that of its windows in targets: short lessons are not padded to long ones that the
    domain never had. Raises DamagedFileError where what was stored is not what was written.
    """
    past = Past(_buffer(store, parent, config, seed, length), parent.depth + 1 if parent else 1)
    if parent is None:
        return past
    past.anchor = lora.adapter_arrays(model)
    if config.use_ewc and config.ewc_lambda > 0:
        before = read_fisher(store.files_of(parent), past.anchor)
        past.fisher = _fisher(before, past.buffer, parent.depth, model, config, mx.random.key(seed), budget)
        if past.fisher is not None:
            past.penalty = _penalty(past.anchor, past.fisher, config.ewc_lambda)
    return past


def _buffer(
    store: Store, parent: Version | None, config: ContinualLearningConfig, seed: int, length: int
) -> ReplayBuffer:
    """The domain's windows as its head left them; an empty buffer, from `seed`, before the first lesson."""
    recorded = store.replay(parent) if parent is not None else None
    if recorded is None:
        return ReplayBuffer(length, config.replay_buffer_size, config.replay_strategy, seed)
    state = {"counters": recorded.counters, "ids": recorded.ids, "priorities": recorded.priorities}
    longest = max(length, recorded.counters["length"])
    buffer = ReplayBuffer.restore(state, recorded.windows.__getitem__, longest)
    buffer.resize(config.replay_buffer_size)
    return buffer


def _fisher(
    before: Arrays | None,
    buffer: ReplayBuffer,
    lesson: int,
    model: BaseModel,
    config: ContinualLearningConfig,
    key: mx.array,
    budget: Budget,
) -> Arrays | None:
    """The Fisher of lesson number `lesson`, the last one, added to that of its forerunners, `before`.

    At most `FISHER_SHARE` of the time goes into it, unless the lesson is limited by steps. Where all of the last lesson
    was known from those before it, theirs is kept.
    """
    until = math.inf if budget.steps is not None else time.perf_counter() + FISHER_SHARE * budget.seconds
    rows = list(islice(buffer.rows(lesson), config.ewc_fisher_samples))

    def windows() -> Iterator[tuple[mx.array, mx.array]]:
        for count, row in enumerate(rows):
            if count and time.perf_counter() > until:
                return
            tokens, mask = unpack(row.window)
            yield mx.array(tokens)[None], mx.array(mask)[None]  # (1, n + 1), (1, n)

    if not rows:
        return before
    latest = fisher_diagonal(logits_of(model), model.trainable_parameters(), windows(), key)
    return consolidate(before, latest, config.ewc_gamma)


def _penalty(anchor: Arrays, fisher: Arrays, strength: float) -> Callable[[Tree], mx.array]:
    """The distance from `anchor` as a function of the adapter's parameters."""
    return lambda parameters: ewc_penalty(parameters, anchor, fisher, strength)
