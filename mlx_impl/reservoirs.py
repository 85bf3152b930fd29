"""Which windows a replay buffer keeps and which it draws: the host's side, which knows windows by their ids only.

Unusual is that admission rolls no dice: a window's key is a hash of seed and id, and a reservoir holds the smallest
keys that it was offered. That is a uniform sample of the different windows, in whatever order and however often they
come, and one that was turned away is turned away again without being remembered. Imports no MLX.
"""

import hashlib
import heapq
import math
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlx_impl.config import REPLAY_STRATEGIES
from mlx_impl.errors import DamagedFileError, InputError

IMPORTANCES = (1e-6, 1e6)
"""Smallest and largest importance of a lesson; beyond them keys and odds would lose precision."""

LEAST_PRIORITY = 1e-6
"""Nats added to every loss, so that a window that is known perfectly is still drawn at times (Schaul et al. 2016)."""


def window_id(window: NDArray[np.int32]) -> bytes:
    """16 bytes that stand for a packed window, tokens and mask: BLAKE2b of it as little-endian int32."""
    return hashlib.blake2b(window.astype("<i4").tobytes(), digest_size=16).digest()


def check_importance(importance: float) -> None:
    """InputError for an importance that a lesson cannot have."""
    low, high = IMPORTANCES
    if not low <= importance <= high:
        raise InputError(f"importance {importance} must lie between {low:g} and {high:g}")


def _check_strategy(strategy: str) -> None:
    if strategy not in REPLAY_STRATEGIES:
        raise InputError(f"replay: strategy {strategy!r} must be one of {', '.join(REPLAY_STRATEGIES)}")


class SumTree:
    """A list of numbers that knows its sum; changing one, and finding where the running sum passes x, are O(log n).

    A node is the sum of its children, never an old value adjusted: it depends on the numbers alone, so that a tree
    built again after a restart draws the same.
    """

    def __init__(self) -> None:
        self._leaves = 1  # room, a power of two
        self._nodes = [0.0, 0.0]  # node i has the children 2i and 2i + 1, the root is 1, leaves come last
        self._size = 0

    @property
    def total(self) -> float:
        """Sum of all numbers."""
        return self._nodes[1]

    def __getitem__(self, index: int) -> float:
        """One of the numbers."""
        return self._nodes[self._leaves + index]

    def __setitem__(self, index: int, value: float) -> None:
        """Change one of the numbers."""
        node = self._leaves + index
        self._nodes[node] = value
        while node > 1:
            node //= 2
            self._nodes[node] = self._nodes[2 * node] + self._nodes[2 * node + 1]

    def append(self, value: float) -> None:
        """Add a number at the end; the room doubles when it is used up, in the long run O(1) a number."""
        if self._size == self._leaves:
            numbers = self._nodes[self._leaves :]
            self._leaves *= 2
            self._nodes = [0.0] * self._leaves + numbers + [0.0] * len(numbers)
            for node in range(self._leaves - 1, 0, -1):
                self._nodes[node] = self._nodes[2 * node] + self._nodes[2 * node + 1]
        self._size += 1
        self[self._size - 1] = value

    def pop(self) -> None:
        """Remove the last number."""
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


class Pool:
    """A reservoir: the keys of its rows, largest first, and the smallest key ever turned away (inf: none was)."""

    def __init__(self, threshold: float = math.inf) -> None:
        self.heap: list[tuple[float, bytes]] = []  # (-key, id)
        self.threshold = threshold


class Lesson:
    """The rows that one lesson took from one source. One is removed by moving the last into its place: O(1)."""

    def __init__(self, pool: Pool, source: str, number: int, importance: float) -> None:
        self.pool, self.source, self.number, self.importance = pool, source, number, importance
        self.rows: list[Row] = []
        self.tilts = SumTree()
        """priority ** alpha of each row."""

    def add(self, row: "Row", tilt: float) -> None:
        """Append a row."""
        row.position = len(self.rows)
        self.rows.append(row)
        self.tilts.append(tilt)

    def remove(self, row: "Row") -> None:
        """Take a row out."""
        last = self.rows.pop()
        if last is not row:
            self.rows[row.position] = last
            self.tilts[row.position] = self.tilts[last.position]
            last.position = row.position
        self.tilts.pop()


