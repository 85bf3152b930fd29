"""Elastic weight consolidation (Kirkpatrick et al. 2017): the Fisher estimate, the penalty, online accumulation.

Targets are sampled from the model, never taken from the text: only then do the cross terms of a summed loss vanish,
and one backward pass squared is an unbiased estimate for all of its positions. Nothing here knows LoRA; what needs
a model takes `logits_of`, a function of the parameters. A Fisher is a flat mapping of float32 arrays under the
parameters' names, so it is saved as it is.
"""

from collections.abc import Callable, Iterable
from functools import partial

import mlx.core as mx

from mlx_impl.arrays import Arrays, Tree, flatten
from mlx_impl.base import BaseModel
from mlx_impl.loss import cross_entropy

Params = Tree
"""A tree of arrays, or its flat form: both have the same dotted names."""

LogitsOf = Callable[[Params, mx.array], mx.array]
"""(parameters, tokens (B, T)) -> logits (B, T, V)."""

LEAST_DIVERGENCE = 1e-6
"""Nats per token below which a divergence is the rounding of float32."""


def logits_of(model: BaseModel) -> LogitsOf:
    """The model's logits as a function of its trained parameters; the model keeps those it has.

    Dropout acts in training mode: switch it off first, the Fisher is that of the model that answers.
    """

    def logits(parameters: Params, tokens: mx.array) -> mx.array:
        own = model.trainable_parameters()
        model.update(parameters)
        try:
            return model(tokens)  # (B, T, V)
        finally:
            model.update(own)

    return logits


def sample_targets(logits: mx.array, key: mx.array) -> mx.array:
    """A target for every position, (...) from logits (..., V): independent draws from softmax(logits) in float32."""
    return mx.random.categorical(mx.stop_gradient(logits).astype(mx.float32), key=key)


def squared_gradients(
    logits_of: LogitsOf, parameters: Params, inputs: mx.array, targets: mx.array, mask: mx.array
) -> Arrays:
    """(d/d theta of the summed negative log-likelihood)^2, in nats^2 by parameter, from one backward pass.

    `inputs`, `targets`, `mask` are (B, T); target t stands at position t, already shifted. A mask counts positions
    with 0 or 1, and weighs them with anything else: its root goes into the sum, hence itself into the squares.
    """
    return _squared(logits_of, parameters, inputs, mask, lambda logits: targets)


def fisher_diagonal(
    logits_of: LogitsOf, parameters: Params, batches: Iterable[tuple[mx.array, mx.array]], key: mx.array
) -> Arrays:
    """Diagonal of the Fisher matrix per counted token, in nats^2: mean_t E_y[(d log p(y | x_<=t) / d theta)^2].

    `batches` are windows (tokens (B, T+1), mask (B, T)) as for the loss, of which only the first T tokens are read:
    y is one `sample_targets` for each position. Unbiased: given x the draws are independent and each score
    has mean zero, so E[(sum_t s_t)^2] = sum_t E[s_t^2], over positions and rows alike. That needs x to be the
    text; a continuation fed back into the model would bind the positions together.

    A batch costs one forward and one backward pass, and adds one square however many tokens it has: the standard
    error of an entry is about sqrt(2 / batches) of it, so many small batches beat few large ones. The arrays come
    back computed. Raises ValueError if no token is counted.
    """
    total = {name: mx.zeros(p.shape) for name, p in flatten(parameters).items()}
    count = mx.array(0.0)
    for tokens, mask in batches:
        key, draw = mx.random.split(key)
        squares = _squared(logits_of, parameters, tokens[:, :-1], mask, partial(sample_targets, key=draw))
        total = {name: total[name] + square for name, square in squares.items()}
        count = count + mask.sum()
        mx.eval(total, count)  # one batch's activations at a time
    if not count > 0:
        raise ValueError("the Fisher needs at least one counted token")
    fisher = {name: sum_of_squares / count for name, sum_of_squares in total.items()}
    mx.eval(fisher)
    return fisher


