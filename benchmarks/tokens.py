"""Tokens a second: decoding after 128 and 1,024 tokens of context, prefill of 512, beside mlx-lm on the same arrays.

Both sides decode greedily from random prompts of one length and are timed from the first token to the last, after two
rounds in which ours fuses the weights of what stays; prefill ends with the first token. On a Mac whose bandwidth is
known, decoding is also told as a share of what that allows, and power where `powermetrics` may be run without a
password.

    minimac-mlx bench tokens
"""

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

from benchmarks import mac
from benchmarks.harness import OURS, Options, Seconds, alternate, beside, peers, row
from mlx_impl import chips
from mlx_impl.arrays import flatten
from mlx_impl.base import BaseModel
from mlx_impl.config import PRESETS
from mlx_impl.device import compute_dtype
from mlx_impl.foreign import open_model
from mlx_impl.generate import Sampling, decode
from mlx_impl.hub import default_model
from mlx_impl.model import ContinualLLM

CONTEXTS = (128, 1024)
PREFILL = 512
NEW = 32
"""Tokens decoded in a turn."""

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
    goals: Goals


class Sizes(NamedTuple):
    """Tokens before a decoded one, of a prefilled prompt, and decoded in a turn."""

    contexts: tuple[int, ...]
    prefill: int
    new: int


def measure(options: Options) -> dict[str, Any]:
    """Both models at each context, and their prefill."""
    directory = options.model or default_model()
    rows: list[dict[str, Any]] = []
    models: dict[str, Any] = {}
    sizes = Sizes((16,), 32, 4) if options.quick else Sizes(CONTEXTS, PREFILL, NEW)
    for case in (opened(directory), drawn("tiny", 500) if options.quick else drawn("medium", 8000)):
        models[case.name] = figures = compared(options, case, sizes)
        rows += rows_of(case, figures, sizes)
    return {"model": directory.name, "peers": peers("mlx-lm"), "figures": rows, "models": models}


def compared(options: Options, case: Case, sizes: Sizes) -> dict[str, Any]:
    """What was measured of one model: of ours in detail, as `benchmarks.decode` does, of another the two sides."""
    from benchmarks import decode as details  # which takes its sides from here

    vocabulary = case.model.vocab_size
    decoders = {OURS: ours(case.model), "mlx-lm": theirs(case.peer)}
    found: dict[str, Any] = {}
    if isinstance(case.model, ContinualLLM):
        found = details.detailed(case, sizes.contexts, sizes.prefill, sizes.new, options.repetitions, options.say)
    else:
        for context in sizes.contexts:
            options.say(f"{case.name}: decoding after {context} tokens")
            sides = _decoding(decoders, random_prompt(vocabulary, context), sizes.new)
            rates = beside(alternate(sides, options.repetitions), rates=True)
            times = rates["times_better"]["mlx-lm"]["median"]
            found[f"decode_{context}"] = {"tokens_per_second": rates, "times_mlx_lm": times}
        options.say(f"{case.name}: prefill of {sizes.prefill} tokens")
        sides = prefilling(decoders, random_prompt(vocabulary, sizes.prefill))
        found[f"prefill_{sizes.prefill}"] = beside(alternate(sides, options.repetitions), rates=True)
    for context in sizes.contexts:
        sides = _decoding(decoders, random_prompt(vocabulary, context), sizes.new)
        at = found[f"decode_{context}"]
        at["bytes_beyond_weights"] = {name: grown(side) for name, side in sides.items()}
        at["share_of_bandwidth"] = of_the_limit(case.model, context, at["tokens_per_second"][OURS]["median"])
    prompt = random_prompt(vocabulary, sizes.contexts[0])
    found["watts"] = mac.watts_while(lambda: list(decoders[OURS](prompt, sizes.new)))
    return found


