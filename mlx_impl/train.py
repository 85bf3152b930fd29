"""Pretraining: the loop, and its exact resume.

Everything a step depends on is in the saved state: weights, moments, random state, the cursor into the data and the
counters. Five steps, a kill and five more equal ten, bit for bit. The learning rate is computed on the host and
given to the step as data, which lets a run limited by the clock follow it.
"""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_impl import checkpoint, modeldir
from mlx_impl.config import TrainConfig
from mlx_impl.data import TokenFile, Tokens
from mlx_impl.device import can_compile
from mlx_impl.errors import InputError, Interrupted, NonFiniteLossError
from mlx_impl.evaluate import evaluate
from mlx_impl.loss import loss_of
from mlx_impl.model import ContinualLLM
from mlx_impl.optim import AdamW, Penalty, Stepper, StepResult, warmup_cosine
from mlx_impl.windows import Batches, evaluation_windows

Event = dict[str, Any]
Steps = list[list[tuple[mx.array, mx.array]]]


def train_steps(
    model: ContinualLLM,
    batches: Steps,
    learning_rates: list[float],
    *,
    weight_decay: float = 0.1,
    max_grad_norm: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    compiled: bool = False,
    penalty: Penalty | None = None,
) -> list[float]:
    """Train what is trainable on given data, a list of microbatches (tokens (B, T+1), mask (B, T)) a step.

    Returns the mean loss of each step in nats per token, before its update and without the penalty, of which see
    `Stepper`. The loop that the reference has too.
    """
    optimizer = AdamW(learning_rates[0], betas, eps, weight_decay)
    stepper = Stepper(model.trainable_parameters(), optimizer, loss_of(model), max_grad_norm, compiled, penalty)
    losses = []
    for step, rate in zip(batches, learning_rates, strict=True):
        result = stepper.step(step, rate)
        losses.append(result.read()[0])
    model.update(stepper.parameters)
    return losses


