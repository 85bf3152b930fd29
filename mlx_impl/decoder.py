"""The model opened for generation: the numbers of `ContinualLLM` for one text, with fewer and larger operations.

It runs the model's own layers at first, adapters included, so that a switch of the domain costs nothing. What stays
is fused, one layer a token: query, key and value, gate and up become one matrix each, an adapter merged into it in
float32. Fused matrices are copies; the model's arrays are never touched, and `release` frees the copies.

On a CPU a step of one token takes MLX's plain products and powers, where its fused kernels are chains of slow
primitives: softmax attention of one query took 0.3 to 0.8 ms a layer, this takes 0.1. On a GPU the kernels are used.
Letters: T tokens, S cached tokens, D model width, H query heads, K key/value heads, d head width, V vocabulary.
"""

import copy
import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_impl import kernels
from mlx_impl.base import BaseModel
from mlx_impl.cache import Cache, Mask
from mlx_impl.config import ModelConfig
from mlx_impl.device import memory_bytes
from mlx_impl.lora import LoRALinear
from mlx_impl.model import Block, ContinualLLM

FUSE_AFTER = 16
"""Tokens that the same weights decode before they are fused: the copy costs about what it saves in thirty more."""

SHORT = 256
"""Cached tokens up to which MLX's softmax is as fast on a CPU as powers, in fewer operations."""

_E = mx.array(math.e)  # MLX's power takes a third of the time of its exp


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


_TREES = (dict, list)


def _made_of(model: ContinualLLM) -> list[Any]:
    """The arrays of a model and the scales of its adapter: what its logits depend on."""
    found: list[Any] = []

    def collect(tree: Any) -> None:
        if isinstance(tree, LoRALinear):
            found.append(tree.scale)
        for value in tree.values() if isinstance(tree, dict) else tree:
            if isinstance(value, mx.array):
                found.append(value)
            elif isinstance(value, _TREES):
                collect(value)

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
        gating = mx.full((1, config.d_ff), 1 / math.e), mx.ones((1, config.d_ff))
        self._layers = [_Layer(block, config, gating) for block in model.layers]
        self._rope = model.layers[0].self_attn.rope
        self._steps = self._fused = 0
        arrays = sum(array.nbytes for array in made_of if isinstance(array, mx.array))
        self.fuse_after = FUSE_AFTER if 4 * arrays <= memory_bytes() else math.inf
        """Steps before it begins to fuse; never where a copy could leave too little memory."""

    def hidden(self, tokens: mx.array, cache: Sequence[Cache]) -> mx.array:
        """Final hidden states (1, T, D) of tokens (1, T), after those in the cache."""
        x = self._embedding(tokens)  # (1, T, D)
        if tokens.shape[1] == 1 and kernels.on_cpu() and x.dtype == mx.float32:
            turn, x = self._rope.matrix(cache[0].offset), x[0]
            for layer, held in zip(self._layers, cache, strict=True):
                x = layer.one(x, turn, held)
            return self._norm.one(x)[None]
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
        try:
            for layer in self._layers[self._fused : end]:
                layer.fuse()
        except BaseException:  # Ctrl-C: half a layer is fused, so that another twin must be made
            self.made_of = []
            raise
        self._fused = min(end, len(self._layers))


