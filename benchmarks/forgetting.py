"""What is forgotten when a model learns one text after another, for every method in one run.

Each method is taught the same new tokens of each text, in the same order; replay comes on top and is counted. Learning
rates are tuned on the training part of one text. After every lesson the validation texts of all lessons so far are
measured, and at the end a text that nobody was taught. Intervals come from resampling documents.

Every (method, order) is a cell that is measured once and kept in the work folder, so that a run can be stopped and gone
on with; what is not there yet is named in the results. Finished cells lie beside them too, in `results/cells`: a run
with the same settings goes on from there on another machine. On two cores two runs with one thread each and half of
the methods take less time than one with all of them: most of a step is no matrix product.

    python -m benchmarks.forgetting --data DIR [--tokens 8192] [--orders 1] [--methods lora,replay+ewc]
    python -m benchmarks.forgetting --quick

DIR holds NAME/train.txt and NAME/valid.txt, documents separated by blank lines.
"""

import argparse
import dataclasses
import hashlib
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mlx_impl  # noqa: F401  before MLX, for the fast BLAS

# isort: split
import mlx.core as mx
import numpy as np

from benchmarks import languages
from benchmarks.common import RESULTS, record
from benchmarks.forgetting_table import Cells, figures_of, plot, table
from benchmarks.resume import BACKWARD, Work, add_common_options, duration, forward_speed, lesson_settings, say
from benchmarks.texts import folder_sources, lesson_texts
from mlx_impl import lora
from mlx_impl.adapters import read_adapter
from mlx_impl.base import BaseModel
from mlx_impl.config import LEAST_STEPS, Budget, ContinualLearningConfig
from mlx_impl.data import Tokens, tokens_of
from mlx_impl.device import compute_dtype
from mlx_impl.errors import InputError
from mlx_impl.evaluate import Predictions, document_sums, predictions
from mlx_impl.hub import default_model
from mlx_impl.learner import ContinualLearner
from mlx_impl.loss import loss_of
from mlx_impl.model import ContinualLLM
from mlx_impl.optim import AdamW, Stepper, warmup_cosine
from mlx_impl.readers import Document
from mlx_impl.router import DOCUMENT_PREFIX
from mlx_impl.store import Store
from mlx_impl.tokenizer import Tokenizer
from mlx_impl.windows import Batch, Batches, Windows, evaluation_windows

KEPT = RESULTS / "cells"

TEXTS = ("medical", "legal", "math", "literature", "python")
NEVER_TAUGHT = "general"
ROWS = 4
"""Windows measured at a time; without overlap, the same for all."""

WITHOUT_CLOCK = Budget(seconds=1e9)
RATES = {"lora": (5e-4, 1e-3, 2e-3, 4e-3), "full": (2e-5, 5e-5, 1e-4, 2e-4)}
QUICK_RATES = {"lora": (1e-2,), "full": (3e-3,)}

Nats = list[float]
"""Sums over each document of a text."""


@dataclass(frozen=True)
class Method:
    """How the texts are taught: one adapter for all (shared), all weights (full), a domain each or all in one lesson.

    `settings` are those in which the lessons differ from the others'; `rate` names their learning rate in `RATES`.
    """

    title: str
    kind: str = "shared"
    rate: str = "lora"
    settings: Mapping[str, Any] = field(default_factory=dict)


def _shared(title: str, replay_ratio: float, use_ewc: bool, **more: Any) -> Method:
    return Method(title, settings={"replay_ratio": replay_ratio, "use_ewc": use_ewc, **more})


TOKENS = {"replay_targets": "tokens"}
"""Replayed windows learned once more, as is usual, and not held to what the version before predicts on them."""

