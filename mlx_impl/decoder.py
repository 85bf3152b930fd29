"""The model opened for generation: the numbers of `ContinualLLM` for one text, with fewer and larger operations.

It runs the model's own layers at first, adapters included, so that a switch of the domain costs nothing. What stays
is fused, one layer a token: query, key and value, gate and up become one matrix each, an adapter merged into it in
float32. Fused matrices are copies; the model's arrays are never touched, and `release` frees the copies.

On a CPU a step of one token takes MLX's plain products and powers, where its fused kernels are chains of slow
primitives: softmax attention of one query took 0.3 to 0.8 ms a layer, this takes 0.1. On a GPU the kernels are used.
Letters: T tokens, S cached tokens, D model width, H query heads, K key/value heads, d head width, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_impl import kernels
from mlx_impl.base import BaseModel
from mlx_impl.cache import Cache, Mask
from mlx_impl.config import ModelConfig
from mlx_impl.device import memory_bytes
from mlx_impl.lora import LoRALinear
from mlx_impl.model import Block, ContinualLLM, rope_frequencies

FUSE_AFTER = 16
"""Tokens that the same weights decode before they are fused: the copy costs about what it saves in thirty more."""

SHORT = 256
"""Cached tokens up to which MLX's softmax is as fast on a CPU as powers, in fewer operations."""

_E, _INVERSE_E = mx.array(math.e), mx.array(1 / math.e)  # MLX's power takes a third of the time of its exp


class Reader(Protocol):
    """What decoding asks of a model: its states and logits for the next tokens of one text."""

    def hidden(self, tokens: mx.array, cache: Sequence[Any]) -> mx.array:
        """Final hidden states (1, T, D) of tokens (1, T), after those in the cache."""

    def __call__(self, tokens: mx.array, cache: Sequence[Any]) -> mx.array:
        """Logits (1, T, V) of tokens (1, T), after those in the cache."""


def opened(model: BaseModel) -> Reader:
    """The fast twin of our own model as it is now, adapter included; any other model as it is.

    The twin is kept with the model and given again as long as the model has the same arrays.
    """
    if not isinstance(model, ContinualLLM):
        return model
    held, made_of = model.reader, _made_of(model)
    if held is None or not _same(held.made_of, made_of):
        model.reader = held = OpenedModel(model, made_of)
    return held


def release(model: BaseModel) -> None:
    """Free the fused copies, before memory is needed for something else."""
    if isinstance(model, ContinualLLM):
        model.reader = None


def _made_of(model: ContinualLLM) -> list[Any]:
    """The arrays of a model and the scales of its adapter: what its logits depend on."""
    found: list[Any] = []

    def collect(tree: Any) -> None:
        for value in tree.values() if isinstance(tree, dict) else tree:
            if isinstance(value, mx.array):
                found.append(value)
            elif isinstance(value, dict | list):
                collect(value)
        if isinstance(tree, LoRALinear):
            found.append(tree.scale)

    collect(model)  # a module is a dictionary; its own parameters() takes ten times as long
    return found


def _same(left: list[Any], right: list[Any]) -> bool:
    """Whether two lists hold the very same arrays and equal scales."""
    return len(left) == len(right) and all(
        a is b or (isinstance(a, float) and isinstance(b, float) and a == b) for a, b in zip(left, right, strict=True)
    )


