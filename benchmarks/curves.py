"""How costs grow: a lesson with the domains and lessons before it, routing with domains, replay with rows, decoding
with context, and memory with each. One picture of small panels beside the JSON. Each curve has its own process, so that
its memory is its own.

Flat is what is wanted of all but decoding. Lessons have two steps each on short texts, so that what grows would show:
the steps themselves do not depend on what was taught before. A lesson is taught five times at each point and taken back
in between. The second of a domain is what later ones are compared with: the first has nothing to replay and no Fisher.

    minimac-mlx bench curves
"""

import itertools
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import mlx_impl  # noqa: F401  before MLX, for the fast BLAS

# isort: split
import mlx.core as mx

from benchmarks import REPETITIONS, cases, child, replay, route
from benchmarks.filled import fill
from benchmarks.harness import Options, row, spread
from benchmarks.texts import library_sources
from mlx_impl.config import Budget, ContinualLearningConfig
from mlx_impl.device import compute_dtype
from mlx_impl.foreign import open_model
from mlx_impl.hub import default_model
from mlx_impl.learner import ContinualLearner
from mlx_impl.plots import plot_panels
from mlx_impl.readers import Document
from mlx_impl.replay import ReplayBuffer

DOMAINS = (1, 10, 100)
LESSONS = (1, 2, 5, 10, 20)
CONTEXTS = (128, 512, 2048, 8192)
STEPS = 2
CONFIG = ContinualLearningConfig(batch_size=2, seq_len=64)
DOCUMENTS = 2
"""Of a lesson, at most 500 tokens each."""

NEW, WARM = 16, 64
"""Tokens decoded after each context, and before the first."""

LESSON = "lesson by lessons before"

Point = dict[str, Any]
Curve = dict[str, Point]
"""By what it depends on, as text for JSON: seconds (or the like) and bytes of memory."""


def measure(options: Options) -> dict[str, Any]:
    """All curves, and for each how the last point compares with the first."""
    model = options.model or default_model()
    counts: dict[str, tuple[int, ...]] = {"domains": DOMAINS, "lessons": LESSONS, "context": CONTEXTS}
    sizes: tuple[int, ...] = replay.SIZES
    if options.quick:
        counts, sizes = {"domains": (1, 3), "lessons": (1, 2, 3), "context": (16, 32)}, (10, 100)
    curves: dict[str, Curve] = {}
    for name, curve, at in (
        (LESSON, lessons_of_one_domain, counts["lessons"]),
        ("first lesson by domains", first_lessons, counts["domains"]),
        ("routing by domains", routing, counts["domains"]),
        ("replay draw by rows", sampling, sizes),
        ("decoding by context", decoding, counts["context"]),
    ):
        options.say(f"{name}: {', '.join(f'{count:,}' for count in at)}")
        curves[name] = options.once(name, partial(child.call, curve, model=str(model), counts=at))
    return {
        "model": model.name,
        "figures": [grown(name, curve, "2" if name == LESSON else next(iter(curve))) for name, curve in curves.items()],
        "lesson": {"steps": STEPS, "windows": [CONFIG.batch_size, CONFIG.seq_len], "repetitions": REPETITIONS},
        "curves": curves,
    }


def grown(name: str, curve: Curve, first: str) -> dict[str, Any]:
    """The row of a curve: its last point against the `first`."""
    last, figure = list(curve)[-1], next(iter(curve[first]))
    ratio = curve[last][figure] / curve[first][figure]
    return row(f"{name}: {figure} at {int(last):,} against {int(first):,}", ratio, "times")


def draw(found: dict[str, Any], path: Path) -> None:
    """The picture: a panel of cost and one of memory for each curve."""
    panels = []
    for name, curve in found["curves"].items():
        for figure in next(iter(curve.values())):
            scale, unit = (1e-9, "GB") if figure == "bytes" else (1.0, figure)
            title = f"{name}: memory" if figure == "bytes" else name
            panels.append((title, unit, [(float(at), scale * point[figure]) for at, point in curve.items()]))
    plot_panels(panels, path)


