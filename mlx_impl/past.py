"""What a domain brings into a lesson: the windows of earlier lessons, and what holds the adapter near their outcome.

Both come from the disk as the domain's head left them, so that undo takes them back with the adapter. The Fisher of a
lesson is estimated when the next one begins, from the windows that the buffer kept of it; a single lesson pays nothing.
"""

import math
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice

import mlx.core as mx
import numpy as np

from mlx_impl import lora
from mlx_impl.adapters import read_adapter, read_fisher, read_unestimated
from mlx_impl.arrays import Arrays, Tree
from mlx_impl.base import BaseModel
from mlx_impl.config import ContinualLearningConfig
from mlx_impl.data import Tokens
from mlx_impl.errors import DamagedFileError
from mlx_impl.ewc import calibrated, consolidate, ewc_penalty, fisher_diagonal, logits_of
from mlx_impl.loss import summed_divergence
from mlx_impl.replay import ReplayBuffer, Window, pack, unpack
from mlx_impl.reservoirs import window_id
from mlx_impl.store import Store
from mlx_impl.versions import Replay, Version
from mlx_impl.windows import Windows

FISHER_SHARE = 0.08
"""Share of the steps' work that estimating the Fisher may add."""

WINDOW_PASSES = 5
"""Forward passes over a window that its part in the estimate costs: a backward one, and two to calibrate it."""

CALIBRATION_WINDOWS = 4
"""Windows, at most, on which the Fisher is compared with the divergence from the bare base."""

WINDOWS_AT_ONCE = 1024

TEACHERS = 8
"""Adapters of earlier versions in memory at one time."""


@dataclass
class Past:
    """The domain's buffer, which takes up the new lesson's windows too, and the pull towards the version before.

    `lesson` numbers the one that begins; `source` and `importance` are its own. `fisher` is the accumulated one, in
    nats^2 per token, and `penalty` the distance from the version before in nats per token; they are None where there is
    nothing to be held near. `unestimated` are the lessons that `fisher` does not know, oldest first. `teacher` gives
    the adapter to whose predictions the windows of a lesson are held. `own` are the ids of the buffer's rows that stand
    in the text of the lesson that begins, `repeated` the numbers of the lessons that it thereby teaches again, `known`
    the share of its held-out part that earlier lessons taught.
    """

    buffer: ReplayBuffer
    lesson: int
    source: str = "text"
    importance: float = 1.0
    fisher: Arrays | None = None
    penalty: Callable[[Tree], mx.array] | None = None
    teacher: Callable[[int], Arrays] | None = None
    unestimated: Sequence[int] = ()
    own: Set[bytes] = frozenset()
    repeated: list[int] = field(default_factory=list)
    known: float = 0.0

    def recognise(self, text: Tokens, heldout: Tokens | None, seq_len: int) -> None:
        """Find what the buffer holds of the text that the lesson is about to teach, in whatever windows.

        And of what is held out of it, which is not to be trained on by way of replay either.
        """
        if not self.buffer.available(self.lesson):
            return
        windows = Windows(text, seq_len)
        starts = range(0, len(windows), WINDOWS_AT_ONCE)
        batches = (windows.batch(range(start, min(start + WINDOWS_AT_ONCE, len(windows)))) for start in starts)
        ids = {window_id(window) for batch in batches for window in pack(*batch)}  # also those shorter than an n-gram
        whole = text.ids if heldout is None else np.concatenate([text.ids, heldout.ids])
        self.own = ids | self.buffer.within(whole)
        self.known = 0.0 if heldout is None else self.buffer.known(heldout.ids)
        self.repeated = self.buffer.lessons_within(self.own)

    @property
    def replayable(self) -> float:
        """Share of the buffer's earlier rows that are not the lesson's own text; 0 where there are none."""
        return self.buffer.available(self.lesson, self.own) / max(1, self.buffer.available(self.lesson))

    @property
    def left(self) -> list[int]:
        """The lessons that the Fisher will not know after this one, if it is not this one alone; else nothing."""
        return [*self.unestimated, self.lesson] if self.unestimated else []

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
    length: int,
    note: Callable[[str], None] = lambda text: None,
) -> Past:
    """The past that the lesson after `parent` has, whose adapter is attached to the model; nothing is held yet.

    `seed` is the lesson's, `length` that of its windows in targets: short lessons are not padded to long ones that the
    domain never had. Raises DamagedFileError where what was stored is not what was written; of a version before
    `parent` that is damaged, `note` is told, and the next one takes its place as after `prune`.
    """
    past = Past(_buffer(store, parent, model, config, seed, length), parent.depth + 1 if parent else 1)
    if parent is None:
        return past
    history = store.history(parent.domain)

    @lru_cache(TEACHERS)
    def read(number: int) -> Arrays:
        try:
            return read_adapter(store.files_of(history[number]))[0]
        except DamagedFileError as error:
            if number + 1 == len(history):
                raise
            note(f"{error}; until then {history[number + 1].name} stands for it")
            return read(number + 1)

    folder = store.files_of(parent)
    past.unestimated = read_unestimated(folder) or _unestimated(history)
    past.teacher = lambda lesson: read(best_version(history, lesson))
    past.fisher = read_fisher(folder, lora.adapter_arrays(model))
    return past