class OpenedModel:
    """The steps of one text through a model. It holds the model's layers, not the model, which may be freed."""

    def __init__(self, model: ContinualLLM, made_of: list[Any]) -> None:
        config = model.config
        self.made_of = made_of
        self._embedding = model.model.embed_tokens
        self._norm = _Norm(model.model.norm)
        head = model.head_weight
        packed = self._embedding.as_linear if config.tie_embeddings else model.lm_head
        self._head: Callable[[mx.array], mx.array] = packed if head is None else partial(_product, head.T)
        self._layers = [_Layer(block, config) for block in model.layers]
        self._rotation = _Rotation(config)
        self._steps = self._fused = 0
        arrays = sum(array.nbytes for array in made_of if isinstance(array, mx.array))
        self.fuse_after = FUSE_AFTER if 4 * arrays <= memory_bytes() else math.inf
        """Steps before it begins to fuse; never where a copy could leave too little memory."""

    def hidden(self, tokens: mx.array, cache: Sequence[Cache]) -> mx.array:
        """Final hidden states (1, T, D) of tokens (1, T), after those in the cache."""
        x = self._embedding(tokens)  # (1, T, D)
        if tokens.shape[1] == 1 and kernels.on_cpu() and x.dtype == mx.float32:
            turn = self._rotation.matrix(cache[0].offset)
            for layer, held in zip(self._layers, cache, strict=True):
                x = layer.one(x, turn, held)
            return self._norm.one(x)
        mask = cache[0].mask(tokens.shape[1])
        for layer, held in zip(self._layers, cache, strict=True):
            x = layer.many(x, mask, held)
        return self._norm(x)

    def __call__(self, tokens: mx.array, cache: Sequence[Cache]) -> mx.array:
        """Logits (1, T, V) of tokens (1, T), after those in the cache. Counts as a step: see `FUSE_AFTER`."""
        self._steps += 1
        if self._steps > self.fuse_after:
            self.fuse(1)
        return self._head(self.hidden(tokens, cache))

    def fuse(self, layers: int | None = None) -> None:
        """Fuse so many more layers, or all."""
        end = len(self._layers) if layers is None else self._fused + layers
        for layer in self._layers[self._fused : end]:
            layer.fuse()
        self._fused = min(end, len(self._layers))


