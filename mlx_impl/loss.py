"""The loss, returned as (sum, number of tokens), so that accumulation and evaluation weigh by tokens.

Labels are shifted here and nowhere else: position t of a window predicts token t + 1.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from mlx_impl import kernels
from mlx_impl.base import BaseModel


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """Negative log-likelihood in nats of targets (...) under logits (..., V); float32, shape (...)."""
    logits = logits.astype(mx.float32)
    chosen = mx.take_along_axis(logits, targets[..., None], axis=-1).squeeze(-1)
    return kernels.logsumexp(logits) - chosen


def divergence(logits: mx.array, teacher: mx.array) -> mx.array:
    """KL(teacher || ours) in nats of the distributions under two logits (..., V); float32, shape (...)."""
    ours, theirs = (x.astype(mx.float32) for x in (logits, teacher))
    ours, theirs = (x - kernels.logsumexp(x)[..., None] for x in (ours, theirs))
    return (kernels.exp(theirs) * (theirs - ours)).sum(axis=-1)


def next_token_loss(model: BaseModel, tokens: mx.array, mask: mx.array) -> tuple[mx.array, mx.array]:
    """Masked loss of windows `tokens` (B, T+1); `mask` (B, T) weighs target t+1 of each row.

    Returns the sum in nats and the sum of the mask, both scalar float32.
    """
    if model.head_weight is None:
        losses = cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]) * mask  # (B, T)
        return losses.sum(), mask.sum()
    hidden = model.hidden(tokens[:, :-1])  # (B, T, D)
    return kernels.summed_cross_entropy(hidden, model.head_weight, tokens[:, 1:], mask), mask.sum()


def summed_divergence(model: BaseModel, hidden: mx.array, teacher: mx.array, weights: mx.array) -> mx.array:
    """KL(teacher || ours) in nats, weighed by (R, T) and summed, of what two `model.hidden` (R, T, ...) predict."""
    if model.head_weight is None:
        return (divergence(model.head(hidden), model.head(teacher)) * weights).sum()
    return kernels.summed_divergence(hidden, teacher, model.head_weight, weights)


def held_loss_of(model: BaseModel) -> Callable[..., tuple[mx.array, mx.array]]:
    """As `loss_of`, also of batches whose last rows are held to a teacher's predictions, with or without their tokens.

    The function takes tokens (B, T + 1) and mask (C, T) of the first C rows. Where rows are held it also takes what
    `model.hidden` gives of the teacher for the last R of them (R, T, ...), and weights (R, T) of their divergence in
    nats, which is added to the sum.
    """

    def loss(
        parameters: Any, tokens: mx.array, mask: mx.array, teacher: mx.array | None = None, held: mx.array | None = None
    ) -> tuple[mx.array, mx.array]:
        model.update(parameters)
        if teacher is None or held is None:
            return next_token_loss(model, tokens, mask)
        hidden: mx.array = model.hidden(tokens[:, :-1])  # (B, T, D)
        learned, rest = hidden[: len(mask)], hidden[len(hidden) - len(held) :]
        targets = tokens[: len(mask), 1:]
        head = model.head_weight  # (V, D)
        if head is None:
            total = (cross_entropy(model.head(learned), targets) * mask).sum()
        else:
            total = kernels.summed_cross_entropy(learned, head, targets, mask)
        return total + summed_divergence(model, rest, teacher, held), mask.sum()

    return loss


def window_losses(model: BaseModel, tokens: mx.array, mask: mx.array) -> mx.array:
    """Mean loss of each window, (B,) in nats per token that counts; a window in which nothing counts has 0."""
    losses = cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]) * mask  # (B, T)
    return losses.sum(axis=1) / mx.maximum(mask.sum(axis=1), 1)


def loss_of(
    model: BaseModel, dtype: mx.Dtype = mx.float32
) -> Callable[[Any, mx.array, mx.array], tuple[mx.array, mx.array]]:
    """`next_token_loss` as a function of the trained parameters, which are computed with in `dtype`.

    They stay float32 outside, so that small updates are not lost to rounding. The function leaves what it was
    called with in the model.
    """

    def loss(parameters: Any, tokens: mx.array, mask: mx.array) -> tuple[mx.array, mx.array]:
        model.update(tree_map(lambda p: p.astype(dtype), parameters))
        return next_token_loss(model, tokens, mask)

    return loss