class _Layer:
    """A transformer layer for one text."""

    def __init__(self, block: Block, config: ModelConfig, gating: tuple[mx.array, mx.array]) -> None:
        attention, mlp = block.self_attn, block.mlp
        self._qkv = _Joined(attention.q_proj, attention.k_proj, attention.v_proj, norm=block.input_layernorm)
        self._gate_up = _Joined(mlp.gate_proj, mlp.up_proj, norm=block.post_attention_layernorm)
        self._out, self._down = _Joined(attention.o_proj), _Joined(mlp.down_proj)
        self._rope, self._scale = attention.rope, attention.scale
        self._gating = gating  # rows (1, F) of 1 / e and of 1: one number would be stretched in an operation of its own
        self._heads, self._kv_heads, self._width = config.num_query_heads, config.num_kv_heads, config.head_width

    def fuse(self) -> None:
        """From now on one matrix for what has one input."""
        self._scale = self._qkv.fuse(first=self._scale)
        for joined in (self._out, self._gate_up, self._down):
            joined.fuse()

    def many(self, x: mx.array, mask: Mask, cache: Cache) -> mx.array:
        """(1, T, D) -> (1, T, D): the operations of `model.Block`, of joined projections."""
        H, K, d = self._heads, self._kv_heads, self._width
        T = x.shape[1]
        turned, values = mx.split(self._qkv(x).reshape(1, T, H + 2 * K, d), [H + K], axis=2)
        q, keys = mx.split(self._rope(turned, cache.offset), [H], axis=1)  # (1, H, T, d), (1, K, T, d)
        keys, values = cache.update(keys, values.swapaxes(1, 2))  # (1, K, S, d)
        out = kernels.attention(q, keys, values, self._scale, mask)  # (1, H, T, d)
        x = self._out(out.swapaxes(1, 2).reshape(1, T, H * d), x)
        gate, up = mx.split(self._gate_up(x), 2, axis=-1)
        return self._down(_gated(gate, up), x)

    def one(self, x: mx.array, turn: mx.array, cache: Cache) -> mx.array:
        """(1, D) -> (1, D) on a CPU; `turn` is what `Rope.matrix` gives."""
        H, K, d = self._heads, self._kv_heads, self._width
        turned, values = mx.split(self._qkv.one(x), [(H + K) * d], axis=-1)
        q, keys = mx.split(turned.reshape(H + K, d) @ turn, [H])
        q = q if self._scale == 1 else self._scale * q
        keys, values = cache.update(keys.reshape(1, K, 1, d), values.reshape(1, K, 1, d))
        # Query heads that share a key are the rows of one product.
        out = _attention(q.reshape(1, K, H // K, d), keys, values)  # (1, K, H / K, d)
        x = self._out.one(out.reshape(1, H * d), x)
        gate, up = mx.split(self._gate_up.one(x), 2, axis=-1)
        inverse_e, one = self._gating
        return self._down.one(gate * up / (one + mx.power(inverse_e, gate)), x)


class _Joined:
    """Linear layers of one input, their outputs side by side, and the norm before them where there is one.

    (1, T, in) or (T, in) -> the same with the sum of out.
    """

    def __init__(self, *layers: nn.Module, norm: nn.RMSNorm | None = None) -> None:
        self._layers = layers
        self._norm = norm and _Norm(norm)
        self._weight: mx.array | None = None  # (in, sum of out), a transposed view, once fused
        self._bias: mx.array | None = None

    def fuse(self, first: float = 1.0) -> float:
        """Make one matrix of them, adapters merged in float32; packed layers stay as they are.

        In float32 the norm's weights become part of it, and `first`, a factor of the first layer's outputs. Returns the
        factor that is left to do: in 16 bits, where each such product is rounded, that is all of it.
        """
        plain = [layer.fuse() if isinstance(layer, LoRALinear) else layer for layer in self._layers]
        bases = [layer.linear if isinstance(layer, LoRALinear) else layer for layer in self._layers]
        if not all(isinstance(base, nn.Linear) for base in bases):
            return first
        weights, biases = ([layer[name] for layer in plain if name in layer] for name in ("weight", "bias"))
        joined, bias = _stacked(weights), _stacked(biases) if biases else None
        if exact := joined.dtype == mx.float32:  # MLX multiplies what is stacked in its own place
            if self._norm and self._norm.weight is not None:
                joined, self._norm = joined * self._norm.weight, self._norm.without_weight()
            if first != 1:
                factors = mx.where(mx.arange(len(joined)) < len(weights[0]), first, 1.0)
                joined, bias = joined * factors[:, None], bias if bias is None else bias * factors
        self._weight, self._bias = joined.T, bias
        return 1.0 if exact else first

    def __call__(self, x: mx.array, onto: mx.array | None = None) -> mx.array:
        """The outputs, added to `onto` where it is given."""
        return self._product(self._norm(x) if self._norm else x, onto)

    def one(self, x: mx.array, onto: mx.array | None = None) -> mx.array:
        """The same of a row (1, in), on a CPU."""
        return self._product(self._norm.one(x) if self._norm else x, onto)

    def _product(self, x: mx.array, onto: mx.array | None) -> mx.array:
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
    """RMS normalisation x / sqrt(mean(x^2) + eps) * weight; a weight of None counts as ones."""

    def __init__(self, norm: nn.RMSNorm) -> None:
        self.weight: mx.array | None = norm.weight
        self._eps, self._share = norm.eps, 1 / norm.weight.size
        self._least = _least(norm.eps)

    def without_weight(self) -> "_Norm":
        """What is left where the weight is done elsewhere."""
        bare = copy.copy(self)
        bare.weight = None
        return bare

    def __call__(self, x: mx.array) -> mx.array:
        """(1, T, D) -> (1, T, D)."""
        return mx.fast.rms_norm(x, self.weight, self._eps)

    def one(self, x: mx.array) -> mx.array:
        """(1, D) -> (1, D) in a third of the time on a CPU: the mean is a product of x with itself."""
        scaled = mx.rsqrt(mx.addmm(self._least, x, x.T, alpha=self._share)) @ x
        return scaled if self.weight is None else scaled * self.weight


@lru_cache
def _least(eps: float) -> mx.array:
    return mx.array([[eps]])


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
