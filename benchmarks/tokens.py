"""Tokens a second: decoding after 128 and 1,024 tokens of context, prefill of 512, beside mlx-lm on the same arrays.

Both sides decode greedily from random prompts of one length and are timed from the first token to the last, ours with
its weights fused, as they are after some fifty tokens. Prefill ends with the first token, ours from weights that are
not fused yet, as a first prompt finds them. What each side keeps in memory beyond the weights is measured in a process
of its own. On a Mac whose bandwidth is known, decoding is also told as a share of what that allows, and power where
`powermetrics` may be run without a password.

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

from benchmarks import child, mac
from benchmarks.harness import OURS, Options, Seconds, alternate, beside, peers, row
from benchmarks.texts import library_sources
from mlx_impl import chips, decoder
from mlx_impl.arrays import flatten
from mlx_impl.base import BaseModel
from mlx_impl.config import PRESETS
from mlx_impl.device import compute_dtype
from mlx_impl.foreign import open_model
from mlx_impl.generate import Sampling, decode
from mlx_impl.hub import default_model
from mlx_impl.model import ContinualLLM
from mlx_impl.tokenizer import Tokenizer

CONTEXTS = (128, 1024)
PREFILL = 512
NEW = 32
"""Tokens decoded in a turn."""

FUSED = 64
"""Tokens after which ours has fused all its weights."""

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


class Sizes(NamedTuple):
    """Tokens before a decoded one, of a prefilled prompt, decoded in a turn, and decoded while memory is measured."""

    contexts: tuple[int, ...]
    prefill: int
    new: int
    remembered: int


def measure(options: Options) -> dict[str, Any]:
    """Both models at each context, and their prefill."""
    directory = options.model or default_model()
    rows: list[dict[str, Any]] = []
    models: dict[str, Any] = {}
    sizes = Sizes((16,), 32, 4, 4) if options.quick else Sizes(CONTEXTS, PREFILL, NEW, FUSED)
    for source in (
        {"directory": str(directory)},
        {"preset": "tiny", "vocabulary": 500} if options.quick else {"preset": "medium", "vocabulary": 8000},
    ):
        case = case_of(**source)
        models[case.name] = figures = compared(options, case, sizes)
        rows += rows_of(case, figures, sizes)
    return {"model": directory.name, "peers": peers("mlx-lm"), "figures": rows, "models": models}


def compared(options: Options, case: Case, sizes: Sizes) -> dict[str, Any]:
    """What was measured of one model: of ours in detail, as `benchmarks.decode` does, of another the two sides."""
    from benchmarks import decode as details  # which takes its sides from here

    vocabulary = case.model.vocab_size
    found: dict[str, Any] = {}
    if isinstance(case.model, ContinualLLM):
        found = details.detailed(options, case, sizes.contexts, sizes.new)
    else:
        for context in sizes.contexts:
            key = f"decode_{context}"
            found[key] = options.once(f"{case.name} {key}", partial(_decoded, options, case, context, sizes.new))
    key = f"prefill_{sizes.prefill}"
    found[key] = options.once(f"{case.name} {key}", partial(prefilled, options, case, sizes.prefill))
    for context in sizes.contexts:
        at = found[f"decode_{context}"]
        at["bytes_beyond_weights"] = options.once(
            f"{case.name} memory_{context}", partial(_remembered, options, case, context, sizes.remembered)
        )
        at["share_of_bandwidth"] = of_the_limit(case.model, context, at["tokens_per_second"][OURS]["median"])
    prompt = random_prompt(vocabulary, sizes.contexts[0])
    found["watts"] = mac.watts_while(lambda: list(ours(case.model)(prompt, sizes.new)))
    return found


def _decoded(options: Options, case: Case, context: int, new: int) -> dict[str, Any]:
    options.say(f"{case.name}: decoding after {context} tokens")
    sides = _decoding(case, random_prompt(case.model.vocab_size, context), new)
    rates = beside(alternate(sides, options.repetitions), rates=True)
    return {"tokens_per_second": rates, "times_mlx_lm": rates["times_better"]["mlx-lm"]["median"]}


def prefilled(options: Options, case: Case, length: int) -> dict[str, Any]:
    """Prompt tokens a second of both sides."""
    options.say(f"{case.name}: prefill of {length} tokens")
    sides = prefilling(case, random_prompt(case.model.vocab_size, length))
    return beside(alternate(sides, options.repetitions), rates=True)


def _remembered(options: Options, case: Case, context: int, new: int) -> dict[str, int]:
    options.say(f"{case.name}: memory of decoding after {context} tokens, each in a process of its own")
    return {
        side: child.call(grown, source=case.source, side=side, context=context, new=new) for side in (OURS, "mlx-lm")
    }


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


def grown(source: dict[str, Any], side: str, context: int, new: int) -> int:
    """Bytes of MLX's arrays at the peak while one side decodes, beyond the weights: what it fuses is counted."""
    case = case_of(**source)
    prompt = random_prompt(case.model.vocab_size, context)
    decoded = ours(case.model)(prompt, new) if side == OURS else theirs(case.peer)(prompt, new)
    settle()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for _ in decoded:
        pass
    return mx.get_peak_memory() - before


def of_the_limit(model: BaseModel, context: int, speed: float) -> float | None:
    """Tokens a second as a share of what a Mac's bandwidth allows; None where either is not known."""
    machine = mac.describe()
    if machine is None or machine["bandwidth_gb_s"] is None or not isinstance(model, ContinualLLM):
        return None
    return speed / chips.ceiling(machine["bandwidth_gb_s"], bytes_read(model, context))


def bytes_read(model: ContinualLLM, context: int) -> float:
    """Bytes of weights, as they lie in memory, packed ones too, and of the cache that decoding one token reads."""
    left_out = () if model.config.tie_embeddings else ("model.embed_tokens.",)  # one row of it is read
    arrays = flatten(model.parameters()).items()
    weights = sum(array.nbytes for name, array in arrays if not name.startswith(left_out))
    return weights + chips.bytes_per_token(model.config, 0.0, context, compute_dtype().size)


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


def _decoding(case: Case, prompt: list[int], new: int) -> dict[str, Seconds]:
    """Tokens a second after the first token."""

    def speed(decoder: Decoder) -> float:
        settle()
        tokens = decoder(prompt, new + 1)
        next(tokens)
        started = time.perf_counter()
        count = sum(1 for _ in tokens)
        return count / (time.perf_counter() - started)

    return {OURS: partial(speed, ours(case.model)), "mlx-lm": partial(speed, theirs(case.peer))}


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


def random_prompt(vocabulary: int, length: int) -> list[int]:
    prompt: list[int] = np.random.default_rng(0).integers(0, vocabulary, length).tolist()
    return prompt
