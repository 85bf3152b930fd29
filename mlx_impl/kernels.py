"""The few operations that decide the speed of a step: SiLU, softmax attention and the loss over a large vocabulary.

On a GPU they are MLX's own kernels. MLX's CPU backend spends 22 ns on an exponential, on one thread, so that softmax
and SiLU cost more than all matrix products of the model; a power of two costs a third of that. There the same
functions are written with powers of two and gradients that reuse what the forward pass computed.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_impl.cache import Mask

LOG2_E = math.log2(math.e)
ROWS = 512
"""Positions whose logits exist at one time while the loss is computed: (512, 49152) float32 is 100 MB."""

MASKED = -1e30
"""Added to a score that must not be seen; finite, so that nothing becomes NaN."""


def _custom(function: Callable) -> Any:
    """`mx.custom_function`, of which the type is not known."""
    return mx.custom_function(function)


def on_cpu() -> bool:
    """Whether the default device is the CPU."""
    return mx.default_device().type == mx.DeviceType.cpu


@_custom
def _power(x: mx.array) -> mx.array:
    return mx.power(mx.array(2.0, x.dtype), x * LOG2_E)


@_power.vjp
def _power_vjp(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    return cotangent * output


def exp(x: mx.array) -> mx.array:
    """e to the x, any shape; on a CPU in a third of MLX's own time."""
    result: mx.array = _power(x) if on_cpu() else mx.exp(x)
    return result


def logsumexp(x: mx.array) -> mx.array:
    """log(sum(exp(x))) over the last axis of float32 (..., V): (...)."""
    if not on_cpu():
        return mx.logsumexp(x, axis=-1)
    highest = mx.stop_gradient(x.max(axis=-1, keepdims=True))
    return mx.log(exp(x - highest).sum(axis=-1)) + highest.squeeze(-1)


@_custom
def _silu_and_sigmoid(x: mx.array) -> tuple[mx.array, mx.array]:
    sigmoid = 1 / (1 + exp(-x))
    return x * sigmoid, sigmoid


@_silu_and_sigmoid.vjp
def _silu_vjp(x: mx.array, cotangents: Sequence[mx.array], outputs: Sequence[mx.array]) -> mx.array:
    y, sigmoid = outputs
    return cotangents[0] * (sigmoid + y * (1 - sigmoid))


def silu(x: mx.array) -> mx.array:
    """x * sigmoid(x), any shape."""
    return _silu_and_sigmoid(x)[0] if on_cpu() else nn.silu(x)


