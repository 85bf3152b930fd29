"""The optimizer steps of one lesson, within a budget of wall time.

How many steps fit is estimated from the speed of the measurement before and corrected after every step; the
learning-rate schedule follows. Where the time suffices for all that was asked, nothing depends on the clock.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx

from mlx_impl.base import BaseModel
from mlx_impl.config import ContinualLearningConfig
from mlx_impl.data import Tokens
from mlx_impl.errors import InputError, NonFiniteLossError
from mlx_impl.loss import loss_of
from mlx_impl.optim import AdamW, Stepper, warmup_cosine
from mlx_impl.windows import Batches, Windows

Event = dict[str, Any]

STEPS_WANTED = 16
"""Steps that a short budget should still hold: the batch shrinks to get there."""

BACKWARD = 3
"""A step's time in forward passes."""


@dataclass(frozen=True)
class Budget:
    """When a lesson ends: after `steps`; without them after `epochs` or `seconds` of wall time, whichever is first."""

    seconds: float = 60.0
    epochs: float = 1.0
    steps: int | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise InputError(f"--{name} {value} must be a positive number")


class Session:
    """The steps of one lesson within its budget; `tokens` counts those that were trained on, each time they were."""

    def __init__(
        self,
        model: BaseModel,
        config: ContinualLearningConfig,
        train: Tokens,
        seed: int,
        budget: Budget,
        deadline: float,
        speed: float,
    ) -> None:
        """`deadline`: when the last step should have ended, by time.perf_counter; `speed`: tokens a second, forward."""
        self.model, self.config, self.budget, self.deadline = model, config, budget, deadline
        windows = Windows(train, config.seq_len)
        accumulated = config.gradient_accumulation_steps
        seconds_per_row = BACKWARD * windows.seq_len * accumulated / speed  # the first steps will tell better
        affordable = (deadline - time.perf_counter()) / seconds_per_row  # rows, each with its accumulation
        enough = min(budget.epochs * len(windows) / accumulated, affordable) / STEPS_WANTED
        self.rows = max(1, min(config.batch_size, int(enough)))
        if budget.steps is not None:
            self.rows = config.batch_size
        self.batches = Batches(windows, self.rows, seed)
        self.rows = self.batches.rows
        self.planned = budget.steps or max(1, math.ceil(budget.epochs * len(windows) / (self.rows * accumulated)))
        self.total = self.planned
        if budget.steps is None:
            self.total = max(1, int(min(self.planned, affordable / self.rows)))
        mx.random.seed(seed)
        optimizer = AdamW(config.learning_rate, betas=(0.9, 0.999), weight_decay=config.weight_decay)
        compiled = mx.default_device().type == mx.DeviceType.gpu  # on a CPU it costs more than a lesson gains
        self.stepper = Stepper(model.trainable_parameters(), optimizer, loss_of(model), config.max_grad_norm, compiled)
        self.step = self.tokens = 0
        self.seconds = 0.0

    @property
    def complete(self) -> bool:
        """Whether all that was asked for was done, and not only what the time allowed."""
        return self.step >= self.planned

    def run(self, report: Callable[[Event], None]) -> None:
        """Take the steps; the model ends with the trained adapter. Raises NonFiniteLossError."""
        self.model.train()
        started = time.perf_counter()
        try:
            while self.step < self.total:
                self._one(report)
                if self.budget.steps is None and not self._time_left(started):
                    break
        finally:
            self.model.update(self.stepper.parameters)
            self.model.train(False)
        mx.eval(self.model.trainable_parameters())
        self.seconds = time.perf_counter() - started

    def _one(self, report: Callable[[Event], None]) -> None:
        count = range(self.config.gradient_accumulation_steps)
        batch = [next(self.batches) for _ in count]
        warmup = max(1, round(self.config.warmup * self.total))
        rate = warmup_cosine(self.step, self.total, warmup, self.config.learning_rate)
        result = self.stepper.step([(mx.array(t), mx.array(m)) for t, m in batch], rate)
        loss, norm = result.read()
        self.step += 1
        self.tokens += sum(int(m.sum()) for _, m in batch)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFiniteLossError(f"step {self.step}: the loss became {loss}; nothing was kept, try a lower --lr")
        report(
            {
                "event": "step",
                "step": self.step,
                "steps": self.total,
                "loss": loss,
                "lr": rate,
                "tokens": self.tokens,
            }
        )

    def _time_left(self, started: float) -> bool:
        """Whether another step fits; brings the plan, and with it the schedule, in line with the speed so far."""
        now = time.perf_counter()
        per_step = (now - started) / self.step
        self.total = int(min(self.planned, self.step + (self.deadline - now) / per_step))
        return self.step < self.total
