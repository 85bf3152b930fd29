"""How well a model predicts a text: loss, perplexity, bits per byte, accuracy.

Takes callables, so that any model under any adapter is measured by the same code. Windows overlap and each token
counts once, with as much context to its left as fits. Bits are per byte of UTF-8, not per token, and therefore
comparable between tokenizers.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_impl.loss import cross_entropy
from mlx_impl.windows import Batch

Logits = Callable[[mx.array], mx.array]


@dataclass
class Evaluation:
    """Sums over the tokens that were predicted; the measures are derived from them."""

    nats: float = 0.0
    tokens: int = 0
    correct: int = 0
    bytes: int | None = None  # of the predicted tokens' text; None where it is not known

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

    def as_json(self) -> dict[str, Any]:
        """What `eval --json` prints."""
        return {
            "tokens": self.tokens,
            "loss": self.loss,
            "perplexity": self.perplexity if math.isfinite(self.perplexity) else None,
            "bits_per_byte": self.bits_per_byte,
            "accuracy": self.accuracy,
        }


def evaluate(
    logits_of: Logits, windows: Iterable[Batch], text_bytes: int | None = None, seconds: float | None = None
) -> Evaluation:
    """Measure `logits_of` (tokens (B, T) -> (B, T, V)) over batches of tokens (B, T+1) and mask (B, T).

    With `seconds` no further batch is begun once they have passed; the first is always finished.
    """
    result = Evaluation(bytes=text_bytes)
    started = time.perf_counter()
    for tokens, mask in windows:
        first = int(np.argmax(mask.any(axis=0)))  # what lies before is context only: its logits are not looked at
        rows, weight = mx.array(tokens), mx.array(mask[:, first:])
        logits = logits_of(rows[:, :-1])[:, first:]  # (B, t, V)
        targets = rows[:, 1 + first :]
        nats = (cross_entropy(logits, targets) * weight).sum()
        correct = ((mx.argmax(logits, axis=-1) == targets) * weight).sum()
        mx.eval(nats, correct)
        result.nats += float(nats.item())  # type: ignore[arg-type]
        result.correct += int(correct.item())  # type: ignore[arg-type]
        result.tokens += int(mask.sum())
        if seconds is not None and time.perf_counter() - started > seconds:
            break
    return result
