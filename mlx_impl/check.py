"""What every module of the MLX model makes of some tokens: one side of `convert --check`. Twin of torch_ref's."""

from collections.abc import Callable, Iterable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlx_impl.config import ModelConfig
from mlx_impl.model import ContinualLLM


def trace(config: ModelConfig, tensors: Iterable[tuple[str, np.ndarray]], tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Path of each linear layer and norm -> its output of tokens (B, T), as executed; last `logits`, (B, T, V).

    `tensors` are float32 under HF names, every one that the configuration asks for.
    """
    model = ContinualLLM(config)
    model.load_weights([(name, mx.array(array)) for name, array in tensors])
    outputs: dict[str, np.ndarray] = {}
    found = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear | nn.RMSNorm)}
    model.update_modules(tree_unflatten([(path, _Recorded(module, path, outputs)) for path, module in found.items()]))
    outputs["logits"] = np.array(model(mx.array(tokens)))
    return outputs


class _Recorded(nn.Module):
    """A module that keeps a copy of what it returns: MLX has no hooks."""

    def __init__(self, module: Callable[[mx.array], mx.array], path: str, outputs: dict[str, np.ndarray]) -> None:
        super().__init__()
        self._call = lambda x: _kept(module(x), path, outputs)

    def __call__(self, x: mx.array) -> mx.array:
        return self._call(x)


def _kept(output: mx.array, path: str, outputs: dict[str, np.ndarray]) -> mx.array:
    outputs[path] = np.array(output)
    return output