METHODS = {
    "domains": Method("a domain each", "domains"),
    "lora": _shared("one LoRA", 0.0, False),
    "full": Method("full fine-tuning", "full", "full"),
    "replay+ewc": _shared("replay 50 % + EWC", 0.5, True),
    "replay10+ewc": _shared("replay 10 % + EWC", 0.1, True),
    "replay": _shared("replay 50 %", 0.5, False),
    "ewc": _shared("EWC", 0.0, True),
    "replay10": _shared("replay 10 %", 0.1, False),
    "tokens+ewc": _shared("replay 50 % of the tokens + EWC", 0.5, True, **TOKENS),
    "tokens+ewc+distill": _shared(
        "replay 50 % of the tokens + EWC, distilled", 0.5, True, **TOKENS, distill_weight=0.5
    ),
    "joint": Method("all at once", "joint"),
}
"""In the order of running: those that the others are compared with come first."""


@dataclass(frozen=True)
class Texts:
    """What is taught, name by name, and what is measured; `tuning` is training text of the first that is not taught."""

    train: dict[str, list[Document]]
    valid: dict[str, Tokens]
    tuning: Tokens

    @property
    def names(self) -> list[str]:
        """The texts that are taught."""
        return list(self.train)

    @property
    def untaught(self) -> list[str]:
        """The texts that are only measured."""
        return [name for name in self.valid if name not in self.train]

    @classmethod
    def read(cls, folder: Path, names: Sequence[str], tokenizer: Tokenizer, tokens: int, measured: int) -> "Texts":
        """About `tokens` of each training text and `measured` of each validation text, whole documents."""
        train, valid = folder_sources(folder, "train.txt"), folder_sources(folder, "valid.txt")
        missing = sorted({*names} - {*train} | {*names} - {*valid})
        if missing:
            raise InputError(f"{folder}: no train.txt and valid.txt for {', '.join(missing)}")
        wanted = [*names, *([NEVER_TAUGHT] if NEVER_TAUGHT in valid else [])]

        def first(source: list[Document], count: int, size: int) -> list[list[Document]]:
            return [documents for _, documents in lesson_texts({"": source}, tokenizer, count, size)]

        lessons = {name: first(train[name], 2 if name == names[0] else 1, tokens) for name in names}
        probes = {name: tokens_of(first(valid[name], 1, measured)[0], tokenizer) for name in wanted}
        tuning = lessons[names[0]][1]
        return cls({name: parts[0] for name, parts in lessons.items()}, probes, tokens_of(tuning, tokenizer))


