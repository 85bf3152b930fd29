"""ContinualLLM again, in plain PyTorch: the model that `mlx_impl.model` is checked against.

Written for reading, not for speed: attention is two matrix products and a softmax, key/value heads are
repeated, the causal mask is an array, angles are taken in float64. Nothing here comes from transformers or
torch's own attention, so that agreement means something. The state dict has Hugging Face's names. Letters in
shapes: B batch, T new tokens, S cached and new tokens, D model width, H query heads, K key/value heads, d
head width, V vocabulary.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from mlx_impl import modeldir
from mlx_impl.config import ModelConfig
from mlx_impl.files import read_json


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Wavelengths / 2 pi of the rotary embedding, base^(2i/d), stretched as `rope_scaling` says.

    (d/2,) float64. The llama3 rule goes case by case, as Meta's `apply_scaling` does, where the MLX twin has
    one formula.
    """
    exponents = torch.arange(0, config.head_width, 2, dtype=torch.float64) / config.head_width
    frequencies = 1.0 / config.rope_base**exponents  # radians a token
    scaling = config.rope_scaling
    if scaling is None:
        return 1.0 / frequencies
    stretched = frequencies / scaling["factor"]
    if scaling["rope_type"] == "linear":
        return 1.0 / stretched
    trained = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelengths = 2 * math.pi / frequencies
    share = (trained / wavelengths - low) / (high - low)
    blended = (1 - share) * stretched + share * frequencies
    scaled = torch.where(wavelengths < trained / high, frequencies, blended)
    return 1.0 / torch.where(wavelengths > trained / low, stretched, scaled)


def _rotate(x: Tensor, periods: Tensor, offset: int) -> Tensor:
    """Turn each pair (i, i + d/2) of x (B, heads, T, d) by position / period; the first position is `offset`.

    The half-split layout of Hugging Face (Su et al. 2021 pair neighbours instead).
    """
    positions = torch.arange(offset, offset + x.shape[2], dtype=torch.float64)
    angles = positions[:, None] / periods  # (T, d/2)
    cos, sin = angles.cos().to(x), angles.sin().to(x)  # x's device too: not every one has float64
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class KVCache:
    """Every key (after rotation) and value of one layer so far, simply concatenated."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    @property
    def offset(self) -> int:
        """Number of tokens held."""
        return 0 if self.keys is None else self.keys.shape[2]

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, K, T, d); returns all of them (B, K, S, d)."""
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)
        self.keys, self.values = keys, values
        return keys, values


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019), computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        wide = x.float()
        mean_square = (wide * wide).mean(dim=-1, keepdim=True)
        return (wide / torch.sqrt(mean_square + self.eps) * self.weight).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023): query head h reads key/value head h // (H / K)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, bias = config.head_width, config.attention_bias
        self.q_proj = nn.Linear(config.d_model, config.num_query_heads * width, bias=bias)
        self.k_proj = nn.Linear(config.d_model, config.num_kv_heads * width, bias=bias)
        self.v_proj = nn.Linear(config.d_model, config.num_kv_heads * width, bias=bias)
        self.o_proj = nn.Linear(config.num_query_heads * width, config.d_model, bias=bias)
        self.width = width
        self.group = config.num_query_heads // config.num_kv_heads
        self.periods = rope_frequencies(config)  # (d/2,); no buffer, it does not belong into a checkpoint

    def forward(self, x: Tensor, mask: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D); `mask` (T, S) is True where a key may be seen."""
        offset = cache.offset if cache is not None else 0
        q = _rotate(self._heads(self.q_proj(x)), self.periods, offset)  # (B, H, T, d)
        k = _rotate(self._heads(self.k_proj(x)), self.periods, offset)  # (B, K, T, d)
        v = self._heads(self.v_proj(x))
        if cache is not None:
            k, v = cache.update(k, v)  # (B, K, S, d)
        k, v = (rows.repeat_interleave(self.group, dim=1) for rows in (k, v))  # (B, H, S, d)
        scores = q @ k.transpose(-1, -2) / math.sqrt(self.width)  # (B, H, T, S)
        weights = torch.softmax(scores.float().masked_fill(~mask, -math.inf), dim=-1)
        out = weights.to(v.dtype) @ v  # (B, H, T, d)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """(B, T, heads * d) -> (B, heads, T, d)."""
        return x.unflatten(-1, (-1, self.width)).transpose(1, 2)


class MLP(nn.Module):
    """SwiGLU feed-forward (Shazeer 2020): down(silu(gate(x)) * up(x)), silu(z) = z * sigmoid(z)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        gate = self.gate_proj(x)
        return self.down_proj(gate * torch.sigmoid(gate) * self.up_proj(x))


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D). Dropout acts only in training mode."""
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), mask, cache))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Decoder(nn.Module):
    """Embedding, layers and final norm: everything below the output head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)


