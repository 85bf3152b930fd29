"""Experience replay: windows of a domain's earlier lessons, from which a part of each batch is drawn.

The windows lie in MLX's (unified) memory and are gathered there; which rows, is decided on the host. Unusual is that
admission rolls no dice: a window's key is a hash of seed and content, and a reservoir holds its smallest keys. That is
a uniform sample of the different windows offered, in whatever order and however often, and what was turned away once
is turned away again without being remembered. Shapes: B rows, T targets a row, L targets a row of the buffer.
"""

import hashlib
import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlx_impl.errors import DamagedFileError, InputError

STRATEGIES = ("uniform", "importance", "reservoir")
IMPORTANCES = (1e-6, 1e6)
"""Smallest and largest importance of a lesson: beyond them, keys and masses would lose their precision."""

LEAST_PRIORITY = 1e-6
"""Added to every loss in nats, so that a window that is known perfectly is still drawn at times."""

_FIRST_ROWS = 256
_PADDING = -1  # token 0, not counted

Window = NDArray[np.int32]
"""A packed window (n + 1,): its tokens, where one whose prediction does not count is stored as its complement -1-t."""


class Sample(NamedTuple):
    """Rows for a step. Multiply `mask` by `weights[:, None]` and divide the loss by the sum of that product."""

    tokens: mx.array  # (B, T + 1) int32
    mask: mx.array  # (B, T) float32, zeros and ones
    weights: mx.array  # (B,) float32
    rows: list[bytes]  # which rows of the buffer these are, for `update_priorities`; in a mixed batch the last ones


class Row(NamedTuple):
    """A row of the buffer as a caller stores it: `window` once under `id`, which is a hash of it."""

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
    packed[:, 1:] = np.where(counts != 0, ids[:, 1:], ~ids[:, 1:])
    return [_trimmed(row) for row in packed]


def unpack(window: Window) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Tokens (n + 1,) and mask (n,) of a packed window."""
    return np.where(window < 0, ~window, window), (window[1:] >= 0).astype(np.float32)


def window_id(window: Window) -> bytes:
    """16 bytes that stand for a window: BLAKE2b of its packed form as little-endian int32, tokens and mask alike."""
    return hashlib.blake2b(window.astype("<i4").tobytes(), digest_size=16).digest()


def _trimmed(row: Window) -> Window:
    """A packed row up to its last target that counts; empty if there is none."""
    counted = np.flatnonzero(row[1:] >= 0)
    return row[: counted[-1] + 2 if len(counted) else 0]


def split_rows(batch_size: int, ratio: float, step: int) -> tuple[int, int]:
    """(new, replayed) rows of 0-based `step`: new is at least 1, and over many steps `ratio` of all are replayed.

    A batch has `batch_size` rows at every step, so that its shape never changes, but at least 2 where anything is to
    be replayed, because one row cannot be both. Fractions alternate: the sum up to any step is the exact one, rounded.
    Where `ratio` leaves less than one new row, all but one are replayed. InputError unless 0 <= ratio < 1.
    """
    if batch_size < 1 or not 0 <= ratio < 1:
        raise InputError(f"batch_size = {batch_size} must be at least 1, replay_ratio = {ratio} in [0, 1)")
    rows = max(batch_size, 2) if ratio else batch_size
    wanted = min(rows * ratio, rows - 1)
    replayed = math.floor((step + 1) * wanted + 0.5) - math.floor(step * wanted + 0.5)
    return rows - replayed, replayed


class _SumTree:
    """A list of numbers that knows its sum; changing one, and finding where the running sum passes x, are O(log n).

    A node is the sum of its children, never an old value adjusted: it depends on the numbers alone, so that a tree
    built again after a restart draws the same.
    """

    def __init__(self) -> None:
        self._leaves = 1  # a power of two
        self._nodes = [0.0, 0.0]  # node i has the children 2i and 2i + 1, the root is 1
        self._size = 0

    @property
    def total(self) -> float:
        return self._nodes[1]

    def __getitem__(self, index: int) -> float:
        return self._nodes[self._leaves + index]

    def __setitem__(self, index: int, value: float) -> None:
        node = self._leaves + index
        self._nodes[node] = value
        while node > 1:
            node //= 2
            self._nodes[node] = self._nodes[2 * node] + self._nodes[2 * node + 1]

    def append(self, value: float) -> None:
        if self._size == self._leaves:  # doubling costs O(1) a number in the long run
            leaves = self._nodes[self._leaves :]
            self._leaves *= 2
            self._nodes = [0.0] * self._leaves + leaves + [0.0] * len(leaves)
            for node in range(self._leaves - 1, 0, -1):
                self._nodes[node] = self._nodes[2 * node] + self._nodes[2 * node + 1]
        self._size += 1
        self[self._size - 1] = value

    def pop(self) -> None:
        self._size -= 1
        self[self._size] = 0.0

    def find(self, x: float) -> int:
        """First index at which the running sum exceeds x, 0 <= x < total."""
        node = 1
        while node < self._leaves:
            node *= 2
            if x >= self._nodes[node] and self._nodes[node + 1] > 0:  # the latter: rounding must not lead outside
                x -= self._nodes[node]
                node += 1
        return node - self._leaves


class _Pool:
    """A reservoir: its rows' keys, largest first out, and the smallest key that was ever turned away (inf: none)."""

    def __init__(self, threshold: float = math.inf) -> None:
        self.heap: list[tuple[float, bytes]] = []  # (-key, id)
        self.threshold = threshold


