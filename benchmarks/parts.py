"""Where the time of a training step goes: forward and backward by part of the model, against the machine's best matmul.

Each part is timed alone, forward and backward, with as many calls as the model makes of it. The matmul limit is what
large square products reach in the same run; a part's own share of it says how much of its time is matrix products. Of a
step over all weights, and of a LoRA step, in which only adapters have gradients: what they add is the difference
between the layers with them and without.
"""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx_impl  # noqa: F401  before MLX, for the fast BLAS

# isort: split
import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from benchmarks.harness import Options, alternate, spread
from mlx_impl import kernels, lora
from mlx_impl.arrays import flatten
from mlx_impl.config import PRESETS, ModelConfig
from mlx_impl.device import can_compile, training_dtype
from mlx_impl.foreign import open_model
from mlx_impl.loss import held_loss_of, loss_of
from mlx_impl.model import Block, ContinualLLM
from mlx_impl.optim import AdamW, clip_by_global_norm

SQUARE = 2048
"""Width of the products that the limit is taken from."""

PRODUCTS = 8
"""How many of them at a time: one alone is told by how long it takes to begin."""


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
    counted as `kernels.attention` computes it: a block of queries is spared the keys behind it on a CPU.
    """
    tokens = rows * length
    q, kv = config.num_query_heads * config.head_width, config.num_kv_heads * config.head_width
    scores = 2 * 2 * rows * scored(length) * q  # q k' and the product with v
    return {
        "attention": 3.0 * config.num_layers * (2 * tokens * config.d_model * (2 * q + 2 * kv) + scores),
        "mlp": 3.0 * config.num_layers * 2 * tokens * 3 * config.d_model * config.d_ff,
        "head and loss": 3.0 * 2 * tokens * config.vocab_size * config.d_model,
    }


def scored(length: int) -> int:
    """Scores of a head that are computed over so many causal positions."""
    if not kernels.on_cpu():
        return length * length
    ends = [min(start + kernels.QUERIES, length) for start in range(0, length, kernels.QUERIES)]
    return sum(end * (end - start) for start, end in zip([0, *ends], ends, strict=False))


def profile(case: Case, repetitions: int) -> dict[str, Any]:
    """Seconds of a step over all weights, by part and in all, in turn; shares of the time, and of the matmul limit."""
    config, compiled = case.model.config, can_compile()  # as pretraining does
    pieces = _pieces(case, compiled)
    whole = {
        "limit": (1, _square(case.square)),
        "forward + backward": (
            1,
            _whole(case, loss_of(case.model, training_dtype()), case.model.parameters(), compiled),
        ),
        "optimizer": (1, _optimizer(case.model.parameters(), compiled)),
    }
    seconds = _in_turn({**whole, **pieces}, repetitions)
    median = {name: spread(values)["median"] for name, values in seconds.items()}
    work = flops(config, case.rows, case.length)
    speeds = [PRODUCTS * 2 * case.square**3 / value for value in seconds["limit"]]
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
        "compiled": compiled,
        "matmul_limit_gflops": spread([speed / 1e9 for speed in speeds]),
        "seconds": spread(seconds["forward + backward"]),
        "share_of_matmul_limit": spread(reached),
        "parts": parts,
        "rest_share_of_time": 1 - sum(part["share_of_time"] for part in parts.values()),
        "optimizer": {"seconds": spread(seconds["optimizer"]), "share_of_step": _share(median)},
    }


def lora_profile(case: Case, repetitions: int) -> dict[str, Any]:
    """Seconds of a LoRA step with the default adapter, by part and in all, in turn, and each part's share of it.

    The model ends bare.
    """
    model, config, compiled = case.model, case.model.config, can_compile()  # as a long lesson does
    states, (tokens, mask) = _states(case), _batch(case)
    assert model.head_weight is not None
    bare = _first_layer(model)
    bare.freeze()
    lora.attach(model, lora.LoRAConfig(), mx.random.key(0))
    adapters, layer, layers = model.trainable_parameters(), model.layers[0], config.num_layers
    mx.eval(adapters)
    plain = {
        "attention": (layers, _graded(bare.self_attn, _attended(bare), states, compiled)),
        "mlp": (layers, _graded(bare.mlp, bare.mlp, states, compiled)),
    }
    adapted = {
        "attention with adapters": (layers, _graded(layer.self_attn, _attended(layer), states, compiled)),
        "mlp with adapters": (layers, _graded(layer.mlp, layer.mlp, states, compiled)),
    }
    rest = {
        "norm": (2 * layers + 1, _graded(bare.input_layernorm, bare.input_layernorm, states, compiled)),
        "head and loss": (1, _graded_head(states, model.head_weight, tokens, mask, False, compiled)),
        "optimizer": (1, _optimizer(adapters, compiled)),
    }
    whole = {"forward + backward": (1, _whole(case, held_loss_of(model), adapters, compiled))}
    try:
        seconds = _in_turn({**whole, **plain, **adapted, **rest}, repetitions)
    finally:
        lora.detach(model)
    with_, without = (np.sum([seconds[name] for name in names], axis=0) for names in (adapted, plain))
    seconds["adapters"] = (with_ - without).tolist()
    median = {name: spread(values)["median"] for name, values in seconds.items()}
    step = median["forward + backward"] + median["optimizer"]
    shares = {name: median[name] / step for name in (*plain, "adapters", *rest)}
    return {
        "windows": [case.rows, case.length],
        "rank": lora.LoRAConfig().rank,
        "compiled": compiled,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "share_of_step": shares,
        "rest_share_of_step": 1 - sum(shares.values()),
    }


Work = Callable[[], Any]
"""Computes something, lazily."""


def _in_turn(sides: dict[str, tuple[int, Work]], repetitions: int) -> dict[str, list[float]]:
    """Seconds that so many calls of each side take, in each of the repetitions; one call is timed."""
    turns = {name: partial(_time, run) for name, (_, run) in sides.items()}
    return {name: [sides[name][0] * value for value in found] for name, found in alternate(turns, repetitions).items()}


def _share(median: dict[str, float]) -> float:
    """The optimizer's part of a whole step."""
    return median["optimizer"] / (median["optimizer"] + median["forward + backward"])