class Row:
    """A window that is kept: `slot` says where in memory, `position` where among its lesson's rows."""

    __slots__ = ("id", "lesson", "position", "priority", "slot")

    def __init__(self, id: bytes, slot: int, lesson: Lesson, priority: float) -> None:
        self.id, self.slot, self.lesson, self.priority = id, slot, lesson, priority
        self.position = -1


class Reservoirs:
    """At most `capacity` rows of one domain, shared by its sources; see `replay.ReplayBuffer` for what is drawn.

    Each source has a reservoir. A full buffer is shared as evenly as the sources allow (max-min fairness): a window of
    a source that is not yet the largest takes the place of one of the largest source, so that none is refused for
    coming late; one of the largest competes within its own. A reservoir keeps the k smallest keys of all the windows
    it was offered, key = -ln(u) / importance, u in (0, 1). k follows from how many were offered and not from which.
    With equal importances each k of them are thus equally likely to be kept, as in Vitter's algorithm R (1985), where
    the next of n is admitted with probability k/n; with unequal ones it is the weighted sample of Efraimidis and
    Spirakis (2006). Dropping the largest key leaves such a sample of k - 1. A reservoir that has dropped a row never
    grows again: no sample can both grow and stay uniform without what it dropped (Al-Kateb et al. 2007).

    The strategy `reservoir` has one reservoir for all sources. Importance decides how often a lesson is drawn, and
    here how many different windows stand for it. Everything costs O(log rows), beside a look at each source or lesson.
    """

    def __init__(self, capacity: int, strategy: str, seed: int, alpha: float, beta: float) -> None:
        """No rows yet; InputError for values that cannot be."""
        _check_strategy(strategy)
        if capacity < 1:
            raise InputError(f"replay: capacity {capacity} must be at least 1")
        self.capacity, self.strategy, self.seed, self.alpha, self.beta = capacity, strategy, seed, alpha, beta
        self.refused = self.draws = 0
        self.highest_priority = 1.0
        self.rows: dict[bytes, Row] = {}
        self.pools: dict[str, Pool] = {}
        self.lessons: dict[tuple[str, int], Lesson] = {}
        self._free: list[int] = []  # slots that rows left; without one, the first that was never used is next

    # -- admission -----------------------------------------------------------------------------------------------

    def lesson(self, source: str, number: int, importance: float) -> Lesson:
        """The rows of a lesson from a source, none if it is new; InputError for an importance it cannot have."""
        check_importance(importance)
        known = self.lessons.get((source, number))
        if known is None:
            pool = self.pools.setdefault("" if self.strategy == "reservoir" else source, Pool())
            known = self.lessons[source, number] = Lesson(pool, source, number, importance)
        if known.importance != importance:
            raise InputError(f"lesson {number} of {source!r} has importance {known.importance}, not {importance}")
        return known

    def offer(self, lesson: Lesson, id: bytes) -> int | None:
        """Admit a window and return the slot it is to be written to, or turn it away: None."""
        if id in self.rows:
            self.refused += 1
            return None
        if not self._make_room(lesson, id):
            return None
        return self._place(lesson, id, self.highest_priority).slot

    def resize(self, capacity: int) -> None:
        """Change the capacity; rows of the largest sources go until the others fit."""
        if capacity < 1:
            raise InputError(f"replay: capacity {capacity} must be at least 1")
        self.capacity = capacity
        while len(self.rows) > capacity:
            self._drop(self._largest())

    def use(self, strategy: str) -> None:
        """Keep and draw by another strategy from now on.

        `reservoir` has one for all sources: of what several hold, the rows stay that each of them would have kept.
        """
        _check_strategy(strategy)
        together, rows = strategy == "reservoir", self.ordered()
        if together != (self.strategy == "reservoir"):
            lowest = min((pool.threshold for pool in self.pools.values()), default=math.inf)
            self.pools = {}
            for lesson in self.lessons.values():
                lesson.pool = self.pools.setdefault("" if together else lesson.source, Pool(lowest))
            for row in rows:
                heapq.heappush(row.lesson.pool.heap, (-self._key(row.id, row.lesson.importance), row.id))
            for pool in self.pools.values():
                while pool.heap and -pool.heap[0][0] >= lowest:
                    self._drop(pool)
        self.strategy = strategy

    def _key(self, id: bytes, importance: float) -> float:
        """Exponentially distributed with rate `importance`, and a function of seed and window."""
        seed = (self.seed % 2**64).to_bytes(8, "little")
        word = int.from_bytes(hashlib.blake2b(id, digest_size=8, key=seed).digest(), "little")
        return -math.log(((word >> 12) + 0.5) * 2.0**-52) / importance

    def _make_room(self, lesson: Lesson, id: bytes) -> bool:
        """Decide on a window; what has to go for it goes."""
        pool = lesson.pool
        entry = (-self._key(id, lesson.importance), id)
        victim = pool if pool.threshold < math.inf else None
        if victim is None and len(self.rows) >= self.capacity:
            largest = self._largest()
            victim = pool if len(pool.heap) == len(largest.heap) else largest
        if victim is pool and (not pool.heap or entry < pool.heap[0]):
            pool.threshold = min(pool.threshold, -entry[0])
            return False
        if victim is not None:
            self._drop(victim)
        heapq.heappush(pool.heap, entry)
        return True

    def _largest(self) -> Pool:
        """The reservoir with most rows, of equal ones the oldest."""
        return max(self.pools.values(), key=lambda pool: len(pool.heap))

    def _drop(self, pool: Pool) -> None:
        """Remove the row with the largest key and every trace of it."""
        negative_key, id = heapq.heappop(pool.heap)
        pool.threshold = min(pool.threshold, -negative_key)
        row = self.rows.pop(id)
        row.lesson.remove(row)
        self._free.append(row.slot)

    def _place(self, lesson: Lesson, id: bytes, priority: float) -> Row:
        slot = self._free.pop() if self._free else len(self.rows)
        row = self.rows[id] = Row(id, slot, lesson, priority)
        lesson.add(row, priority**self.alpha)
        return row

    # -- drawing -------------------------------------------------------------------------------------------------

    def draw(self, count: int, excluding: int | None) -> tuple[list[Row], NDArray[np.float64]]:
        """`count` rows and their weights (count,); InputError if there is none outside the lesson `excluding`."""
        lessons = [lesson for lesson in self.lessons.values() if lesson.rows and lesson.number != excluding]
        if not lessons:
            raise InputError("nothing to replay: no earlier lesson has a row in the buffer")
        # Raw words and not `Generator`: numpy keeps those the same in all versions.
        words = np.random.Philox(key=np.array([self.seed % 2**64, self.draws], np.uint64)).random_raw((count, 2))
        u = (words >> np.uint64(11)) * 2.0**-53  # (count, 2) in [0, 1): which lesson, which of its rows
        self.draws += 1
        bounds = np.cumsum(self._odds(lessons))
        chosen = np.searchsorted(bounds, u[:, 0] * bounds[-1], side="right")
        rows = [self._pick(lessons[index], x) for index, x in zip(chosen, u[:, 1].tolist(), strict=True)]
        if self.strategy != "importance":
            return rows, np.ones(count)
        tilts = np.array([row.lesson.tilts[row.position] for row in rows])
        mean = bounds[-1] / sum(self._wished(lessons))  # of all tilts, as `uniform` would draw them
        return rows, (mean / tilts) ** self.beta

    def _odds(self, lessons: list[Lesson]) -> list[float]:
        """Of each lesson, not summing to 1."""
        if self.strategy == "reservoir":
            # A row stands for 1 / P(key < threshold) windows that were offered.
            admitted = [-math.expm1(-lesson.importance * lesson.pool.threshold) for lesson in lessons]
            return [len(lesson.rows) * lesson.importance / p for lesson, p in zip(lessons, admitted, strict=True)]
        odds = self._wished(lessons)
        if self.strategy == "uniform":
            return odds
        return [p * lesson.tilts.total / len(lesson.rows) for p, lesson in zip(odds, lessons, strict=True)]

    def _wished(self, lessons: list[Lesson]) -> list[float]:
        """Of each lesson without priorities: sources alike, and the lessons of one by their importance."""
        of_source = Counter(lesson.source for lesson in lessons)
        return [lesson.importance / of_source[lesson.source] for lesson in lessons]

    def _pick(self, lesson: Lesson, u: float) -> Row:
        """The row of a lesson that u in [0, 1) stands for."""
        if self.strategy == "importance":
            return lesson.rows[lesson.tilts.find(u * lesson.tilts.total)]
        return lesson.rows[int(u * len(lesson.rows))]

    def update_priorities(self, ids: Sequence[bytes], losses: ArrayLike) -> None:
        """See `replay.ReplayBuffer.update_priorities`."""
        priorities = np.asarray(losses, np.float64) + LEAST_PRIORITY
        if not (np.isfinite(priorities) & (priorities > 0)).all():
            raise InputError(f"priorities must be losses of at least 0: {np.asarray(losses).tolist()}")
        for id, priority in zip(ids, priorities.tolist(), strict=True):
            row = self.rows.get(id)
            if row is not None:
                row.priority = priority
                row.lesson.tilts[row.position] = priority**self.alpha
                self.highest_priority = max(self.highest_priority, priority)

    # -- state ---------------------------------------------------------------------------------------------------

    def ordered(self) -> list[Row]:
        """All rows, lesson by lesson, in an order that restoring keeps."""
        return [row for lesson in self.lessons.values() for row in lesson.rows]

    def membership(self) -> dict[str, Any]:
        """See `replay.ReplayBuffer.membership`."""
        rows = self.ordered()
        names = ("capacity", "strategy", "seed", "alpha", "beta", "refused", "draws", "highest_priority")
        thresholds = {name: pool.threshold for name, pool in self.pools.items()}
        return {
            "counters": {
                **{name: getattr(self, name) for name in names},
                "thresholds": {name: None if key == math.inf else key for name, key in thresholds.items()},
                "lessons": [[x.source, x.number, x.importance, len(x.rows)] for x in self.lessons.values()],
            },
            "ids": np.frombuffer(b"".join(row.id for row in rows), np.uint8).reshape(-1, 16),
            "priorities": np.array([row.priority for row in rows], np.float64),
        }

    @classmethod
    def restore(cls, state: dict[str, Any]) -> "Reservoirs":
        """The rows of a membership, in slots 0, 1, ... in its order. DamagedFileError if its parts disagree."""
        c, ids, priorities = state["counters"], [row.tobytes() for row in state["ids"]], state["priorities"].tolist()
        stated = sum(rows for *_, rows in c["lessons"])
        if not len(set(ids)) == len(ids) == len(priorities) == stated:
            raise DamagedFileError(
                f"replay: {stated} rows are recorded, but {len(set(ids))} ids and {len(priorities)} priorities"
            )
        restored = cls(c["capacity"], c["strategy"], c["seed"], c["alpha"], c["beta"])
        restored.refused, restored.draws = c["refused"], c["draws"]
        restored.highest_priority = c["highest_priority"]
        for name, threshold in c["thresholds"].items():
            restored.pools[name] = Pool(math.inf if threshold is None else threshold)
        members = zip(ids, priorities, strict=True)
        for source, number, importance, rows in c["lessons"]:
            lesson = restored.lesson(source, number, importance)
            for id, priority in islice(members, rows):
                heapq.heappush(lesson.pool.heap, (-restored._key(id, importance), id))
                restored._place(lesson, id, priority)
        return restored
