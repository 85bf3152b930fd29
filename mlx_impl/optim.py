"""AdamW as torch computes it, learning-rate schedules, clipping, and the one compiled optimizer step.

MLX's AdamW does not correct bias unless told to; its first step is else three times too large. The step is a
function from state to state: parameters and moments go in and come out, gradients of sums of losses are divided by
the number of tokens once, at the end, so that accumulation over unequal batches is exact.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.optimizers
from mlx.utils import tree_map

from mlx_impl import kernels
from mlx_impl.arrays import Tree, flatten

Loss = Callable[..., tuple[mx.array, mx.array]]
"""Of parameters and the arrays of a batch, (B, ...) each: (sum in nats, tokens)."""

Penalty = Callable[[Tree], mx.array]


class AdamW(mlx.optimizers.AdamW):
    """Decoupled weight decay (Loshchilov & Hutter 2019), bias-corrected; vectors are not decayed.

    Norm weights and biases, the parameters of one dimension, keep their scale, as is usual.
    """

    def __init__(
        self,
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(learning_rate, list(betas), eps, weight_decay, bias_correction=True)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        """The new parameter; `state` (moments m and v) is updated in place."""
        if parameter.ndim >= 2:
            return super().apply_single(gradient, parameter, state)
        return mlx.optimizers.Adam.apply_single(self, gradient, parameter, state)


def warmup_cosine(step: int, total: int, warmup: int, peak: float, floor: float = 0.1) -> float:
    """Learning rate of 0-based `step`: linear up to `peak` over `warmup` steps, cosine down to floor * peak.

    The first step already moves (1/warmup of the peak), the last one of `total` has the floor.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    share = min(1.0, (step - warmup + 1) / max(1, total - warmup))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share)))


def clip_by_global_norm(gradients: Tree, limit: float, share: mx.array | float = 1.0) -> tuple[Tree, mx.array]:
    """`share` times the whole tree, and scaled to a norm of at most `limit` (Pascanu et al. 2013), in one pass.

    Returns it and the norm that it had before the limit.
    """
    # In the order of names: a tree read from a file has another order, and float sums depend on it.
    squares = [kernels.sum_of_squares(gradient) for _, gradient in sorted(flatten(gradients).items())]
    norm = share * mx.sqrt(sum(squares, mx.array(0.0)))
    factor = share * mx.minimum(limit / (norm + 1e-6), 1.0)
    return tree_map(lambda g: g * factor, gradients), norm


@dataclass
class StepResult:
    """What one optimizer step saw. Arrays are scalars and may still be lazy."""

    loss_sum: mx.array  # nats
    tokens: mx.array
    grad_norm: mx.array  # of the mean loss and the penalty together, before clipping
    penalty: mx.array  # nats per token, at the parameters before the step; not part of loss_sum

    def read(self) -> tuple[float, float]:
        """(mean loss in nats per token, gradient norm); waits until they are computed."""
        count = max(1.0, float(self.tokens.item()))  # type: ignore[arg-type]
        return float(self.loss_sum.item()) / count, float(self.grad_norm.item())  # type: ignore[arg-type]


class Stepper:
    """Optimizer steps over (microbatches of) windows; holds parameters and optimizer, compiled where it can be.

    `loss(parameters, *batch)` returns (sum in nats, tokens). Compiled and eager steps give the same numbers up
    to float32 rounding. `penalty(parameters)`, a scalar in nats per token, is added to the mean loss: its gradient
    comes once a step, times the tokens, before the sums are divided by them and clipped. Arrays that it closes over are
    constants of a compiled step and must have been computed.
    """

    def __init__(
        self,
        parameters: Tree,
        optimizer: AdamW,
        loss: Loss,
        max_grad_norm: float,
        compiled: bool,
        penalty: Penalty | None = None,
    ) -> None:
        self.parameters = parameters
        self.optimizer = optimizer
        optimizer.init(parameters)
        mx.eval(optimizer.state)
        gradient_of = mx.value_and_grad(loss)

        def accumulate(parameters: Tree, total: Tree, *batch: mx.array) -> tuple:
            (loss_sum, count), gradients = gradient_of(parameters, *batch)
            gradients = tree_map(lambda g: g.astype(mx.float32), gradients)
            if total is not None:
                gradients = tree_map(mx.add, total, gradients)
            return loss_sum, count, gradients

        def apply(parameters: Tree, state: Tree, gradients: Tree, count: mx.array) -> tuple:
            extra, tokens = mx.array(0.0), mx.maximum(count, 1)
            if penalty is not None:
                extra, more = mx.value_and_grad(penalty)(parameters)
                gradients = tree_map(lambda g, m: g + tokens * m, gradients, more)  # sums over tokens, like the others
            gradients, norm = clip_by_global_norm(gradients, max_grad_norm, 1 / tokens)
            optimizer.state = state
            parameters = optimizer.apply_gradients(gradients, parameters)
            return parameters, optimizer.state, norm, extra

        def whole(parameters: Tree, state: Tree, *batch: mx.array) -> tuple:
            loss_sum, count, gradients = accumulate(parameters, None, *batch)
            parameters, state, norm, extra = apply(parameters, state, gradients, count)
            return parameters, state, loss_sum, count, norm, extra

        random = [mx.random.state]  # dropout draws from it, so it is state like the rest
        if compiled:
            self._first = kernels.compiled(lambda p, *batch: accumulate(p, None, *batch), inputs=random, outputs=random)
            self._more = kernels.compiled(accumulate, inputs=random, outputs=random)
            self._apply = kernels.compiled(apply)
            self._whole = kernels.compiled(whole, inputs=random, outputs=random)
        else:
            self._first = lambda p, *batch: accumulate(p, None, *batch)
            self._more, self._apply, self._whole = accumulate, apply, whole

    def step(self, batches: Sequence[tuple[mx.array, ...]], learning_rate: float) -> StepResult:
        """One update from microbatches, such as (tokens (B, T+1), mask (B, T)), weighted by tokens."""
        self.optimizer.learning_rate = mx.array(learning_rate)
        state = self.optimizer.state
        if len(batches) == 1:
            self.parameters, state, loss_sum, count, norm, extra = self._whole(self.parameters, state, *batches[0])
        else:
            loss_sum, count, total = self._first(self.parameters, *batches[0])
            for batch in batches[1:]:
                mx.eval(total)  # one microbatch's activations at a time
                more, n, total = self._more(self.parameters, total, *batch)
                loss_sum, count = loss_sum + more, count + n
            self.parameters, state, norm, extra = self._apply(self.parameters, state, total, count)
        self.optimizer.state = state
        mx.async_eval(self.parameters, state, loss_sum, count, norm, extra)
        return StepResult(loss_sum, count, norm, extra)
