"""Seconds to a held-out loss: one of our lessons with its defaults, beside mlx_lm.lora with its learning rate tuned.

Our lesson goes once over a text; the loss that it reaches on text of the same kind is the mark. mlx-lm's trainer gets
the same documents and adapters of our rank in the same places, the best of `ROWS` and `RATES`, and of rates beyond them
while the best lies at an edge, and goes on until it reaches the mark, at most `PATIENCE` times over the text. Seconds
are those of the training steps on both sides: loading, measuring and saving are in neither. What compiling a step takes
is in them: mlx-lm compiles one for each length of a batch, our lesson one in all. On a CPU the loops that it is made of
come from the C++ compiler once and are kept; a first run of each side, which does not count, pays for them. Settings
that do not reach the mark are told.

    minimac-mlx bench learn [--data DIR]
"""

import contextlib
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx_impl  # noqa: F401  before MLX, for the fast BLAS

# isort: split
import numpy as np

from benchmarks import sides
from benchmarks.harness import OURS, Options, beside, peers, row, spread
from benchmarks.texts import Sources, folder_sources, lesson_texts, library_sources
from mlx_impl.config import Budget, ContinualLearningConfig
from mlx_impl.data import Tokens, tokens_of
from mlx_impl.evaluate import evaluate
from mlx_impl.hub import default_model
from mlx_impl.learner import ContinualLearner
from mlx_impl.readers import Document
from mlx_impl.tokenizer import Tokenizer
from mlx_impl.windows import Windows, evaluation_windows

TEXT = "medical"
RATES = (5e-4, 1e-3, 2.5e-4)
ROWS = (1, 4)
"""What mlx-lm's settings are chosen from, likely ones first: the others are given up when they take longer. With a row
a step 1e-3 and 2e-3 leave the base worse than it was, with four 2e-3 is worse than 1e-3."""

BEYOND = 2
"""Rates that are tried beyond those, at most: half the lowest or twice the highest, whichever was best."""

PATIENCE = 2.0
LOOKS = 4
"""How often mlx-lm's loss is measured over one pass of the text; between two looks it is interpolated."""

LONGEST = 512


class Plan(NamedTuple):
    """How much is learned, and what mlx-lm is tuned over."""

    tokens: int
    measured: int
    rates: Sequence[float]
    rows: Sequence[int]
    beyond: int


class Setup(NamedTuple):
    """The model and the texts: what is taught, and what the loss is measured on."""

    model: Path
    taught: list[Document]
    heldout: Tokens
    config: ContinualLearningConfig


class Ended(Exception):
    """Ends mlx-lm's training."""


def measure(options: Options) -> dict[str, Any]:
    """Tune mlx-lm, then both sides in turn, each time with another seed."""
    plan = Plan(256, 128, (1e-2,), (1,), 0) if options.quick else Plan(8192, 2048, RATES, ROWS, BEYOND)
    model = options.model or default_model()
    name, setup = prepared(options, model, plan)
    mark = options.once("our lesson", lambda: lesson(setup, plan, seed=0))["loss"]
    options.say(f"{name}: our lesson reaches {mark:.4f} nats per token")

    def attempt(rows: int, rate: float, at_most: float) -> dict[str, Any]:
        key = f"mlx-lm, {rows} rows, {rate:g}"
        took: dict[str, Any] = options.once(key, lambda: to_reach(setup, mark, rows, rate, 0, at_most))
        options.say(f"{key}: {took['loss']:.4f} after {took['seconds']:.1f} s")
        return took

    options.once("mlx-lm, not counted", lambda: to_reach(setup, mark, plan.rows[0], plan.rates[0], 0, at_most=0.0))
    tried = tuned(plan, attempt)
    rows, rate = best(tried)
    pairs = []
    for seed in range(1, options.repetitions + 1):
        options.say(f"both sides, {seed} of {options.repetitions}")
        pairs.append(options.once(f"seed {seed}", partial(both, setup, plan, rows, rate, seed)))
    ours, theirs = ([pair[side] for pair in pairs] for side in (OURS, "mlx-lm"))
    compared = beside(
        {OURS: [took["training_seconds"] for took in ours], "mlx-lm": [took["seconds"] for took in theirs]}, rates=False
    )
    reached = sum(took["reached"] for took in theirs)
    ratio = compared["times_better"]["mlx-lm"]["median"]
    note = "" if reached == options.repetitions else f" (reached in {reached} of {options.repetitions} runs: at least)"
    return {
        "model": model.name,
        "peers": peers("mlx-lm"),
        "text": name,
        "figures": [row(f"seconds to a loss on {name}, against mlx_lm.lora, tuned{note}", ratio, "times", 1.5)],
        "tokens": plan.tokens,
        "measured_on": plan.measured,
        "loss": spread([took["loss"] for took in ours]),
        "seconds": compared,
        "lesson_seconds": spread([took["seconds"] for took in ours]),
        "mlx_lm": {
            "rows": rows,
            "learning_rate": rate,
            "reached": reached,
            "seconds_include_compiling": True,
            "first_steps_of_a_length": {
                name: spread([took["first_steps"][name] for took in theirs]) for name in ("steps", "seconds")
            },
        },
        "tuning": [{"rows": rows, "rate": rate, **took} for (rows, rate), took in tried.items()],
    }


