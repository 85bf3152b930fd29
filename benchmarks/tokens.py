"""Tokens a second: decoding after 128 and 1,024 tokens of context, prefill of 512, beside mlx-lm on the same arrays.

Both sides decode greedily from random prompts of one length and are timed from the first token to the last, ours with
its weights fused, as they are after some fifty tokens. Prefill ends with the first token, ours from weights that are
not fused yet, as a first prompt finds them. What each side keeps in memory beyond the weights is measured in a process
of its own. On a Mac whose bandwidth is known, decoding is also told as a share of what that allows, and power where
`powermetrics` may be run without a password.

    minimac-mlx bench tokens
"""

import time
from functools import partial
from typing import Any, NamedTuple

import mlx_impl  # noqa: F401  before MLX, for the fast BLAS

# isort: split
import mlx.core as mx

from benchmarks import child, mac
from benchmarks.cases import PREFILL, Case, Decoder, case_of, ours, prefilled, random_prompt, settle, theirs
from benchmarks.decode import detailed
from benchmarks.harness import OURS, Options, Seconds, alternate, beside, peers, row
from mlx_impl import chips
from mlx_impl.arrays import flatten
from mlx_impl.base import BaseModel
from mlx_impl.device import compute_dtype
from mlx_impl.hub import default_model
from mlx_impl.model import ContinualLLM

CONTEXTS = (128, 1024)
NEW = 32
"""Tokens decoded in a turn."""

FUSED = 64
"""Tokens after which ours has fused all its weights."""


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
    vocabulary = case.model.vocab_size
    found: dict[str, Any] = {}
    if isinstance(case.model, ContinualLLM):
        found = detailed(options, case, sizes.contexts, sizes.new)
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