@_custom
def _softmax(scores: mx.array) -> mx.array:
    shifted = exp(scores - scores.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


@_softmax.vjp
def _softmax_vjp(scores: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    weighted = output * cotangent
    return weighted - output * weighted.sum(axis=-1, keepdims=True)


@functools.lru_cache(maxsize=8)
def _causal(queries: int, keys: int) -> mx.array:
    """(T, S): 0 where a query may see a key, else `MASKED`; the last query sees all."""
    bias = mx.where(mx.tril(mx.ones((queries, keys), dtype=mx.bool_), keys - queries), 0.0, MASKED)
    mx.eval(bias)
    return bias


def attention(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: Mask) -> mx.array:
    """Softmax attention of queries (B, H, T, d) over keys and values (B, K, S, d), H a multiple of K: (B, H, T, d).

    `mask` is "causal" (the queries are the last of the positions), an additive or boolean (T, S) array, or None.
    """
    B, H, T, d = q.shape
    K, S = k.shape[1:3]
    if not on_cpu() or T == 1 or q.dtype != mx.float32:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    groups = H // K  # queries that share a key: their rows are stacked, so that no key is copied
    scores = ((q * scale).reshape(B, K, groups * T, d) @ k.swapaxes(-1, -2)).reshape(B, K, groups, T, S)
    if isinstance(mask, str):
        scores = scores + _causal(T, S)
    elif mask is not None:
        scores = mx.where(mask, scores, MASKED) if mask.dtype == mx.bool_ else scores + mask
    weights = _softmax(scores).reshape(B, K, groups * T, S)
    return (weights @ v).reshape(B, H, T, d)


def _loss_and_slopes(
    hidden: mx.array, weight: mx.array, targets: mx.array, mask: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """(sum of masked losses, its gradient by hidden (N, D), by weight (V, D)) of hidden (N, D) and targets (N,).

    Chunk after chunk, so that the logits of all positions never exist at once.
    """
    total = mx.array(0.0)
    by_hidden: list[mx.array] = []
    by_weight = mx.zeros(weight.shape, weight.dtype)
    for start in range(0, len(targets), ROWS):
        rows = hidden[start : start + ROWS]
        chosen, counts = targets[start : start + ROWS, None], mask[start : start + ROWS, None]
        logits = (rows @ weight.T).astype(mx.float32)
        highest = logits.max(axis=-1, keepdims=True)
        exponentials = exp(logits - highest)
        norm = exponentials.sum(axis=-1, keepdims=True)
        losses = mx.log(norm) + highest - mx.take_along_axis(logits, chosen, axis=-1)
        total = total + (losses * counts).sum()
        slope = exponentials * (counts / norm)
        at_target = mx.take_along_axis(slope, chosen, axis=-1) - counts
        slope = mx.put_along_axis(slope, chosen, at_target, axis=-1).astype(weight.dtype)  # (rows, V)
        by_hidden.append(slope @ weight)
        by_weight = by_weight + slope.T @ rows
    return total, mx.concatenate(by_hidden), by_weight


def summed_cross_entropy(hidden: mx.array, weight: mx.array, targets: mx.array, mask: mx.array) -> mx.array:
    """Sum over positions of mask * -log p(target), nats, scalar float32: the head and the loss in one.

    hidden (..., D), weight (V, D), targets and mask (...). Differentiable by hidden and weight.
    """
    # The slopes are closed over: as outputs of the function they would be computed whether or not they are asked for,
    # and a frozen head's (V, D) costs as much as the logits.
    flat, frozen = mx.stop_gradient(hidden.reshape(-1, hidden.shape[-1])), mx.stop_gradient(weight)
    total, by_hidden, by_weight = _loss_and_slopes(flat, frozen, targets.reshape(-1), mask.reshape(-1))

    @_custom
    def loss(hidden: mx.array, weight: mx.array) -> mx.array:
        return total

    @loss.vjp
    def slopes(primals: Sequence[mx.array], cotangent: mx.array, output: mx.array) -> tuple[mx.array, mx.array]:
        hidden, weight = primals
        by_states = (cotangent * by_hidden).astype(hidden.dtype).reshape(hidden.shape)
        return by_states, (cotangent * by_weight).astype(weight.dtype)

    result: mx.array = loss(hidden, weight)
    return result


@_custom
def _summed_divergence(
    hidden: mx.array, teacher: mx.array, weight: mx.array, mask: mx.array
) -> tuple[mx.array, mx.array]:
    """(sum of masked divergences, its gradient by hidden (N, D)), chunk after chunk as in `_loss_and_slopes`."""
    total = mx.array(0.0)
    by_hidden = []
    for start in range(0, len(hidden), ROWS):
        counts = mask[start : start + ROWS, None]
        ours, theirs = ((states[start : start + ROWS] @ weight.T).astype(mx.float32) for states in (hidden, teacher))
        ours, theirs = (logits - logsumexp(logits)[:, None] for logits in (ours, theirs))  # log-probabilities (rows, V)
        wanted = exp(theirs)
        total = total + (wanted * (theirs - ours) * counts).sum()
        slope = ((exp(ours) - wanted) * counts).astype(weight.dtype)
        by_hidden.append(slope @ weight)
    return total, mx.concatenate(by_hidden)


@_summed_divergence.vjp
def _summed_divergence_vjp(
    primals: Sequence[mx.array], cotangents: Sequence[mx.array], outputs: Sequence[mx.array]
) -> tuple[mx.array, ...]:
    hidden, *others = primals
    return (cotangents[0] * outputs[1]).astype(hidden.dtype), *(mx.zeros_like(other) for other in others)


def summed_divergence(hidden: mx.array, teacher: mx.array, weight: mx.array, mask: mx.array) -> mx.array:
    """Sum over positions of mask * KL(p_teacher || p), nats, scalar float32 (Hinton et al. 2015, temperature 1).

    hidden and teacher (..., D) are final hidden states, weight (V, D) the head of both, mask (...). Differentiable by
    hidden alone: teacher and head are taken as frozen.
    """
    width = hidden.shape[-1]
    return _summed_divergence(hidden.reshape(-1, width), teacher.reshape(-1, width), weight, mask.reshape(-1))[0]
