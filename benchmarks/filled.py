"""Stores with many domains, made without teaching each: real words and states for the router, adapters of rank one.

What a lesson or a prompt costs with a hundred domains there depends on what they carry, not on how they were taught.
"""

import itertools

import mlx_impl  # noqa: F401  before MLX, for the fast BLAS

# isort: split
import mlx.core as mx

from benchmarks.texts import library_sources
from mlx_impl import lora, states
from mlx_impl.adapters import Statistics, write_adapter, write_state
from mlx_impl.data import tokens_of
from mlx_impl.learner import ContinualLearner
from mlx_impl.readers import Document
from mlx_impl.router import Router, count_tokens

STRETCHES = 4
"""Means of states that a domain carries; a lesson takes up to 24."""


def fill(learner: ContinualLearner, count: int) -> None:
    """Add domains to the learner's store until there are `count`; its model must be bare and ends bare."""
    there = learner.store.domains()
    texts = itertools.cycle(itertools.chain.from_iterable(library_sources().values()))
    shape = lora.LoRAConfig(1, 2.0)
    missing = [name for number in range(count) if (name := f"other-{number:03}") not in there][: count - len(there)]
    if not missing:
        return
    start = states.first_token(learner.tokenizer)
    background = Router(learner.model, learner.tokenizer, learner.store).background()
    if background is None:
        background = states.background(learner.model, learner.tokenizer)
    lora.attach(learner.model, shape, mx.random.key(0))
    arrays = lora.adapter_arrays(learner.model)
    mx.eval(arrays)
    lora.detach(learner.model)
    with learner.store.writing():
        for name in missing:
            statistics = _statistics(learner, list(itertools.islice(texts, 3)), start)
            statistics[states.BACKGROUND] = background

            def write(folder, statistics: Statistics = statistics) -> None:  # type: ignore[no-untyped-def]
                write_adapter(folder, arrays, shape, learner.model)
                write_state(folder, None, statistics)

            figures = {"fit": {"before": 1.0, "after": 1.0, "tokens": 1}, "seconds": 0.0}
            learner.store.commit(name, None, write, source=name, config={}, figures=figures, heldout=None)


def _statistics(learner: ContinualLearner, documents: list[Document], start: int) -> Statistics:
    """What the router keeps of a text."""
    ids = tokens_of(documents, learner.tokenizer).ids
    means = states.mean_states(learner.model, states.stretches(ids, STRETCHES), start)
    return {**count_tokens(ids), states.MEANS: means}
