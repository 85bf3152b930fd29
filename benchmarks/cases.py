"""Models that both sides open, and a turn of either: what decoding and prefill are measured on."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx_impl  # noqa: F401  before MLX, for the fast BLAS

# isort: split
import mlx.core as mx
import numpy as np

from benchmarks.harness import OURS, Options, Seconds, alternate, beside
from benchmarks.texts import library_sources
from mlx_impl import decoder
from mlx_impl.arrays import flatten
from mlx_impl.base import BaseModel
from mlx_impl.config import PRESETS
from mlx_impl.device import compute_dtype
from mlx_impl.foreign import open_model
from mlx_impl.generate import Sampling, decode
from mlx_impl.model import ContinualLLM
from mlx_impl.tokenizer import Tokenizer

PREFILL = 512
"""Tokens of a prompt whose prefill is measured."""

Decoder = Callable[[list[int], int], Iterator[int]]
"""New tokens after a prompt, so many at most."""


class Goals(NamedTuple):
    """Of decoding: times mlx-lm's speed, and the share of a streaming product's, with little context."""

    against_peer: float
    of_roof: float


class Case(NamedTuple):
    """A model opened by both sides, and what is wanted of ours."""

    name: str
    model: BaseModel
    peer: Any
    tokenizer: Tokenizer
    goals: Goals
    source: dict[str, Any]
    """Arguments of `case_of` that open it again, in another process."""


def case_of(directory: str | None = None, preset: str = "", vocabulary: int = 0) -> Case:
    """A model directory, or a preset with random weights."""
    return opened(Path(directory)) if directory else drawn(preset, vocabulary)


def opened(directory: Path) -> Case:
    """A model directory, opened by us and by mlx-lm."""
    from mlx_lm.utils import load_model

    network, _ = load_model(directory)
    network.set_dtype(compute_dtype())
    mx.eval(network.parameters())
    model = open_model(directory, compute_dtype())
    source = {"directory": str(directory)}
    return Case(directory.name, model, network, Tokenizer.load(directory), Goals(1.6, 0.75), source)


def drawn(preset: str, vocabulary: int) -> Case:
    """A preset with random weights, which both sides share, and the tokenizer of a little text."""
    model = ContinualLLM(dataclasses.replace(PRESETS[preset], vocab_size=vocabulary))
    model.set_dtype(compute_dtype())
    mx.eval(model.parameters())
    tokenizer = Tokenizer.train([document.text for document in library_sources()["topics"][:20]], min(vocabulary, 500))
    source = {"preset": preset, "vocabulary": vocabulary}
    return Case(preset, model, peer_of(model), tokenizer, Goals(1.5, 0.85), source)


def peer_of(model: ContinualLLM) -> Any:
    """mlx-lm's network around the very same arrays."""
    from mlx_lm.models import llama

    network = llama.Model(llama.ModelArgs.from_dict(model.config.to_hf()))
    network.load_weights(list(flatten(model.parameters()).items()))
    network.eval()
    return network


def ours(model: BaseModel) -> Decoder:
    """Our decoder, greedy."""
    return lambda prompt, new: decode(model, prompt, new, Sampling())


def theirs(network: Any) -> Decoder:
    """mlx-lm's, greedy."""
    from mlx_lm.generate import generate_step

    return lambda prompt, new: (token for token, _ in generate_step(mx.array(prompt), network, max_tokens=new))


def settle() -> None:
    """What a turn begins with: nothing of the turn before still runs, and no buffers of it are kept.

    mlx-lm computes one token more than it yields, on a stream of its own, and frees MLX's buffers as it decodes.
    """
    from mlx_lm.generate import generation_stream

    mx.synchronize(generation_stream)
    mx.synchronize()
    mx.clear_cache()


def random_prompt(vocabulary: int, length: int) -> list[int]:
    prompt: list[int] = np.random.default_rng(0).integers(0, vocabulary, length).tolist()
    return prompt


def prefilled(options: Options, case: Case, length: int) -> dict[str, Any]:
    """Prompt tokens a second of both sides."""
    options.say(f"{case.name}: prefill of {length} tokens")
    sides = prefilling(case, random_prompt(case.model.vocab_size, length))
    return beside(alternate(sides, options.repetitions), rates=True)


def prefilling(case: Case, prompt: list[int]) -> dict[str, Seconds]:
    """Prompt tokens over the time to the first new one."""

    def speed(side: Decoder) -> float:
        decoder.release(case.model)
        settle()
        tokens = side(prompt, 1)
        started = time.perf_counter()
        next(tokens)
        return len(prompt) / (time.perf_counter() - started)

    return {OURS: partial(speed, ours(case.model)), "mlx-lm": partial(speed, theirs(case.peer))}
