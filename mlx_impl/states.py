"""What a text is about, as the base sees it: its hidden states a quarter of the way up, averaged over a stretch.

Counted words say little about another part of the same book; the base has read of most things and puts what is alike
near each other. Means over `STRETCH` tokens of one domain lie around the domain's own mean, text of no domain around
that of what the base itself makes up. Under one covariance for all, Fisher's linear discriminant tells them apart:
the router adds that to its words.
"""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_impl import generate
from mlx_impl.base import BaseModel
from mlx_impl.device import compute_dtype, dtype_name, keep_quantised
from mlx_impl.tokenizer import Tokenizer

Floats = NDArray[np.float32]

STRETCH = 64
"""Tokens of a stretch of text that one mean is taken over."""

MOST = 64
"""Means kept of a domain, however many lessons it had."""

PER_LESSON = 24
"""Means taken of a lesson, at most."""

MADE_UP = 16
"""Stretches that the base makes up, for text of no domain."""

TOKENS_OF_ONE = STRETCH // 4
"""What the states of a stretch cost, in tokens of a whole forward pass."""

MEANS, BACKGROUND, MADE_WITH = "means", "background", "made_with"
"""Names in a version's statistics: of the two, (N, D) each, and of `made_with` for the background."""

PRICE = 64
"""Of the background, in stretches that are read: it goes through all of the base, token by token, side by side."""

ROWS = 8
"""Stretches that go through the base together."""

SEED = 20
"""Of the background, the same for all domains of a base."""


def mean_states(model: BaseModel, rows: NDArray[np.int32], start: int) -> Floats:
    """Means of the bare base's states over each of the texts (N, T), each after the token `start`: (N, D).

    The states are those that enter the layer a quarter of the way up. The first position's is left out: it takes up
    attention that has nowhere to go, and is as large for every text.
    """
    layers: Any = model.layers
    depth = len(layers) // 4
    layer = layers[depth]
    means = []
    for at in range(0, len(rows), ROWS):
        part = rows[at : at + ROWS]
        tokens = np.concatenate([np.full((len(part), 1), start, np.int32), part], axis=1)
        seen = _Seen(layer)
        layers[depth] = seen
        try:
            model.hidden(mx.array(tokens))  # lazy: of this, only what is asked for below is computed
        finally:
            layers[depth] = layer
        means.append(np.array(seen.states[:, 1:].astype(mx.float32).mean(axis=1)))
    return np.concatenate(means)


class _Seen:
    """Stands for a layer during one call, and keeps what goes into it."""

    states: mx.array  # (B, T, D)

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def __call__(self, states: mx.array, *rest: Any, **named: Any) -> Any:
        self.states = states
        return self._layer(states, *rest, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def stretches(ids: NDArray[np.int32], count: int) -> NDArray[np.int32]:
    """At most `count` stretches of a text's ids (N,), spread over all of it: (M, STRETCH), or one shorter one."""
    if len(ids) < STRETCH:
        return ids[None]
    wanted = min(count, len(ids) // STRETCH)
    starts = np.linspace(0, len(ids) - STRETCH, wanted).astype(int)
    return np.stack([ids[start : start + STRETCH] for start in starts])


def background(model: BaseModel, tokenizer: Tokenizer) -> Floats:
    """Means of texts that the bare base makes up, (MADE_UP, D): what it expects before it knows the subject."""
    start = first_token(tokenizer)
    drawn = generate.sampled_rows(model, start, MADE_UP, STRETCH, mx.random.key(SEED), tokenizer.vocab_size)
    return mean_states(model, np.array(drawn, np.int32), start)


def made_with() -> Floats:
    """What the base's own text depends on beside the base, the kind of its numbers and of the processor, as codes (N,).

    Made with others, it differs in the last digits or in its words.
    """
    how = f"{dtype_name(compute_dtype())} {mx.default_device().type} {'packed' if keep_quantised() else 'plain'}"
    return np.array([ord(letter) for letter in how], np.float32)


def first_token(tokenizer: Tokenizer) -> int:
    """What stands before a text: the end of another one, or what the tokenizer begins with."""
    ids = (tokenizer.eos_id, tokenizer.bos_id)
    return next((id for id in ids if id is not None), 0)


def merged(before: Floats, new: Floats, share: float) -> Floats:
    """The means of a domain's earlier lessons and of a new one, at most `MOST`, of which it gets its share of text."""
    if len(before) + len(new) <= MOST:
        return np.concatenate([before, new])
    taken = min(len(new), max(1, MOST - len(before), round(share * MOST)))
    return np.concatenate([_spread(before, MOST - taken), _spread(new, taken)])


def _spread(rows: Floats, count: int) -> Floats:
    """`count` of the rows, or all, spread over them."""
    return rows if len(rows) <= count else rows[np.linspace(0, len(rows) - 1, count).astype(int)]


class Discriminant:
    """Fisher's linear discriminant (1936) between domains and the background, from means of stretches."""

    def __init__(self, domains: Mapping[str, Floats], background: Floats) -> None:
        """`domains` maps names to means (N, D), N >= 1. The covariance is shrunk halfway to a sphere of its size."""
        groups = [np.asarray(group, np.float64) for group in (background, *domains.values())]
        centres = np.stack([group.mean(axis=0) for group in groups])  # (1 + domains, D)
        spread = np.concatenate([group - centre for group, centre in zip(groups, centres, strict=True)])
        freedom = max(1, len(spread) - len(groups))
        covariance = spread.T @ spread / freedom
        covariance += max(np.trace(covariance) / len(covariance), 1e-12) * np.eye(len(covariance))
        offsets = centres[1:] - centres[0]
        self._names = list(domains)
        self._weights = np.linalg.solve(covariance, offsets.T).T  # (domains, D)
        self._middle = ((centres[1:] + centres[0]) / 2 * self._weights).sum(axis=1)

    def evidence(self, mean: NDArray[np.floating], tokens: int) -> dict[str, float]:
        """How much likelier a mean (D,) over so many tokens is in each domain than in the background, in nats.

        A mean over fewer tokens than a stretch strays further, and counts for less.
        """
        found = (self._weights @ np.asarray(mean, np.float64) - self._middle) * tokens / STRETCH
        return dict(zip(self._names, found.tolist(), strict=True))