def prepared(options: Options, model: Path, plan: Plan) -> tuple[str, Setup]:
    """A name of the text, and what to teach of it; the loss is measured on other documents of the same source."""
    tokenizer = Tokenizer.load(model)
    sources: Sources = folder_sources(options.data) if options.data else library_sources()
    name = TEXT if TEXT in sources else next(iter(sources))
    taught, other = (found for _, found in lesson_texts({name: sources[name]}, tokenizer, 2, plan.tokens))
    heldout = tokens_of(other, tokenizer)
    heldout = Tokens(heldout.ids[: plan.measured], None, 1, 0)
    return name, Setup(model, taught, heldout, ContinualLearningConfig(holdout=0.0))


def tuned(plan: Plan, attempt: Callable[[int, float, float], dict[str, Any]]) -> dict[tuple[int, float], Any]:
    """What `attempt` found by rows and rate, given the seconds that the best needed so far."""
    tried: dict[tuple[int, float], Any] = {}

    def at(rows: int, rate: float) -> None:
        least = min((took["seconds"] for took in tried.values() if took["reached"]), default=math.inf)
        tried[rows, rate] = attempt(rows, rate, least)

    for rows in plan.rows:
        for rate in plan.rates:
            at(rows, rate)
    for rows in plan.rows:
        for _ in range(plan.beyond):
            of_rows = {key: took for key, took in tried.items() if key[0] == rows}
            rate, rates = best(of_rows)[1], [there for _, there in of_rows]
            if rate not in (min(rates), max(rates)):
                break
            at(rows, rate / 2 if rate == min(rates) else rate * 2)
    return tried


def best(tried: Mapping[tuple[int, float], dict[str, Any]]) -> tuple[int, float]:
    """Rows and rate that reached the mark first or, where none did, that came to the lowest loss."""
    reached = {key: took["seconds"] for key, took in tried.items() if took["reached"]}
    ranked = reached or {key: took["loss"] for key, took in tried.items()}
    return min(ranked, key=ranked.__getitem__)


def both(setup: Setup, plan: Plan, rows: int, rate: float, seed: int) -> dict[str, Any]:
    """One of our lessons, and mlx-lm until it reaches the same loss."""
    ours = lesson(setup, plan, seed)
    return {OURS: ours, "mlx-lm": to_reach(setup, ours["loss"], rows, rate, seed)}


def lesson(setup: Setup, plan: Plan, seed: int) -> dict[str, Any]:
    """Held-out `loss` after one of our lessons with its defaults, its seconds in all and those of its steps."""
    config = ContinualLearningConfig(holdout=0.0, seed=seed)
    with tempfile.TemporaryDirectory() as store:
        learner = ContinualLearner.from_checkpoint(setup.model, config, store)
        windows = Windows(tokens_of(setup.taught, learner.tokenizer), learner.config.seq_len)
        budget = Budget(steps=math.ceil(min(plan.tokens / learner.config.seq_len, len(windows)) / config.batch_size))
        figures = learner.learn(setup.taught, "main", "bench", budget).as_json()
        taken = {name: figures[name] for name in ("seconds", "training_seconds")}
        return {"loss": loss(learner.model, setup.heldout), **taken}


def to_reach(setup: Setup, mark: float, rows: int, rate: float, seed: int, at_most: float = math.inf) -> dict[str, Any]:
    """Seconds of mlx-lm's steps until its held-out loss is `mark`, or all it took; its lowest loss; whether it was.

    It is given up after `at_most` seconds: another setting needed no more. `first_steps` are those that were the first
    of their length, and so were compiled.
    """
    tokenizer = Tokenizer.load(setup.model)
    end = [tokenizer.eos_id] if tokenizer.eos_id is not None else []
    ids = [tokenizer.encode(document.text)[: LONGEST - 1] + end for document in setup.taught]
    once = math.ceil(len(ids) / min(rows, len(ids)))
    count, each = math.ceil(PATIENCE * once), max(1, once // LOOKS)
    batches = sides.peer_batches(ids, rows, LONGEST, count, seed)
    shapes = [batch.shape for batch, _ in batches]
    network = sides.peer_model(setup.model, ContinualLearningConfig(seed=seed))
    seen = [(0.0, loss(network, setup.heldout))]
    total, reached, first = 0.0, False, []

    def look(step: int, seconds: float) -> None:
        nonlocal total, reached
        total += seconds
        if shapes.index(shapes[step - 1]) == step - 1:
            first.append(seconds)
        if step % each and step != count:
            return
        seen.append((total, loss(network, setup.heldout)))
        network.train()
        reached = seen[-1][1] <= mark
        if reached or total > at_most:
            raise Ended

    with contextlib.suppress(Ended):
        sides.train_peer(network, batches, count, rate, look)
    return {
        "seconds": crossing(seen, mark) if reached else total,
        "loss": min(found for _, found in seen),
        "reached": reached,
        "first_steps": {"steps": len(first), "seconds": sum(first)},
    }


def crossing(seen: Sequence[tuple[float, float]], mark: float) -> float:
    """Seconds at which the line through the last two looks (seconds, loss) falls to `mark`."""
    (before, high), (after, low) = seen[-2:]
    return after if high <= low else before + (after - before) * (high - mark) / (high - low)


def loss(model: Any, text: Tokens) -> float:
    """Nats per token of held-out text, in windows of 256."""
    length = min(256, len(text) - 1)
    measured: float = evaluate(model, evaluation_windows(text, length, length, 4)).loss
    return measured if np.isfinite(measured) else math.inf