def hold(past: Past, model: BaseModel, config: ContinualLearningConfig, seed: int, work: float = math.inf) -> None:
    """Give a past its penalty: the Fisher of the last lesson is estimated and added to that of the ones before.

    So is that of lessons before it which were followed by one without EWC. The model carries the adapter as it begins,
    in evaluation mode. `work` is that of the lesson's steps, in tokens of a forward pass. A lesson without EWC leaves
    the Fisher as it is, for later ones.
    """
    if past.lesson == 1 or not _holds(config.use_ewc, config.ewc_lambda):
        return
    past.fisher = _fisher(past, model, config, seed, work)
    past.unestimated = ()
    if past.fisher is not None:
        past.penalty = _penalty(lora.adapter_arrays(model), past.fisher, config.ewc_lambda)


def _holds(use_ewc: bool, strength: float) -> bool:
    """Whether a lesson with these settings is held by EWC."""
    return use_ewc and strength > 0


def _unestimated(history: Sequence[Version]) -> list[int]:
    """The lessons whose Fisher the last version does not have, where it does not say so itself; see `Past`.

    A lesson with EWC has that of all before.
    """
    lessons: list[int] = []
    for version in reversed(history):
        lessons.insert(0, version.depth)
        if _holds(version.config.get("use_ewc", True), version.config.get("ewc_lambda", 1.0)):
            break
    return lessons


def best_version(history: Sequence[Version], lesson: int) -> int:
    """Index of the version that knew lesson number `lesson` best, of those it went into that were not pruned.

    Each version's figures say how the held-out parts of earlier lessons changed by it. Where nobody measured that, the
    first version is taken: what later ones lost of the lesson is then to be won back, and does not add up. So it is
    where the lesson's own version was pruned, under whose name the figures stand. A version that was taught the
    lesson's text once more knows it better than all before.
    """
    first = next((index for index, version in enumerate(history) if version.depth >= lesson), len(history) - 1)
    if history[first].depth != lesson:
        return first
    best, drift, lowest = first, 0.0, 0.0
    for index, version in enumerate(history[first + 1 :], first + 1):
        if lesson in version.figures.get("repeated", ()):
            best, drift, lowest = index, 0.0, 0.0
            continue
        measured = (kept for kept in version.figures.get("kept", ()) if kept["version"] == history[first].name)
        drift += sum(kept["after"] - kept["before"] for kept in measured)
        if drift < lowest:
            best, lowest = index, drift
    return best


