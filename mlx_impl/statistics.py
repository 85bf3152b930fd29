"""Intervals, calibration and the variety of generated text, in numpy.

Losses are ratios of sums, nats over tokens, and the tokens of a document are not independent; therefore documents are
resampled, never tokens, and each condition is given the same ones. Calibration is kept as sums per bin, so that it adds
up over batches.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlx_impl.errors import InputError

Floats = NDArray[np.float64]

CALIBRATION_BINS = 15
"""Bins of equal width, as in Guo et al. 2017."""


# -- intervals -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """A figure with the bounds between which it lies in `level` of the resamples."""

    value: float
    low: float
    high: float
    level: float

    def as_json(self) -> dict[str, Any]:
        """The four numbers."""
        return asdict(self)


def resampled_losses(nats: ArrayLike, tokens: ArrayLike, samples: int = 2000, seed: int = 0) -> Floats:
    """Losses (samples, C) in nats per token of C conditions on documents drawn with replacement.

    `nats` (C, N) or (N,) are sums over each of N documents, `tokens` (N,) their counts, the same in all conditions:
    the bootstrap is paired, sample s has the same documents in each. Documents without tokens are left out. Raises
    InputError for fewer than two others: one document says nothing about the next.
    """
    sums, counts = _documents(nats, tokens)
    documents = len(counts)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(documents, np.full(documents, 1 / documents), size=samples)  # (samples, N)
    return (drawn @ sums.T) / (drawn @ counts)[:, None]


def bootstrap(
    nats: ArrayLike,
    tokens: ArrayLike,
    measure: Callable[[Floats], Floats],
    samples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile interval of a measure of losses by the paired bootstrap over documents (Efron & Tibshirani 1993).

    `measure` takes losses (S, C) of C conditions and gives (S,): the forgetting between two stages is
    `lambda loss: 100 * np.expm1(loss[:, 1] - loss[:, 0])`. The rest is as for `resampled_losses`; for a measure over
    several texts draw each of them with it, and take `interval`.
    """
    sums, counts = _documents(nats, tokens)
    whole = measure((sums.sum(axis=1) / counts.sum())[None])
    return interval(float(whole[0]), measure(resampled_losses(sums, counts, samples, seed)), level)


def interval(value: float, resampled: Floats, level: float = 0.95) -> Interval:
    """`value` with the percentiles of its resamples (S,) that hold `level` of them; NaN among them are left out."""
    if not 0 < level < 1:
        raise InputError(f"level is {level}, it must lie between 0 and 1")
    known = resampled[~np.isnan(resampled)]
    if not len(known):
        return Interval(value, math.nan, math.nan, level)
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), level)


def _documents(nats: ArrayLike, tokens: ArrayLike) -> tuple[Floats, Floats]:
    """Sums (C, N) and counts (N,) of the documents that have tokens; InputError where they cannot be resampled."""
    sums, counts = np.atleast_2d(np.asarray(nats, np.float64)), np.asarray(tokens, np.float64)
    if sums.shape[1:] != counts.shape:
        raise InputError(f"nats of {sums.shape[1]} documents and tokens of {counts.size}: they must be the same ones")
    there = counts > 0
    if there.sum() < 2:
        raise InputError(f"an interval needs at least 2 documents with tokens, there are {there.sum()}")
    return sums[:, there], counts[there]


# -- calibration -----------------------------------------------------------------------------------------------------


def reliability(confidences: ArrayLike, correct: ArrayLike, bins: int = CALIBRATION_BINS) -> Floats:
    """Sums (bins, 3) over predictions: how many, their confidence, how many were correct; tables of parts add up.

    `confidences` (N,) are probabilities of the first choice, `correct` (N,) whether it came true. Bin b holds the
    confidences in (b / bins, (b + 1) / bins], the first one also 0.
    """
    sure, right = np.asarray(confidences, np.float64).ravel(), np.asarray(correct, np.float64).ravel()
    which = np.clip(np.ceil(np.nan_to_num(sure) * bins).astype(int) - 1, 0, bins - 1)  # NaN shows in its bin's sum
    weights = (np.ones(len(sure)), sure, right)
    return np.stack([np.bincount(which, weight, minlength=bins) for weight in weights], axis=1)


def expected_calibration_error(table: Floats) -> float | None:
    """ECE of a table of `reliability`: sum over bins of |accuracy - confidence|, weighted by count (Guo et al. 2017).

    Between 0 and 1, lower is better; None for an empty table.
    """
    total = table[:, 0].sum()
    return float(np.abs(table[:, 1] - table[:, 2]).sum() / total) if total else None


# -- generated text --------------------------------------------------------------------------------------------------


def distinct(texts: Sequence[Sequence[int]], n: int) -> float | None:
    """distinct-n (Li et al. 2016): different n-grams over all n-grams of these texts' ids; None if there is none."""
    grams = [gram for text in texts for gram in _grams(text, n)]
    return len(set(grams)) / len(grams) if grams else None


def repetition(texts: Sequence[Sequence[int]], n: int = 4) -> float | None:
    """seq-rep-n (Welleck et al. 2020): share of n-grams that stood in the same text before, mean over texts.

    None if all texts are shorter than n.
    """
    shares = [1 - len(set(grams)) / len(grams) for grams in (_grams(text, n) for text in texts) if grams]
    return sum(shares) / len(shares) if shares else None


def longest_loop(text: Sequence[int]) -> int:
    """Tokens of the longest stretch that only says again, whole, what stood right before it: 4 in a b a b a b."""
    ids, longest = np.asarray(text), 0
    for period in range(1, len(ids) // 2 + 1):
        run = 0
        for same in ids[period:] == ids[:-period]:
            run = run + 1 if same else 0
            if run >= period:
                longest = max(longest, run)
    return longest


def _grams(text: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return list(zip(*(text[start:] for start in range(n)), strict=False))
