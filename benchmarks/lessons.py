"""Twenty lessons into one domain: what is kept of the first ones, and what a lesson costs when there were many.

Each lesson is a group of documents of about 2,048 tokens. Beside it stand joint training, one lesson on all of them
with as many new tokens, and mlx-lm's LoRA trainer, resumed from lesson to lesson at the learning rate that suited the
first ones best. All are measured by the same code on the same held-out windows. It goes on where it was stopped.

    python -m benchmarks.lessons [--data DIR] [--lessons 20] [--steps 8] [--set ewc_lambda=1] [--quick]
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx_impl  # noqa: F401  before MLX, for the fast BLAS

# isort: split
import numpy as np

from benchmarks import peer, texts
from benchmarks.common import record
from benchmarks.resume import (
    BACKWARD,
    Work,
    add_common_options,
    digest_of,
    duration,
    forward_speed,
    lesson_settings,
    say,
    taught,
)
from mlx_impl import arrays, lora, modeldir
from mlx_impl.adapters import read_adapter
from mlx_impl.config import ContinualLearningConfig
from mlx_impl.data import Tokens, tokens_of
from mlx_impl.evaluate import evaluate
from mlx_impl.holdout import estimated_tokens, split_holdout
from mlx_impl.hub import default_model
from mlx_impl.learner import ContinualLearner
from mlx_impl.lesson import HELD_OUT_AT_MOST
from mlx_impl.matrix import ForgettingMatrix
from mlx_impl.readers import Document
from mlx_impl.windows import evaluation_windows

LESSON_TOKENS = 2048
"""A lesson's documents have these and a few more: more than the least from which a lesson holds a part out."""

FULL_ROWS = (1, 2, 5, 10, 20)
"""Stages after which all lessons so far are measured; after the others only the first and the latest."""

FIRST = 5
"""Lessons that are called the first ones in a mean."""

Attach = Callable[[], None]
Row = list[float | None]
"""Losses of all texts after a stage, None for those that were not measured."""


@dataclass(frozen=True)
class Plan:
    """What is taught, and at which learning rates mlx-lm is tried on the first `tuned_on` lessons."""

    lessons: int = 20
    steps: int = 8
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    tuned_on: int = 2
    seed: int = 0
    config: ContinualLearningConfig = ContinualLearningConfig(holdout=0.2)


@dataclass(frozen=True)
class Text:
    """A lesson's documents, and the tokens that are trained on and held out."""

    label: str
    documents: list[Document]
    train: list[Document]
    trained: Tokens
    heldout: Tokens


