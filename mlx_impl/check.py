"""What every module of the MLX model makes of some tokens: one side of `convert --check`. Twin of torch_ref's.

A model that was packed on the way has both sides here: its packed products, and float32 arithmetic of the same values.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from convert import check
from convert.detect import read_model
from mlx_impl import modeldir, quantised
from mlx_impl.arrays import Arrays, load
from mlx_impl.config import ModelConfig
from mlx_impl.errors import InputError
from mlx_impl.model import ContinualLLM
from mlx_impl.packing import Packing
from mlx_impl.tokenizer import Tokenizer


def trace(config: ModelConfig, tensors: Iterable[tuple[str, np.ndarray]], tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Path of each linear layer and norm -> its output of tokens (B, T), as executed; last `logits`, (B, T, V).

    `tensors` are float32 under HF names, every one that the configuration asks for.
    """
    model = ContinualLLM(config)
    model.load_weights([(name, mx.array(array)) for name, array in tensors])
    return _traced(model, tokens)


def trace_packed(directory: Path, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """As `trace`, of a Llama directory that MLX quantised: products with its packed weights, in float32."""
    config, quantization = modeldir.read_config(directory)
    assert quantization is not None
    arrays: Arrays = {}
    for file in modeldir.checked_weights(directory, config, quantization):
        arrays |= load(file)
    model = ContinualLLM(config)
    quantised.pack_layers(model, quantization, arrays)
    model.load_weights(list(arrays.items()))
    model.set_dtype(mx.float32)  # of scales, biases and norms; codes stay
    return _traced(model, tokens)


def compare_packed(
    source: Path, target: Path, packing: Packing, dtype: str, config_file: Path | None = None
) -> dict[str, Any]:
    """Hold a directory that `packed_writer` made against the source's weights as they were rounded; for JSON.

    The fields of `check.Check`: with the same values only the order of sums may differ. And `quantising`, which is no
    error but the price: `kl`, how far the predictions for a text are from those of the source, and `on`, what text.
    """
    text: list[int] = []
    with contextlib.suppress(InputError):  # weights alone have no tokenizer
        text = Tokenizer.load(target).encode(check.ENGLISH)
    model = read_model(source, config_file, with_tokenizer=False)
    tokens = check.tokens_for(model.config, text)
    expected = trace(model.config, quantised.rounded(model.tensors, packing, dtype), tokens)
    found = check.compare(expected, trace_packed(target, tokens), "packed")
    again = read_model(source, config_file, with_tokenizer=False)  # tensors may be gone through once
    before = trace(model.config, again.tensors, tokens)
    changed = {"kl": check.divergence(before, expected), "on": "English" if text else "random ids"}
    return {**dataclasses.asdict(found), "quantising": changed}


def _traced(model: ContinualLLM, tokens: np.ndarray) -> dict[str, np.ndarray]:
    outputs: dict[str, np.ndarray] = {}
    found = {
        path: module for path, module in model.named_modules() if isinstance(module, (*quantised.LINEAR, nn.RMSNorm))
    }
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
