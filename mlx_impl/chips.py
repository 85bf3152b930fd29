"""Apple's chips by name: GPU cores and memory bandwidth, and the decoding speed that the bandwidth allows.

Bandwidths are those that Apple publishes; what is computed from them is a prediction and no measurement. To decode one
token every weight is read once, and every key and value of the context, so that no decoder of one text at a time can be
faster than bandwidth / bytes.
"""

from typing import NamedTuple

from mlx_impl.config import ModelConfig

QUANTISED_4 = 4.5
"""Bits a weight that MLX packs into 4: groups of 64 share a scale and a bias of 16 bits each."""


class Chip(NamedTuple):
    """A chip as it is sold. Two of one name differ in bandwidth where one has fewer GPU cores."""

    name: str
    gpu_cores: tuple[int, ...]
    bandwidth: float  # GB/s, 10^9 bytes


CHIPS = (
    Chip("Apple M1", (7, 8), 68.25),
    Chip("Apple M1 Pro", (14, 16), 200.0),
    Chip("Apple M1 Max", (24, 32), 400.0),
    Chip("Apple M1 Ultra", (48, 64), 800.0),
    Chip("Apple M2", (8, 10), 100.0),
    Chip("Apple M2 Pro", (16, 19), 200.0),
    Chip("Apple M2 Max", (30, 38), 400.0),
    Chip("Apple M2 Ultra", (60, 76), 800.0),
    Chip("Apple M3", (8, 10), 100.0),
    Chip("Apple M3 Pro", (14, 18), 150.0),
    Chip("Apple M3 Max", (30,), 300.0),
    Chip("Apple M3 Max", (40,), 400.0),
    Chip("Apple M3 Ultra", (60, 80), 819.0),
    Chip("Apple M4", (8, 10), 120.0),
    Chip("Apple M4 Pro", (16, 20), 273.0),
    Chip("Apple M4 Max", (32,), 410.0),
    Chip("Apple M4 Max", (40,), 546.0),
)


def find(name: str, gpu_cores: int | None = None) -> Chip | None:
    """The chip that macOS calls `name`; None if it is not in the table, or if only the GPU cores could tell which."""
    named = [chip for chip in CHIPS if chip.name == name]
    exact = [chip for chip in named if gpu_cores in chip.gpu_cores]
    candidates = exact or named
    return candidates[0] if len(candidates) == 1 else None


def bytes_per_token(config: ModelConfig, weight_bits: float = 16.0, context: int = 0, cache_bytes: int = 2) -> float:
    """Bytes that decoding one token reads: the weights, and keys and values of `context` tokens before it.

    Of a table that only embeds, a single row is needed: it counts where it is the head as well.
    """
    weights = config.num_parameters() - (0 if config.tie_embeddings else config.vocab_size * config.d_model)
    cache = 2 * config.num_layers * config.num_kv_heads * config.head_width * context
    return weights * weight_bits / 8 + cache * cache_bytes


def ceiling(bandwidth: float, bytes_read: float) -> float:
    """Tokens a second that a bandwidth in GB/s allows at most, for so many bytes a token."""
    return bandwidth * 1e9 / bytes_read
