"""AdamW, the learning-rate schedule and clipping again, in PyTorch, written out by hand.

`torch.optim.AdamW` is not used here: the tests compare this one with it, so that the MLX side has two
witnesses.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class AdamW:
    """Decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2), bias-corrected; vectors do not decay.

        m <- b1 m + (1 - b1) g          m' = m / (1 - b1^t)
        v <- b2 v + (1 - b2) g^2        v' = v / (1 - b2^t)
        p <- (1 - lr * decay) p - lr * m' / (sqrt(v') + eps)

    `learning_rate` may be changed between steps.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        self.parameters = list(parameters)
        self.learning_rate, self.betas, self.eps, self.weight_decay = learning_rate, betas, eps, weight_decay
        self.step = 0
        self.m = [torch.zeros_like(p) for p in self.parameters]
        self.v = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def apply_gradients(self, gradients: Sequence[Tensor]) -> None:
        """One update of the parameters, in place; `gradients` are in their order and of their shapes."""
        self.step += 1
        b1, b2 = self.betas
        for p, g, m, v in zip(self.parameters, gradients, self.m, self.v, strict=True):
            m.copy_(b1 * m + (1 - b1) * g)
            v.copy_(b2 * v + (1 - b2) * g * g)
            m_hat = m / (1 - b1**self.step)
            v_hat = v / (1 - b2**self.step)
            decay = self.weight_decay if p.ndim >= 2 else 0.0
            p.copy_((1 - self.learning_rate * decay) * p - self.learning_rate * m_hat / (v_hat.sqrt() + self.eps))


def warmup_cosine(step: int, total: int, warmup: int, peak: float, floor: float = 0.1) -> float:
    """Learning rate of 0-based `step`: linear up to `peak` over `warmup` steps, cosine down to floor * peak.

    The first step already moves (1/warmup of the peak), the last one of `total` has the floor.
    """
    done = step + 1
    if done <= warmup:
        return peak * done / warmup
    angle = math.pi * min(1.0, (done - warmup) / max(1, total - warmup))
    lowest = floor * peak
    return lowest + (peak - lowest) * (1 + math.cos(angle)) / 2


def clip_by_global_norm(gradients: Sequence[Tensor], limit: float) -> tuple[list[Tensor], Tensor]:
    """Scale all gradients to a joint norm of at most `limit` (Pascanu et al. 2013).

    Returns them and the norm before.
    """
    norm = torch.sqrt(sum((g.float().square().sum() for g in gradients), torch.zeros(())))
    factor = torch.clamp(limit / (norm + 1e-6), max=1.0)
    return [g * factor for g in gradients], norm
