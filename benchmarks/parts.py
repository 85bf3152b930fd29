"""Where the time of a training step goes: forward and backward by part of the model, against the machine's best matmul.

Each part is timed alone, forward and backward, with as many calls as the model makes of it. The matmul limit is what a
large square product reaches in the same run; a part's own share of it says how much of its time is matrix products.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx_impl  # noqa: F401  before MLX, for the fast BLAS

# isort: split
import mlx.core as mx

from benchmarks.harness import Options, spread
from mlx_impl import kernels
from mlx_impl.config import PRESETS, ModelConfig
from mlx_impl.device import can_compile, training_dtype
from mlx_impl.foreign import open_model
from mlx_impl.loss import loss_of
from mlx_impl.model import ContinualLLM
from mlx_impl.optim import AdamW, clip_by_global_norm

SQUARE = 2048
"""Width of the product that the limit is taken from."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of ours and a batch."""

    name: str
    model: ContinualLLM
    rows: int
    length: int
    square: int = SQUARE


def cases(options: Options, directory: Path) -> list[Case]:
    """The medium preset with random weights, and the model directory where it is a Llama of ours."""
    if options.quick:
        return [Case("tiny", ContinualLLM(dataclasses.replace(PRESETS["tiny"], vocab_size=500)), 2, 32, 256)]
    found = [Case("medium", ContinualLLM(dataclasses.replace(PRESETS["medium"], vocab_size=8000)), 4, 512)]
    opened = open_model(directory, training_dtype())
    if isinstance(opened, ContinualLLM) and opened.head_weight is not None:  # packed weights have no gradients
        found.append(Case(directory.name, opened, 4, min(512, opened.config.max_seq_len)))
    return found


def flops(config: ModelConfig, rows: int, length: int) -> dict[str, float]:
    """Floating-point operations of the matrix products of one forward and backward pass over all weights, by part.

    A product of (N, in) and (in, out) takes 2 N in out, and as much again for each of its two gradients. Attention is
    counted as it is computed, without leaving out what the mask hides.
    """
    tokens = rows * length
    q, kv = config.num_query_heads * config.head_width, config.num_kv_heads * config.head_width
    scores = 2 * 2 * rows * length * length * q  # q k' and the product with v
    return {
        "attention": 3.0 * config.num_layers * (2 * tokens * config.d_model * (2 * q + 2 * kv) + scores),
        "mlp": 3.0 * config.num_layers * 2 * tokens * 3 * config.d_model * config.d_ff,
        "head and loss": 3.0 * 2 * tokens * config.vocab_size * config.d_model,
    }


def profile(case: Case, repetitions: int) -> dict[str, Any]:
    """Seconds by part and in all, in turn; shares of the time, and of the matmul limit."""
    config = case.model.config
    pieces = _pieces(case)
    whole, optimizer = _whole(case), _optimizer(case)
    limit = _square(case.square)
    seconds: dict[str, list[float]] = {name: [] for name in ("limit", "forward + backward", "optimizer", *pieces)}
    for number in range(repetitions + 1):
        taken = {"limit": _time(limit), "forward + backward": _time(whole), "optimizer": _time(optimizer)}
        taken |= {name: calls * _time(run) for name, (calls, run) in pieces.items()}
        if number:  # the first time warms up
            for name, value in taken.items():
                seconds[name].append(value)
    median = {name: spread(values)["median"] for name, values in seconds.items()}
    work = flops(config, case.rows, case.length)
    speeds = [2 * case.square**3 / value for value in seconds["limit"]]
    together = sum(work.values())
    reached = [together / s / v for s, v in zip(speeds, seconds["forward + backward"], strict=True)]
    total = median["forward + backward"]
    parts = {
        name: {
            "seconds": spread(seconds[name]),
            "share_of_time": median[name] / total,
            "share_of_matmul_limit": work.get(name, 0.0) / spread(speeds)["median"] / median[name],
        }
        for name in pieces
    }
    return {
        "windows": [case.rows, case.length],
        "parameters": config.num_parameters(),
        "compiled": can_compile(),
        "matmul_limit_gflops": spread([speed / 1e9 for speed in speeds]),
        "seconds": spread(seconds["forward + backward"]),
        "share_of_matmul_limit": spread(reached),
        "parts": parts,
        "rest_share_of_time": 1 - sum(part["share_of_time"] for part in parts.values()),
        "optimizer": {"seconds": spread(seconds["optimizer"]), "share_of_step": _share(median)},
    }


