"""How much of one text stands in another, by n-grams of tokens so long that two texts hardly share one by chance.

An n-gram is found wherever it stands in the other text, however that one is cut into windows. Imports no MLX.
"""

import numpy as np
from numpy.typing import NDArray

LENGTH = 16
"""Tokens of an n-gram."""
TOLD = 5.0
"""Percent of a lesson's held-out text that another one taught, from which on it is said, and kept out of means."""
FACTOR = np.uint64(0x9E3779B97F4A7C15)
"""Odd and large, so that an n-gram's number depends on all bits of its tokens."""

Numbers = NDArray[np.uint64]
"""What stands for n-grams: a polynomial in their tokens modulo 2^64."""


def ngrams(ids: NDArray[np.integer]) -> Numbers:
    """Numbers of the n-grams that begin at each place of a text's (N,) ids, sorted, each once."""
    if len(ids) < LENGTH:
        return np.zeros(0, np.uint64)
    return np.unique(_numbers(np.lib.stride_tricks.sliding_window_view(ids, LENGTH)))


def shares(rows: NDArray[np.integer], lengths: NDArray[np.integer], there: Numbers) -> NDArray[np.float64]:
    """Share of each row's n-grams, taken one behind the other, that are `there` as `ngrams` gives them: (B,).

    Of a row of ids (B, T) the first `lengths` (B,) count. A row that is shorter than an n-gram has a share of 0.
    """
    count = rows.shape[1] // LENGTH
    inside = np.arange(1, count + 1) * LENGTH <= lengths[:, None]  # (B, count)
    found = np.isin(_numbers(rows[:, : count * LENGTH].reshape(len(rows), count, LENGTH)), there)
    return (found & inside).sum(axis=1) / np.maximum(1, inside.sum(axis=1))


def share(text: NDArray[np.integer], there: Numbers) -> float:
    """Share of the n-grams of one text's (N,) ids that are `there`; see `shares`."""
    return float(shares(text[None], np.array([len(text)]), there)[0])


def _numbers(grams: NDArray[np.integer]) -> Numbers:
    """Numbers (...) of n-grams (..., LENGTH)."""
    numbers = np.zeros(grams.shape[:-1], np.uint64)
    for offset in range(LENGTH):
        numbers = numbers * FACTOR + grams[..., offset].astype(np.uint64)
    return numbers
