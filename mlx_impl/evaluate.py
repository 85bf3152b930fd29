"""How well a model predicts a text: loss, perplexity, bits per byte, accuracy.

Takes callables, so that any model under any adapter is measured by the same code. Windows overlap and each token
counts once, with as much context to its left as fits. Bits are per byte of UTF-8, not per token, and therefore
comparable between tokenizers. Where time is short fewer windows are measured, and a comparison is cut to those that
both sides have. Calibration comes along: the probability of the first choice costs nothing once its logit is known.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_impl import kernels
from mlx_impl.data import Tokens
from mlx_impl.errors import InputError
from mlx_impl.statistics import CALIBRATION_BINS, Floats, expected_calibration_error, reliability
from mlx_impl.windows import Batch, evaluation_windows

Logits = Callable[[mx.array], mx.array]

TRIES = 3
"""Times that a window is measured, at most, to know the machine's speed."""

SMALLEST_WINDOW = 64
"""Tokens below which a window is not cut for want of time: what follows too little context says little."""


@dataclass
class Evaluation:
    """Sums over the tokens that were predicted; the measures are derived from them."""

    nats: float = 0.0
    tokens: int = 0
    correct: int = 0
    bytes: int | None = None  # of the predicted tokens' text; None where it is not known
    seconds: float = 0.0  # that the measuring took
    reliability: Floats = field(default_factory=lambda: np.zeros((CALIBRATION_BINS, 3)), compare=False)

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood, nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Total bits over total bytes of text."""
        return self.nats / math.log(2) / self.bytes if self.bytes else None

    @property
    def accuracy(self) -> float:
        """Share of tokens that were the model's first choice."""
        return self.correct / self.tokens

    @property
    def calibration_error(self) -> float | None:
        """How far the probability of the first choice is from how often it comes true; see `statistics`."""
        return expected_calibration_error(self.reliability)

    def as_json(self) -> dict[str, Any]:
        """What `eval --json` prints."""
        return {
            "tokens": self.tokens,
            "loss": self.loss,
            "perplexity": self.perplexity if math.isfinite(self.perplexity) else None,
            "bits_per_byte": self.bits_per_byte,
            "accuracy": self.accuracy,
            "calibration_error": self.calibration_error,
        }


class Predictions(NamedTuple):
    """What a model made of the M tokens of a batch that count, in their order."""

    nats: NDArray[np.float32]  # (M,) negative log-likelihoods
    correct: NDArray[np.bool_]  # (M,) whether the token was the first choice
    confidence: NDArray[np.float32]  # (M,) probability of the first choice
    seconds: float  # that computing them took


def evaluate(logits_of: Logits, windows: Iterable[Batch], text_bytes: int | None = None) -> Evaluation:
    """Measure `logits_of` (tokens (B, T) -> (B, T, V)) over batches of tokens (B, T+1) and mask (B, T).

    `text_bytes` is the length of the predicted tokens' text. InputError where the mask counts no token at all.
    """
    result = total(each(logits_of, windows))
    if not result.tokens:
        raise InputError("no token of this text counts, so there is nothing to measure")
    result.bytes = text_bytes
    return result


def total(parts: Iterable[Evaluation]) -> Evaluation:
    """The sums over several measurements."""
    result = Evaluation()
    for part in parts:
        result.nats += part.nats
        result.tokens += part.tokens
        result.correct += part.correct
        result.seconds += part.seconds
        result.reliability = result.reliability + part.reliability
    return result


def each(logits_of: Logits, windows: Iterable[Batch]) -> Iterator[Evaluation]:
    """Measure one batch after another, as they are asked for; those in which no token counts are left out."""
    for part in predictions(logits_of, windows):
        yield summary(part)


def summary(part: Predictions) -> Evaluation:
    """The sums over predictions."""
    table = reliability(part.confidence, part.correct)
    nats = float(part.nats.sum(dtype=np.float64))
    return Evaluation(nats, len(part.nats), int(part.correct.sum()), seconds=part.seconds, reliability=table)


def predictions(logits_of: Logits, windows: Iterable[Batch]) -> Iterator[Predictions]:
    """Each token of one batch after another, as they are asked for; batches in which none counts are left out."""
    for tokens, mask in windows:
        if not mask.any():
            continue
        began = time.perf_counter()
        first = int(np.argmax(mask.any(axis=0)))  # what lies before is context only: its logits are not looked at
        rows, counted = mx.array(tokens), mask[:, first:] > 0
        logits = logits_of(rows[:, :-1])[:, first:].astype(mx.float32)  # (B, t, V)
        targets = rows[:, 1 + first :]
        best = mx.argmax(logits, axis=-1)  # (B, t)
        # As in loss.cross_entropy, whose normaliser is needed twice here and is what costs time.
        normaliser = kernels.logsumexp(logits)  # (B, t)
        nats = normaliser - _at(logits, targets)
        confidence = mx.exp(_at(logits, best) - normaliser)
        correct = best == targets
        mx.eval(nats, confidence, correct)
        found, right, sure = (np.array(array)[counted] for array in (nats, correct, confidence))
        yield Predictions(found, right, sure, time.perf_counter() - began)