def _buffer(
    store: Store, parent: Version | None, model: BaseModel, config: ContinualLearningConfig, seed: int, length: int
) -> ReplayBuffer:
    """The domain's windows as its head left them; an empty buffer, from `seed`, before the first lesson."""
    recorded = store.replay(parent) if parent is not None else None
    if recorded is None:
        return ReplayBuffer(length, config.replay_buffer_size, config.replay_strategy, seed)
    state = {"counters": recorded.counters, "ids": recorded.ids, "priorities": recorded.priorities}
    try:
        if not 1 <= recorded.counters["length"] <= model.config.max_seq_len:
            raise ValueError(f"windows of {recorded.counters['length']} tokens")
        if any((unpack(window)[0] >= model.vocab_size).any() for window in recorded.windows.values()):
            raise ValueError("tokens that the model does not have")
        longest = max(length, recorded.counters["length"])
        buffer = ReplayBuffer.restore(state, recorded.windows.__getitem__, longest)
    except (DamagedFileError, KeyError, TypeError, ValueError, OverflowError) as error:
        assert parent is not None
        raise store.damaged(parent, f"its replay buffer cannot be what a lesson left: {error}") from None
    buffer.use(config.replay_strategy)
    buffer.resize(config.replay_buffer_size)
    return buffer


def _fisher(past: Past, model: BaseModel, config: ContinualLearningConfig, seed: int, work: float) -> Arrays | None:
    """The Fisher of each lesson that has none yet, added to that of its forerunners.

    Of all of them as many windows as `FISHER_SHARE` of the steps' `work` goes through, one each at least; the latest
    lessons, if they are more than that. A lesson whose text was known from those before it has no windows of its own.
    """
    affordable = FISHER_SHARE * work / (WINDOW_PASSES * past.buffer.length)
    most = min(config.ewc_fisher_samples, max(1, round(min(affordable, config.ewc_fisher_samples))))
    lessons = past.unestimated[-most:]
    fisher = past.fisher
    for lesson in lessons:
        windows = [row.window for row in islice(past.buffer.rows(lesson), most // len(lessons))]
        if windows:
            key = mx.random.key(seed + lessons[-1] - lesson)  # the lesson's own for the last one
            fisher = consolidate(fisher, measured_fisher(model, windows, key), config.ewc_gamma)
    return fisher


def measured_fisher(model: BaseModel, windows: Sequence[Window], key: mx.array) -> Arrays:
    """The Fisher of the attached adapter on windows, `calibrated` by how far it went from what the base predicts.

    The model is in evaluation mode.
    """
    batches = [(mx.array(ids)[None], mx.array(mask)[None]) for ids, mask in map(unpack, windows)]  # (1, n + 1), (1, n)
    fisher = fisher_diagonal(logits_of(model), model.trainable_parameters(), batches, key)
    here = lora.adapter_arrays(model)
    bare = {name: mx.zeros_like(array) if name.endswith(".lora_b") else array for name, array in here.items()}
    divergence = _divergence_of_base(model, batches[:CALIBRATION_WINDOWS])
    return calibrated(fisher, here, bare, divergence)


def _divergence_of_base(model: BaseModel, batches: Iterable[tuple[mx.array, mx.array]]) -> float:
    """KL(with the adapter || without) in nats per token."""
    total = count = mx.array(0.0)
    for tokens, mask in batches:
        adapted = model.hidden(tokens[:, :-1])
        with lora.bare(model):
            base = model.hidden(tokens[:, :-1])
        total, count = total + summed_divergence(model, base, adapted, mask), count + mask.sum()
        mx.eval(total, count)  # one window's activations at a time
    return float((total / count).item())  # type: ignore[arg-type]


def _penalty(anchor: Arrays, fisher: Arrays, strength: float) -> Callable[[Tree], mx.array]:
    """The distance from `anchor` as a function of the adapter's parameters.

    The anchor is a copy: a compiled step whose parameters begin as the very arrays that it closes over is refused.
    """
    start = {name: array + 0 for name, array in anchor.items()}
    mx.eval(start)
    return lambda parameters: ewc_penalty(parameters, start, fisher, strength)
