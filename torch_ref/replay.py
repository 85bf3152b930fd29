"""Experience replay again, in PyTorch, from its definition: lists that are searched from end to end.

Nothing is indexed and nothing is kept up to date: who is the largest source, what a row's probability is and whether a
window is here already is found out anew each time. The generator is numpy's Philox and the hash BLAKE2b, as on the MLX
side, so that the same seed and the same calls choose the same rows. Shapes as there: B rows, T and L targets, N rows.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mlx_impl.errors import DamagedFileError, InputError


class Sample(NamedTuple):
    """Rows for a step: tokens (B, T + 1) int32, mask (B, T), weights (B,), and the ids of those from the buffer."""

    tokens: Tensor
    mask: Tensor
    weights: Tensor
    rows: list[bytes]


class StoredRow(NamedTuple):
    """A row of the buffer as a caller stores it: the packed `window` under `id`, which is a hash of it."""

    id: bytes
    window: Tensor
    source: str
    lesson: int
    importance: float


@dataclass(eq=False)
class _Row:
    id: bytes
    tokens: Tensor  # (L + 1,) int32, padded with 0
    mask: Tensor  # (L,) bool
    priority: float


Lesson = tuple[str, int]
"""Source and number."""


def pack(tokens: Tensor, mask: Tensor) -> list[Tensor]:
    """Windows of a batch, tokens (B, T + 1) and mask (B, T), each cut after its last target that counts.

    A token that does not count as a target, t, is stored as -1 - t. Empty if nothing counts.
    """
    windows = []
    for ids, counts in zip(tokens.to(torch.int32), mask != 0, strict=True):
        window = torch.cat([ids[:1], torch.where(counts, ids[1:], -1 - ids[1:])])
        n = max((t + 1 for t in range(len(counts)) if counts[t]), default=-1)
        windows.append(window[: n + 1])
    return windows


def unpack(window: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (n + 1,) int32 and mask (n,) float32 of a packed window."""
    return torch.where(window < 0, -1 - window, window), (window[1:] >= 0).float()


def window_id(window: Tensor) -> bytes:
    """BLAKE2b, 16 bytes, of a packed window as little-endian int32."""
    return hashlib.blake2b(window.numpy().astype("<i4").tobytes(), digest_size=16).digest()


def split_rows(batch_size: int, ratio: float, step: int) -> tuple[int, int]:
    """(new, replayed) rows of a step: what was replayed before it and what was after it, both rounded half up."""
    if not ratio:
        return batch_size, 0
    if batch_size == 1:  # the new row stays, others come to it: ratio of 1 + x rows are x of them
        before, after = (math.floor(n * min(ratio / (1 - ratio), 1) + 0.5) for n in (step, step + 1))
        return 1, after - before
    before, after = (math.floor(n * min(batch_size * ratio, batch_size - 1) + 0.5) for n in (step, step + 1))
    return batch_size - (after - before), after - before


