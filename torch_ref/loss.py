"""The loss again, in PyTorch: (sum, number of tokens), from the definition and not from `F.cross_entropy`.

Labels are shifted here and nowhere else: position t of a window predicts token t + 1.
"""

import torch
from torch import Tensor, nn


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood in nats of targets (...) under logits (..., V); float32, shape (...).

    -log softmax(z)[y] = log sum_v exp(z_v - m) + m - z_y with m = max z, which keeps exp from overflowing.
    """
    logits = logits.float()
    largest = logits.amax(dim=-1)  # (...)
    mass = torch.exp(logits - largest[..., None]).sum(dim=-1)
    chosen = torch.gather(logits, -1, targets[..., None]).squeeze(-1)
    return torch.log(mass) + largest - chosen


def divergence(logits: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || ours) in nats of the distributions under two logits (..., V); float32, shape (...).

    sum_v p_v (log p_v - log q_v) with p = softmax(teacher), q = softmax(logits).
    """
    ours, theirs = (x.float() - torch.logsumexp(x.float(), dim=-1, keepdim=True) for x in (logits, teacher))
    return (torch.exp(theirs) * (theirs - ours)).sum(dim=-1)


def next_token_loss(model: nn.Module, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Masked loss of windows `tokens` (B, T+1); `mask` (B, T) weighs target t+1 of each row.

    Returns the sum in nats and the sum of the mask, both scalar float32.
    """
    logits = model(tokens[:, :-1])  # (B, T, V)
    losses = cross_entropy(logits, tokens[:, 1:]) * mask  # (B, T)
    return losses.sum(), mask.sum()