def main() -> None:
    """Teach all, measure all and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of NAME/train.txt  [default: what comes with Python]")
    parser.add_argument("--lessons", type=int, help=f"how many  [default: {Plan.lessons}]")
    parser.add_argument("--steps", type=int, help=f"optimizer steps of a lesson  [default: {Plan.steps}]")
    parser.add_argument(
        "--rates", type=float, nargs="+", help=f"learning rates for mlx-lm  [default: {' '.join(map(str, Plan.rates))}]"
    )
    add_common_options(parser, "lessons")
    arguments = parser.parse_args()
    small = Plan(lessons=3, steps=2, rates=(3e-4,), tuned_on=1) if arguments.quick else Plan()
    plan = replace(
        small,
        lessons=arguments.lessons or small.lessons,
        steps=arguments.steps or small.steps,
        rates=tuple(arguments.rates or small.rates),
        seed=arguments.seed,
        config=lesson_settings(arguments.settings, replace(small.config, seed=arguments.seed)),
    )
    sources = texts.folder_sources(arguments.data) if arguments.data else texts.library_sources()
    figures = measure(arguments.model or default_model(), arguments.work, plan, sources)
    if arguments.quick:
        print(json.dumps(figures, indent=2))
    else:
        record("lessons", figures)
    say(table(figures))


def measure(model: Path, folder: Path, plan: Plan, sources: texts.Sources) -> dict[str, Any]:
    """All figures, those measured before under the same plan taken from `folder`."""
    run = Run(model, folder, plan, sources)
    say(f"state in {run.work.folder}; about {duration(run.predicted_seconds())} in all")
    base: Row = [*run.losses("base", range(plan.lessons), lambda: run.attach(None))]
    ours, ours_lessons = run.our_lessons(base)
    joint, joint_lesson = run.joint_training(sum(lesson["trained_tokens"] for lesson in ours_lessons))
    tuning = {rate: run.tuning_loss(rate) for rate in plan.rates}
    rate = min(tuning, key=tuning.__getitem__)
    theirs, theirs_lessons = run.peer_lessons(rate, base)
    return {
        "model": model.name,
        "plan": asdict(plan),
        "lessons": [{"label": t.label, "tokens": len(t.trained), "heldout_tokens": len(t.heldout)} for t in run.texts],
        "base": base,
        "joint": {"losses": joint, "seconds": joint_lesson["seconds"], "steps": joint_lesson["steps"]},
        "minimac": {**_kept(ours, joint), **_cost(ours_lessons), "matrix": ours.as_json()},
        "mlx_lm": {
            **_kept(theirs, joint),
            **_cost(theirs_lessons),
            "matrix": theirs.as_json(),
            "learning_rate": rate,
            "tuning": {str(tried): loss for tried, loss in tuning.items()},
        },
    }


@dataclass
class Run:
    """A plan under way on one model."""

    model: Path
    folder: Path
    plan: Plan
    sources: texts.Sources
    work: Work = field(init=False)
    learner: ContinualLearner = field(init=False)
    texts: list[Text] = field(init=False)

    def __post_init__(self) -> None:
        plan = self.plan
        what = {name: [document.text for document in documents] for name, documents in self.sources.items()}
        self.work = Work(
            self.folder, {"model": modeldir.identity(self.model), **asdict(plan), "texts": digest_of(what)}
        )
        self.learner = ContinualLearner.from_checkpoint(self.model, plan.config, self.work.folder / "store")
        groups = texts.lesson_texts(self.sources, self.learner.tokenizer, plan.lessons, LESSON_TOKENS)
        self.texts = [self._text(*group) for group in groups]

    def _text(self, label: str, documents: list[Document]) -> Text:
        """Divide a lesson's documents as the lesson itself will: for joint training and for mlx-lm."""
        config, tokenizer = self.plan.config, self.learner.tokenizer
        train, held = split_holdout(documents, config.holdout, HELD_OUT_AT_MOST, estimated_tokens, config.seed)
        return Text(label, documents, train, tokens_of(train, tokenizer), tokens_of(held, tokenizer))

    def our_lessons(self, base: Row) -> tuple[ForgettingMatrix, list[dict[str, Any]]]:
        """The lessons, one after the other into one domain, and the losses after each."""
        store, rows = self.learner.store, [base]
        lessons = []
        for number, text in enumerate(self.texts, 1):
            lessons.append(taught(self.learner, "lessons", number, text.documents, text.label, self.plan.steps))
            version = store.history("lessons")[number - 1]
            held = store.heldout(version)
            if held is None or not np.array_equal(held.ids, text.heldout.ids):
                raise RuntimeError(f"{text.label}: the lesson held out something else than joint training does")
            rows.append(self._row("minimac", number, store.files_of(version)))
        return self._matrix(rows), lessons

    def joint_training(self, tokens: int) -> tuple[list[float], dict[str, Any]]:
        """One lesson on everything that was trained on before, in steps of new text only; its losses on all texts."""
        config = replace(self.plan.config, holdout=0.0)
        learner = ContinualLearner(self.learner.model, config, self.learner.tokenizer, self.learner.store)
        steps = max(1, round(tokens / (config.batch_size * config.gradient_accumulation_steps * config.seq_len)))
        documents = [document for text in self.texts for document in text.train]
        lesson = taught(learner, "joint", 1, documents, "all of them", steps)
        folder = learner.store.files_of(learner.store.require("joint"))
        return self.losses("joint", range(len(self.texts)), lambda: self.attach(folder)), lesson

    def tuning_loss(self, rate: float) -> float:
        """The mean held-out loss of the first lessons after mlx-lm learned them in turn at a learning rate."""
        tuned_on = min(self.plan.tuned_on, len(self.texts))
        for number in range(1, tuned_on + 1):
            self._peer_lesson(rate, number)
        found = self.losses(f"mlx-lm {rate} tuning", range(tuned_on), lambda: self.attach(self._peer(rate, tuned_on)))
        return float(np.mean(found))

    def peer_lessons(self, rate: float, base: Row) -> tuple[ForgettingMatrix, list[dict[str, Any]]]:
        """mlx-lm's lessons, those of its tuning included, and the losses after each."""
        lessons, rows = [], [base]
        for number in range(1, len(self.texts) + 1):
            lessons.append(self._peer_lesson(rate, number))
            rows.append(self._row(f"mlx-lm {rate}", number, self._peer(rate, number)))
        return self._matrix(rows), lessons

    def _peer(self, rate: float, number: int) -> Path:
        return self.work.folder / f"mlx-lm-{rate}" / f"{number:03d}"

    def _peer_lesson(self, rate: float, number: int) -> dict[str, Any]:
        def train() -> dict[str, Any]:
            resumed = self._peer(rate, number - 1) if number > 1 else None
            target = self._peer(rate, number)
            config, steps = self.plan.config, self.plan.steps
            target.parent.mkdir(exist_ok=True)
            done = peer.train_lesson(self.model, self.texts[number - 1].trained, resumed, target, steps, rate, config)
            say(f"mlx-lm at {rate}: lesson {number}: {steps} steps in {done['seconds']:.0f} s")
            return done

        lesson: dict[str, Any] = self.work.once(f"mlx-lm {rate} lesson {number}", train)
        return lesson

    def attach(self, folder: Path | None) -> None:
        """Put an adapter on the model, ours or mlx-lm's, or none."""
        if folder is None:
            lora.detach(self.learner.model)
        elif (folder / "adapter_config.json").is_file():
            lora.attach_arrays(self.learner.model, *read_adapter(folder))
        else:
            scale = self.plan.config.lora_alpha / self.plan.config.lora_r
            lora.attach_arrays(self.learner.model, arrays.load(folder / peer.ADAPTER), scale)
        self.learner.model.train(False)

    def _row(self, who: str, stage: int, adapter: Path) -> Row:
        """Losses after a stage, None for the texts that are not measured."""
        full = stage in FULL_ROWS or stage == len(self.texts)
        columns = range(stage) if full else sorted({0, stage - 1})
        found = self.losses(f"{who} {stage}", columns, lambda: self.attach(adapter))
        say(f"{who}, after lesson {stage}: lesson 1 at {found[0]:.3f}, the latest at {found[-1]:.3f} nats per token")
        row: Row = [None] * len(self.texts)
        for column, loss in zip(columns, found, strict=True):
            row[column] = loss
        return row

    def losses(self, key: str, columns: Sequence[int], attach: Attach) -> list[float]:
        """Held-out losses of some lessons' texts in nats per token, with an adapter that is put on if need be."""

        def measure() -> list[float]:
            attach()
            length = self.plan.config.seq_len
            windows = [evaluation_windows(self.texts[c].heldout, length, max(1, length // 2)) for c in columns]
            return [evaluate(self.learner.model, one).loss for one in windows]

        found: list[float] = self.work.once(f"losses {key}", measure)
        return found

    def _matrix(self, rows: Sequence[Row]) -> ForgettingMatrix:
        return ForgettingMatrix([text.label for text in self.texts], rows)

    def predicted_seconds(self) -> float:
        """Time for everything, from the speed of a forward pass; joint training has half of the lessons' tokens."""
        plan, c = self.plan, self.plan.config
        step = c.batch_size * c.gradient_accumulation_steps * c.seq_len
        tuning = (len(plan.rates) - 1) * min(plan.tuned_on, plan.lessons)
        steps = plan.steps * (2.5 * plan.lessons + tuning)
        measured = 1  # forward pass, about, that a lesson's own measuring adds to a step's three
        full = sum(min(stage, plan.lessons) for stage in {*FULL_ROWS, plan.lessons} if stage <= plan.lessons)
        cells = 2 * (plan.lessons + full + 2 * plan.lessons) * 2 * c.holdout * LESSON_TOKENS
        return (steps * step * (BACKWARD + measured) + cells) / forward_speed(self.learner.model, c.seq_len)


def _kept(matrix: ForgettingMatrix, joint: Sequence[float]) -> dict[str, Any]:
    """How the last stage compares with joint training: of the loss, as the goal is put, and of the perplexity."""
    last, together = matrix.cells[-1], np.array(joint)

    def compared(count: int) -> dict[str, float]:
        rise = last[:count].mean() - together[:count].mean()
        return {
            "loss": float(last[:count].mean()),
            "joint": float(together[:count].mean()),
            "loss_above_joint_percent": float(100 * rise / together[:count].mean()),
            "perplexity_above_joint_percent": float(100 * np.expm1(rise)),
        }

    return {"first_lesson": compared(1), "first_lessons": compared(FIRST), "all_lessons": compared(len(joint))}


def _cost(lessons: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Seconds a lesson, and by how much of their mean they rise from one to the next; the first has no past."""
    seconds = np.array([lesson["seconds"] for lesson in lessons])
    later = seconds[1:]
    slope = float(np.polyfit(np.arange(len(later)), later, 1)[0]) if len(later) > 1 else None
    return {
        "seconds": seconds.tolist(),
        "seconds_mean": float(seconds.mean()),
        "seconds_slope": slope,
        "slope_percent_of_mean": None if slope is None else 100 * slope / float(later.mean()),
        "new_tokens": sum(lesson["trained_tokens"] for lesson in lessons),
        "replayed_tokens": sum(lesson.get("replayed_tokens", 0) for lesson in lessons),
    }


def table(figures: dict[str, Any]) -> str:
    """Losses at the end, forgetting and cost, a row for each way of learning."""
    titles = ("lesson 1", "vs joint", "all", "vs joint", "forgotten", "s/lesson", "slope")
    head = f"{'':10}" + "".join(f"{title:>10}" for title in titles)
    joint = figures["joint"]["losses"]
    lines = [head, f"{'joint':10}{joint[0]:10.3f}{'':10}{float(np.mean(joint)):10.3f}"]
    for name in ("minimac", "mlx_lm"):
        found = figures[name]
        forgotten = found["matrix"]["ppl_forget_percent"]["mean"]
        slope = found["slope_percent_of_mean"]
        lines.append(
            f"{name:10}{found['first_lesson']['loss']:10.3f}"
            f"{found['first_lesson']['loss_above_joint_percent']:+9.1f}%{found['all_lessons']['loss']:10.3f}"
            f"{found['all_lessons']['loss_above_joint_percent']:+9.1f}%"
            + (f"{'':10}" if forgotten is None else f"{forgotten:+9.1f}%")
            + f"{found['seconds_mean']:10.1f}"
            + ("" if slope is None else f"{slope:+9.1f}%")
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