def rows_of(case: Case, found: dict[str, Any], sizes: Sizes) -> list[dict[str, Any]]:
    """The figures of one model that there are goals for, and what a Mac adds."""
    rows = []
    for context in sizes.contexts:
        at, what = found[f"decode_{context}"], f"decode, {case.name}, {context} tokens of context"
        rows.append(row(f"{what}, against mlx-lm", at["times_mlx_lm"], "times", case.goals.against_peer))
        if at["share_of_bandwidth"] is not None:
            rows.append(row(f"{what}, of what the bandwidth allows", at["share_of_bandwidth"], "share"))
        if "share_of_roof" in at:
            goal = case.goals.of_roof if context == sizes.contexts[0] else None
            rows.append(row(f"{what}, bytes/s of a streaming product", at["share_of_roof"], "share", goal))
            rows.append(row(f"{what}, a domain against none", at["domain_against_none"], "times", 0.95))
            rows.append(row(f"{what}, the same just switched", at["just_switched_against_none"], "times"))
    ratio = found[f"prefill_{sizes.prefill}"]["times_better"]["mlx-lm"]["median"]
    rows.append(row(f"prefill, {case.name}, {sizes.prefill} tokens, against mlx-lm", ratio, "times", 1.1))
    if "primitives" in found:
        share, slowest = found["primitives"]["share"], max(s["median"] for s in found["switching_ms"].values())
        rows.append(row(f"primitives of a token, {case.name}, of mlx-lm's", share, "share", 0.75, at_most=True))
        rows.append(row(f"switching the domain, {case.name}", slowest, "ms", 5.0, at_most=True))
    return rows


def grown(work: Callable[[], Any]) -> int:
    """Bytes of MLX's arrays at the peak, beyond those that were there before."""
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    work()
    return mx.get_peak_memory() - before


def of_the_limit(model: BaseModel, context: int, speed: float) -> float | None:
    """Tokens a second as a share of what a Mac's bandwidth allows; None where either is not known."""
    machine = mac.describe()
    if machine is None or machine["bandwidth_gb_s"] is None or not isinstance(model, ContinualLLM):
        return None
    width = compute_dtype().size
    read = chips.bytes_per_token(model.config, 8.0 * width, context, width)
    return speed / chips.ceiling(machine["bandwidth_gb_s"], read)


def opened(directory: Path) -> Case:
    """A model directory, opened by us and by mlx-lm."""
    from mlx_lm.utils import load_model

    network, _ = load_model(directory)
    network.set_dtype(compute_dtype())
    mx.eval(network.parameters())
    return Case(directory.name, open_model(directory, compute_dtype()), network, Goals(1.6, 0.75))


def drawn(preset: str, vocabulary: int) -> Case:
    """A preset with random weights, which both sides share."""
    model = ContinualLLM(dataclasses.replace(PRESETS[preset], vocab_size=vocabulary))
    model.set_dtype(compute_dtype())
    mx.eval(model.parameters())
    return Case(preset, model, peer_of(model), Goals(1.5, 0.85))


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


def _decoding(decoders: dict[str, Decoder], prompt: list[int], new: int) -> dict[str, Seconds]:
    """Tokens a second after the first token."""

    def speed(decoder: Decoder) -> float:
        tokens = decoder(prompt, new + 1)
        next(tokens)
        started = time.perf_counter()
        count = sum(1 for _ in tokens)
        return count / (time.perf_counter() - started)

    return {name: partial(speed, decoder) for name, decoder in decoders.items()}


def prefilling(decoders: dict[str, Decoder], prompt: list[int]) -> dict[str, Seconds]:
    """Prompt tokens over the time to the first new one."""

    def speed(decoder: Decoder) -> float:
        started = time.perf_counter()
        next(decoder(prompt, 1))
        return len(prompt) / (time.perf_counter() - started)

    return {name: partial(speed, decoder) for name, decoder in decoders.items()}


def random_prompt(vocabulary: int, length: int) -> list[int]:
    prompt: list[int] = np.random.default_rng(0).integers(0, vocabulary, length).tolist()
    return prompt
