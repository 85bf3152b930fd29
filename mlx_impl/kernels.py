"""The few operations that decide the speed of a step: SiLU, softmax attention and the loss over a large vocabulary.

On a GPU they are MLX's own kernels. MLX's CPU backend spends 22 ns on an exponential, on one thread, so that softmax
and SiLU cost more than all matrix products of the model; a power of e costs a third of that. Any other operation over
an array of many megabytes takes four times as long there as over one that fits a cache. So the same functions are
written with powers, in blocks, and with gradients of their own that keep little of the forward pass.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_impl.cache import Mask

ROWS = 512
"""Positions whose logits exist at one time while the loss is computed: (512, 49152) float32 is 100 MB."""

LOGITS = 6 * 2**20
"""The same on a CPU, as a number of logits, and fewer: MLX allocates for up to a hundred operations beyond the one that
it computes there, and so for half a dozen chunks."""

QUERIES = 64
"""Queries whose scores exist at one time on a CPU. Causal ones are spared the keys that come after the block."""

SMALL = 2**20
"""Elements up to which SwiGLU keeps its sigmoid for the backward pass: of larger ones it is a tenth of a LoRA step's
memory, of smaller ones to compute it again is a twentieth of the step's time."""

MANY = 2**17
"""Numbers whose sum is no longer right to five digits on a CPU; fewer are added faster than as products."""

LOWEST, HIGHEST = -127 * math.log(2), 127 * math.log(2)
"""Between these a power of two is a float32; at the lowest it is 0, so that what is masked counts nothing at all."""

ROUNDS = 1.5 * 2**23 + 127
"""Added to a whole number n, it leaves n + 127 in the last bits of a float32: the bits of the exponent of 2^n."""

POLYNOMIAL = (0.99999970701, 0.49999149193, 0.16667636581, 0.041897975353, 0.008290306194)
"""(e^r - 1) / r for |r| at most ln 2 / 2, coefficients of r^0 to r^4: of all such e^r has the least relative error,
9.2e-8."""

MASKED = -1e30
"""Added to a score that must not be seen; finite, so that nothing becomes NaN."""


def _custom(function: Callable) -> Any:
    """`mx.custom_function`, of which the type is not known."""
    return mx.custom_function(function)


def on_cpu() -> bool:
    """Whether the default device is the CPU."""
    return mx.default_device().type == mx.DeviceType.cpu