class _Lesson:
    """The rows that one lesson took from one source. One is removed by moving the last into its place: O(1)."""

    def __init__(self, pool: _Pool, source: str, lesson: int, importance: float) -> None:
        self.pool, self.source, self.lesson, self.importance = pool, source, lesson, importance
        self.rows: list[_Row] = []
        self.tilts = _SumTree()  # priority ** alpha, in the rows' order

    def add(self, row: "_Row", tilt: float) -> None:
        row.position = len(self.rows)
        self.rows.append(row)
        self.tilts.append(tilt)

    def remove(self, row: "_Row") -> None:
        last = self.rows.pop()
        if last is not row:
            self.rows[row.position] = last
            self.tilts[row.position] = self.tilts[last.position]
            last.position = row.position
        self.tilts.pop()


class _Row:
    """Where a window lies: `slot` in memory, `position` among its lesson's rows."""

    __slots__ = ("id", "lesson", "position", "priority", "slot")

    def __init__(self, id: bytes, slot: int, lesson: _Lesson, priority: float) -> None:
        self.id, self.slot, self.lesson, self.priority = id, slot, lesson, priority
        self.position = -1


class ReplayBuffer:
    """At most `capacity` windows of up to `length` targets, from all lessons of one domain.

    **Admission.** A window already here is refused, whoever offers it; one that left is forgotten. Each source has a
    reservoir, and a full buffer shares its rows as evenly as the sources allow (max-min fairness): a window of a
    source that is not yet the largest takes the place of one of the largest source, so none is ever refused for
    coming late; one of the largest competes within its own. A reservoir keeps the k smallest keys of all windows
    offered to it, key = -ln(u)/importance with u in (0, 1) from a hash of seed and window. k depends on how many were
    offered and not on which. With equal importances each k-subset is thus equally likely, as in Vitter's algorithm R
    (1985), and with unequal ones it is the weighted sample of Efraimidis and Spirakis (2006); dropping the largest
    key leaves such a sample of k - 1. A reservoir that has dropped rows never grows again: no sample could both grow
    and stay uniform without what was dropped. The strategy `reservoir` has one reservoir for all sources.

    **Drawing**, independently and with replacement, among lessons that have rows:

    - uniform: a lesson with probability proportional to importance / lessons of its source, in it a row uniformly:
      sources are equal whatever their size, lessons within a source too, and importance 2 doubles a lesson's odds.
    - importance: the same tilted by priority**alpha, with weights (N p)**-beta divided by the sample's largest, N p
      being relative to uniform (Schaul et al. 2016). A priority is the row's last loss in nats per token; new rows
      have the highest so far. beta corrects the tilt, and not the importance that somebody asked for.
    - reservoir: every window that was ever offered with the same probability, times its importance: a row counts
      importance / probability of its admission, given the threshold (Cohen and Kaplan 2007); equal ones are equal.

    Importance thus decides how often a lesson is drawn, and how many different windows stand for it.

    **Exactness.** Draw number n is Philox keyed with (seed, n). Same seed and same calls give the same rows, in this
    implementation and in the reference, before and after `restore`. Inserting and drawing cost O(log rows) on the
    host, beside a look at each source or lesson, of which there are few.
    """

    def __init__(
        self, length: int, capacity: int, strategy: str, seed: int, alpha: float = 0.6, beta: float = 0.4
    ) -> None:
        """An empty buffer; InputError for values that none can have."""
        if length < 1 or capacity < 1 or strategy not in STRATEGIES:
            raise InputError(
                f"replay: length {length} and capacity {capacity} must be at least 1, strategy {strategy!r} one of "
                + ", ".join(STRATEGIES)
            )
        self.length, self.capacity, self.strategy = length, capacity, strategy
        self.seed, self.alpha, self.beta = seed, alpha, beta
        self.refused = 0
        """Duplicates that were turned away."""
        self._draws = 0
        self._highest_priority = 1.0
        self._rows: dict[bytes, _Row] = {}
        self._pools: dict[str, _Pool] = {}
        self._lessons: dict[tuple[str, int], _Lesson] = {}
        self._windows = mx.full((min(capacity, _FIRST_ROWS), length + 1), _PADDING, mx.int32)
        self._free: list[int] = []  # slots that rows left; else the next unused one is taken

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._rows)

    def available(self, excluding: int | None = None) -> int:
        """Rows that can be drawn: all but those of the lesson `excluding`."""
        return sum(len(lesson.rows) for lesson in self._lessons.values() if lesson.lesson != excluding)

    @property
    def sources(self) -> dict[str, int]:
        """Rows of each source, in the order in which they were first offered."""
        counts: Counter[str] = Counter()
        for lesson in self._lessons.values():
            counts[lesson.source] += len(lesson.rows)
        return dict(counts)

    # -- admission -----------------------------------------------------------------------------------------------

    def insert(self, tokens: ArrayLike, mask: ArrayLike, source: str, lesson: int, importance: float = 1.0) -> int:
        """Offer windows, tokens (B, T + 1) and mask (B, T), T <= length; returns how many were admitted.

        Windows in which nothing counts are passed over. `lesson` is the version being made; one lesson has one
        importance. On InputError the buffer is as before.
        """
        windows = [window for window in pack(tokens, mask) if len(window)]
        longest = max((len(window) - 1 for window in windows), default=0)
        if longest > self.length:
            raise InputError(
                f"a window has {longest} targets, the buffer {self.length}; restore it with length={longest}"
            )
        group = self._lesson(source, lesson, importance)
        written: dict[int, Window] = {}  # by slot: what is admitted here may make room for a later one
        admitted = 0
        for window in windows:
            identity = window_id(window)
            if identity in self._rows:
                self.refused += 1
            elif self._make_room(group, identity):
                written[self._place(group, identity, self._highest_priority).slot] = window
                admitted += 1
        self._write(written)
        return admitted

    def resize(self, capacity: int) -> None:
        """Change the capacity; rows of the largest sources go until the others fit."""
        if capacity < 1:
            raise InputError(f"replay: capacity {capacity} must be at least 1")
        self.capacity = capacity
        while len(self) > capacity:
            self._drop(self._largest())

    def _lesson(self, source: str, lesson: int, importance: float) -> _Lesson:
        """The lesson's rows of this source, a new list of them if there is none."""
        if not IMPORTANCES[0] <= importance <= IMPORTANCES[1]:
            raise InputError("importance = {} must lie between {:g} and {:g}".format(importance, *IMPORTANCES))
        known = self._lessons.get((source, lesson))
        if known is None:
            pool = self._pools.setdefault(self._pool_of(source), _Pool())
            known = self._lessons[source, lesson] = _Lesson(pool, source, lesson, importance)
        if known.importance != importance:
            raise InputError(f"lesson {lesson} of {source} has importance {known.importance}, not {importance}")
        return known

    def _pool_of(self, source: str) -> str:
        return "" if self.strategy == "reservoir" else source

    def _key(self, identity: bytes, importance: float) -> float:
        """Exponentially distributed with rate `importance`; a function of seed and window."""
        seed = (self.seed % 2**64).to_bytes(8, "little")
        word = int.from_bytes(hashlib.blake2b(identity, digest_size=8, key=seed).digest(), "little")
        return -math.log(((word >> 12) + 0.5) * 2.0**-52) / importance

    def _make_room(self, group: _Lesson, identity: bytes) -> bool:
        """Decide on a window that is not here; what has to go for it goes, and its key stands in its reservoir."""
        pool = group.pool
        entry = (-self._key(identity, group.importance), identity)
        victim = pool if pool.threshold < math.inf else None
        if victim is None and len(self) >= self.capacity:
            largest = self._largest()
            victim = pool if len(pool.heap) == len(largest.heap) else largest
        if victim is pool and (not pool.heap or entry < pool.heap[0]):
            pool.threshold = min(pool.threshold, -entry[0])
            return False
        if victim is not None:
            self._drop(victim)
        heapq.heappush(pool.heap, entry)
        return True

    def _largest(self) -> _Pool:
        """The reservoir with most rows, of equal ones the oldest."""
        return max(self._pools.values(), key=lambda pool: len(pool.heap))

    def _drop(self, pool: _Pool) -> None:
        """Remove the row with the largest key, and every trace of it."""
        key, identity = heapq.heappop(pool.heap)
        pool.threshold = min(pool.threshold, -key)
        row = self._rows.pop(identity)
        row.lesson.remove(row)
        self._free.append(row.slot)

    def _place(self, group: _Lesson, identity: bytes, priority: float) -> _Row:
        """Give a window that has been decided on its row and slot."""
        slot = self._free.pop() if self._free else len(self._rows)
        row = self._rows[identity] = _Row(identity, slot, group, priority)
        group.add(row, priority**self.alpha)
        return row

    def _write(self, windows: dict[int, Window]) -> None:
        """Put windows into their slots. The memory grows by doubling, so that a row costs O(1) in the long run."""
        if not windows:
            return
        needed, rows = max(windows) + 1, len(self._windows)
        if needed > rows:
            more = max(needed, min(2 * rows, self.capacity)) - rows
            self._windows = mx.concatenate([self._windows, mx.full((more, self.length + 1), _PADDING, mx.int32)])
        block = np.full((len(windows), self.length + 1), _PADDING, np.int32)
        for row, window in zip(block, windows.values(), strict=True):
            row[: len(window)] = window
        self._windows[mx.array(list(windows), mx.int32)] = mx.array(block)
        mx.eval(self._windows)  # MLX then writes in place; while it is still to be computed, it copies all rows

    # -- drawing -------------------------------------------------------------------------------------------------

    def sample(self, count: int, excluding: int | None = None) -> Sample:
        """`count` rows, tokens (count, L + 1) and mask (count, L), not of the lesson `excluding`.

        Rows are drawn as the strategy says; weights are 1 but for `importance`. InputError if there is none to draw.
        """
        lessons, masses = self._masses(excluding)
        if not lessons:
            raise InputError("nothing to replay: no earlier lesson has a row in the buffer")
        words = np.random.Philox(key=np.array([self.seed % 2**64, self._draws], np.uint64)).random_raw((count, 2))
        u = (words >> np.uint64(11)) * 2.0**-53  # (count, 2) in [0, 1)
        self._draws += 1
        bounds = np.cumsum(masses)
        chosen = np.searchsorted(bounds, u[:, 0] * bounds[-1], side="right")
        rows = [self._pick(lessons[index], float(x)) for index, x in zip(chosen, u[:, 1], strict=True)]
        weights = np.ones(count)
        if self.strategy == "importance":
            tilts = np.array([row.lesson.tilts[row.position] for row in rows])
            weights = (tilts.min() / tilts) ** self.beta  # N p is the tilt up to a factor, which cancels
        stored = self._gather(rows)  # (count, L + 1)
        mask = (stored[:, 1:] >= 0).astype(mx.float32)
        tokens = mx.where(stored < 0, -1 - stored, stored)
        return Sample(tokens, mask, mx.array(weights, mx.float32), [row.id for row in rows])

    def _masses(self, excluding: int | None) -> tuple[list[_Lesson], list[float]]:
        """The lessons that can be drawn from and the odds of each."""
        lessons = [group for group in self._lessons.values() if group.rows and group.lesson != excluding]
        of_source = Counter(group.source for group in lessons)
        masses = []
        for group in lessons:
            mass = group.importance / of_source[group.source]
            if self.strategy == "importance":
                mass *= group.tilts.total / len(group.rows)
            elif self.strategy == "reservoir":
                admitted = -math.expm1(-group.importance * group.pool.threshold)  # P(key < threshold)
                mass = len(group.rows) * group.importance / admitted
            masses.append(mass)
        return lessons, masses

    def _pick(self, group: _Lesson, u: float) -> _Row:
        """The row of a lesson that u in [0, 1) stands for."""
        if self.strategy == "importance":
            return group.rows[group.tilts.find(u * group.tilts.total)]
        return group.rows[int(u * len(group.rows))]

    def _gather(self, rows: Sequence[_Row]) -> mx.array:
        """Packed windows (N, L + 1), padded."""
        return mx.take(self._windows, mx.array([row.slot for row in rows], mx.int32), axis=0)

    def update_priorities(self, rows: Sequence[bytes], losses: ArrayLike) -> None:
        """Note the losses (N,), in nats per token, that the drawn `rows` have now; rows that have left are ignored.

        InputError for a loss that is negative, NaN or infinite.
        """
        priorities = np.asarray(losses, np.float64) + LEAST_PRIORITY
        if not (np.isfinite(priorities) & (priorities > 0)).all():
            raise InputError(f"priorities must be losses of at least 0: {np.asarray(losses).tolist()}")
        for identity, priority in zip(rows, priorities.tolist(), strict=True):
            row = self._rows.get(identity)
            if row is not None:
                row.priority = priority
                row.lesson.tilts[row.position] = priority**self.alpha
                self._highest_priority = max(self._highest_priority, priority)

    # -- state ---------------------------------------------------------------------------------------------------

    def rows(self, lesson: int | None = None) -> Iterator[Row]:
        """The rows with their windows, of one lesson or of all: what a commit adds to the windows stored under ids."""
        for group in [group for group in self._lessons.values() if lesson in (None, group.lesson)]:
            for first in range(0, len(group.rows), 1024):
                rows = group.rows[first : first + 1024]
                for row, window in zip(rows, np.array(self._gather(rows)), strict=True):
                    yield Row(row.id, _trimmed(window), group.source, group.lesson, group.importance)

    def membership(self) -> dict[str, Any]:
        """All but the windows: `counters` for JSON, `ids` (N, 16) uint8 and `priorities` (N,) float64.

        A version records this, 24 bytes a row, beside windows that are stored once under their ids (see `rows`).
        Undo is then `restore` with the parent's membership; a window can go when no version's membership names it.
        """
        rows = [row for group in self._lessons.values() for row in group.rows]
        thresholds = {name: pool.threshold for name, pool in self._pools.items()}
        counters = {
            **{name: getattr(self, name) for name in ("length", "capacity", "strategy", "seed", "alpha", "beta")},
            "refused": self.refused,
            "draws": self._draws,
            "highest_priority": self._highest_priority,
            "thresholds": {name: None if math.isinf(key) else key for name, key in thresholds.items()},
            "lessons": [[g.source, g.lesson, g.importance, len(g.rows)] for g in self._lessons.values()],
        }
        ids = np.frombuffer(b"".join(row.id for row in rows), np.uint8).reshape(-1, 16)
        return {"counters": counters, "ids": ids, "priorities": np.array([row.priority for row in rows], np.float64)}

    def state(self) -> dict[str, Any]:
        """`membership` and the `windows` themselves, (N, L + 1) int32, packed and padded."""
        rows = [row for group in self._lessons.values() for row in group.rows]
        windows = np.array(self._gather(rows)) if rows else np.zeros((0, self.length + 1), np.int32)
        return {**self.membership(), "windows": windows}

    @classmethod
    def restore(
        cls, state: dict[str, Any], lookup: Callable[[bytes], Window] | None = None, length: int | None = None
    ) -> "ReplayBuffer":
        """The buffer that goes on exactly as the one whose `state` this is, or whose `membership`, with `lookup`.

        `lookup` gives the packed window of an id; `length`, if given, is a new one that no window exceeds. Raises
        DamagedFileError where a window is not the one its id stands for or the parts contradict each other.
        """
        c, ids, priorities = state["counters"], [row.tobytes() for row in state["ids"]], state["priorities"].tolist()
        if not len(set(ids)) == len(ids) == len(priorities) == sum(rows for *_, rows in c["lessons"]):
            raise DamagedFileError(f"replay: {len(ids)} rows, {len(priorities)} priorities and lessons do not agree")
        buffer = cls(length or c["length"], c["capacity"], c["strategy"], c["seed"], c["alpha"], c["beta"])
        buffer.refused, buffer._draws, buffer._highest_priority = c["refused"], c["draws"], c["highest_priority"]
        for name, threshold in c["thresholds"].items():
            buffer._pools[name] = _Pool(math.inf if threshold is None else threshold)
        groups = [buffer._lesson(*lesson) for *lesson, rows in c["lessons"] for _ in range(max(rows, 1)) if rows or 1]
        raise NotImplementedError