def lessons_of_one_domain(model: str, counts: Sequence[int]) -> Curve:
    """Seconds of a whole lesson, its steps, measuring and commit, as the nth of its domain."""
    curve: Curve = {}
    texts = _texts()
    with tempfile.TemporaryDirectory() as folder:
        learner = ContinualLearner.from_checkpoint(model, CONFIG, folder)
        _taught(learner, texts, "warm")  # the store's first also has the base write
        for number in range(1, counts[-1] + 1):
            seconds = [_taught(learner, texts, "main")]
            if number in counts:
                for _ in range(REPETITIONS - 1):
                    learner.undo("main")
                    seconds.append(_taught(learner, texts, "main"))
                curve[str(number)] = {"s": spread(seconds)["median"], "bytes": child.resident()}
    return curve


def first_lessons(model: str, counts: Sequence[int]) -> Curve:
    """Seconds of a domain's first lesson, with so many other domains there."""
    curve: Curve = {}
    texts = _texts()
    with tempfile.TemporaryDirectory() as folder:
        learner = ContinualLearner.from_checkpoint(model, CONFIG, folder)
        _taught(learner, texts, "new")
        learner.forget("new")
        for count in counts:
            learner.set_adapter(None)
            fill(learner, count)
            seconds = []
            for _ in range(REPETITIONS):
                seconds.append(_taught(learner, texts, "new"))
                learner.forget("new")
            curve[str(count)] = {"s": spread(seconds)["median"], "bytes": child.resident()}
    return curve


def routing(model: str, counts: Sequence[int]) -> Curve:
    """Milliseconds of a decision on a long prompt."""
    table = route.by_domains(model, counts, REPETITIONS)
    return {at: {"ms": point["long"]["median"], "bytes": point["process_bytes"]} for at, point in table.items()}


def sampling(model: str, counts: Sequence[int]) -> Curve:
    """Microseconds of a draw of four windows, and what the buffer takes; the model has no part in it."""
    buffers, taken = {}, {}
    for size in counts:
        before = child.resident()
        buffers[size] = replay.full("uniform", size, 64)
        taken[size] = max(0, child.resident() - before)

    def draw(buffer: ReplayBuffer, call: int) -> None:
        drawn = buffer.sample(4, excluding=2)
        mx.eval(drawn.tokens, drawn.mask, drawn.weights)

    seconds = replay.timed(draw, buffers)
    return {str(size): {"µs": seconds[str(size)]["median"], "bytes": taken[size]} for size in counts}


def decoding(model: str, counts: Sequence[int]) -> Curve:
    """Milliseconds a token after so many tokens of context, as far as the model's own goes; bytes of MLX's arrays."""
    opened = open_model(Path(model), compute_dtype())
    decoder = cases.ours(opened)
    list(decoder([0], WARM))  # what stays is fused
    curve: Curve = {}
    for context in counts:
        if context > opened.config.max_seq_len:
            continue
        mx.clear_cache()
        mx.reset_peak_memory()
        stream = decoder(cases.random_prompt(opened.vocab_size, context), NEW + 1)
        next(stream)
        times = list(_intervals(stream))
        curve[str(context)] = {"ms": 1e3 * spread(times)["median"], "bytes": mx.get_peak_memory()}
    return curve


def _intervals(stream: Iterator[int]) -> Iterator[float]:
    """Seconds between what an iterator gives."""
    last = time.perf_counter()
    for _ in stream:
        now = time.perf_counter()
        yield now - last
        last = now


def _taught(learner: ContinualLearner, texts: Iterator[Document], domain: str) -> float:
    """Seconds of a lesson on the next few documents."""
    documents = list(islice(texts, DOCUMENTS))
    started = time.perf_counter()
    learner.learn(documents, domain, "curves", Budget(steps=STEPS))
    return time.perf_counter() - started


def _texts() -> Iterator[Document]:
    """Documents without end."""
    return itertools.cycle(library_sources()["topics"])