class _Layer:
    """A transformer layer for one text."""

    def __init__(self, block: Block, config: ModelConfig) -> None:
        attention, mlp = block.self_attn, block.mlp
        self._norms = _Norm(block.input_layernorm), _Norm(block.post_attention_layernorm)
        self._qkv = _Joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self._out, self._down = _Joined(attention.o_proj), _Joined(mlp.down_proj)
        self._gate_up = _Joined(mlp.gate_proj, mlp.up_proj)
        self._rope, self._scale = attention.rope, attention.scale
        self._heads, self._kv_heads, self._width = config.num_query_heads, config.num_kv_heads, config.head_width

    def fuse(self) -> None:
        """From now on one matrix for what has one input."""
        for joined in (self._qkv, self._out, self._gate_up, self._down):
            joined.fuse()

    def many(self, x: mx.array, mask: Mask, cache: Cache) -> mx.array:
        """(1, T, D) -> (1, T, D): the operations of `model.Block`, of joined projections."""
        H, K, d = self._heads, self._kv_heads, self._width
        T = x.shape[1]
        joined = self._qkv(self._norms[0](x)).reshape(1, T, H + 2 * K, d).swapaxes(1, 2)  # (1, H + 2K, T, d)
        turned, values = mx.split(joined, [H + K], axis=1)
        q, keys = mx.split(self._rope(turned, offset=cache.offset), [H], axis=1)
        keys, values = cache.update(keys, values)  # (1, K, S, d)
        out = kernels.attention(q, keys, values, self._scale, mask)  # (1, H, T, d)
        x = self._out(out.swapaxes(1, 2).reshape(1, T, H * d), x)
        gate, up = mx.split(self._gate_up(self._norms[1](x)), 2, axis=-1)
        return self._down(_gated(gate, up), x)

    def one(self, x: mx.array, turn: tuple[mx.array, mx.array], cache: Cache) -> mx.array:
        """(1, 1, D) -> (1, 1, D) on a CPU; `turn` is what `_Rotation.matrix` gives."""
        H, K, d = self._heads, self._kv_heads, self._width
        joined = self._qkv(self._norms[0].one(x))  # (1, 1, (H + 2K) d)
        q, keys, values = mx.split(joined, [H * d, (H + K) * d], axis=-1)
        q = q.reshape(1, K, H // K, d) @ turn[0]  # query heads that share a key are the rows of one product
        keys, values = cache.update(keys.reshape(1, K, 1, d) @ turn[1], values.reshape(1, K, 1, d))
        out = _attention(q, keys, values)  # (1, K, H / K, d)
        x = self._out(out.reshape(1, 1, H * d), x)
        gate, up = mx.split(self._gate_up(self._norms[1].one(x)), 2, axis=-1)
        return self._down(gate * up / (1 + mx.power(_INVERSE_E, gate)), x)


class _Joined:
    """Linear layers of one input, their outputs side by side: (1, T, in) -> (1, T, sum of out)."""

    def __init__(self, *layers: nn.Module) -> None:
        self._layers = layers
        self._weight: mx.array | None = None  # (in, sum of out), a transposed view, once fused
        self._bias: mx.array | None = None

    def fuse(self) -> None:
        """Make one matrix of them, adapters merged in float32; packed layers stay as they are."""
        plain = [layer.fuse() if isinstance(layer, LoRALinear) else layer for layer in self._layers]
        bases = [layer.linear if isinstance(layer, LoRALinear) else layer for layer in self._layers]
        if all(isinstance(base, nn.Linear) for base in bases):
            self._weight = _stacked([layer.weight for layer in plain]).T
            self._bias = _stacked([layer.bias for layer in plain]) if "bias" in plain[0] else None

    def __call__(self, x: mx.array, onto: mx.array | None = None) -> mx.array:
        """The outputs, added to `onto` where it is given."""
        if self._weight is None:
            out = [layer(x) for layer in self._layers]
            joined = out[0] if len(out) == 1 else mx.concatenate(out, axis=-1)
            return joined if onto is None else onto + joined
        added = self._bias if onto is None else onto if self._bias is None else onto + self._bias
        return x @ self._weight if added is None else mx.addmm(added, x, self._weight)


def _stacked(arrays: list[mx.array]) -> mx.array:
    return arrays[0] if len(arrays) == 1 else mx.concatenate(arrays)


def _product(weight: mx.array, x: mx.array) -> mx.array:
    return x @ weight


class _Norm:
    """RMS normalisation x / sqrt(mean(x^2) + eps) * weight."""

    def __init__(self, norm: nn.RMSNorm) -> None:
        self._weight, self._eps = norm.weight, norm.eps
        self._least = mx.array([[[norm.eps]]])
        self._share = 1 / norm.weight.size

    def __call__(self, x: mx.array) -> mx.array:
        """(1, T, D) -> (1, T, D)."""
        return mx.fast.rms_norm(x, self._weight, self._eps)

    def one(self, x: mx.array) -> mx.array:
        """(1, 1, D) -> (1, 1, D) in a third of the time on a CPU: the mean is a product of x with itself."""
        return x * mx.rsqrt(mx.addmm(self._least, x, x.swapaxes(1, 2), alpha=self._share)) * self._weight


class _Rotation:
    """Rotary positions of one token as a matrix, so that heads are turned by one small product on a CPU."""

    def __init__(self, config: ModelConfig) -> None:
        width, half = config.head_width, config.head_width // 2
        if config.rope_scaling is None:  # as MLX computes them, to the bit
            speeds = mx.exp(mx.arange(0, -half, -1, dtype=mx.float32) * (math.log(config.rope_base) / half))
        else:
            speeds = 1 / rope_frequencies(config)
        self._speeds = mx.concatenate([speeds, speeds])  # (d,), radians a position
        self._same = mx.eye(width)
        self._other = mx.eye(width, k=half) - mx.eye(width, k=-half)  # x @ it is (-second half, first half)
        self._scale = width**-0.5

    def matrix(self, position: int) -> tuple[mx.array, mx.array]:
        """Two (d, d): for queries, with attention's scale in it, and for keys."""
        angles = position * self._speeds
        turn = self._same * mx.cos(angles) + self._other * mx.sin(angles)
        return turn * self._scale, turn


def _attention(q: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    """One token's scaled queries (1, K, H / K, d) over keys and values (1, K, S, d), on a CPU: (1, K, H / K, d)."""
    scores = q @ keys.swapaxes(-1, -2)
    if keys.shape[2] <= SHORT:
        return mx.softmax(scores, axis=-1) @ values
    powers = mx.power(_E, scores - scores.max(axis=-1, keepdims=True))
    return (powers @ values) / powers.sum(axis=-1, keepdims=True)


def _gated(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up, any shape; one launch on a GPU."""
    return kernels.swiglu(gate, up) if kernels.on_cpu() else _compiled_gated(gate, up)


@partial(mx.compile, shapeless=True)
def _compiled_gated(gate: mx.array, up: mx.array) -> mx.array:
    return nn.silu(gate) * up
