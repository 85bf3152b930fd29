"""Tokens -> packed windows -> batches, for training and for measuring.

Windows are cut from a stream back to back: nothing is padded, and every token but the very first is a target exactly
once. Order depends on (seed, epoch) alone, so a cursor of a few numbers resumes at the exact window.

Shapes: B rows, L targets per row; a row is L + 1 tokens, and mask[b, t] weighs the target tokens[b, t + 1].
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_impl.data import TokenFile, Tokens
from mlx_impl.errors import InputError

Batch = tuple[NDArray[np.int32], NDArray[np.float32]]
"""Tokens (B, L + 1) and mask (B, L)."""


def _gather(tokens: TokenFile | Tokens, rows: Sequence[tuple[int, int]], length: int) -> Batch:
    """Windows of `length` targets; a row (done, last) ends at target `last` and counts those after `done`."""
    ids = np.zeros((len(rows), length + 1), np.int32)  # (B, L + 1)
    mask = np.zeros((len(rows), length), np.float32)  # (B, L)
    for row, (done, last) in enumerate(rows):
        start = last - length
        ids[row], trained = tokens.span(start, last + 1)
        mask[row] = trained[1:]
        mask[row, : done - start] = 0
    return ids, mask


def _window_length(tokens: TokenFile | Tokens, seq_len: int) -> int:
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

    def __init__(self, tokens: TokenFile | Tokens, seq_len: int) -> None:
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
    """

    def __init__(self, windows: Windows, batch_size: int, seed: int, shuffle: bool = True) -> None:
        """Start before the first window of epoch 0; InputError for a batch size below 1."""
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}, at least 1 is needed")
        self.windows = windows
        self.rows = min(batch_size, len(windows))
        """B, the rows of each batch."""
        self.epoch = 0
        self.position = 0
        """Windows of this epoch that were handed out."""
        self._seed, self._shuffle = seed, shuffle
        self._data = {
            "windows": len(windows),
            "seq_len": windows.seq_len,
            "seed": seed,
            "shuffle": shuffle,
            "tokens": windows.tokens.digest,
        }
        self._order = self._permutation(0)

    def __iter__(self) -> Iterator[Batch]:
        """Itself: there is one position."""
        return self

    def __next__(self) -> Batch:
        """Tokens (B, L + 1) int32 and mask (B, L) float32."""
        return self.take(self.rows)

    def take(self, rows: int) -> Batch:
        """The next `rows` windows, at most as many as there are: tokens (rows, L + 1) and mask (rows, L)."""
        chosen = self._take(rows)
        if len(chosen) < rows:
            self.epoch, self.position = self.epoch + 1, 0
            self._order = self._permutation(self.epoch)
            chosen = np.concatenate([chosen, self._take(rows - len(chosen))])
        return self.windows.batch(chosen)

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
        self.epoch, self.position = cursor["epoch"], cursor["position"]
        self._order = self._permutation(self.epoch)

    def _take(self, count: int) -> NDArray[np.int64]:
        """The next `count` windows of this epoch, or what is left of it."""
        chosen = self._order[self.position : self.position + count]
        self.position += len(chosen)
        return chosen

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        """Order of the windows in an epoch.

        Sorted raw Philox words: numpy keeps those the same in all versions, `Generator.permutation` it does
        not, and a run that is resumed after an upgrade must go on in the same order.
        """
        if not self._shuffle:
            return np.arange(len(self.windows))
        key = np.array([self._seed % 2**64, epoch], np.uint64)
        return np.random.Philox(key=key).random_raw(len(self.windows)).argsort(kind="stable")


def evaluation_windows(tokens: TokenFile | Tokens, seq_len: int, stride: int, batch_size: int = 1) -> Iterator[Batch]:
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