def _time(work: Work) -> float:
    mx.clear_cache()
    started = time.perf_counter()
    mx.eval(work())
    return time.perf_counter() - started


def _square(width: int) -> Work:
    a, b = (mx.random.normal((width, width), key=mx.random.key(seed)).astype(training_dtype()) for seed in (0, 1))
    mx.eval(a, b)
    return lambda: [a @ b for _ in range(PRODUCTS)]


def _whole(case: Case, loss: Callable[..., Any], parameters: Any, compiled: bool) -> Work:
    """Loss of one batch, and its gradients by `parameters`."""
    tokens, mask = _batch(case)
    graded = _compiled(mx.value_and_grad(loss), compiled)

    def run() -> Any:
        result = graded(parameters, tokens, mask)
        case.model.update(parameters)  # the loss leaves what it was traced with
        return result

    return run


def _optimizer(parameters: Any, compiled: bool) -> Work:
    """Clipping and AdamW over the parameters, with gradients of a like size."""
    optimizer = AdamW(1e-4)
    optimizer.init(parameters)
    mx.eval(optimizer.state)

    def update(parameters: Any, state: Any) -> tuple[Any, Any]:
        gradients, _ = clip_by_global_norm(parameters, 1.0)
        optimizer.state = state
        return optimizer.apply_gradients(gradients, parameters), optimizer.state

    updated, state = _compiled(update, compiled), optimizer.state
    return lambda: updated(parameters, state)


def _pieces(case: Case, compiled: bool) -> dict[str, tuple[int, Work]]:
    """Each part: how often the model calls it, and its forward and backward pass."""
    model, layers = case.model, case.model.config.num_layers
    layer, states, (tokens, mask) = _first_layer(model), _states(case), _batch(case)
    assert model.head_weight is not None
    head, table = (w.astype(training_dtype()) for w in (model.head_weight, model.model.embed_tokens.weight))
    return {
        "attention": (layers, _graded(layer.self_attn, _attended(layer), states, compiled)),
        "mlp": (layers, _graded(layer.mlp, layer.mlp, states, compiled)),
        "norm": (2 * layers + 1, _graded(layer.input_layernorm, layer.input_layernorm, states, compiled)),
        "head and loss": (1, _graded_head(states, head, tokens, mask, True, compiled)),
        "embedding": (1, _graded_table(table, tokens, compiled)),
    }


def _first_layer(model: ContinualLLM) -> Block:
    """A copy of it in the dtype that training computes in."""
    layer = Block(model.config)
    layer.update(tree_map(lambda p: p.astype(training_dtype()), model.layers[0].parameters()))
    mx.eval(layer.parameters())
    return layer


def _attended(layer: Block) -> Callable[[mx.array], mx.array]:
    return lambda x: layer.self_attn(x, "causal")


def _states(case: Case) -> mx.array:
    """What attention of the first layer is given of the batch, (B, T, D).

    Random numbers make scores of a hundred and more, of whose powers most are too small for a normal float: attention
    then takes twice the time.
    """
    tokens, _ = _batch(case)
    model = case.model
    states = model.layers[0].input_layernorm(model.model.embed_tokens(tokens[:, :-1])).astype(training_dtype())
    mx.eval(states)
    return states


def _graded(module: Any, call: Callable[[mx.array], mx.array], states: mx.array, compiled: bool) -> Work:
    """Gradients by what is trained of a module, if anything is, and by what goes in."""

    def total(parameters: Any, x: mx.array) -> mx.array:
        module.update(parameters)
        return call(x).sum()

    parameters = module.trainable_parameters()
    graded = _compiled(mx.grad(total, argnums=(0, 1) if flatten(parameters) else 1), compiled)

    def run() -> Any:
        result = graded(parameters, states)
        module.update(parameters)
        return result

    return run


def _graded_head(
    states: mx.array, head: mx.array, tokens: mx.array, mask: mx.array, trained: bool, compiled: bool
) -> Work:
    """Gradients of the loss by the states that it is computed from, and by the head if that is `trained`."""

    def total(states: mx.array, head: mx.array) -> mx.array:
        return kernels.summed_cross_entropy(states, head, tokens[:, 1:], mask)

    graded = _compiled(mx.grad(total, argnums=(0, 1) if trained else 0), compiled)
    return lambda: graded(states, head)


def _graded_table(table: mx.array, tokens: mx.array, compiled: bool) -> Work:
    def total(table: mx.array) -> mx.array:
        return table[tokens[:, :-1]].sum()

    graded = _compiled(mx.grad(total), compiled)
    return lambda: graded(table)


def _batch(case: Case) -> tuple[mx.array, mx.array]:
    """Random tokens (B, T + 1) and a mask of ones (B, T)."""
    shape = (case.rows, case.length + 1)
    tokens = mx.random.randint(0, case.model.config.vocab_size, shape, key=mx.random.key(0))
    mask = mx.ones((case.rows, case.length))
    mx.eval(tokens, mask)
    return tokens, mask


def _compiled(function: Callable[..., Any], compiled: bool) -> Callable[..., Any]:
    return kernels.compiled(function) if compiled else function