@dataclass
class Progress:
    """Counters of a run; part of the saved state."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    evaluated_step: int | None = None


@dataclass
class Trainer:
    """A run in a directory. `run` trains until the plan is fulfilled, or a signal, an error or the clock ends it.

    `heldout` is evaluated every `eval_every` steps in a fixed order; the weights with the lowest loss are the ones in
    the directory at the end, the latest are in its `trainer/`. Without held-out text the latest are both.
    """

    directory: Path
    model: ContinualLLM
    config: TrainConfig
    batches: Batches
    heldout: Tokens | TokenFile | None = None
    report: Callable[[Event], None] = lambda event: None
    dtype: mx.Dtype = mx.float32
    about: Event = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        optimizer = AdamW(self.config.lr, weight_decay=self.config.weight_decay)
        self.model.checkpoint_gradients(self.config.recompute)
        self.model.train()
        loss = loss_of(self.model, self.dtype)
        self.stepper = Stepper(self.model.parameters(), optimizer, loss, self.config.max_grad_norm, can_compile())
        self.total = total_steps(self.config, self.batches)
        self.metrics = self.directory / modeldir.METRICS
        self._pending: tuple[int, StepResult, float] | None = None
        self._speed: list[float] = []  # tokens/s of the latest steps

    def resume(self) -> None:
        """Go on from the latest state in the directory; InputError if it is of another run or there is none."""
        state = checkpoint.latest_state(self.directory / "trainer")
        rest = checkpoint.read_state(state)
        differs = [k for k, v in self._identity().items() if rest.get("identity", {}).get(k) != v]
        if differs:
            raise InputError(f"{self.directory}: was trained with other {', '.join(differs)}; resume with the same")
        self.batches.seek(rest["cursor"])
        parameters, optimizer_state = checkpoint.load_state(state, rest)
        self.stepper.parameters, self.stepper.optimizer.state = parameters, optimizer_state
        self.progress = Progress(**rest["progress"])
        self._saved = self.progress.step
        checkpoint.cut_metrics(self.metrics, self.progress.step)
        self.report({"event": "resumed", "step": self.progress.step})

    def start(self) -> None:
        """Begin a new run: an own random state, and a first saved state to fall back on."""
        mx.random.seed(self.config.seed)
        self._save()

    def run(self) -> Progress:
        """Train to the end of the plan.

        Raises Interrupted after saving when the process is told to stop, and NonFiniteLossError naming the step, the
        last good state and weights kept.
        """
        with _signals() as stopped:
            while not self._finished():
                self._step()
                if stopped():
                    self._settle()
                    if self.progress.best_step is None:
                        self._publish()  # so that there is a model to look at
                    self._save()
                    raise Interrupted(f"stopped after step {self.progress.step}; go on with --resume")
                if self.progress.step % self.config.eval_every == 0:
                    self._evaluate()
                if self.progress.step % self.config.save_every == 0:
                    self._settle()
                    self._save()
        self._settle()
        if self.progress.evaluated_step != self.progress.step:
            self._evaluate()
        self._save()
        return self.progress

    def _identity(self) -> Event:
        """What must be the same for a resumed run to be the same run. Its length may grow."""
        fixed = asdict(self.config)
        for name in ("epochs", "steps", "minutes", "save_every", "eval_every"):
            del fixed[name]
        return {**fixed, "model": {**asdict(self.model.config)}, "dtype": str(self.dtype)}

    def _finished(self) -> bool:
        if self.config.minutes is not None:
            return self.progress.seconds >= 60 * self.config.minutes
        return self.progress.step >= self.total

    def _learning_rate(self) -> float:
        step, total = self.progress.step, self.total
        if self.config.minutes is not None:
            total = 10_000
            step = min(total, int(total * self.progress.seconds / (60 * self.config.minutes)))
        warmup = max(1, round(self.config.warmup * total))
        return warmup_cosine(step, total, warmup, self.config.lr, self.config.final_lr)

    def _step(self) -> None:
        started = time.perf_counter()
        rate = self._learning_rate()
        microbatches = [tuple(map(mx.array, next(self.batches))) for _ in range(self.config.grad_accum)]
        result = self.stepper.step(microbatches, rate)
        self._settle()  # the step before: its loss is there by now, and reading it stalls nothing
        self._pending = (self.progress.step + 1, result, rate)
        if self.config.minutes is not None or self.progress.step == 0:
            self._settle()
        spent = time.perf_counter() - started
        count = sum(m.shape[0] * m.shape[1] for _, m in microbatches)
        self.progress.step += 1
        self.progress.tokens += count
        self.progress.seconds += spent
        self._speed = [*self._speed[-19:], count / spent]

    def _settle(self) -> None:
        """Read the loss of the step that is under way, check it and report it."""
        if self._pending is None:
            return
        step, result, rate = self._pending
        self._pending = None
        loss, norm = result.read()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFiniteLossError(
                f"step {step}: the loss is {loss} and the gradient's norm {norm}; the state of step "
                f"{self._saved} is kept. Look at the text near there, or start anew with a lower --lr"
            )
        self.progress.loss = loss
        record = {"step": step, "loss": loss, "lr": rate, "grad_norm": norm}
        checkpoint.append_metrics(self.metrics, record)
        speed = sorted(self._speed)[len(self._speed) // 2] if self._speed else None
        self.report({"event": "step", **record, **self._outlook(speed)})

    def _outlook(self, speed: float | None) -> Event:
        left = None
        if self.config.minutes is not None:
            left = max(0.0, 60 * self.config.minutes - self.progress.seconds)
        elif self.progress.step and speed:
            left = (self.total - self.progress.step) * self.progress.tokens / self.progress.step / speed
        return {
            "steps": None if self.config.minutes is not None else self.total,  # the clock ends it
            "tokens_per_second": speed,
            "eta_seconds": left,
            "peak_memory": mx.get_peak_memory(),
        }

    def _evaluate(self) -> None:
        """Loss on held-out text; the weights are published if it is the lowest so far, or if there is no such text."""
        self._settle()
        if self.heldout is None:
            return
        self.model.update(self.stepper.parameters)
        self.model.eval()
        length = self.batches.windows.seq_len
        result = evaluate(self.model, evaluation_windows(self.heldout, length, length))
        self.model.train()
        if not math.isfinite(result.loss):
            raise NonFiniteLossError(
                f"step {self.progress.step}: the held-out loss is {result.loss}; the state of step "
                f"{self._saved} is kept"
            )
        self.progress.evaluated_step = self.progress.step
        best = self.progress.best_loss is None or result.loss < self.progress.best_loss
        record = {"step": self.progress.step, "heldout_loss": result.loss, "accuracy": result.accuracy}
        checkpoint.append_metrics(self.metrics, record)
        self.report({"event": "eval", **record, "tokens": result.tokens, "best": best})
        if best:
            self.progress.best_loss, self.progress.best_step = result.loss, self.progress.step
            self._publish()

    def _publish(self) -> None:
        summary = {**self.about, **asdict(self.progress), "config": asdict(self.config)}
        checkpoint.publish(self.directory, self.stepper.parameters, self.model.config, summary)

    def _save(self) -> None:
        rest = {
            "identity": self._identity(),
            "cursor": self.batches.cursor,
            "progress": asdict(self.progress),
        }
        checkpoint.save_state(
            self.directory / "trainer",
            self.progress.step,
            self.stepper.parameters,
            self.stepper.optimizer.state,
            rest,
        )
        self._saved = self.progress.step
        if self.heldout is None and self.progress.step:
            self._publish()
        self.report({"event": "saved", "step": self.progress.step})


def total_steps(config: TrainConfig, batches: Batches) -> int:
    """Optimizer steps of a run: as many as were asked for, or enough to see every window `epochs` times."""
    if config.steps is not None:
        return config.steps
    return max(1, math.ceil(config.epochs * len(batches.windows) / (batches.rows * config.grad_accum)))


@contextlib.contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether Ctrl-C or a termination signal has come; the second one ends at once."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def note(number: int, frame: object) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
