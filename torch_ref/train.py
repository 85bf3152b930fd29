"""Training steps again, in PyTorch: accumulate, divide by tokens once, clip, update.

One eager loop with nothing fused or compiled; the losses of `mlx_impl.train.train_steps` must follow these.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from torch_ref.loss import next_token_loss
from torch_ref.optim import AdamW, clip_by_global_norm

Batch = tuple[Tensor, Tensor]
Penalty = Callable[[Mapping[str, Tensor]], Tensor]


def train_steps(
    model: nn.Module,
    batches: Sequence[Sequence[Batch]],
    learning_rates: Sequence[float],
    *,
    weight_decay: float,
    max_grad_norm: float,
    betas: tuple[float, float],
    eps: float,
    penalty: Penalty | None = None,
    optimizer: AdamW | None = None,
) -> list[float]:
    """Train what requires a gradient, one optimizer step an entry of `batches`; returns the mean losses.

    A step is a list of microbatches (tokens (B, T+1), mask (B, T)). Their gradients of summed losses add up
    and are divided by the step's number of tokens once, so microbatches weigh by tokens. Losses are in nats
    per token, before the step's update. Dropout acts if the model is in training mode.

    `penalty`, of the trained parameters by name and in nats per token, adds its gradient to that of the mean loss,
    before clipping; it is not part of the losses returned. `optimizer`, one for the trained parameters in the model's
    order, goes on with its moments and its own settings; else a new one begins.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parameters = list(trained.values())
    optimizer = optimizer or AdamW(parameters, 0.0, betas, eps, weight_decay)
    losses = []
    for batch, learning_rate in zip(batches, learning_rates, strict=True):
        loss_sum, count, gradients = _accumulated(model, parameters, batch)
        gradients = [g / max(count, 1.0) for g in gradients]
        if penalty is not None:
            more = torch.autograd.grad(penalty(trained), parameters)
            gradients = [g + extra for g, extra in zip(gradients, more, strict=True)]
        clipped, _ = clip_by_global_norm(gradients, max_grad_norm)
        optimizer.learning_rate = learning_rate
        optimizer.apply_gradients(clipped)
        losses.append(loss_sum / max(count, 1.0))
    return losses


def _accumulated(
    model: nn.Module, parameters: Sequence[Tensor], batch: Sequence[Batch]
) -> tuple[float, float, list[Tensor]]:
    """Summed loss in nats, number of tokens and summed gradients over the microbatches of one step."""
    loss_sum, count = 0.0, 0.0
    gradients = [torch.zeros_like(p) for p in parameters]
    for tokens, mask in batch:
        loss, n = next_token_loss(model, tokens, mask)
        more = torch.autograd.grad(loss, list(parameters))
        gradients = [total + g for total, g in zip(gradients, more, strict=True)]
        loss_sum, count = loss_sum + loss.item(), count + n.item()
    return loss_sum, count, gradients
