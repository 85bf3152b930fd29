"""ContinualLLM: a Llama-like decoder with grouped-query attention, RoPE, SwiGLU and RMSNorm.

The module tree carries Hugging Face's parameter names, so a checkpoint is loaded without renaming anything. The hot
paths use `mx.fast` kernels. Letters in shapes: B batch, T tokens, S cached tokens, D model width, H query heads,
K key/value heads, d head width, V vocabulary.
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from mlx_impl import kernels, modeldir, quantised
from mlx_impl.arrays import check_finite, flatten, load, unflatten
from mlx_impl.cache import Cache, KVCache, Mask, RotatingKVCache
from mlx_impl.config import ModelConfig
from mlx_impl.device import keep_quantised

if TYPE_CHECKING:
    from mlx_impl.tokenizer import Tokenizer


def rope_frequencies(config: ModelConfig) -> mx.array:
    """Wavelengths / 2 pi of the rotary embedding, base^(2i/d), stretched as `rope_scaling` says: (d/2,).

    Linear scaling stretches all of them by `factor` (Chen et al. 2023). llama3 leaves the short waves alone,
    stretches the long ones, and blends between (Llama 3.1's reference code, `apply_scaling`).
    """
    width = config.head_width
    periods = config.rope_base ** (mx.arange(0, width, 2, dtype=mx.float32) / width)
    scaling = config.rope_scaling
    if scaling is None:
        return periods
    factor = float(scaling["factor"])
    if scaling["rope_type"] == "linear":
        return periods * factor
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    trained = float(scaling["original_max_position_embeddings"])
    turns = trained / (2 * math.pi * periods)  # full turns within the trained context
    share = mx.clip((turns - low) / (high - low), 0.0, 1.0)  # 1 = short wave, keep as it is
    return 1.0 / ((1 - share) / (factor * periods) + share / periods)


class Rope:
    """Rotary positions (Su et al. 2021) of heads whose halves are pairs.

    On a GPU this is MLX's kernel. On a CPU that kernel is a chain of copies; two tables and a product that swaps the
    halves give the same to the bit, in half the time with the gradient.
    """

    def __init__(self, config: ModelConfig) -> None:
        width, half, plain = config.head_width, config.head_width // 2, config.rope_scaling is None
        self._kernel = partial(
            mx.fast.rope,
            dims=width,
            traditional=False,
            base=config.rope_base if plain else None,
            scale=1.0,
            freqs=None if plain else rope_frequencies(config),
        )
        if plain:  # as MLX computes them, to the bit
            speeds = mx.exp(mx.arange(0, -half, -1, dtype=mx.float32) * (math.log(config.rope_base) / half))
        else:
            speeds = 1 / rope_frequencies(config)
        self._speeds = mx.concatenate([speeds, speeds])  # (d,), radians a position
        self._same = mx.eye(width)
        self._other = mx.eye(width, k=half) - mx.eye(width, k=-half)  # x @ it is (-second half, first half)
        self._last: tuple[tuple[int, int], tuple[mx.array, mx.array]] | None = None

    def __call__(self, x: mx.array, offset: int) -> mx.array:
        """Heads (B, T, H, d) of tokens from position `offset` on -> (B, H, T, d), turned."""
        if not kernels.on_cpu() or x.dtype != mx.float32:
            return self._kernel(x.swapaxes(1, 2), offset=offset)
        cos, sin = self._tables(offset, x.shape[1])
        return (x * cos + (x @ self._other) * sin).swapaxes(1, 2)

    def matrix(self, position: int) -> mx.array:
        """(d, d): what turns the heads of one token, as a product."""
        angles = position * self._speeds
        return self._same * mx.cos(angles) + self._other * mx.sin(angles)

    def _tables(self, offset: int, length: int) -> tuple[mx.array, mx.array]:
        """Cosines and sines (T, 1, d) of the positions; computed at once, so that they are no part of any graph."""
        if self._last is None or self._last[0] != (offset, length):
            angles = mx.arange(offset, offset + length).astype(mx.float32)[:, None, None] * self._speeds
            tables = mx.cos(angles), mx.sin(angles)
            mx.eval(tables)
            self._last = (offset, length), tables
        return self._last[1]


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023) with rotary positions; layers share a `Rope`."""

    def __init__(self, config: ModelConfig, rope: Rope | None = None) -> None:
        super().__init__()
        width, bias = config.head_width, config.attention_bias
        self.q_proj = nn.Linear(config.d_model, config.num_query_heads * width, bias=bias)
        self.k_proj = nn.Linear(config.d_model, config.num_kv_heads * width, bias=bias)
        self.v_proj = nn.Linear(config.d_model, config.num_kv_heads * width, bias=bias)
        self.o_proj = nn.Linear(config.num_query_heads * width, config.d_model, bias=bias)
        self._heads, self._kv_heads, self._width = config.num_query_heads, config.num_kv_heads, width
        self.scale = width**-0.5
        self.rope = rope or Rope(config)

    def __call__(self, x: mx.array, mask: Mask, cache: Cache | None = None) -> mx.array:
        """(B, T, D) -> (B, T, D)."""
        B, T, _ = x.shape
        q = self.q_proj(x).reshape(B, T, self._heads, self._width)
        k = self.k_proj(x).reshape(B, T, self._kv_heads, self._width)
        v = self.v_proj(x).reshape(B, T, self._kv_heads, self._width).swapaxes(1, 2)
        offset = cache.offset if cache is not None else 0
        q, k = self.rope(q, offset), self.rope(k, offset)  # (B, H, T, d), (B, K, T, d)
        if cache is not None:
            k, v = cache.update(k, v)  # (B, K, S, d)
        out = kernels.attention(q, k, v, self.scale, mask)
        return self.o_proj(out.swapaxes(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU feed-forward (Shazeer 2020): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=config.mlp_bias)

    def __call__(self, x: mx.array) -> mx.array:
        """(B, T, D) -> (B, T, D)."""
        return self.down_proj(kernels.swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: ModelConfig, rope: Rope | None = None) -> None:
        super().__init__()
        self.self_attn = Attention(config, rope)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self._dropout, self._kept = nn.Dropout(config.dropout), 1 - config.dropout

    def __call__(self, x: mx.array, mask: Mask, cache: Cache | None = None, keys: mx.array | None = None) -> mx.array:
        """(B, T, D) -> (B, T, D). Dropout acts only in training mode; `keys` (2, 2), if given, say what it drops."""
        first, second = (None, None) if keys is None else keys
        x = x + self._dropped(self.self_attn(self.input_layernorm(x), mask, cache), first)
        return x + self._dropped(self.mlp(self.post_attention_layernorm(x)), second)

    @property
    def drops(self) -> bool:
        """Whether dropout acts."""
        return self.training and self._kept < 1

    def _dropped(self, x: mx.array, key: mx.array | None) -> mx.array:
        if key is None:
            return self._dropout(x)
        return mx.random.bernoulli(self._kept, x.shape, key) * x * (1 / self._kept)


class Decoder(nn.Module):
    """Embedding, layers and final norm: everything below the output head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        rope = Rope(config)
        self.layers = [Block(config, rope) for _ in range(config.num_layers)]
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)


class ContinualLLM(nn.Module):
    """The model. `ContinualLLM(config)` has random weights, a function of `seed` alone.

    Weights are float32, normal with standard deviation 0.02, on the residual branches divided by sqrt(2 layers)
    (GPT-2's rule); norms start at one, biases at zero.
    """

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.model = Decoder(config)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self._config = config
        self._checkpointing = False
        self.reader: Any = None
        """What `decoder.opened` made of it, for generation."""
        self.update(_initial(self.parameters(), config, mx.random.key(seed)))
        self.eval()

    @property
    def config(self) -> ModelConfig:
        """The configuration it was built from."""
        return self._config

    @property
    def layers(self) -> list[Block]:
        """The transformer layers, first to last."""
        return self.model.layers

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table; a tokenizer may have fewer ids."""
        return self._config.vocab_size

    @property
    def head_weight(self) -> mx.array | None:
        """(V, D), of which the logits are the product with the hidden states; None where they are more than that."""
        table = self.model.embed_tokens
        if self._config.tie_embeddings:
            return table.weight if isinstance(table, nn.Embedding) else None
        return self.lm_head.weight if isinstance(self.lm_head, nn.Linear) else None

    def checkpoint_gradients(self, on: bool) -> None:
        """Recompute each layer in the backward pass instead of keeping its activations (Chen et al. 2016)."""
        self._checkpointing = on

    def hidden(self, tokens: mx.array, cache: Sequence[Cache] | None = None, mask: mx.array | None = None) -> mx.array:
        """Final hidden states of tokens (B, T): (B, T, D). `mask` (T, T) replaces the causal one."""
        x = self.model.embed_tokens(tokens)  # (B, T, D)
        causal = (cache[0] if cache else KVCache()).mask(tokens.shape[1])
        sees = causal if mask is None else mask
        for index, layer in enumerate(self.model.layers):
            if self._checkpointing and cache is None:
                x = _recomputed(layer, x, sees)
            else:
                x = layer(x, sees, cache[index] if cache else None)
        return self.model.norm(x)

    def head(self, hidden: mx.array) -> mx.array:
        """Logits (..., V) of hidden states (..., D)."""
        if self._config.tie_embeddings:
            return self.model.embed_tokens.as_linear(hidden)
        return self.lm_head(hidden)

    def __call__(self, tokens: mx.array, cache: Sequence[Cache] | None = None) -> mx.array:
        """Logits (B, T, V) of tokens (B, T); with a cache, T new tokens after those it holds."""
        return self.head(self.hidden(tokens, cache))

    def make_cache(self, window: int | None = None) -> list[Cache]:
        """A cache a layer: growing, or with `window` one that keeps that many tokens."""
        if window is None:
            return [KVCache() for _ in self.layers]
        return [RotatingKVCache(window) for _ in self.layers]

    @classmethod
    def from_checkpoint(cls, directory: str | Path, dtype: mx.Dtype = mx.float32) -> "ContinualLLM":
        """Load a model directory (Hugging Face Llama layout); weights are cast to `dtype`.

        MLX's quantised weights stay packed or are unpacked, as `device.keep_quantised` says. Raises InputError if it
        is not there or not a Llama, DamagedFileError listing every tensor that is missing, unknown or of the wrong
        shape.
        """
        directory = Path(directory).expanduser()
        config, quantization = modeldir.read_config(directory)
        files = modeldir.checked_weights(directory, config, quantization)
        model = cls(config)  # its random weights are lazy and never computed
        arrays: dict[str, mx.array] = {}
        for file in files:
            arrays.update(load(file))
        if quantization is not None:
            quantised.pack_layers(model, quantization, arrays)
        wanted = flatten(model.parameters())
        model.load_weights([(name, array) for name, array in arrays.items() if name in wanted])
        if not keep_quantised():
            quantised.unpack_layers(model)
        model.set_dtype(dtype)
        mx.eval(model.parameters())
        if not (directory / modeldir.MANIFEST).is_file():  # where there is one, hashes vouch for the values
            check_finite(flatten(model.parameters()), str(directory))
        return model

    def generate(self, prompt: str, tokenizer: "Tokenizer", max_new_tokens: int = 100, **sampling: Any) -> str:
        """The text that follows `prompt`; `sampling` are the fields of `generate.Sampling`. Greedy by default."""
        from mlx_impl import generate

        return generate.complete(self, tokenizer, prompt, max_new_tokens, generate.Sampling(**sampling)).text


def _recomputed(layer: Block, x: mx.array, mask: Mask) -> mx.array:
    """A layer under `mx.checkpoint`. Its parameters are arguments, else their gradients would be lost.

    So are the keys of its dropout: the second time it is computed, it has to drop what it dropped the first time.
    """

    def run(parameters: dict, x: mx.array, *keys: mx.array) -> mx.array:
        layer.update(parameters)
        return layer(x, mask, None, *map(mx.stop_gradient, keys))

    keys = [mx.stop_gradient(mx.random.randint(0, 2**31 - 1, (2, 2)).astype(mx.uint32))] if layer.drops else []
    parameters = layer.trainable_parameters()
    out = mx.checkpoint(run)(parameters, x, *keys)
    layer.update(parameters)
    return out


def _initial(tree: dict, config: ModelConfig, key: mx.array) -> Any:
    """Random weights for a parameter tree, drawn in the order of their names."""
    flat = sorted(flatten(tree).items())
    keys = mx.random.split(key, len(flat))
    residual = 0.02 / math.sqrt(2 * config.num_layers)
    drawn = []
    for (name, array), subkey in zip(flat, keys, strict=True):
        if name.endswith("bias"):
            drawn.append((name, mx.zeros(array.shape)))
        elif array.ndim == 1:
            drawn.append((name, mx.ones(array.shape)))
        else:
            std = residual if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            drawn.append((name, mx.random.normal(array.shape, scale=std, key=subkey)))
    return unflatten(dict(drawn))
