"""Bytes that training will take, predicted from shapes before it starts. Measured against it in benchmarks/forecast.

Counted are float32 arrays in MLX's hands at the worst moment of a step; the process takes a few hundred megabytes more.
"""

from typing import Protocol

from mlx_impl.config import ModelConfig
from mlx_impl.kernels import ROWS, on_cpu


class Shape(Protocol):
    """The sizes of a base model that a lesson goes by; `ModelConfig` has them, under these names."""

    @property
    def vocab_size(self) -> int:
        """Number of logits V."""

    @property
    def d_model(self) -> int:
        """Width D."""

    @property
    def num_layers(self) -> int:
        """Transformer layers."""

    @property
    def num_query_heads(self) -> int:
        """Query heads H of a layer."""

    @property
    def d_ff(self) -> int:
        """Width of the feed-forward layer's inside."""

    @property
    def max_seq_len(self) -> int:
        """Longest context trained for, in tokens."""


def pretraining_bytes(config: ModelConfig, rows: int, length: int, accumulate: bool, recompute: bool) -> int:
    """Peak of a step over all weights, with `rows` windows of `length` targets.

    The larger of two moments: the turn from forward to backward (weights, two moments, gradients that accumulate and
    all activations) and the update (weights, moments, gradients and the successors of the first three). Activations a
    token: in each layer about 14 vectors of the model's width, 5 of d_ff and three rows of attention scores a head (4
    and one on a CPU, see `kernels`); four rows of logits for as many positions as have them at one time. With
    recomputation one layer's activations and the layers' inputs.
    """
    inner, scores = (4, 1) if on_cpu() else (5, 3)
    layer = 14 * config.d_model + inner * config.d_ff + scores * config.num_query_heads * length
    layers = layer + config.num_layers * config.d_model if recompute else config.num_layers * layer
    weights = config.num_parameters()
    activations = rows * length * layers + 4 * _positions(rows, length) * config.vocab_size
    return 4 * max((4 if accumulate else 3) * weights + activations, 7 * weights)


def lesson_bytes(config: Shape, base: int, adapter: int, rows: int, length: int) -> int:
    """Peak of a lesson's step: a frozen base of `base` bytes, `adapter` weights, `rows` windows of `length` targets.

    No gradient is taken of a frozen layer's weights, so that it needs to keep less: 8 vectors of the model's width, 9
    of d_ff and a row of scores a head (4 and 0.6 of a row on a CPU, see `kernels`); two rows of logits for as many
    positions as have them. Of the adapter there are weights, moments, gradients, EWC's anchor and Fisher, and the
    successors of the first three.
    """
    inner, scores = (4, 0.6) if on_cpu() else (9, 1.0)
    layer = 8 * config.d_model + inner * config.d_ff + int(scores * config.num_query_heads * length)
    activations = rows * length * config.num_layers * layer + 2 * _positions(rows, length) * config.vocab_size
    return base + 4 * (9 * adapter + activations)


def _positions(rows: int, length: int) -> int:
    """Positions whose logits exist at one time."""
    return min(rows * length, ROWS)