def _chunks(positions: int, vocabulary: int) -> list[slice]:
    """Positions whose logits are computed together."""
    rows = max(1, LOGITS // vocabulary) if on_cpu() else ROWS
    return [slice(start, start + rows) for start in range(0, positions, rows)]


_compiling = False


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """While what is called is traced for `mx.compile`, which makes one loop of operations that follow each other."""
    global _compiling
    before, _compiling = _compiling, True
    try:
        yield
    finally:
        _compiling = before


def compiled(function: Callable, **state: Any) -> Callable:
    """`mx.compile` of a function that calls these operations; `state` as there."""

    @functools.wraps(function)
    def traced(*arguments: Any) -> Any:
        with compiling():
            return function(*arguments)

    result: Callable = mx.compile(traced, **state)
    return result


def exp(x: mx.array) -> mx.array:
    """e to the x, any shape; float32 on a CPU in a third of MLX's own time or less, and there for x up to 88."""
    if not on_cpu() or x.dtype != mx.float32:
        return mx.exp(x)
    result: mx.array = _exp_of_simple_operations(x) if _compiling else mx.power(math.e, x)
    return result


@_custom
def _exp_of_simple_operations(x: mx.array) -> mx.array:
    """The same as 2^n e^r, n whole and |r| at most ln 2 / 2. NaN stays NaN.

    One after the other they take as long as a power. As one loop they take a quarter, because a C++ compiler makes
    vector instructions of them.
    """
    x = mx.minimum(mx.maximum(x, LOWEST), HIGHEST)
    rounded = x * (1 / math.log(2)) + ROUNDS
    r = x - (rounded - ROUNDS) * math.log(2)
    a, b, c, d, e = POLYNOMIAL
    square = r * r
    part = (1 + a * r) + square * ((b + c * r) + square * (d + e * r))
    return part * mx.view(mx.left_shift(mx.view(rounded, mx.int32), 23), mx.float32)


@_exp_of_simple_operations.vjp
def _exp_vjp(primal: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    return cotangent * output


def sum_of_squares(x: mx.array) -> mx.array:
    """Of an array of any shape, scalar float32.

    MLX's CPU backend adds numbers up one after the other: of the 28 million squares of an embedding 7 % are lost to
    rounding. Rows as products with themselves are right to six digits, and four times as fast.
    """
    x = x.astype(mx.float32)
    if not on_cpu() or x.ndim < 2 or x.size < MANY:
        return x.square().sum()
    rows = x.reshape(-1, 1, x.shape[-1])
    return (rows @ rows.swapaxes(1, 2)).sum()


def logsumexp(x: mx.array) -> mx.array:
    """log(sum(exp(x))) over the last axis of float32 (..., V): (...)."""
    if not on_cpu():
        return mx.logsumexp(x, axis=-1)
    highest = mx.stop_gradient(x.max(axis=-1, keepdims=True))
    return mx.log(exp(x - highest).sum(axis=-1)) + highest.squeeze(-1)


def _sigmoid(x: mx.array) -> mx.array:
    if _compiling:
        power = exp(x)
        return power / (1 + power)
    return 1 / (1 + mx.power(1 / math.e, x))


@_custom
def _swiglu(gate: mx.array, up: mx.array) -> tuple[mx.array, mx.array]:
    sigmoid = _sigmoid(gate)
    return gate * sigmoid * up, sigmoid


@_swiglu.vjp
def _swiglu_vjp(
    primals: Sequence[mx.array], cotangents: Sequence[mx.array], outputs: Sequence[mx.array]
) -> tuple[mx.array, mx.array]:
    (gate, up), cotangent = primals, cotangents[0]
    if gate.size <= SMALL:
        sigmoid = outputs[1]
    else:  # of another array, as `mx.compile` sees it, which would keep what the forward pass computes of the same
        sigmoid = _sigmoid(mx.depends([gate], [cotangent])[0])
    silu = gate * sigmoid
    return cotangent * up * (sigmoid + silu * (1 - sigmoid)), cotangent * silu


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """gate * sigmoid(gate) * up, any shape (Shazeer 2020)."""
    if not on_cpu() or gate.dtype != mx.float32:
        return nn.silu(gate) * up
    result: mx.array = _swiglu(gate, up)[0]
    return result


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
    K = k.shape[1]
    if not on_cpu() or T == 1 or q.dtype != mx.float32:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    if mask is not None and not isinstance(mask, str) and mask.dtype == mx.bool_:
        mask = mx.where(mask, 0.0, MASKED)
    out = _attention_in_blocks((q * scale).reshape(B, K, H // K, T, d), k, v, mask)  # (B, T, K, H / K, d)
    return out.reshape(B, T, H, d).swapaxes(1, 2)


def _attention_in_blocks(q: mx.array, k: mx.array, v: mx.array, mask: Mask) -> mx.array:
    """Attention of scaled queries (B, K, G, T, d), G of them to a key, block after block: (B, T, K, G, d).

    Of each block of queries the backward pass finds the powers of its scores (B, K, G t, s) and their sums, which turn
    them into probabilities. It divides what is narrower by the sums instead.
    """
    B, K, G, T, d = q.shape
    S = k.shape[2]
    blocks = [slice(start, min(start + QUERIES, T)) for start in range(0, T, QUERIES)]
    seen = [S - T + block.stop if isinstance(mask, str) else S for block in blocks]  # keys
    bias = _causal(T, S) if isinstance(mask, str) else mask

    def stacked(x: mx.array, block: slice) -> mx.array:
        """The rows of a block, those that share a key below each other, so that no key is copied: (B, K, G t, ...)."""
        return x[:, :, :, block].reshape(B, K, -1, x.shape[-1])

    @_custom
    def attend(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, ...]:
        outs, kept = [], []
        for block, s in zip(blocks, seen, strict=True):
            scores = stacked(q, block) @ k[:, :, :s].swapaxes(-1, -2)
            if bias is not None:
                scores = (scores.reshape(B, K, G, -1, s) + bias[block, :s]).reshape(scores.shape)
            powers = exp(scores - scores.max(axis=-1, keepdims=True))
            sums = powers.sum(axis=-1, keepdims=True)
            outs.append(((powers @ v[:, :, :s]) / sums).reshape(B, K, G, -1, d).transpose(0, 3, 1, 2, 4))
            kept += [powers, sums]
        return mx.concatenate(outs, axis=1), *kept

    @attend.vjp
    def gradients(
        primals: Sequence[mx.array], cotangents: Sequence[mx.array], outputs: Sequence[mx.array]
    ) -> tuple[mx.array, ...]:
        q, k, v = primals
        by_out = cotangents[0].transpose(0, 2, 3, 1, 4)  # (B, K, G, T, d)
        means = (cotangents[0] * outputs[0]).sum(axis=-1, keepdims=True).transpose(0, 2, 3, 1, 4)
        by_q: list[mx.array] = []
        by_k = by_v = mx.zeros((B, K, 0, d))
        for block, s, powers, sums in zip(blocks, seen, outputs[1::2], outputs[2::2], strict=True):
            slope = stacked(by_out, block) / sums
            by_scores = powers * (slope @ v[:, :, :s].swapaxes(-1, -2) - stacked(means, block) / sums)
            by_q.append((by_scores @ k[:, :, :s]).reshape(B, K, G, -1, d))
            by_k = _added(by_k, by_scores.swapaxes(-1, -2) @ stacked(q, block))
            by_v = _added(by_v, powers.swapaxes(-1, -2) @ slope)
        return mx.concatenate(by_q, axis=3), by_k, by_v

    result: mx.array = attend(q, k, v)[0]
    return result


def _added(total: mx.array, part: mx.array) -> mx.array:
    """The sum of (B, K, S, d) and (B, K, S', d), S' at least S, of which the shorter counts as zero behind its end."""
    S = total.shape[2]
    first = total + part[:, :, :S]
    return first if part.shape[2] == S else mx.concatenate([first, part[:, :, S:]], axis=2)


def _loss_and_slopes(
    hidden: mx.array, weight: mx.array, targets: mx.array, mask: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """(sum of masked losses, its gradient by hidden (N, D), by weight (V, D)) of hidden (N, D) and targets (N,).

    Chunk after chunk, so that the logits of all positions never exist at once. What would be done to all (rows, V)
    slopes is done to what they are multiplied with: slope = exponentials * counts / norm, less counts at the target.
    A chunk waits for the gradient by the one before, also where only the loss is asked for.
    """
    total = mx.array(0.0)
    by_hidden: list[mx.array] = []
    by_weight = mx.zeros(weight.shape, weight.dtype)
    for chunk in _chunks(len(targets), len(weight)):
        rows, chosen, counts = _after(by_hidden, hidden[chunk]), targets[chunk, None], mask[chunk, None]
        logits = (rows @ weight.T).astype(mx.float32)
        highest = logits.max(axis=-1, keepdims=True)
        at_target = mx.take_along_axis(logits, chosen, axis=-1)
        (logits,) = mx.depends([logits], [highest, at_target])  # so that exponentials can take the place of logits
        exponentials = exp(logits - highest)
        norm = exponentials.sum(axis=-1, keepdims=True)
        total = total + ((mx.log(norm) + highest - at_target) * counts).sum()
        share = counts / norm
        if weight.dtype != mx.float32:  # a product with unnormalised ones could overflow float16
            exponentials, share = (exponentials / norm).astype(weight.dtype), counts
        by_hidden.append(share * (exponentials @ weight) - counts * weight[chosen.squeeze(-1)])
        by_weight = by_weight + exponentials.T @ (share * rows).astype(weight.dtype)
    by_weight = by_weight.at[targets].add((-mask[:, None] * hidden).astype(weight.dtype))
    return total, mx.concatenate(by_hidden), by_weight


def _after(earlier: list[mx.array], rows: mx.array) -> mx.array:
    """`rows`, but not before the last of `earlier` is there: what does not wait may be computed at once, and kept."""
    return mx.depends([rows], earlier[-1:])[0] if earlier else rows


def summed_cross_entropy(hidden: mx.array, weight: mx.array, targets: mx.array, mask: mx.array) -> mx.array:
    """Sum over positions of mask * -log p(target), nats, scalar float32: the head and the loss in one.

    hidden (..., D), weight (V, D), targets and mask (...). Differentiable by hidden and weight.
    """
    # The slopes are closed over: as outputs of the function they would be computed whether or not they are asked for,
    # and a frozen head's (V, D) costs as much as the logits. They are given away once: the graph of slopes that nobody
    # asks for would hold the exponentials of all chunks.
    flat, frozen = mx.stop_gradient(hidden.reshape(-1, hidden.shape[-1])), mx.stop_gradient(weight)
    total, *slopes = _loss_and_slopes(flat, frozen, targets.reshape(-1), mask.reshape(-1))

    @_custom
    def loss(hidden: mx.array, weight: mx.array) -> mx.array:
        return total

    @loss.vjp
    def gradients(primals: Sequence[mx.array], cotangent: mx.array, output: mx.array) -> tuple[mx.array, mx.array]:
        hidden, weight = primals
        by_weight, by_hidden = slopes.pop(), slopes.pop()
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
    by_hidden: list[mx.array] = []
    for chunk in _chunks(len(hidden), len(weight)):
        counts = mask[chunk, None]
        ours, theirs = (_after(by_hidden, states[chunk]) for states in (hidden, teacher))
        ours, theirs = ((rows @ weight.T).astype(mx.float32) for rows in (ours, theirs))
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
