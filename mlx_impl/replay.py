"""Experience replay: windows of a domain's earlier lessons, from which a part of each batch is drawn.

The windows lie in MLX's memory, which on Apple silicon the GPU shares, and are gathered there; which rows, is decided
on the host (see `reservoirs`). A window is one row of int32: a token that does not count as a target is stored as its
complement, so that tokens and mask move, and are hashed, as one. Shapes: B rows of a batch, T targets a row, L targets
a row of the buffer, N rows of the buffer.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlx_impl.errors import DamagedFileError, InputError
from mlx_impl.ngrams import ngrams, share, shares
from mlx_impl.reservoirs import Reservoirs, Row, window_id

Window = NDArray[np.int32]
"""A packed window (n + 1,): its tokens; one whose prediction does not count, t, as -1 - t."""

NEARLY_ALL = 0.8
"""Share of a lesson's rows with which its text counts as taught again: a part of it may have been changed."""

DRAWS = 32
"""How often so many rows are drawn, at most, for one that is not left out."""

_FIRST_ROWS = 256
_PADDING = -1  # token 0, not counted
_CHUNK = 1024  # rows copied at once


class Sample(NamedTuple):
    """Rows for a step. Multiply `mask` by `weights[:, None]` and divide the loss by the sum of that product."""

    tokens: mx.array  # (B, T + 1) int32
    mask: mx.array  # (B, T) float32, zeros and ones
    weights: mx.array  # (B,) float32
    rows: list[bytes]  # ids of those that came from the buffer, the last ones of a mixed batch


class StoredRow(NamedTuple):
    """A row of the buffer as a caller stores it: `window` under `id`, which is a hash of it."""

    id: bytes
    window: Window
    source: str
    lesson: int
    importance: float


def pack(tokens: ArrayLike, mask: ArrayLike) -> list[Window]:
    """The windows of a batch, tokens (B, T + 1) and mask (B, T) of zeros and ones, without their padding.

    What follows the last target that counts is left out: attention looks back only, so nothing is learned from it.
    A window in which nothing counts comes out empty. Raises InputError for other masks and for negative tokens.
    """
    ids, counts = np.asarray(tokens, np.int32), np.asarray(mask)
    if ids.ndim != 2 or counts.shape != (ids.shape[0], ids.shape[1] - 1):
        raise InputError(f"tokens {ids.shape} and mask {counts.shape} must be (B, T + 1) and (B, T)")
    if ((counts != 0) & (counts != 1)).any() or (ids < 0).any():
        raise InputError("windows to be replayed need tokens of at least 0 and a mask of zeros and ones")
    packed = ids.copy()
    packed[:, 1:] = np.where(counts != 0, ids[:, 1:], -1 - ids[:, 1:])
    return [_trimmed(row) for row in packed]


