"""Decoding in detail: beside mlx-lm and a plain streaming product, with a domain and without, and what a switch takes.

All sides go on from the keys and values of one random prompt, greedily, and take turns. `roof` multiplies a vector by
one matrix of as many bytes as the model has weights: nothing that reads each weight once a token can be faster. Writes
results/decode_NAME.json.

    python -m benchmarks.decode [medium] [--contexts 128 1024] [--new 32] [--repetitions 5]
"""

import argparse
import io
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx_impl  # noqa: F401  before MLX, for the fast BLAS

# isort: split
import mlx.core as mx

from benchmarks.common import record
from benchmarks.harness import OURS, Seconds, alternate, beside, spread
from benchmarks.resume import say
from benchmarks.tokens import PREFILL, Case, drawn, opened, ours, prefilling, random_prompt, theirs
from mlx_impl import decoder, lora
from mlx_impl.arrays import Arrays, flatten
from mlx_impl.device import compute_dtype
from mlx_impl.generate import Sampling, decode
from mlx_impl.hub import default_model
from mlx_impl.model import ContinualLLM

SCALE = 2.0


def main() -> None:
    """Measure the default model, or a preset with random weights and 8,000 tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", help="a preset's name or a directory  [default: the model pulled last]")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--new", type=int, default=32, help="tokens a turn  [default: 32]")
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    directory = Path(arguments.preset) if arguments.preset else default_model()
    case = opened(directory) if directory.is_dir() else drawn(arguments.preset, 8000)
    figures = detailed(case, arguments.contexts, PREFILL, arguments.new, arguments.repetitions, say)
    record(f"decode_{case.name}", figures, "decode")


def detailed(
    case: Case,
    contexts: Sequence[int],
    prefill: int,
    new: int,
    repetitions: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """All that is measured of a model of ours: primitives, switches, and the sides at each context and in prefill."""
    model = case.model
    assert isinstance(model, ContinualLLM)
    adapters = [_adapter(model, seed) for seed in (1, 2)]
    figures: dict[str, Any] = {"model": case.name, "weight_bytes": _bytes(model), "new_tokens": new}
    figures["primitives"] = primitives(case)
    figures["switching_ms"] = switching(model, adapters)
    for context in contexts:
        say(f"{case.name}: decoding after {context} tokens")
        sides = decoding(case, adapters[0], random_prompt(model.vocab_size, context), new)
        rates = beside(alternate(sides, repetitions), rates=True)
        figures[f"decode_{context}"] = {"tokens_per_second": rates, **_goals(rates)}
    say(f"{case.name}: prefill of {prefill} tokens")
    sides = prefilling({OURS: ours(model), "mlx-lm": theirs(case.peer)}, random_prompt(model.vocab_size, prefill))
    figures[f"prefill_{prefill}"] = beside(alternate(sides, repetitions), rates=True)
    return figures


def decoding(case: Case, adapter: Arrays, prompt: list[int], new: int) -> dict[str, Seconds]:
    """Tokens a second of each side; `roof` is the number of times a second that all weights can be read."""
    model = case.model
    assert isinstance(model, ContinualLLM)

    def as_ours(adapted: bool, fused: bool) -> Seconds:
        cache = model.make_cache()

        def once() -> float:
            decoder.release(model)  # of the turn before nothing may be fused already
            lora.detach(model)
            if adapted:
                lora.attach_arrays(model, adapter, SCALE)
            reader = decoder.opened(model)
            assert isinstance(reader, decoder.OpenedModel)
            reader.fuse_after = math.inf
            if fused:
                reader.fuse()
            return _speed(decode(model, prompt, new + 1, Sampling(), cache=cache), new, cache, len(prompt) - 1)

        return once

    sides = {
        OURS: as_ours(adapted=False, fused=True),
        "mlx-lm": _as_theirs(case.peer, prompt, new),
        "roof": _roof(_bytes(model), model.config.d_model),
        "domain": as_ours(adapted=True, fused=True),
        "just switched": as_ours(adapted=True, fused=False),
        "not fused": as_ours(adapted=False, fused=False),
    }
    lora.detach(model)
    return sides


def _as_theirs(network: Any, prompt: list[int], new: int) -> Seconds:
    from mlx_lm.generate import generate_step
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(network)

    def once() -> float:
        rest = mx.array(prompt[cache[0].offset :])
        tokens = (token for token, _ in generate_step(rest, network, max_tokens=new + 1, prompt_cache=cache))
        return _speed(tokens, new, cache, len(prompt) - 1)

    return once


def _speed(tokens: Any, new: int, cache: Sequence[Any], keep: int) -> float:
    """Tokens a second after the first of `new` + 1; the cache is cut back to what the next turn begins with."""
    next(tokens)
    started = time.perf_counter()
    count = sum(1 for _ in tokens)
    seconds = time.perf_counter() - started
    assert count == new
    for layer in cache:
        layer.trim(layer.offset - keep)
    return count / seconds


def _roof(size: int, width: int) -> Seconds:
    """Products a second of a vector and one matrix of `size` bytes."""
    dtype = compute_dtype()
    matrix = mx.random.normal((size // dtype.size // width, width)).astype(dtype)
    vector = mx.random.normal((1, width)).astype(dtype)
    mx.eval(matrix, vector)

    def once() -> float:
        started = time.perf_counter()
        for _ in range(4):
            mx.eval(vector @ matrix.T)
        return 4 / (time.perf_counter() - started)

    return once


def _goals(rates: dict[str, Any]) -> dict[str, Any]:
    """The ratios that the goals are about, round by round."""
    better = rates["times_better"]
    return {
        "times_mlx_lm": better["mlx-lm"]["median"],
        "share_of_roof": better["roof"]["median"],
        "domain_against_none": 1 / better["domain"]["median"],
        "just_switched_against_none": 1 / better["just switched"]["median"],
    }


def primitives(case: Case) -> dict[str, Any]:
    """Boxes in `mx.export_to_dot` of one greedy step after a short prompt, on both sides and without the twin."""
    from mlx_lm.models.cache import make_prompt_cache

    model = case.model
    assert isinstance(model, ContinualLLM)
    fast = decoder.OpenedModel(model, [])
    fast.fuse()
    counts = {}
    for name, network, cache in (
        (OURS, fast, model.make_cache()),
        ("mlx-lm", case.peer, make_prompt_cache(case.peer)),
        ("not opened", model, model.make_cache()),
    ):
        mx.eval(network(mx.array([[1, 2, 3, 4]]), cache=cache), [layer.state for layer in cache])
        logits = network(mx.array([[5]]), cache=cache)[:, -1]
        if name == "mlx-lm":  # what generate_step does to each token's logits
            logits = logits - mx.logsumexp(logits, keepdims=True)
        file = io.StringIO()
        mx.export_to_dot(file, mx.argmax(logits, axis=-1))
        counts[name] = file.getvalue().count("shape=rectangle")
    return {**counts, "share": counts[OURS] / counts["mlx-lm"]}


def switching(model: ContinualLLM, adapters: list[Arrays]) -> dict[str, Any]:
    """Milliseconds until the first step of another domain can begin: adapters in memory, attached and opened.

    What the base had taken off is put back, as the learner does.
    """
    layers: list[tuple[str, lora.LoRALinear]] = []

    def timed(before: Callable[[], None], after: Callable[[], None]) -> dict[str, Any]:
        taken = []
        for _ in range(15):
            before()
            decoder.opened(model)
            started = time.perf_counter()
            after()
            decoder.opened(model)
            taken.append(1e3 * (time.perf_counter() - started))
        return spread(taken)

    def attach(number: int) -> Callable[[], None]:
        return lambda: lora.attach_arrays(model, adapters[number], SCALE)

    def bare() -> None:
        layers[:] = lora.detach(model)

    def adapted() -> None:
        lora.put_back(model, layers)
        lora.attach_arrays(model, adapters[0], SCALE)

    attach(0)()
    found = {
        "domain_to_domain": timed(attach(0), attach(1)),
        "domain_to_base": timed(attach(0), bare),
        "base_to_domain": timed(bare, adapted),
    }
    lora.detach(model)
    return found


def _adapter(model: ContinualLLM, seed: int) -> Arrays:
    """A random adapter of the default shape on all projections."""
    lora.attach(model, lora.LoRAConfig(), mx.random.key(seed))
    names = lora.adapter_arrays(model)
    lora.detach(model)
    keys = mx.random.split(mx.random.key(seed), len(names))
    arrays = {n: 0.01 * mx.random.normal(a.shape, key=key) for (n, a), key in zip(names.items(), keys, strict=True)}
    mx.eval(arrays)
    return arrays


def _bytes(model: ContinualLLM) -> int:
    return sum(array.nbytes for array in flatten(model.parameters()).values())


if __name__ == "__main__":
    main()