Work = Callable[[], Any]
"""Computes something, lazily."""


def _share(median: dict[str, float]) -> float:
    """The optimizer's part of a whole step."""
    return median["optimizer"] / (median["optimizer"] + median["forward + backward"])


def _time(work: Work) -> float:
    started = time.perf_counter()
    mx.eval(work())
    return time.perf_counter() - started


def _square(width: int) -> Work:
    a, b = (mx.random.normal((width, width), key=mx.random.key(seed)).astype(training_dtype()) for seed in (0, 1))
    mx.eval(a, b)
    return lambda: a @ b


def _whole(case: Case) -> Work:
    """Loss and gradients by all weights of one batch."""
    tokens, mask = _batch(case)
    parameters = case.model.parameters()
    graded = _compiled(mx.value_and_grad(loss_of(case.model, training_dtype())))

    def run() -> Any:
        result = graded(parameters, tokens, mask)
        case.model.update(parameters)  # the loss leaves what it was traced with
        return result

    return run


def _optimizer(case: Case) -> Work:
    """Clipping and AdamW over all weights, with gradients of a like size."""
    optimizer = AdamW(1e-4)
    parameters = case.model.parameters()
    optimizer.init(parameters)
    mx.eval(optimizer.state)

    def update(parameters: Any, state: Any) -> tuple[Any, Any]:
        gradients, _ = clip_by_global_norm(parameters, 1.0)
        optimizer.state = state
        return optimizer.apply_gradients(gradients, parameters), optimizer.state

    graded, state = _compiled(update), optimizer.state
    return lambda: graded(parameters, state)


def _pieces(case: Case) -> dict[str, tuple[int, Work]]:
    """Each part: how often the model calls it, and its forward and backward pass."""
    model, config = case.model, case.model.config
    layer = model.layers[0]
    states = mx.random.normal((case.rows, case.length, config.d_model), key=mx.random.key(2)).astype(training_dtype())
    tokens, mask = _batch(case)
    mx.eval(states)
    assert model.head_weight is not None
    head = model.head_weight
    return {
        "attention": (config.num_layers, _graded(layer.self_attn, lambda x: layer.self_attn(x, "causal"), states)),
        "mlp": (config.num_layers, _graded(layer.mlp, layer.mlp, states)),
        "norm": (2 * config.num_layers + 1, _graded(layer.input_layernorm, layer.input_layernorm, states)),
        "head and loss": (1, _graded_head(states, head, tokens, mask)),
        "embedding": (1, _graded_table(model, tokens)),
    }


def _graded(module: Any, call: Callable[[mx.array], mx.array], states: mx.array) -> Work:
    """Gradients of a module by its weights and by what goes in."""

    def total(parameters: Any, x: mx.array) -> mx.array:
        module.update(parameters)
        return call(x).sum()

    parameters = module.parameters()
    graded = _compiled(mx.grad(total, argnums=(0, 1)))

    def run() -> Any:
        result = graded(parameters, states)
        module.update(parameters)
        return result

    return run


def _graded_head(states: mx.array, head: mx.array, tokens: mx.array, mask: mx.array) -> Work:
    def total(states: mx.array, head: mx.array) -> mx.array:
        return kernels.summed_cross_entropy(states, head, tokens[:, 1:], mask)

    graded = _compiled(mx.grad(total, argnums=(0, 1)))
    return lambda: graded(states, head)


def _graded_table(model: ContinualLLM, tokens: mx.array) -> Work:
    table = model.model.embed_tokens.weight

    def total(table: mx.array) -> mx.array:
        return table[tokens[:, :-1]].sum()

    graded = _compiled(mx.grad(total))
    return lambda: graded(table)


def _batch(case: Case) -> tuple[mx.array, mx.array]:
    """Random tokens (B, T + 1) and a mask of ones (B, T)."""
    shape = (case.rows, case.length + 1)
    tokens = mx.random.randint(0, case.model.config.vocab_size, shape, key=mx.random.key(0))
    mask = mx.ones((case.rows, case.length))
    mx.eval(tokens, mask)
    return tokens, mask


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled where pretraining compiles its step."""
    return mx.compile(function) if can_compile() else function