def unpack(window: Window) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Tokens (n + 1,) and mask (n,) of a packed window."""
    return np.where(window < 0, -1 - window, window), (window[1:] >= 0).astype(np.float32)


def _trimmed(row: Window) -> Window:
    """A packed row up to its last target that counts; empty if there is none."""
    counted = np.flatnonzero(row[1:] >= 0)
    return row[: counted[-1] + 2 if len(counted) else 0]


def split_rows(batch_size: int, ratio: float, step: int) -> tuple[int, int]:
    """(new, replayed) rows of 0-based `step`: new is at least 1, and over many steps `ratio` of all are replayed.

    A batch has `batch_size` rows at every step, so that its shape never changes. One row cannot be both: with a
    `batch_size` of 1 there is always a new one, and as often as `ratio` wants it a replayed one beside it. Fractions
    alternate: the sum up to a step is the exact one, rounded. A `ratio` that leaves less than one new row replays all
    rows but one. InputError unless 0 <= ratio < 1.
    """
    if batch_size < 1 or not 0 <= ratio < 1:
        raise InputError(f"batch_size {batch_size} must be at least 1 and replay_ratio {ratio} in [0, 1)")
    wanted = min(ratio / (1 - ratio), 1) if batch_size == 1 else min(batch_size * ratio, batch_size - 1)
    replayed = math.floor((step + 1) * wanted + 0.5) - math.floor(step * wanted + 0.5)
    return (1 if batch_size == 1 else batch_size - replayed), replayed


class ReplayBuffer:
    """At most `capacity` windows of up to `length` targets from all lessons of one domain.

    What is kept when it is full: a fair share for every source, and of each source a uniform sample; see `Reservoirs`.
    A window that is already here is refused, whoever offers it; one that left is forgotten and leaves no trace.

    What is drawn, independently and with replacement, from the lessons that have rows:

    - uniform: a lesson with odds importance / lessons of its source, and in it any row. Sources are equal whatever
      their size, so are the lessons of a source, and importance 2 doubles a lesson's odds.
    - importance: a row's odds under `uniform` times priority**alpha, with weights (N p)**-beta, where N p is relative
      to `uniform` (Schaul et al. 2016, proportional). They are not divided by the sample's largest, as is usual: of a
      sample of one that is its own, and nothing would be corrected. A row's priority is its last loss in nats per
      token, a new row has the highest so far. The weights correct for priorities only: how important a lesson is was
      somebody's wish.
    - reservoir: any window that was ever offered to the domain, with odds importance. Of equal importances that is
      any row; else a row stands for 1 / P(it was admitted) of its lesson's windows (Cohen and Kaplan 2007).

    Everything is a function of the seed and of the calls made: a draw is Philox keyed with the seed and its number,
    admission a hash. The PyTorch reference draws the same rows from the same seed, and reads the same `state`.
    """

    def __init__(
        self, length: int, capacity: int, strategy: str, seed: int, alpha: float = 0.6, beta: float = 0.4
    ) -> None:
        """An empty buffer; InputError for values that none can have."""
        if length < 1:
            raise InputError(f"replay: length {length} must be at least 1")
        self.length = length
        self._index = Reservoirs(capacity, strategy, seed, alpha, beta)
        self._windows = _empty_rows(min(capacity, _FIRST_ROWS), length)

    def __len__(self) -> int:
        """Number of rows N."""
        return len(self._index.rows)

    def available(self, excluding: int | None = None, without: Set[bytes] = frozenset()) -> int:
        """Rows that can be drawn: all but those of the lesson `excluding`; of them, those whose id is not `without`."""
        lessons = [lesson for lesson in self._index.lessons.values() if lesson.number != excluding]
        if not without:
            return sum(len(lesson.rows) for lesson in lessons)
        return sum(row.id not in without for lesson in lessons for row in lesson.rows)

    @property
    def sources(self) -> dict[str, int]:
        """Rows of each source that ever offered a window."""
        counts: Counter[str] = Counter()
        for lesson in self._index.lessons.values():
            counts[lesson.source] += len(lesson.rows)
        return dict(counts)

    @property
    def refused(self) -> int:
        """Duplicates turned away so far."""
        return self._index.refused

    def insert(self, tokens: ArrayLike, mask: ArrayLike, source: str, lesson: int, importance: float = 1.0) -> int:
        """Offer windows, tokens (B, T + 1) and mask (B, T), T <= L; returns how many were admitted.

        Windows in which nothing counts are passed over. `lesson` numbers the version being made; a lesson has one
        importance for each source. On InputError the buffer is as before.
        """
        windows = [window for window in pack(tokens, mask) if len(window)]
        longest = max((len(window) - 1 for window in windows), default=0)
        if longest > self.length:
            raise InputError(f"a window has {longest} targets, the buffer {self.length}: restore it with that length")
        group = self._index.lesson(source, lesson, importance)
        slots = [(self._index.offer(group, window_id(window)), window) for window in windows]
        admitted = [(slot, window) for slot, window in slots if slot is not None]
        self._write(dict(admitted))  # where one took the place of another of this call, the later one
        return len(admitted)

    def resize(self, capacity: int) -> None:
        """Change the capacity; where rows have to go, they are the largest sources'. InputError below 1."""
        self._index.resize(capacity)

    def use(self, strategy: str) -> None:
        """Keep and draw by another strategy from now on; see `Reservoirs.use`. InputError if it is unknown."""
        self._index.use(strategy)

    def _write(self, windows: dict[int, Window]) -> None:
        """Put windows into slots. The memory grows by doubling, so that a row costs O(1) in the long run."""
        if not windows:
            return
        needed, there = max(windows) + 1, len(self._windows)
        if needed > there:
            more = max(needed, min(2 * there, self._index.capacity)) - there
            self._windows = mx.concatenate([self._windows, _empty_rows(more, self.length)])
        block = np.full((len(windows), self.length + 1), _PADDING, np.int32)
        for row, window in zip(block, windows.values(), strict=True):
            row[: len(window)] = window
        self._windows[mx.array(list(windows), mx.int32)] = mx.array(block)
        mx.eval(self._windows)  # MLX then writes in place; left lazy, the next write would copy all rows

    def sample(self, count: int, excluding: int | None = None, without: Set[bytes] = frozenset()) -> Sample:
        """`count` rows, tokens (count, L + 1) and mask (count, L), none of the lesson `excluding`.

        Nor of the ids `without`, in whose place others are drawn; where none is found, such a row stays, of weight 0.
        Weights are else 1 but for the strategy `importance`. InputError if there is nothing to draw.
        """
        rows, weights = self._index.draw(count, excluding)
        for place in (place for place, row in enumerate(rows) if row.id in without):
            rows[place], weights[place] = self._another(excluding, without) or (rows[place], 0.0)
        stored = self._gather([row.slot for row in rows])  # (count, L + 1)
        tokens = mx.where(stored < 0, -1 - stored, stored)
        mask = (stored[:, 1:] >= 0).astype(mx.float32)
        return Sample(tokens, mask, mx.array(weights, mx.float32), [row.id for row in rows])

    def _another(self, excluding: int | None, without: Set[bytes]) -> tuple[Row, float] | None:
        """A row that is not `without`, and its weight; None where `DRAWS` draws of `DRAWS` rows find none."""
        for _ in range(DRAWS):
            drawn = zip(*self._index.draw(DRAWS, excluding), strict=True)
            if found := next(((row, float(weight)) for row, weight in drawn if row.id not in without), None):
                return found
        return None

    def update_priorities(self, rows: Sequence[bytes], losses: ArrayLike) -> None:
        """Note the losses (B,) in nats per token that rows drawn before have now; rows that left are passed over.

        InputError, and nothing noted, for a loss that is negative, NaN or infinite.
        """
        self._index.update_priorities(rows, losses)

    def _gather(self, slots: list[int]) -> mx.array:
        """Packed and padded rows (len(slots), L + 1)."""
        return mx.take(self._windows, mx.array(slots, mx.int32), axis=0)

    def lessons_of(self, rows: Sequence[bytes]) -> list[int]:
        """The lessons that rows drawn before came in with."""
        return [self._index.rows[id].lesson.number for id in rows]

    def lessons_within(self, ids: Set[bytes]) -> list[int]:
        """Numbers of the lessons of whose rows nearly all are among `ids`, in order."""
        inside = Counter(row.lesson.number for row in self._index.ordered() if row.id in ids)
        everywhere = Counter(row.lesson.number for row in self._index.ordered())
        return sorted(number for number, rows in inside.items() if rows >= NEARLY_ALL * everywhere[number])

    def within(self, text: NDArray[np.integer]) -> set[bytes]:
        """Ids of the rows of which at least half stands in a text's (N,) ids, however those were cut into windows."""
        there, found = ngrams(text), set()
        ordered = self._index.ordered()
        for first in range(0, len(ordered), _CHUNK):
            rows = ordered[first : first + _CHUNK]
            stored = np.array(self._gather([row.slot for row in rows]))  # (B, L + 1)
            counted = stored[:, 1:] >= 0
            lengths = np.where(counted.any(axis=1), self.length + 1 - counted[:, ::-1].argmax(axis=1), 0)
            alike = shares(np.where(stored < 0, -1 - stored, stored), lengths, there)
            found |= {row.id for row, inside in zip(rows, alike, strict=True) if inside >= 0.5}
        return found

    def known(self, text: NDArray[np.integer]) -> float:
        """Share of a text's (N,) ids, in n-grams, that stand in some row."""
        rows = [unpack(row.window)[0] for row in self.rows()]
        there = np.unique(np.concatenate([ngrams(row) for row in rows])) if rows else ngrams(text[:0])
        return share(text, there)

    def rows(self, lesson: int | None = None) -> Iterator[StoredRow]:
        """The rows with their windows, of one lesson or of all: what a commit adds to the windows it has stored."""
        chosen = [row for row in self._index.ordered() if lesson in (None, row.lesson.number)]
        for first in range(0, len(chosen), _CHUNK):
            rows = chosen[first : first + _CHUNK]
            for row, window in zip(rows, np.array(self._gather([row.slot for row in rows])), strict=True):
                yield StoredRow(row.id, _trimmed(window), row.lesson.source, row.lesson.number, row.lesson.importance)

    def membership(self) -> dict[str, Any]:
        """All but the windows: `counters` for JSON, `ids` (N, 16) uint8 and `priorities` (N,) float64.

        A version records this, 24 bytes a row, beside the windows, which are stored once under their ids (`rows`).
        Undo is `restore` with the parent's membership; a window may go when no version's membership names it.
        """
        state = self._index.membership()
        return {**state, "counters": {"length": self.length, **state["counters"]}}

    def state(self) -> dict[str, Any]:
        """`membership` and with it `windows`, (N, L + 1) int32, packed and padded."""
        slots = [row.slot for row in self._index.ordered()]
        windows = np.array(self._gather(slots)) if slots else np.zeros((0, self.length + 1), np.int32)
        return {**self.membership(), "windows": windows}

    @classmethod
    def restore(
        cls, state: dict[str, Any], lookup: Callable[[bytes], Window] | None = None, length: int | None = None
    ) -> "ReplayBuffer":
        """The buffer that goes on exactly as the one that gave `state`, or a `membership` and `lookup`.

        `lookup` gives the packed window of an id. `length` replaces L, for a lesson with longer windows. Raises
        DamagedFileError where a window is not what its id stands for or does not fit, or where parts contradict.
        """
        index = Reservoirs.restore(state)
        ids = list(index.rows)
        windows = [lookup(id) for id in ids] if lookup else [_trimmed(row) for row in state["windows"]]
        buffer = cls(length or state["counters"]["length"], index.capacity, index.strategy, index.seed)
        buffer._index = index
        if len(windows) != len(ids):
            raise DamagedFileError(f"replay: {len(ids)} rows are recorded, but {len(windows)} windows")
        for id, window in zip(ids, windows, strict=True):
            if window_id(window) != id:
                raise DamagedFileError(f"replay: window {id.hex()} is not the one that was stored")
            if len(window) - 1 > buffer.length:
                raise DamagedFileError(f"replay: a window has {len(window) - 1} targets, the buffer {buffer.length}")
        buffer._write(dict(enumerate(windows)))
        return buffer