def _at(logits: mx.array, ids: mx.array) -> mx.array:
    """Logits (B, t) of one id (B, t) at each place of logits (B, t, V)."""
    return mx.take_along_axis(logits, ids[..., None], axis=-1).squeeze(-1)


def document_sums(nats: NDArray[np.floating], tokens: Tokens, eos_id: int | None) -> tuple[Floats, Floats]:
    """Sums of nats and of tokens, both (D,), over the documents of a stream; what the bootstrap resamples.

    `nats` (M,) are of the first M tokens of the stream that count, in order. Documents end with EOS: a conversation
    whose template closes each turn with it falls into its turns.
    """
    counted = np.flatnonzero(tokens.span(1, len(tokens))[1])[: len(nats)]  # target i is token i + 1
    document = np.cumsum(tokens.ids == eos_id)[counted]  # of target i: the EOS up to token i
    return np.bincount(document, nats).astype(np.float64), np.bincount(document).astype(np.float64)


def within(seconds: float, parts: Iterable[Evaluation]) -> Iterator[Evaluation]:
    """Measurements for as long as another one is expected to fit, judged by the last; the first in any case."""
    end = time.perf_counter() + seconds
    for part in parts:
        yield part
        if time.perf_counter() + part.seconds > end:
            return


class Measuring:
    """Texts measured before and after a lesson, on the same windows, as far as tokens and time allow.

    The windows are those of evaluation without overlap, one at a time, from the start of each text; shorter than
    `seq_len` where that is more than is allowed.
    """

    def __init__(self, logits_of: Logits, seq_len: int) -> None:
        self._logits_of, self._seq_len = logits_of, seq_len
        self._texts: list[tuple[Tokens, int, list[Evaluation]]] = []
        self.seconds = 0.0
        """Time that `before` took, over all texts."""
        self.speed = 0.0
        """Tokens a second, forward, of the fastest window: the first one also reads weights from the disk."""
        self._first: tuple[Tokens, int, Evaluation] | None = None  # what `pace` measured of which text

    def pace(self, text: Tokens, wanted: float) -> float:
        """`speed` on the text's first window, which `before` need not measure again.

        Where that is less than wanted it is looked at twice more: a cold start or other work is no lasting speed.
        """
        length = min(self._seq_len, len(text) - 1)
        for _ in range(TRIES):
            part = next(self._windows(text, length))
            self._first = text, length, part
            self.speed = max(self.speed, length / part.seconds)
            if self.speed >= wanted:
                break
        return self.speed

    def before(self, text: Tokens, at_most: float, seconds: float) -> Evaluation:
        """Measure a text until `at_most` tokens are counted or no further window fits; at least one window."""
        length = min(self._seq_len, len(text) - 1, max(SMALLEST_WINDOW, int(at_most)))
        windows = self._windows(text, length)
        if self._first is not None and self._first[0] is text and self._first[1] == length:
            windows = chain([self._first[2]], self._windows(text, length, 1))
        parts: list[Evaluation] = []
        for part in within(seconds, windows):
            parts.append(part)
            if sum(part.tokens for part in parts) >= at_most:
                break
        self._texts.append((text, length, parts))
        self.seconds += sum(part.seconds for part in parts)
        self.speed = max(self.speed, length / min(part.seconds for part in parts))
        return total(parts)

    def after(self, seconds: float) -> list[tuple[Evaluation, Evaluation]]:
        """(before, after) of each text in its order, of the first at least one window.

        Where the time does not suffice, windows at the end are left out on both sides, and then whole texts.
        """
        end = time.perf_counter() + seconds
        pairs: list[tuple[Evaluation, Evaluation]] = []
        after: list[Evaluation] = []
        for text, length, before in self._texts:
            left = end - time.perf_counter()
            if after and after[-1].seconds > left:
                break
            after = list(islice(within(left, self._windows(text, length)), len(before)))
            pairs.append((total(before[: len(after)]), total(after)))
        return pairs

    def _windows(self, text: Tokens, length: int, start: int = 0) -> Iterator[Evaluation]:
        """Those in which something counts, from number `start`."""
        counting = (batch for batch in evaluation_windows(text, length, length) if batch[1].any())
        return each(self._logits_of, islice(counting, start, None))
