"""Decoding in detail: beside mlx-lm and a plain streaming product, with a domain and without, and what a switch takes.

All sides go on from the keys and values of one random prompt, greedily, and take turns. `roof` multiplies a vector by
one matrix of as many bytes as the model has weights: nothing that reads each weight once a token can be faster.
`products` are a token's own products with fused weights, one after the other, and nothing between them. What is
between them Python and MLX prepare on one thread, whose time is told too. A switch is what the learner does for a
person, from a store of domains that it read before, until the first step can begin. Writes results/decode_NAME.json.

    python -m benchmarks.decode [medium] [--contexts 128 1024] [--new 32] [--repetitions 5]
"""

import argparse
import io
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx_impl  # noqa: F401  before MLX, for the fast BLAS

# isort: split
import mlx.core as mx

from benchmarks.cases import PREFILL, Case, drawn, opened, prefilled, random_prompt, settle
from benchmarks.common import record
from benchmarks.filled import fill
from benchmarks.harness import OURS, Options, Seconds, alternate, beside, spread
from benchmarks.resume import say
from mlx_impl import decoder, lora
from mlx_impl.arrays import Arrays, flatten
from mlx_impl.config import ModelConfig
from mlx_impl.device import compute_dtype
from mlx_impl.generate import Sampling, decode
from mlx_impl.hub import default_model
from mlx_impl.learner import ContinualLearner
from mlx_impl.model import ContinualLLM

SCALE = 2.0
SWITCHES = 15
"""Times that each switch is measured."""


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
    options = Options(repetitions=arguments.repetitions, say=say)
    figures = detailed(options, case, arguments.contexts, arguments.new)
    figures[f"prefill_{PREFILL}"] = prefilled(options, case, PREFILL)
    record(f"decode_{case.name}", figures, "decode")


def detailed(options: Options, case: Case, contexts: Sequence[int], new: int) -> dict[str, Any]:
    """What is measured of a model of ours only: primitives, switches, and all sides of decoding at each context."""
    model = case.model
    assert isinstance(model, ContinualLLM)
    figures: dict[str, Any] = {"model": case.name, "weight_bytes": _bytes(model), "new_tokens": new}
    figures["primitives"] = options.once(f"{case.name} primitives", partial(primitives, case))
    figures |= options.once(f"{case.name} switching", partial(switching, options, case))
    for context in contexts:
        key = f"decode_{context}"
        figures[key] = options.once(f"{case.name} {key}", partial(_decoded, options, case, context, new))
    return figures


def _decoded(options: Options, case: Case, context: int, new: int) -> dict[str, Any]:
    options.say(f"{case.name}: decoding after {context} tokens")
    rates = beside(
        alternate(decoding(case, random_prompt(case.model.vocab_size, context), new), options.repetitions), rates=True
    )
    better = rates["times_better"]
    prepared = [
        _preparing(case, random_prompt(case.model.vocab_size, context), new) for _ in range(options.repetitions)
    ]
    return {
        "preparing_ms": spread(prepared),
        "tokens_per_second": rates,
        "times_mlx_lm": better["mlx-lm"]["median"],
        "share_of_roof": better["roof"]["median"],
        "share_of_products": better["products"]["median"],
        "domain_against_none": 1 / better["domain"]["median"],
        "just_switched_against_none": 1 / better["just switched"]["median"],
    }


def decoding(case: Case, prompt: list[int], new: int) -> dict[str, Seconds]:
    """Tokens a second of each side; `roof` is the number of times a second that all weights can be read."""
    model = case.model
    assert isinstance(model, ContinualLLM)
    adapter = _adapter(model, seed=1)

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
            settle()
            return _speed(decode(model, prompt, new + 1, Sampling(), cache=cache), new, cache, len(prompt) - 1)

        return once

    sides = {
        OURS: as_ours(adapted=False, fused=True),
        "mlx-lm": _as_theirs(case.peer, prompt, new),
        "roof": _roof(_bytes(model), model.config.d_model),
        "products": _products(model.config),
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
        settle()
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
        settle()
        started = time.perf_counter()
        mx.eval([vector @ matrix.T for _ in range(4)])
        return 4 / (time.perf_counter() - started)

    return once


def _products(config: ModelConfig) -> Seconds:
    """Tokens a second of the products alone: four a layer and the head, each after the one before."""
    heads, width, d_ff = config.num_query_heads * config.head_width, config.d_model, config.d_ff
    joined = heads + 2 * config.num_kv_heads * config.head_width
    shapes = [(joined, width), (width, heads), (2 * d_ff, width), (width, d_ff)] * config.num_layers
    matrices = [mx.random.normal(shape).astype(compute_dtype()) for shape in [*shapes, (config.vocab_size, width)]]
    vector = mx.random.normal((1, max(heads, d_ff, width))).astype(compute_dtype())
    mx.eval(matrices, vector)

    def once() -> float:
        settle()
        started = time.perf_counter()
        for _ in range(4):
            out = vector
            for matrix in matrices:
                out = out[:, : matrix.shape[1]] @ matrix.T
            mx.eval(out)
        return 4 / (time.perf_counter() - started)

    return once


def _preparing(case: Case, prompt: list[int], new: int) -> float:
    """Milliseconds a token that the thread of the program is busy: it says what MLX's own is to compute."""
    model = case.model
    reader = decoder.opened(model)
    assert isinstance(reader, decoder.OpenedModel)
    reader.fuse()
    tokens = decode(model, prompt, new + 1, Sampling())
    next(tokens)
    started = time.thread_time()
    for _ in tokens:
        pass
    return 1e3 * (time.thread_time() - started) / new


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


def switching(options: Options, case: Case) -> dict[str, Any]:
    """Milliseconds until the first step under another domain can begin, and what two parts of that take.

    The domains are of a store; their adapters have been read before, as those of a learner's last eight are.
    """
    options.say(f"{case.name}: switching the domain")
    model = case.model
    learner = ContinualLearner(model, None, case.tokenizer)
    fill(learner, 2)
    first, second = learner.store.domains()

    def to(domain: str | None) -> None:
        learner.set_adapter(domain)
        decoder.opened(model)

    def timed(work: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> dict[str, Any]:
        taken = []
        for _ in range(SWITCHES):
            before()
            started = time.perf_counter()
            work()
            taken.append(1e3 * (time.perf_counter() - started))
        return spread(taken)

    for domain in (first, second, None):
        to(domain)
    found = {
        "switching_ms": {
            "domain_to_domain": timed(partial(to, second), partial(to, first)),
            "domain_to_base": timed(partial(to, None), partial(to, first)),
            "base_to_domain": timed(partial(to, first), partial(to, None)),
        },
        "switching_parts_ms": {
            "asking the store for the version": timed(partial(learner.store.require, first)),
            "opening for generation": timed(partial(decoder.opened, model), partial(decoder.release, model)),
        },
    }
    learner.set_adapter(None)
    decoder.release(model)
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