class Experiment:
    """The texts and the base under one set of settings; every figure is measured once and kept in `work`."""

    def __init__(
        self,
        model: Path,
        work: Work,
        config: ContinualLearningConfig,
        texts: Texts,
        rates: Mapping[str, Sequence[float]],
    ) -> None:
        self.model, self.work, self.texts, self.rates = model, work, texts, rates
        self.config = dataclasses.replace(config, holdout=0.0)  # validation texts measure here
        self.tokenizer = Tokenizer.load(model)

    def base(self) -> dict[str, Nats]:
        """Sums of the frozen base, by text."""
        return self.work.once("base", lambda: self._measure(self._bare(), list(self.texts.valid)))

    def cell(self, name: str, order: Sequence[str], number: int) -> dict[str, Any]:
        """Figures of a method, the texts taught in an order; `number` tells this order from others."""
        key = f"{name}/{number}"
        teach = {"shared": self._shared, "full": self._full, "domains": self._domains, "joint": self._joint}
        return self.work.once(key, lambda: teach[METHODS[name].kind](self.settings(name), list(order), key))

    def settings(self, name: str) -> ContinualLearningConfig:
        """Of a method's lessons."""
        method = METHODS[name]
        return dataclasses.replace(self.config, **method.settings, learning_rate=self.rate(method.rate))

    def rate(self, family: str) -> float:
        """The learning rate after which the first text's tuning part is predicted best."""
        name = self.texts.names[0]

        def tune() -> dict[str, float]:
            losses = {}
            for rate in self.rates[family]:
                config = dataclasses.replace(self.config, learning_rate=rate)
                with tempfile.TemporaryDirectory() as folder:
                    learner = self._learner(config, Path(folder))
                    if family == "full":
                        self._train_all(learner.model, self.texts.train[name], config, 0)
                    else:
                        learner.learn(self.texts.train[name], name, name, WITHOUT_CLOCK)
                    nats = self._nats(learner.model, self.texts.tuning)
                losses[str(rate)] = float(nats.sum() / len(nats))
                say(f"{family}: learning rate {rate:g} leaves {losses[str(rate)]:.4f} nats per token of {name}")
            return losses

        if len(self.rates[family]) == 1:
            return self.rates[family][0]
        losses = self.work.once(f"tune/{family}", tune)
        return float(min(losses, key=lambda rate: losses[rate]))

    # -- the kinds of methods --------------------------------------------------------------------------------------

    def _shared(self, config: ContinualLearningConfig, order: list[str], key: str) -> dict[str, Any]:
        """One domain taught each text in turn; lessons that the store has are not taught again."""
        folder = self.work.folder / key
        if not folder.is_dir():
            self._first(order[0]).copy_to(folder)
        learner = self._learner(config, folder)
        stages = []
        for number, name in enumerate(order):
            if len(learner.store.history("main")) == number:
                self._teach(learner, self.texts.train[name], "main", name)
            version = learner.store.history("main")[number]
            lora.attach_arrays(learner.model, *read_adapter(learner.store.files_of(version)))
            stages.append(self._stage(learner.model, order, number, key))
        return {"order": order, "stages": stages, **_cost(learner)}

    def _first(self, name: str) -> Store:
        """One domain with the lesson that all methods on one adapter begin with: nothing can be replayed or held yet.

        It is taught once, to the bit what each of them would teach; another process that needs it waits.
        """
        with self.work.alone("first"):
            learner = self._learner(self.settings("replay+ewc"), self.work.folder / "first" / name)
            if not learner.store.history("main"):
                self._teach(learner, self.texts.train[name], "main", name)
            return learner.store

    def _full(self, config: ContinualLearningConfig, order: list[str], key: str) -> dict[str, Any]:
        """All weights taught each text in turn, from the base each time that this is started."""
        model, stages, costs = self._bare(), [], []
        for number, name in enumerate(order):
            costs.append(self._train_all(model, self.texts.train[name], config, number))
            say(f"{key}: {name} in {costs[-1]['seconds']:.0f} s")
            stages.append(self._stage(model, order, number, key))
        return {"order": order, "stages": stages, **_summed(costs)}

    def _domains(self, config: ContinualLearningConfig, order: list[str], key: str) -> dict[str, Any]:
        """A domain for each text; measured by name, and each window as its first tokens are routed."""
        learner = self._learner(config, self.work.folder / key)
        before: dict[str, str] = {}
        for name in order:
            if not learner.store.history(name):
                self._teach(learner, self.texts.train[name], name, name)
            learner.set_adapter(name)
            before[name] = self.work.once(f"{key}/logits/{name}", partial(self._probe, learner.model, name))
        nats: dict[str, Nats] = {}
        same = []
        for name in order:
            learner.set_adapter(name)
            same.append(before[name] == self._probe(learner.model, name))
            nats |= self._measure(learner.model, [name])
        routed = self._routed(learner)
        return {"order": order, "texts": nats, "bit_identical": all(same), "routed": routed, **_cost(learner)}

    def _joint(self, config: ContinualLearningConfig, order: list[str], key: str) -> dict[str, Any]:
        """All texts in one lesson, its windows shuffled: what no order can do better."""
        learner = self._learner(config, self.work.folder / key)
        documents = [document for name in order for document in self.texts.train[name]]
        if not learner.store.history("main"):
            self._teach(learner, documents, "main", "all")
        learner.set_adapter("main")
        return {"order": order, "texts": self._measure(learner.model, list(self.texts.valid)), **_cost(learner)}

    def _teach(self, learner: ContinualLearner, documents: list[Document], domain: str, source: str) -> None:
        lesson = learner.learn(documents, domain, source, WITHOUT_CLOCK)
        say(
            f"{learner.store.folder.parent.name}: {source} in {lesson.seconds:.0f} s, {lesson.steps} steps of "
            f"{lesson.batch_size} windows, {lesson.before:.3f} -> {lesson.after:.3f} nats per token of its own text"
        )

    def _train_all(
        self, model: BaseModel, documents: list[Document], config: ContinualLearningConfig, seed: int
    ) -> dict[str, Any]:
        """One epoch over all weights, with the batches that a lesson takes."""
        started = time.perf_counter()
        windows = Windows(tokens_of(documents, self.tokenizer), config.seq_len)
        rows = max(1, min(config.batch_size, len(windows) // LEAST_STEPS))
        batches, steps = Batches(windows, rows, config.seed + seed), math.ceil(len(windows) / rows)
        model.unfreeze()
        optimizer = AdamW(config.peak_rate(steps), betas=(0.9, 0.999), weight_decay=config.weight_decay)
        stepper = Stepper(model.trainable_parameters(), optimizer, loss_of(model), config.max_grad_norm, False)
        tokens = 0
        for step in range(steps):
            ids, mask = next(batches)
            rate = warmup_cosine(step, steps, max(1, round(config.warmup * steps)), config.peak_rate(steps))
            stepper.step([(mx.array(ids), mx.array(mask))], rate).read()
            tokens += int(mask.sum())
        model.update(stepper.parameters)
        mx.eval(model.parameters())
        seconds = time.perf_counter() - started
        return {"steps": steps, "new_tokens": tokens, "replayed_tokens": 0, "seconds": seconds}

    # -- measuring -------------------------------------------------------------------------------------------------

    def _bare(self) -> BaseModel:
        return ContinualLLM.from_checkpoint(self.model, compute_dtype())

    def _learner(self, config: ContinualLearningConfig, store: Path) -> ContinualLearner:
        return ContinualLearner.from_checkpoint(self.model, config, store)

    def _stage(self, model: BaseModel, order: list[str], number: int, key: str) -> dict[str, Nats]:
        """The texts taught up to now; after the last one also what was never taught."""
        names = order[: number + 1]
        if number + 1 == len(order):
            names = [*names, *self.texts.untaught]
        return self.work.once(f"{key}/{number}", lambda: self._measure(model, names))

    def _measure(self, model: BaseModel, names: Sequence[str]) -> dict[str, Nats]:
        """Sums over the documents of these texts."""
        sums = {}
        for name in names:
            text = self.texts.valid[name]
            sums[name] = document_sums(self._nats(model, text), text, self.tokenizer.eos_id)[0].tolist()
        return sums

    def _nats(self, model: BaseModel, text: Tokens) -> np.ndarray:
        """Of each token but the first."""
        windows = evaluation_windows(text, self.config.seq_len, self.config.seq_len, ROWS)
        return np.concatenate([part.nats for part in predictions(model, windows)])

    def _probe(self, model: BaseModel, name: str) -> str:
        """Hash of the logits of a text's first window."""
        logits = model(mx.array(self.texts.valid[name].ids[: self.config.seq_len])[None])
        return hashlib.sha256(np.array(logits.astype(mx.float32)).tobytes()).hexdigest()

    def _routed(self, learner: ContinualLearner) -> dict[str, Any]:
        """Windows routed by their first tokens and measured on the rest, beside the text's own domain or the base.

        By text: the domains chosen, and (named, routed, tokens) of each window, in nats.
        """
        results = {}
        for name, text in self.texts.valid.items():
            own = name if name in self.texts.train else None
            seen = min(DOCUMENT_PREFIX, self.config.seq_len // 2)
            rows = [(ids, _behind(seen, mask)) for ids, mask in self._single_windows(text)]
            chosen = [learner.route(ids[0, :seen].tolist()).domain for ids, _ in rows]
            sums = {}
            for domain in {own, *chosen}:
                learner.set_adapter(domain)
                sums[domain] = [_total(part) for part in predictions(learner.model, rows)]
            results[name] = {
                "chosen": [domain or "none" for domain in chosen],
                "named": sums[own],
                "routed": [sums[domain][row] for row, domain in enumerate(chosen)],
                "tokens": [int(mask.sum()) for _, mask in rows],
            }
        return results

    def _single_windows(self, text: Tokens) -> list[Batch]:
        """Whole windows, one by one."""
        length = self.config.seq_len
        return [part for part in evaluation_windows(text, length, length) if part[1].all()]


def _behind(seen: int, mask: np.ndarray) -> np.ndarray:
    """The mask (1, T) without the first `seen` tokens, by which a window is routed."""
    rest = mask.copy()
    rest[:, : seen - 1] = 0
    return rest


def _total(part: Predictions) -> float:
    return float(part.nats.sum(dtype=np.float64))


def _cost(learner: ContinualLearner) -> dict[str, Any]:
    """Steps, tokens and seconds of all lessons in the store."""
    lessons = [version.figures for version in learner.store.versions()]
    return _summed(
        [
            {
                "steps": lesson["steps"],
                "new_tokens": lesson["trained_tokens"],
                "replayed_tokens": lesson["replayed_tokens"],
                "seconds": lesson["training_seconds"],
            }
            for lesson in lessons
        ]
    )


def _summed(costs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"cost": {name: sum(cost[name] for cost in costs) for name in costs[0]}}


def orders_of(names: Sequence[str], count: int, seed: int) -> list[list[str]]:
    """`count` orders, the first as given."""
    random = np.random.default_rng(seed)
    return [list(names), *([names[i] for i in random.permutation(len(names))] for _ in range(count - 1))][:count]


def predicted_seconds(experiment: Experiment, methods: Sequence[str], orders: int, tokens: int, measured: int) -> float:
    """From the speed of a forward pass now: what all cells take if none is there."""
    speed = forward_speed(experiment._bare(), experiment.config.seq_len)
    texts, total = len(experiment.texts.names), 0.0
    cells = texts * (texts + 1) / 2
    for name in methods:
        method = METHODS[name]
        replayed = method.settings.get("replay_ratio", 0.0)
        trained = texts * tokens / (1 - replayed)
        times = orders if method.kind in ("shared", "full") else 1
        total += times * (BACKWARD * trained + (cells if times == orders else texts) * measured)
    tuned = sum(len(rates) for rates in experiment.rates.values() if len(rates) > 1)
    return (total + tuned * (BACKWARD * tokens + tokens)) / speed


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, and write table, plot and JSON of what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of NAME/train.txt and NAME/valid.txt")
    parser.add_argument("--texts", default=",".join(TEXTS), help=f"names, in order  [default: {','.join(TEXTS)}]")
    parser.add_argument("--tokens", type=int, default=8192, help="new tokens of each text  [default: 8192]")
    parser.add_argument("--measured", type=int, default=4096, help="tokens of each validation text  [default: 4096]")
    parser.add_argument("--orders", type=int, default=1, help="orders of the texts  [default: 1]")
    parser.add_argument("--methods", default=",".join(METHODS), help=f"of {','.join(METHODS)}  [default: all]")
    parser.add_argument(
        "--rates",
        action="append",
        default=[],
        metavar="NAME=X,...",
        help=f"learning rates to choose from, of {' and '.join(RATES)}; one alone is taken as it is",
    )
    parser.add_argument("--report", action="store_true", help="measure nothing, write what is there")
    parser.add_argument("--quick", action="store_true", help="invented languages on a tiny model: a minute or two")
    add_common_options(parser, "forgetting", quick=False)
    options = parser.parse_args(arguments)
    methods = options.methods.split(",")
    unknown = sorted({*methods} - {*METHODS})
    if unknown:
        parser.error(f"no method {', '.join(unknown)}; there are {', '.join(METHODS)}")
    if options.quick:
        written("forgetting_quick", quick(options.work, options.seed, methods))
        return
    if options.data is None:
        parser.error("--data DIR or --quick is needed")
    model = options.model or default_model()
    config = lesson_settings(options.settings, ContinualLearningConfig(seed=options.seed))
    texts = Texts.read(options.data, options.texts.split(","), Tokenizer.load(model), options.tokens, options.measured)
    rates = RATES | {name: _numbers(values) for name, _, values in (pair.partition("=") for pair in options.rates)}
    settings = {
        "model": model.name,
        "texts": {name: tokens.digest for name, tokens in texts.valid.items()},
        "tokens": options.tokens,
        "config": dataclasses.asdict(config),
        "rates": rates,
    }
    name = f"forgetting_{options.tokens}"
    work = Work(options.work, settings, KEPT / f"{name}.json")
    experiment = Experiment(model, work, config, texts, rates)
    orders = orders_of(texts.names, options.orders, options.seed)
    if options.report:
        methods = [name for name in methods if all(f"{name}/{n}" in work for n in _numbered(name, options.orders))]
        if not methods:
            parser.error(f"nothing is finished yet in {work.folder}")
    else:
        seconds = predicted_seconds(experiment, methods, options.orders, options.tokens, options.measured)
        say(f"at most {duration(seconds)} for {len(methods)} methods, less what is in {work.folder}")
    figures = run(experiment, methods, orders)
    figures["missing"] = sorted({*METHODS} - {*methods})
    cells = [f"{method}/{number}" for method in METHODS for number in range(options.orders)]
    work.keep(["base", *(f"tune/{family}" for family in RATES), *cells])
    written(name, {"model": model.name, "tokens": options.tokens, **figures})


def written(name: str, figures: dict[str, Any]) -> None:
    """Write JSON and plot into the results, and print the table."""
    plot(figures, RESULTS / f"{name}.png")
    record(name, figures, module="forgetting")
    print(table(figures))


def _numbered(name: str, orders: int) -> range:
    """The orders in which a method is run: one where the order makes no difference."""
    return range(orders if METHODS[name].kind in ("shared", "full") else 1)


def _numbers(values: str) -> tuple[float, ...]:
    return tuple(float(value) for value in values.split(","))


def run(experiment: Experiment, methods: Sequence[str], orders: list[list[str]]) -> dict[str, Any]:
    """Every cell, and the figures that follow from them."""
    base = experiment.base()
    cells: Cells = {}
    for number, order in enumerate(orders):
        for name in methods:
            if number in _numbered(name, len(orders)):
                cells.setdefault(name, []).append(experiment.cell(name, order, number))
    counts = {
        name: document_sums(np.ones(len(text) - 1), text, experiment.tokenizer.eos_id)[0]
        for name, text in experiment.texts.valid.items()
    }
    rates = {family: experiment.rate(family) for family in {METHODS[name].rate for name in methods}}
    titles = {name: METHODS[name].title for name in methods}
    return {"learning_rates": rates, **figures_of(cells, base, counts, titles)}


def quick(folder: Path, seed: int, methods: Sequence[str]) -> dict[str, Any]:
    """Invented languages on a tiny base: under two minutes, the same code."""
    return run(quick_experiment(folder, seed), methods, [list(languages.NAMES)])


def quick_experiment(folder: Path, seed: int) -> Experiment:
    """What `quick` measures: the base and the texts are made where they are missing."""
    work = Work(folder, {"quick": seed})
    data = languages.write_texts(work.folder / "texts", seed)
    model = languages.train_base(work.folder / "base", data, seed)
    config = ContinualLearningConfig(seq_len=64, batch_size=4, lora_r=8, lora_alpha=16, seed=seed)
    texts = Texts.read(data, languages.NAMES, Tokenizer.load(model), 8192, 2048)
    return Experiment(model, work, config, texts, QUICK_RATES)


if __name__ == "__main__":
    main()