class ReplayBuffer:
    """At most `capacity` windows of one domain; see the MLX side for what is kept and what is drawn, and why."""

    def __init__(
        self, length: int, capacity: int, strategy: str, seed: int, alpha: float = 0.6, beta: float = 0.4
    ) -> None:
        self.length, self.capacity, self.strategy = length, capacity, strategy
        self.seed, self.alpha, self.beta = seed, alpha, beta
        self.refused = self.draws = 0
        self.highest_priority = 1.0
        self.lessons: dict[Lesson, list[_Row]] = {}
        self.importances: dict[Lesson, float] = {}
        self.thresholds: dict[str, float] = {}

    def __len__(self) -> int:
        """Number of rows N."""
        return sum(len(rows) for rows in self.lessons.values())

    def available(self, excluding: int | None = None) -> int:
        """Rows of all lessons but `excluding`."""
        return sum(len(rows) for lesson, rows in self.lessons.items() if lesson[1] != excluding)

    # -- admission -----------------------------------------------------------------------------------------------

    def insert(self, tokens: Tensor, mask: Tensor, source: str, lesson: int, importance: float = 1.0) -> int:
        """Offer windows, tokens (B, T + 1) and mask (B, T), T <= L; returns how many were admitted."""
        windows = [window for window in pack(tokens, mask) if len(window)]
        if any(len(window) - 1 > self.length for window in windows):
            raise InputError(f"a window has more targets than the buffer's {self.length}")
        self.lessons.setdefault((source, lesson), [])
        self.importances[source, lesson] = importance
        self.thresholds.setdefault(self._pool((source, lesson)), math.inf)
        return sum(self._offer(window, (source, lesson)) for window in windows)

    def _pool(self, lesson: Lesson) -> str:
        """Name of the reservoir that a lesson's rows are in."""
        return "" if self.strategy == "reservoir" else lesson[0]

    def _pools(self) -> dict[str, list[tuple[float, bytes]]]:
        """The rows of each reservoir as (-key, id), the oldest reservoir first."""
        pools: dict[str, list[tuple[float, bytes]]] = {name: [] for name in self.thresholds}
        for lesson, rows in self.lessons.items():
            pools[self._pool(lesson)] += [(-self._key(row.id, lesson), row.id) for row in rows]
        return pools

    def _key(self, id: bytes, lesson: Lesson) -> float:
        """-ln(u) / importance, where the 52 highest bits of a keyed hash are u's digits, and a half."""
        seed = np.array([self.seed % 2**64], "<u8").tobytes()
        word = np.frombuffer(hashlib.blake2b(id, digest_size=8, key=seed).digest(), "<u8")[0]
        return -math.log((int(word) // 2**12 + 0.5) / 2**52) / self.importances[lesson]

    def _offer(self, window: Tensor, lesson: Lesson) -> bool:
        id = window_id(window)
        if any(row.id == id for rows in self.lessons.values() for row in rows):
            self.refused += 1
            return False
        pools, own = self._pools(), self._pool(lesson)
        cut = self.thresholds[own] < math.inf
        if cut or len(self) >= self.capacity:
            largest = max(pools, key=lambda name: len(pools[name]))
            if cut or len(pools[own]) == len(pools[largest]):
                largest = own
                pools[own].append((-self._key(id, lesson), id))
            key, loser = min(pools[largest])
            self.thresholds[largest] = min(self.thresholds[largest], -key)
            if loser == id:
                return False
            self._remove(loser)
        self.lessons[lesson].append(self._row(id, window))
        return True

    def _row(self, id: bytes, window: Tensor) -> _Row:
        tokens, mask = torch.zeros(self.length + 1, dtype=torch.int32), torch.zeros(self.length, dtype=torch.bool)
        tokens[: len(window)], mask[: len(window) - 1] = unpack(window)[0], window[1:] >= 0
        return _Row(id, tokens, mask, self.highest_priority)

    def _remove(self, id: bytes) -> None:
        """The last row of the lesson takes the place of the one that goes."""
        for rows in self.lessons.values():
            for index, row in enumerate(rows):
                if row.id == id:
                    rows[index] = rows[-1]
                    rows.pop()
                    return

    def resize(self, capacity: int) -> None:
        """Change the capacity; rows of the largest sources go until the others fit."""
        self.capacity = capacity
        while len(self) > capacity:
            pools = self._pools()
            largest = max(pools, key=lambda name: len(pools[name]))
            key, loser = min(pools[largest])
            self.thresholds[largest] = min(self.thresholds[largest], -key)
            self._remove(loser)

    def use(self, strategy: str) -> None:
        """Another strategy from now on; one reservoir takes of several the rows whose keys are below all thresholds."""
        if (strategy == "reservoir") == (self.strategy == "reservoir"):
            self.strategy = strategy
            return
        lowest = min(self.thresholds.values(), default=math.inf)
        self.strategy = strategy
        self.thresholds = {self._pool(lesson): lowest for lesson in self.lessons}
        losers = [one for pool in self._pools().values() for one in sorted(pool) if -one[0] >= lowest]
        for _, loser in losers:
            self._remove(loser)

    # -- drawing -------------------------------------------------------------------------------------------------

    def sample(self, count: int, excluding: int | None = None) -> Sample:
        """`count` rows, independently and with replacement, not of the lesson `excluding`."""
        base, tilted = self._probabilities(excluding)
        if not tilted:
            raise InputError("nothing to replay")
        generator = np.random.Philox(key=np.array([self.seed % 2**64, self.draws], np.uint64))
        self.draws += 1
        rows, weights = [], []
        odds = torch.stack([p.sum() for p in tilted.values()])
        for _ in range(count):
            first, second = (int(word) // 2**11 / 2**53 for word in generator.random_raw(2))
            lesson = list(tilted)[_index(odds, first)]
            place = _index(tilted[lesson], second)
            rows.append(self.lessons[lesson][place])
            relative = tilted[lesson][place] / odds.sum() / (base[lesson][place] / sum(p.sum() for p in base.values()))
            weights.append(relative**-self.beta)
        return Sample(
            torch.stack([row.tokens for row in rows]),  # (count, L + 1)
            torch.stack([row.mask for row in rows]).float(),  # (count, L)
            torch.stack(weights).float(),
            [row.id for row in rows],
        )

    def _probabilities(self, excluding: int | None) -> tuple[dict[Lesson, Tensor], dict[Lesson, Tensor]]:
        """Of each row of each lesson, float64 and up to a factor: without priorities, and with them."""
        base, tilted = {}, {}
        alive = [lesson for lesson, rows in self.lessons.items() if rows and lesson[1] != excluding]
        for lesson in alive:
            rows, importance = self.lessons[lesson], self.importances[lesson]
            if self.strategy == "reservoir":
                p = importance / (1 - math.exp(-importance * self.thresholds[self._pool(lesson)]))
            else:
                p = importance / sum(other[0] == lesson[0] for other in alive) / len(rows)
            base[lesson] = torch.full((len(rows),), p, dtype=torch.float64)
            tilt = torch.tensor([row.priority for row in rows], dtype=torch.float64) ** self.alpha
            tilted[lesson] = base[lesson] * (tilt if self.strategy == "importance" else 1)
        return base, tilted

    def update_priorities(self, rows: Sequence[bytes], losses: Tensor) -> None:
        """Note the losses (B,) that rows have now, plus 1e-6; rows that left are passed over."""
        for id, loss in zip(rows, losses.double().tolist(), strict=True):
            for row in [row for lesson in self.lessons.values() for row in lesson if row.id == id]:
                row.priority = loss + 1e-6
                self.highest_priority = max(self.highest_priority, row.priority)

    # -- state ---------------------------------------------------------------------------------------------------

    def rows(self, lesson: int | None = None) -> Iterator[StoredRow]:
        """The rows with their windows, of one lesson or of all."""
        for (source, number), rows in self.lessons.items():
            for row in rows if lesson in (None, number) else []:
                window = pack(row.tokens[None], row.mask[None])[0]
                yield StoredRow(row.id, window, source, number, self.importances[source, number])

    def membership(self) -> dict[str, Any]:
        """All but the windows: `counters` for JSON, `ids` (N, 16) uint8, `priorities` (N,) float64."""
        names = ("length", "capacity", "strategy", "seed", "alpha", "beta", "refused", "draws", "highest_priority")
        counters: dict[str, Any] = {name: getattr(self, name) for name in names}
        counters["thresholds"] = {name: None if key == math.inf else key for name, key in self.thresholds.items()}
        counters["lessons"] = [[*x, self.importances[x], len(rows)] for x, rows in self.lessons.items()]
        rows = [row for lesson in self.lessons.values() for row in lesson]
        ids = np.array([list(row.id) for row in rows], np.uint8).reshape(-1, 16)
        return {"counters": counters, "ids": ids, "priorities": np.array([row.priority for row in rows])}

    def state(self) -> dict[str, Any]:
        """`membership` and `windows`, (N, L + 1) int32, packed and padded with -1."""
        windows = np.full((len(self), self.length + 1), -1, np.int32)
        for padded, row in zip(windows, self.rows(), strict=True):
            padded[: len(row.window)] = row.window.numpy()
        return {**self.membership(), "windows": windows}

    @classmethod
    def restore(
        cls, state: dict[str, Any], lookup: Callable[[bytes], Tensor] | None = None, length: int | None = None
    ) -> "ReplayBuffer":
        """The buffer that goes on exactly as the one that gave `state`, or a `membership` and `lookup`."""
        c = state["counters"]
        buffer = cls(length or c["length"], c["capacity"], c["strategy"], c["seed"], c["alpha"], c["beta"])
        buffer.refused, buffer.draws, buffer.highest_priority = c["refused"], c["draws"], c["highest_priority"]
        buffer.thresholds = {name: math.inf if key is None else key for name, key in c["thresholds"].items()}
        ids = [bytes(row.tolist()) for row in state["ids"]]
        at = 0
        for source, number, importance, count in c["lessons"]:
            rows = buffer.lessons[source, number] = []
            buffer.importances[source, number] = importance
            for index in range(at, at + count):
                window = lookup(ids[index]) if lookup else torch.tensor(state["windows"][index])
                tokens, mask = unpack(window)
                window = pack(tokens[None], mask[None])[0]
                if window_id(window) != ids[index]:
                    raise DamagedFileError(f"window {ids[index].hex()} is not the one that was stored")
                rows.append(buffer._row(ids[index], window))
                rows[-1].priority = float(state["priorities"][index])
            at += count
        return buffer


def _index(odds: Tensor, u: float) -> int:
    """Where u in [0, 1) falls when the odds (n,) are laid end to end on [0, 1)."""
    bounds = torch.cumsum(odds, 0) / odds.sum()
    return min(int((bounds <= u).sum()), len(odds) - 1)


def mix(tokens: Tensor, mask: Tensor, buffer: ReplayBuffer, count: int, excluding: int | None = None) -> Sample:
    """New windows, tokens (B, T + 1) and mask (B, T), weight 1, and behind them `count` replayed ones.

    The latter are scaled so that their targets together weigh count / B times the new ones.
    """
    rows, longest = len(tokens), mask.shape[1]
    if count == 0 or not buffer.available(excluding):
        return Sample(tokens.to(torch.int32), mask.float(), torch.ones(rows), [])
    old = buffer.sample(count, excluding)
    longest = max(longest, old.mask.shape[1])
    all_tokens = torch.zeros((rows + count, longest + 1), dtype=torch.int32)
    all_mask = torch.zeros((rows + count, longest))
    all_tokens[:rows, : tokens.shape[1]], all_tokens[rows:, : old.tokens.shape[1]] = tokens, old.tokens
    all_mask[:rows, : mask.shape[1]], all_mask[rows:, : old.mask.shape[1]] = mask, old.mask
    weights = old.weights * (count / rows) * mask.sum() / old.mask.sum()
    return Sample(all_tokens, all_mask, torch.cat([torch.ones(rows), weights]), old.rows)
