"""Two models on the same tokens: how far their logits are apart and, where that is too far, in which module it began.

Knows neither model class: a trace maps the path of each module to its output, in order of execution, and ends with
`logits`. `mlx_impl.check.trace` and `torch_ref.check.trace` make them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mlx_impl.config import ModelConfig

TOKENS = 32

ENGLISH = (
    "The school is on the other side of the river, and in winter, when the ferry does not run, the children who live "
    "in the village walk along the bank to the old bridge, which takes them most of an hour each way."
)
"""To say what rounding does to predictions: after random tokens no prediction means much."""

TOLERANCES = {"float32": 1e-5, "packed": 3e-5, "float16": 5e-3, "F16": 5e-3, "bfloat16": 8e-2, "Q8_0": 0.12}
"""Largest difference of an output by how the weights were stored, as a share of its largest magnitude or of 1.

In float32 only the order of sums differs; packed weights, held against what they stand for, have another one again. The
others are some three times what rounding does to SmolLM2-135M: its random tokens are the worst case, and what a wrong
layout does is of the size of the logits.
"""

Trace = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Check:
    """What a comparison found; differences are absolute, of logits."""

    difference: float | None
    """None where it is not finite."""
    at_most: float
    tokens: int
    first: str | None
    """The first module whose output is too far off, in order of execution; None where the logits are close enough."""


def tokens_for(config: ModelConfig, text: Sequence[int] = ()) -> np.ndarray:
    """(B, T) token ids: random ones, always the same for a vocabulary, and in a second row the first of `text`, if any.

    T is 32, or the context where that is shorter, or the length of the text.
    """
    length = min(TOKENS, config.max_seq_len, len(text) or TOKENS)
    random = np.random.default_rng(0).integers(0, config.vocab_size, (1, length))
    return np.concatenate([random, np.asarray(text[:length])[None]]) if text else random


def compare(expected: Trace, actual: Trace, stored: str) -> Check:
    """Compare two traces of the same tokens; `stored` is a key of TOLERANCES.

    Values of which one is not finite are infinitely far apart unless they are equal.
    """
    tolerance = TOLERANCES[stored]
    difference, at_most = _distance(expected["logits"], actual["logits"], tolerance)
    first = None
    if not difference <= at_most:
        distances = ((name, _distance(expected[name], actual[name], tolerance)) for name in expected if name in actual)
        first = next(name for name, (far, most) in distances if not far <= most)
    shown = difference if np.isfinite(difference) else None
    return Check(shown, at_most, expected["logits"].shape[1], first)


def divergence(expected: Trace, actual: Trace) -> float:
    """Mean Kullback-Leibler divergence of the predictions for the last row, in nats: sum_v p (log p - log q)."""
    p, q = (_log_softmax(trace["logits"][-1].astype(np.float64)) for trace in (expected, actual))  # (T, V)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def _distance(expected: np.ndarray, actual: np.ndarray, tolerance: float) -> tuple[float, float]:
    """(largest difference, what is allowed) of two outputs of one module; what is allowed is always finite."""
    if expected.shape != actual.shape:
        return float("inf"), tolerance
    finite = np.isfinite(expected)
    at_most = tolerance * max(1.0, float(np.abs(expected).max(initial=0.0, where=finite)))
    if not ((finite & np.isfinite(actual)) | (expected == actual)).all():
        return float("inf"), at_most
    with np.errstate(invalid="ignore"):  # an infinity that both have
        difference = np.abs(expected.astype(np.float64) - actual)
    return float(difference.max(initial=0.0, where=finite)), at_most