def consolidate(old: Params | None, new: Params, gamma: float) -> Arrays:
    """Online EWC: gamma * F_old + F_new by name (Schwarz et al. 2018, section 3.2); `new` itself if `old` is None.

    `new` is the Fisher on the latest lesson alone, else earlier ones count twice. With gamma = 1 nothing fades; below
    it a lesson's weight halves every log(1/2) / log(gamma) lessons. The arrays come back computed, which makes them
    constants in a compiled step. Raises ValueError for gamma outside [0, 1] and KeyError for a name in one only.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma = {gamma} must lie in [0, 1]")
    latest = flatten(new)
    if old is None:
        return latest
    before = flatten(old)
    if before.keys() != latest.keys():
        raise KeyError(f"in one Fisher only: {', '.join(sorted(before.keys() ^ latest.keys()))}")
    fisher = {name: gamma * before[name] + array for name, array in latest.items()}
    mx.eval(fisher)
    return fisher


def calibrated(fisher: Params, params: Params, other: Params, divergence: float) -> Arrays:
    """A Fisher at `params`, scaled so that `ewc_penalty` of `other` is the `divergence` measured there, in nats.

    A diagonal takes no account of parameters that move together, which they all do: what a lesson changed costs many
    times what its diagonal says, the more so the larger the model. `other` had better be far away, such as before
    a lesson. Comes back as it is where either of the two is nothing, or below what float32 can measure.
    """
    expected = float(ewc_penalty(other, params, fisher, 1.0).item())  # type: ignore[arg-type]
    factor = divergence / expected if divergence > LEAST_DIVERGENCE and expected > 0 else 1.0
    scaled = {name: factor * array for name, array in flatten(fisher).items()}
    mx.eval(scaled)
    return scaled


def ewc_penalty(params: Params, anchor: Params, fisher: Params, strength: float) -> mx.array:
    """Elastic weight consolidation: strength/2 * sum_i F_i (theta_i - theta*_i)^2.

    All three trees have the adapter's structure; the result is a scalar in nats, added to a loss in nats per
    token. Zero at the anchor. Kirkpatrick et al. 2017, eq. 3; the factor 1/2 is theirs and not everyone's. With a
    Fisher per token, strength 1 makes it the second-order KL divergence per token from the anchor, as far as the
    Fisher is diagonal (see `calibrated`): the old text then weighs as much as the new.

    An adapter's (A, B) and (cA, B/c) are one function. Rescaling all three trees together changes nothing here, but
    moving from the one to the other costs, and a mixing (A M, M^-1 B) of the rank is seen either way. Only a
    Fisher on the product A @ B would be blind to that, at the price of an entry for every weight of the base.

    Raises KeyError naming the first parameter that has no Fisher entry.
    """
    start, importance = flatten(anchor), flatten(fisher)
    terms = []
    # In the order of names: a tree read from a file has another order, and float sums depend on it.
    for name, theta in sorted(flatten(params).items()):
        if name not in importance:
            raise KeyError(f"{name} has no Fisher entry")
        terms.append((importance[name] * (theta - start[name]).square()).sum())
    return strength / 2 * sum(terms, mx.array(0.0))


def _squared(
    logits_of: LogitsOf,
    parameters: Params,
    inputs: mx.array,
    mask: mx.array,
    targets_of: Callable[[mx.array], mx.array],
) -> Arrays:
    """`squared_gradients` with the targets as a function of the logits: sampling needs no second forward pass."""

    def summed_nll(parameters: Params) -> mx.array:
        logits = logits_of(parameters, inputs)  # (B, T, V)
        losses = cross_entropy(logits, targets_of(logits))  # (B, T)
        return (losses * mx.sqrt(mask)).sum()

    gradients = flatten(mx.grad(summed_nll)(parameters))
    return {name: gradient.astype(mx.float32).square() for name, gradient in gradients.items()}
