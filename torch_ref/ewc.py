"""Elastic weight consolidation again, in PyTorch, from its definition and under the names of `mlx_impl.ewc`.

Parameters, anchors and Fishers are flat mappings of tensors by name; `logits_of` is a function of such a mapping.
Sampling takes a forward pass of its own here, so that the sampled targets can also be given.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from torch_ref.loss import cross_entropy

Params = Mapping[str, Tensor]
LogitsOf = Callable[[Params, Tensor], Tensor]
"""(parameters, tokens (B, T)) -> logits (B, T, V)."""

LEAST_DIVERGENCE = 1e-6
"""Nats per token below which a divergence is the rounding of float32."""


def logits_of(model: nn.Module) -> LogitsOf:
    """The model's logits as a function of its trained parameters; the model keeps those it has.

    Dropout acts in training mode: switch it off first.
    """
    return lambda parameters, tokens: torch.func.functional_call(model, dict(parameters), (tokens,))


@torch.no_grad()
def sample_targets(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A target for every position, (...) from logits (..., V): independent draws from softmax(logits) in float32."""
    probabilities = torch.softmax(logits.float(), dim=-1).flatten(0, -2)  # (N, V)
    return torch.multinomial(probabilities, 1, generator=generator).reshape(logits.shape[:-1])


def squared_gradients(
    logits_of: LogitsOf, parameters: Params, inputs: Tensor, targets: Tensor, mask: Tensor
) -> dict[str, Tensor]:
    """(d/d theta of the summed negative log-likelihood)^2, in nats^2 by parameter, from one backward pass.

    `inputs`, `targets`, `mask` are (B, T); target t stands at position t, already shifted. The root of the mask
    goes into the sum, hence itself into the squares.
    """
    leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
    losses = cross_entropy(logits_of(leaves, inputs), targets) * mask.sqrt()  # (B, T)
    gradients = torch.autograd.grad(losses.sum(), list(leaves.values()))
    return {name: gradient.float() ** 2 for name, gradient in zip(leaves, gradients, strict=True)}


def fisher_diagonal(
    logits_of: LogitsOf, parameters: Params, batches: Iterable[tuple[Tensor, Tensor]], generator: torch.Generator
) -> dict[str, Tensor]:
    """Diagonal of the Fisher matrix per counted token, in nats^2, from windows (tokens (B, T+1), mask (B, T)).

    One backward pass a batch, of the summed loss under targets sampled from the model. Raises ValueError if no
    token is counted.
    """
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    count = 0.0
    for tokens, mask in batches:
        inputs = tokens[:, :-1]
        with torch.no_grad():
            targets = sample_targets(logits_of(parameters, inputs), generator)
        for name, square in squared_gradients(logits_of, parameters, inputs, targets, mask).items():
            total[name] += square
        count += mask.sum().item()
    if not count > 0:
        raise ValueError("the Fisher needs at least one counted token")
    return {name: square / count for name, square in total.items()}


def consolidate(old: Params | None, new: Params, gamma: float) -> dict[str, Tensor]:
    """Online EWC: gamma * F_old + F_new by name (Schwarz et al. 2018, section 3.2); `new` itself if `old` is None.

    Raises ValueError for gamma outside [0, 1] and KeyError for a name in one only.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma = {gamma} must lie in [0, 1]")
    if old is None:
        return dict(new)
    if old.keys() != new.keys():
        raise KeyError(f"in one Fisher only: {', '.join(sorted(old.keys() ^ new.keys()))}")
    return {name: gamma * old[name] + new[name] for name in new}


def calibrated(fisher: Params, params: Params, other: Params, divergence: float) -> dict[str, Tensor]:
    """A Fisher at `params`, scaled so that `ewc_penalty` of `other` is the `divergence` measured there, in nats.

    Comes back as it is where either of the two is nothing, or below what float32 can measure.
    """
    expected = ewc_penalty(other, params, fisher, 1.0).item()
    factor = divergence / expected if divergence > LEAST_DIVERGENCE and expected > 0 else 1.0
    return {name: factor * array for name, array in fisher.items()}


def ewc_penalty(params: Params, anchor: Params, fisher: Params, strength: float) -> Tensor:
    """strength/2 * sum_i F_i (theta_i - theta*_i)^2 (Kirkpatrick et al. 2017, eq. 3), a scalar in nats per token.

    Raises KeyError naming the first parameter that has no Fisher entry.
    """
    total = torch.zeros(())
    for name in sorted(params):
        if name not in fisher:
            raise KeyError(f"{name} has no Fisher entry")
        total = total + torch.sum(fisher[name] * (params[name] - anchor[name]) ** 2)
    return strength * total / 2
