"""Tokens -> packed windows -> batches, for training and for measuring.

Windows are cut from a stream back to back: nothing is padded, and every token but the very first is a target exactly
once. A lesson that goes over its text again cuts it elsewhere each time. Windows and order depend on (seed, epoch)
alone, so a cursor of a few numbers resumes at the exact one.

Shapes: B rows, L targets per row; a row is L + 1 tokens, and mask[b, t] weighs the target tokens[b, t + 1].
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_impl.data import Flags, Ids, TokenFile, Tokens
from mlx_impl.errors import InputError

Batch = tuple[NDArray[np.int32], NDArray[np.float32]]
"""Tokens (B, L + 1) and mask (B, L)."""


@dataclass(frozen=True)
class Turned:
    """A stream as if it were a ring, from its token number `by` on; the same attributes as `Tokens`."""

    stream: "Stream"
    by: int

    def __len__(self) -> int:
        """Number of tokens N."""
        return len(self.stream)

    @property
    def masked(self) -> bool:
        """Whether some tokens may be left out of the loss."""
        return self.stream.masked

    @property
    def digest(self) -> str:
        """Hex digest of the stream, and where it begins."""
        return f"{self.stream.digest} from {self.by}"

    def span(self, start: int, stop: int) -> tuple[Ids, Flags]:
        """Ids and trained of the tokens [start, stop), both (stop - start,)."""
        first, last = start + self.by, stop + self.by
        inner, outer = min(last, len(self)), max(first, len(self))  # the ring closes between them
        parts = [self.stream.span(first, inner)] if first < inner else []
        parts += [self.stream.span(outer - len(self), last - len(self))] if outer < last else []
        ids, trained = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return ids, trained


Stream = TokenFile | Tokens | Turned


def _gather(tokens: Stream, rows: Sequence[tuple[int, int]], length: int) -> Batch:
    """Windows of `length` targets; a row (done, last) ends at target `last` and counts those after `done`."""
    ids = np.zeros((len(rows), length + 1), np.int32)  # (B, L + 1)
    mask = np.zeros((len(rows), length), np.float32)  # (B, L)
    for row, (done, last) in enumerate(rows):
        start = last - length
        ids[row], trained = tokens.span(start, last + 1)
        mask[row] = trained[1:]
        mask[row, : done - start] = 0
    return ids, mask


def _window_length(tokens: Stream, seq_len: int) -> int:
    """L: `seq_len`, or all targets there are if these are fewer; InputError if there is none."""
    if seq_len < 1:
        raise InputError(f"seq_len is {seq_len}, at least 1 is needed")
    if len(tokens) < 2:
        raise InputError(f"the text has {len(tokens)} tokens, at least 2 are needed to predict one from another")
    return min(seq_len, len(tokens) - 1)


class Windows:
    """The stream cut into windows of L = min(seq_len, N - 1) targets: tokens [i*L, i*L + L].

    Each token but the first is a target in exactly one window. The last window is moved back to be full, and
    what it repeats is masked out. Windows in which nothing counts are left out. InputError if nothing counts
    at all.
    """

    def __init__(self, tokens: Stream, seq_len: int) -> None:
        """Find the windows; reads the mask once if there is one."""
        self.tokens = tokens
        self.seq_len = _window_length(tokens, seq_len)
        self.n_targets = len(tokens) - 1
        """Targets that count in the loss, over all windows."""
        self._windows: range | NDArray[np.int64] = range(-(-self.n_targets // self.seq_len))
        if tokens.masked:
            counts = np.array([tokens.span(*self._targets(window))[1].sum() for window in self._windows])
            self._windows = np.flatnonzero(counts)
            self.n_targets = int(counts.sum())
        if not self.n_targets:
            raise InputError("no token of this text counts in the loss; train on all text")

    def __len__(self) -> int:
        """Number of windows."""
        return len(self._windows)

    def _targets(self, window: int) -> tuple[int, int]:
        """The tokens [first, stop) that window number `window` of the stream counts as targets."""
        done = int(window) * self.seq_len
        return done + 1, min(done + self.seq_len, len(self.tokens) - 1) + 1

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> Batch:
        """Windows by index, 0 <= index < len(self): tokens (B, L + 1) int32 and mask (B, L) float32."""
        spans = [self._targets(self._windows[index]) for index in indices]
        return _gather(self.tokens, [(first - 1, stop - 1) for first, stop in spans], self.seq_len)


class Batches:
    """An endless iterator over batches of windows that goes on exactly where its cursor says.

    Each epoch is a permutation of the windows drawn from (seed, epoch) alone; the last batch of an epoch is
    filled from the start of the next, so that every batch has the same shape. With fewer windows than
    `batch_size`, a batch has as many rows as there are windows: no window is twice in it for want of others.

    `turn` lets each epoch but the first cut the stream, closed to a ring, at places of its own: then no sentence is
    always seen after the same words, or learned only at the place of a window where it happened to stand.
    """

    def __init__(self, windows: Windows, batch_size: int, seed: int, shuffle: bool = True, turn: bool = False) -> None:
        """Start before the first window of epoch 0; InputError for a batch size below 1."""
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}, at least 1 is needed")
        self._given, self._turn = windows, turn
        self.rows = min(batch_size, len(windows))
        """B, the rows of each batch."""
        self._seed, self._shuffle = seed, shuffle
        self._data = {
            "windows": len(windows),
            "seq_len": windows.seq_len,
            "seed": seed,
            "shuffle": shuffle,
            "tokens": windows.tokens.digest,
        }
        self._begin(0)

    def __iter__(self) -> Iterator[Batch]:
        """Itself: there is one position."""
        return self

    def __next__(self) -> Batch:
        """Tokens (B, L + 1) int32 and mask (B, L) float32."""
        return self.take(self.rows)

    def take(self, rows: int) -> Batch:
        """The next `rows` windows: tokens (rows, L + 1) and mask (rows, L)."""
        batch = self.windows.batch(self._take(rows))
        while len(batch[0]) < rows:
            self._begin(self.epoch + 1)
            more = self.windows.batch(self._take(rows - len(batch[0])))
            batch = np.concatenate([batch[0], more[0]]), np.concatenate([batch[1], more[1]])
        return batch

    @property
    def cursor(self) -> dict[str, Any]:
        """Where the next batch begins and in which data; JSON can hold it."""
        return {"epoch": self.epoch, "position": self.position, **self._data}

    def seek(self, cursor: dict[str, Any]) -> None:
        """Go on from a cursor; InputError naming what differs if it belongs to other data or order."""
        differs = [
            f"{key} was {cursor.get(key)!r}, is {value!r}"
            for key, value in self._data.items()
            if cursor.get(key) != value
        ]
        if differs:
            raise InputError(f"cannot resume in other data: {'; '.join(differs)}")
        self._begin(cursor["epoch"])
        self.position = cursor["position"]

    def _begin(self, epoch: int) -> None:
        """Go to the beginning of an epoch."""
        self.epoch = epoch
        """Passes over the stream that are over."""
        self.position = 0
        """Windows of this epoch that were handed out."""
        self.windows = self._windows_of(epoch)
        """Those of this epoch."""
        self._order = self._permutation(epoch)

    def _windows_of(self, epoch: int) -> Windows:
        """The windows of an epoch: as they were given or, if so wanted, cut from another token of the ring on.

        That token is no target then; the only one that counts must not be it.
        """
        if not (self._turn and epoch) or self._given.n_targets < 2:
            return self._given
        stream = self._given.tokens
        by = int(self._words(epoch, len(self._given) + 1)[-1] % len(stream))
        return Windows(Turned(stream, by), self._given.seq_len)

    def _take(self, count: int) -> NDArray[np.int64]:
        """The next `count` windows of this epoch, or what is left of it."""
        chosen = self._order[self.position : self.position + count]
        self.position += len(chosen)
        return chosen

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        """Order of the windows in an epoch."""
        if not self._shuffle:
            return np.arange(len(self.windows))
        return self._words(epoch, len(self.windows)).argsort(kind="stable")

    def _words(self, epoch: int, count: int) -> NDArray[np.uint64]:
        """Random words of an epoch, (count,).

        Raw words of Philox: numpy keeps those the same in all versions, `Generator.permutation` it does not, and a run
        that is resumed after an upgrade must go on in the same order.
        """
        return np.random.Philox(key=np.array([self._seed % 2**64, epoch], np.uint64)).random_raw(count)


def evaluation_windows(tokens: Stream, seq_len: int, stride: int, batch_size: int = 1) -> Iterator[Batch]:
    """Overlapping windows in order, in which each token but the first counts exactly once.

    The first window counts all of its L = min(seq_len, N - 1) targets; each later one moves on by `stride`
    and counts its last `stride`, which thus have at least L - stride tokens before them. The last is moved
    back to be full. Yields tokens (B, L + 1) and mask (B, L), B = `batch_size` but for the last. Raises
    InputError for a stride that is not in [1, seq_len] and for fewer than 2 tokens.
    """
    if not 1 <= stride <= seq_len:
        raise InputError(f"stride is {stride}, it must lie between 1 and seq_len = {seq_len}")
    length, end = _window_length(tokens, seq_len), len(tokens) - 1
    firsts = range(length, end, stride)
    rows = [(0, length), *((done, min(done + stride, end)) for done in firsts)]
    for first in range(0, len(rows), batch_size):
        yield _gather(tokens, rows[first : first + batch_size], length)
