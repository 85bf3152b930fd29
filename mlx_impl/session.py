"""The optimizer steps of one lesson, within a budget of wall time.

How many steps fit is estimated from the speed of the measurement before and corrected after every step; the
learning-rate schedule follows. Where the time amply suffices for all that was asked, nothing depends on the clock.
"""

import math
import time
from collections.abc import Callable
from itertools import groupby
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_impl import kernels, lora
from mlx_impl.arrays import unflatten
from mlx_impl.base import BaseModel
from mlx_impl.config import LEAST_STEPS, Budget, ContinualLearningConfig
from mlx_impl.data import Tokens
from mlx_impl.device import can_compile
from mlx_impl.errors import NonFiniteLossError
from mlx_impl.loss import held_loss_of, window_losses
from mlx_impl.optim import AdamW, Stepper, warmup_cosine
from mlx_impl.past import Past
from mlx_impl.replay import Sample, extend, mix, split_rows
from mlx_impl.windows import Batches, Windows

Event = dict[str, Any]

BACKWARD = 3
"""A step's time in forward passes."""

COMPILED = 8192
"""Tokens of a lesson from which on its step is compiled on a CPU, too. A step takes about an eighth less time then, but
some 40 loops go through the C++ compiler first, half a minute; MLX keeps them in the folder for temporary files."""

PATIENT = 300.0
"""Seconds that a lesson which time cuts short must have for that."""

ROUGHLY = 0.8
"""Of the steps planned, those that a first estimate of the speed must promise for the plan to be tried as it is."""