def mix(tokens: ArrayLike, mask: ArrayLike, buffer: ReplayBuffer, count: int, excluding: int | None = None) -> Sample:
    """A batch of new windows, tokens (B, T + 1) and mask (B, T), with `count` replayed ones behind them.

    `count` comes from `split_rows`; with nothing to draw the batch stays all new. Rows are padded to the longest, with
    mask zero. New rows have weight 1. The replayed ones together weigh count / B times what the new ones do, however
    long their windows are (else ten tokens of a short lesson would drown in replayed windows of 256), each of them
    times its own weight of `sample`.
    """
    new_tokens, new_mask = mx.array(np.asarray(tokens, np.int32)), mx.array(np.asarray(mask, np.float32))
    rows = len(new_tokens)
    if count == 0 or buffer.available(excluding) == 0:
        return Sample(new_tokens, new_mask, mx.ones(rows), [])
    old = buffer.sample(count, excluding)
    width = max(new_mask.shape[1], old.mask.shape[1])
    share = (new_mask.sum() / rows) / (old.mask.sum() / count)
    padded = [mx.pad(a, ((0, 0), (0, width - a.shape[1]))) for a in (new_mask, old.mask)]
    longer = [mx.pad(a, ((0, 0), (0, width + 1 - a.shape[1]))) for a in (new_tokens, old.tokens)]
    weights = mx.concatenate([mx.ones(rows), old.weights * share])
    return Sample(mx.concatenate(longer), mx.concatenate(padded), weights, old.rows)
