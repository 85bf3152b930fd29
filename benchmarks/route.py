"""Routing: milliseconds to decide which of 1, 10 and 100 domains a prompt belongs to, for a long and a short prompt.

The first decision after opening reads every domain's statistics from the disk and is told apart. Most of a later one is
the base's own look at the prompt, which does not depend on the number of domains. No peer routes.

    minimac-mlx bench route
"""

import tempfile
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import mlx_impl  # noqa: F401  before MLX, for the fast BLAS

# isort: split
import mlx.core as mx

from benchmarks.child import resident
from benchmarks.filled import fill
from benchmarks.harness import Options, alternate, row, spread, timed
from benchmarks.texts import library_sources
from mlx_impl.hub import default_model
from mlx_impl.learner import ContinualLearner

SHORT = 12
"""Tokens of the short prompt; the long one has as many as the router looks at."""

LONG = 128


def measure(options: Options) -> dict[str, Any]:
    """The table by number of domains, and how the last compares with the first."""
    model = options.model or default_model()
    counts = (1, 3) if options.quick else (1, 10, 100)
    options.say(f"routing among {counts[-1]} domains, which are made first")
    table = options.once("by domains", lambda: by_domains(str(model), counts, options.repetitions))
    first, last = (table[str(count)] for count in (counts[0], counts[-1]))
    rows = []
    for kind in ("long", "short"):
        milliseconds = last[kind]["median"]
        rows.append(row(f"routing a {kind} prompt among {counts[-1]} domains", milliseconds, "ms"))
        ratio = milliseconds / first[kind]["median"]
        rows.append(row(f"routing a {kind} prompt, {counts[-1]} domains against {counts[0]}", ratio, "times"))
    return {"model": model.name, "figures": rows, "milliseconds": table}


def by_domains(model: str, counts: Sequence[int], repetitions: int) -> dict[str, Any]:
    """Milliseconds a decision by number of domains, the first one and the later ones, and bytes of the process."""
    table: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        filler = ContinualLearner.from_checkpoint(model, store=folder)
        text = " ".join(document.text for document in library_sources()["topics"][:4])
        ids = filler.tokenizer.encode(text)
        prompts = {"long": ids[:LONG], "short": ids[:SHORT]}
        mx.eval(filler.model(mx.array([prompts["long"]])))  # warm
        for count in counts:
            fill(filler, count)
            learner = ContinualLearner(filler.model, filler.config, filler.tokenizer, filler.store)
            started = time.perf_counter()
            learner.route(prompts["long"])
            first = time.perf_counter() - started
            sides = {kind: timed(partial(learner.route, ids)) for kind, ids in prompts.items()}
            seconds = alternate(sides, 4 * repetitions)
            table[str(count)] = {
                "first": 1e3 * first,
                **{kind: spread([1e3 * value for value in values]) for kind, values in seconds.items()},
                "process_bytes": resident(),
            }
    return table