def _empty_rows(rows: int, length: int) -> mx.array:
    return mx.full((rows, length + 1), _PADDING, mx.int32)


def mix(
    tokens: ArrayLike,
    mask: ArrayLike,
    buffer: ReplayBuffer,
    count: int,
    excluding: int | None = None,
    without: Set[bytes] = frozenset(),
) -> Sample:
    """A batch of new windows, tokens (B, T + 1) and mask (B, T), with `count` replayed ones behind them.

    `count` comes from `split_rows`; where there is nothing to draw, the batch is all new. Rows are padded to the
    longest, with mask zero. New rows have weight 1. The replayed ones together weigh count / B times as much as the
    new ones, however long their windows are: ten tokens of a short lesson would else drown in windows of 256. Within
    that, each has its own weight of `sample`.
    """
    new = Sample(mx.array(np.asarray(tokens, np.int32)), mx.array(np.asarray(mask, np.float32)), mx.ones(0), [])
    rows = len(new.tokens)
    if count == 0 or buffer.available(excluding, without) == 0:
        return new._replace(weights=mx.ones(rows))
    old = buffer.sample(count, excluding, without)
    width = max(new.mask.shape[1], old.mask.shape[1])
    share = (new.mask.sum() / rows) / (old.mask.sum() / count)
    return Sample(
        mx.concatenate([_padded(new.tokens, width + 1), _padded(old.tokens, width + 1)]),
        mx.concatenate([_padded(new.mask, width), _padded(old.mask, width)]),
        mx.concatenate([mx.ones(rows), old.weights * share]),
        old.rows,
    )


def extend(sample: Sample, tokens: ArrayLike, mask: ArrayLike) -> Sample:
    """A batch with rows of another text behind it, tokens (B, T + 1) and mask (B, T), each of weight 1."""
    more, counted = mx.array(np.asarray(tokens, np.int32)), mx.array(np.asarray(mask, np.float32))
    width = max(sample.mask.shape[1], counted.shape[1])
    return Sample(
        mx.concatenate([_padded(sample.tokens, width + 1), _padded(more, width + 1)]),
        mx.concatenate([_padded(sample.mask, width), _padded(counted, width)]),
        mx.concatenate([sample.weights, mx.ones(len(more))]),
        sample.rows,
    )


def _padded(array: mx.array, width: int) -> mx.array:
    return mx.pad(array, [(0, 0), (0, width - array.shape[1])])