class Session:
    """The steps of one lesson within its budget.

    `tokens` counts those of the lesson's text that were trained on, each time they were, `replayed` those drawn from
    earlier lessons. The windows of the first pass over the text enter the buffer, each after its step; later passes
    cut the text elsewhere.
    """

    def __init__(
        self,
        model: BaseModel,
        config: ContinualLearningConfig,
        train: Tokens,
        past: Past,
        seed: int,
        budget: Budget,
        deadline: float,
        speed: float,
        like_base: Tokens | None = None,
    ) -> None:
        """`deadline`: when the last step should have ended, by time.perf_counter; `speed`: tokens a second, forward.

        A speed of inf says that the time will suffice; only the steps themselves can then prove otherwise.
        `like_base` is text of the kind that the base was trained on: `base_ratio` of it is added to each batch.
        """
        self.model, self.config, self.budget, self.deadline = model, config, budget, deadline
        self.past = past
        windows = Windows(train, config.seq_len)
        self.ratio = config.replay_ratio * past.replayable
        accumulated = config.gradient_accumulation_steps
        affordable = math.inf  # rows, each with its accumulation; the first steps will tell better
        if speed < math.inf:
            affordable = (deadline - time.perf_counter()) * speed / (BACKWARD * windows.seq_len * accumulated)
        fresh = 1 - self.ratio  # share of a batch that is the lesson's own
        passes = budget.passes(len(windows) / accumulated)
        enough = min(passes * len(windows) / accumulated / fresh, affordable) / LEAST_STEPS
        self.rows = max(1, min(config.batch_size, int(enough)))
        if budget.steps is not None:
            self.rows = config.batch_size
        self.rows = min(self.rows, max(1, math.ceil(len(windows) / fresh)))  # no new window twice in a batch
        self.batches = Batches(windows, self.rows, seed, turn=True)
        self.unkept = len(windows)
        """Windows of the first pass that are still to enter the buffer."""
        self.like_base = Batches(Windows(like_base, windows.seq_len), 1, seed) if like_base is not None else None
        shares = [split_rows(self.rows, self.ratio, step) for step in range(1000)]
        shares = [(min(new, len(windows)), replayed) for new, replayed in shares]
        new_rows, replayed_rows = (sum(counts) / len(shares) for counts in zip(*shares, strict=True))
        self.hold = config.replay_weight * new_rows / replayed_rows if replayed_rows else 0.0
        """Weight of a replayed row's divergence: where few are drawn, each stands for more."""
        self.planned = budget.steps or max(1, math.ceil(passes * len(windows) / (new_rows * accumulated)))
        self.total = self.planned
        if budget.steps is None and affordable / self.rows < ROUGHLY * self.planned:
            self.total = max(1, int(affordable / self.rows))
        mx.random.seed(seed)
        self.held = self.hold > 0 or past.penalty is not None
        optimizer = AdamW(self._peak_rate(), betas=(0.9, 0.999), weight_decay=config.weight_decay)
        self.compiled = self._worth_compiling(windows.seq_len)
        self.predicted = config.replay_targets == "predictions"
        self.stepper = Stepper(
            model.trainable_parameters(),
            optimizer,
            held_loss_of(model),
            config.max_grad_norm,
            self.compiled,
            past.penalty,
        )
        self.step = self.tokens = self.replayed = 0
        self.seconds = 0.0
        self._ends: list[float] = []  # of the steps so far, by time.perf_counter

    def _peak_rate(self) -> float:
        """That of as many steps as are planned now."""
        return self.config.peak_rate(self.total, self.held)

    def _worth_compiling(self, length: int) -> bool:
        """Whether the step is to be compiled; nothing that depends on the clock where time does not end the lesson."""
        if not kernels.on_cpu():
            return True
        tokens = self.total * self.config.gradient_accumulation_steps * self.rows * length
        patient = self.total == self.planned or self.deadline - time.perf_counter() >= PATIENT
        return tokens >= COMPILED and patient and can_compile()

    @property
    def seen(self) -> float:
        """Share of the text's windows that the steps came to."""
        return 1 - self.unkept / len(self.batches.windows)

    @property
    def complete(self) -> bool:
        """Whether all that was asked for was done, and not only what the time allowed."""
        return self.step >= self.planned

    def run(self, report: Callable[[Event], None]) -> None:
        """Take the steps; the model ends with the trained adapter. Raises NonFiniteLossError."""
        self.model.train()
        started = time.perf_counter()
        if self.compiled and kernels.on_cpu():
            report(
                {
                    "event": "note",
                    "text": "compiling the step; the first time since the machine started that takes half a minute",
                }
            )
        try:
            while self.step < self.total:
                self._one(report)
                if self.budget.steps is None and not self._time_left():
                    break
        finally:
            self.model.update(self.stepper.parameters)
            self.model.train(False)
        mx.eval(self.model.trainable_parameters())
        self.seconds = time.perf_counter() - started

    def _one(self, report: Callable[[Event], None]) -> None:
        accumulated = self.config.gradient_accumulation_steps
        new = [self._new_rows(self.step * accumulated + number) for number in range(accumulated)]
        past = self.past
        mixed = [mix(tokens, mask, past.buffer, count, past.lesson, past.own) for tokens, mask, count in new]
        warmup = max(1, round(self.config.warmup * self.total))
        rate = warmup_cosine(self.step, self.total, warmup, self._peak_rate())
        extended = [self._extended(sample, self.step * accumulated + number) for number, sample in enumerate(mixed)]
        batches = [self._batch(all_, len(tokens)) for all_, (tokens, _, _) in zip(extended, new, strict=True)]
        result = self.stepper.step(batches, rate)
        loss, norm = result.read()
        self.step += 1
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFiniteLossError(f"step {self.step}: the loss became {loss}; nothing was kept, try a lower --lr")
        for (tokens, mask, _), sample in zip(new, mixed, strict=True):
            self.tokens += int(mask.sum())
            replayed = sample.mask[len(mask) :] * (sample.weights[len(mask) :, None] > 0)
            self.replayed += int(replayed.sum().item())  # type: ignore[arg-type]
            first = min(len(tokens), self.unkept)
            if first:
                kept = self.past.source, self.past.lesson, self.past.importance
                self.past.buffer.insert(tokens[:first], mask[:first], *kept)
                self.unkept -= first
            if self.config.replay_strategy == "importance" and sample.rows:
                self._refresh(sample)
        figures = {"loss": loss, "lr": rate, "tokens": self.tokens, "replayed": self.replayed}
        report({"event": "step", "step": self.step, "steps": self.total, **figures})

    def _new_rows(self, microbatch: int) -> tuple[NDArray[np.int32], NDArray[np.float32], int]:
        """Windows of the lesson's own text for a microbatch, and how many earlier ones go with them."""
        count, replayed = split_rows(self.rows, self.ratio, microbatch)
        tokens, mask = self.batches.take(min(count, len(self.batches.windows)))
        return tokens, mask, replayed

    def _extended(self, sample: Sample, microbatch: int) -> Sample:
        """A microbatch with its rows of text like the base's."""
        if self.like_base is None or self.config.base_ratio == 0:
            return sample
        early = max(0, math.ceil(0.5 / (self.rows * self.config.base_ratio)) - 1)  # one in the first step: few have ten
        count = split_rows(self.rows, self.config.base_ratio, microbatch + early)[1]
        if not count:
            return sample
        return extend(sample, *self.like_base.take(min(count, len(self.like_base.windows))))

    def _batch(self, sample: Sample, new: int) -> tuple[mx.array, ...]:
        """What the loss takes of a microbatch: the `new` rows of the lesson's own, replayed ones, ones like the base's.

        Replayed windows are held to what the version that knew their lesson best predicts on them. Their tokens would
        be learned by heart: a short lesson's few windows come up again and again, while the text that they stand for
        is forgotten.
        """
        weights = sample.mask * sample.weights[:, None]  # (B, T)
        behind = new + len(sample.rows)
        replayed, general = slice(new, behind), slice(behind, len(weights))
        strength = self.config.distill_weight
        order, learned = [slice(0, behind), general], len(weights)
        if self.predicted:
            order, learned = [slice(0, new), general, replayed], len(weights) - len(sample.rows)  # the rest: no tokens
            lessons = self.past.buffer.lessons_of(sample.rows)
            teachers = [(general, None, strength), (replayed, lessons, self.hold)]
        else:
            teachers = [(slice(new, len(weights)), None, strength)]
        teachers = [part for part in teachers if part[0].stop > part[0].start and part[2] > 0]
        if not teachers:
            return sample.tokens, weights
        states = [self._predictions(sample.tokens[rows, :-1], lessons) for rows, lessons, _ in teachers]
        held = [factor * weights[rows] for rows, _, factor in teachers]
        tokens, mask = (mx.concatenate([array[rows] for rows in order]) for array in (sample.tokens, weights))
        return tokens, mask[:learned], mx.concatenate(states), mx.concatenate(held)

    def _predictions(self, tokens: mx.array, lessons: list[int] | None) -> mx.array:
        """Final states (R, T, ...) on tokens (R, T) of the teachers of the rows' lessons, or of the bare base."""
        self.model.train(False)  # what they predict, not what dropout makes of it
        try:
            if lessons is None:
                with lora.bare(self.model):
                    states = self.model.hidden(tokens)
            else:
                assert self.past.teacher is not None
                parts, start = [], 0
                for lesson, rows in groupby(lessons):
                    end = start + len(list(rows))
                    self.model.update(unflatten(self.past.teacher(lesson)))
                    parts.append(self.model.hidden(tokens[start:end]))
                    start = end
                states = mx.concatenate(parts)
            mx.eval(states)  # no part of the step's graph
            return states
        finally:
            self.model.update(self.stepper.parameters)
            self.model.train()

    def _refresh(self, sample: Sample) -> None:
        """Note what the replayed windows of a batch cost now, for the next draws: one more forward pass over them."""
        self.model.update(self.stepper.parameters)
        rows = len(sample.rows)
        self.model.train(False)  # a window's loss, not what dropout makes of it
        losses = np.array(window_losses(self.model, sample.tokens[-rows:], sample.mask[-rows:]))
        self.model.train()
        self.past.buffer.update_priorities(sample.rows, losses)

    def _time_left(self) -> bool:
        """Whether another step fits; brings the plan, and with it the schedule, in line with the speed so far.

        The first step says nothing of the speed: it compiles, and reads weights from the disk.
        """
        now = time.perf_counter()
        self._ends.append(now)
        if now >= self.deadline:
            return False
        if len(self._ends) > 1:
            per_step = float(np.median(np.diff(self._ends)))
            self.total = int(min(self.planned, self.step + (self.deadline - now) / per_step))
        return self.step < self.total