class ContinualLLM(nn.Module):
    """The model, in evaluation mode; its random weights follow the MLX twin's rule, with other numbers.

    float32, normal with standard deviation 0.02, on the residual branches divided by sqrt(2 layers); norms
    start at one, biases at zero.
    """

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        _initialize(self, config, torch.Generator().manual_seed(seed))
        self.eval()

    def hidden(self, tokens: Tensor, cache: Sequence[KVCache] | None = None, mask: Tensor | None = None) -> Tensor:
        """Final hidden states (B, T, D) of tokens (B, T).

        `mask` (T, T), True where a key may be seen, replaces the causal one.
        """
        if mask is None:
            mask = _causal_mask(tokens.shape[1], cache[0].offset if cache else 0).to(tokens.device)
        x = self.model.embed_tokens(tokens)  # (B, T, D)
        for index, layer in enumerate(self.model.layers):
            x = layer(x, mask, cache[index] if cache else None)
        return self.model.norm(x)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., D)."""
        if self.config.tie_embeddings:
            return hidden @ self.model.embed_tokens.weight.T
        return self.lm_head(hidden)

    def forward(self, tokens: Tensor, cache: Sequence[KVCache] | None = None) -> Tensor:
        """Logits (B, T, V) of tokens (B, T); with a cache, T new tokens after those it holds."""
        return self.head(self.hidden(tokens, cache))

    def make_cache(self) -> list[KVCache]:
        """One empty cache a layer."""
        return [KVCache() for _ in self.model.layers]

    @classmethod
    def from_checkpoint(cls, directory: str | Path, dtype: torch.dtype = torch.float32) -> "ContinualLLM":
        """Load a model directory (Hugging Face Llama layout); weights are cast to `dtype`.

        Raises InputError if it is not there or not a Llama, DamagedFileError listing every tensor that is
        missing, unknown or of the wrong shape.
        """
        directory = Path(directory)
        config = ModelConfig.from_hf(read_json(directory / modeldir.CONFIG), str(directory / modeldir.CONFIG))
        files = modeldir.checked_weights(directory, config)
        wanted = modeldir.expected_shapes(config)
        model = cls(config).to(dtype)
        arrays = {name: array for file in files for name, array in safetensors.torch.load_file(file).items()}
        model.load_state_dict({name: arrays[name] for name in wanted})
        return model


def _causal_mask(length: int, offset: int) -> Tensor:
    """(T, S) with S = offset + T: True where the key at s is not ahead of the query at offset + t."""
    rows = torch.arange(offset, offset + length)[:, None]
    return torch.arange(offset + length)[None] <= rows


@torch.no_grad()
def _initialize(model: ContinualLLM, config: ModelConfig, generator: torch.Generator) -> None:
    """Overwrite torch's own random weights (uniform, from its global seed)."""
    residual = 0.02 / math.sqrt(2 * config.num_layers)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.ndim >= 2:
            std = residual if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            parameter.normal_(0.0, std, generator=generator)
