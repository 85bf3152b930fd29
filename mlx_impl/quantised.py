"""Quantised layers: packed where products with them are fast, unpacked elsewhere (see `device.keep_quantised`).

An adapter learns on either: gradients pass through a packed layer and stop at its weights, which is what QLoRA
(Dettmers et al. 2023) is. Unpacking is exact in float32; packing again is not.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map_with_path

from convert.model import Model
from mlx_impl import modeldir
from mlx_impl.arrays import Arrays, check_finite
from mlx_impl.config import ModelConfig
from mlx_impl.errors import DamagedFileError, InputError
from mlx_impl.files import atomic_folder, write_json
from mlx_impl.packing import KEYS, Packing, Quantization
from mlx_impl.packing import unpack as unpacked

LINEAR = (nn.Linear, nn.QuantizedLinear)
"""What an adapter can be put on."""


def linear_shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer, packed or not."""
    rows, stored = layer.weight.shape
    return rows, stored * 32 // layer.bits if isinstance(layer, nn.QuantizedLinear) else stored


def dense_weight(layer: nn.Module) -> mx.array:
    """The weights (out, in) of a linear layer or an embedding in float32, unpacked where they are packed."""
    if not isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding):
        return layer.weight.astype(mx.float32)
    scales = layer.scales if layer.mode != "affine" else layer.scales.astype(mx.float32)  # other modes have bytes here
    biases = layer.get("biases")
    return mx.dequantize(
        layer.weight,
        scales,
        None if biases is None else biases.astype(mx.float32),
        layer.group_size,
        layer.bits,
        layer.mode,
    ).astype(mx.float32)


def pack_layers(model: nn.Module, quantization: Quantization, arrays: Arrays) -> None:
    """Replace by packed layers those of which `arrays` hold scales, so that the arrays can be loaded."""

    def packing(path: str, module: nn.Module) -> bool | dict[str, Any]:
        known = f"{path}.scales" in arrays and hasattr(module, "to_quantized")
        return quantization.of(path).as_config() if known else False

    nn.quantize(model, class_predicate=packing)


def unpack_layers(model: nn.Module) -> None:
    """Replace packed linear layers and embeddings by ordinary ones in float32."""

    def ordinary(_: str, module: nn.Module) -> nn.Module:
        if isinstance(module, nn.QuantizedLinear):
            rows, width = linear_shape(module)
            linear = nn.Linear(width, rows, bias="bias" in module)
            linear.weight = dense_weight(module)
            if "bias" in module:
                linear.bias = module.bias
            return linear
        if isinstance(module, nn.QuantizedEmbedding):
            embedding = nn.Embedding(module.num_embeddings, module.dims)
            embedding.weight = dense_weight(module)
            return embedding
        return module

    model.update_modules(tree_map_with_path(ordinary, model.leaf_modules(), is_leaf=nn.Module.is_module))


def pack(weight: np.ndarray, packing: Packing, dtype: str) -> dict[str, mx.array]:
    """weight, scales and biases of a float32 matrix (out, in), by MLX's affine quantisation of it in `dtype`."""
    rounded = mx.array(weight).astype(getattr(mx, dtype))
    codes, scales, biases = mx.quantize(rounded, packing.group_size, packing.bits)
    return {"weight": codes, "scales": scales, "biases": biases}


def unpack(parts: Mapping[str, mx.array], packing: Packing) -> mx.array:
    """The float32 matrix (out, in) of what `pack` returned."""
    scales, biases = (parts[name].astype(mx.float32) for name in ("scales", "biases"))
    return mx.dequantize(parts["weight"], scales, biases, packing.group_size, packing.bits)


def rounded(
    tensors: Iterable[tuple[str, np.ndarray]], packing: Packing, dtype: str
) -> Iterator[tuple[str, np.ndarray]]:
    """What `write_quantised` keeps of float32 tensors: (name, float32 array) with the values that its codes stand for.

    Unpacked by numpy, not by MLX, so that one can be held against the other.
    """
    for name, array in tensors:
        if _is_packed(array, packing):
            parts = pack(array, packing, dtype)
            scales, biases = (np.array(parts[kind].astype(mx.float32)) for kind in ("scales", "biases"))
            yield name, unpacked(np.array(parts["weight"]), scales, biases, packing.bits)
        else:
            yield name, np.array(mx.array(array).astype(getattr(mx, dtype)).astype(mx.float32))


def _is_packed(array: np.ndarray, packing: Packing) -> bool:
    return array.ndim == 2 and array.shape[1] % packing.group_size == 0


def write_quantised(
    target: Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, np.ndarray]],
    tokenizer_files: Mapping[str, str | bytes],
    generation_config: Mapping[str, Any],
    source: Mapping[str, Any],
    packing: Packing,
    dtype: str = "float32",
) -> Path:
    """A model directory as mlx-lm quantises one: embedding and linear layers packed; or nothing. Returns `target`.

    Arguments and errors as of `modeldir.write_model_directory`; `dtype` is that of scales, biases and norms, and of
    what an mlx-lm that reads this computes in. A matrix whose rows the group size does not divide stays as it is;
    InputError where that is all of them. The packed weights are in memory together.
    """
    found: dict[str, tuple[int, ...]] = {}
    arrays: Arrays = {}
    for name, array in tensors:
        if name in found:
            raise DamagedFileError(f"tensor {name} was given twice")
        found[name] = array.shape
        if _is_packed(array, packing):
            path = name.removesuffix(".weight")
            arrays |= {f"{path}.{kind}": part for kind, part in pack(array, packing, dtype).items()}
        else:
            arrays[name] = mx.array(array).astype(getattr(mx, dtype))
        mx.eval(arrays)
    modeldir.check_shapes(found, modeldir.expected_shapes(config), "weights")
    check_finite(arrays, f"weights in {dtype}")
    if len(arrays) == len(found):
        raise InputError(f"nothing to quantise: no row is a multiple of {packing.group_size} long")
    with atomic_folder(target) as folder:
        write_json(folder / modeldir.CONFIG, {**config.to_hf(dtype), **dict.fromkeys(KEYS, packing.as_config())})
        write_json(folder / "generation_config.json", dict(generation_config))
        for name, content in tokenizer_files.items():
            (folder / name).write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        write_arrays(folder / modeldir.WEIGHTS, arrays)
        modeldir.write_manifest(folder, source=source)
    return target


def packed_writer(packing: Packing) -> Callable[[Model, Path, str], Path]:
    """What writes a model of `convert` as a quantised directory: a function of model, target and dtype."""

    def write(model: Model, target: Path, dtype: str) -> Path:
        files, generation = model.tokenizer_files, model.generation_config
        return write_quantised(target, model.config, model.tensors, files, generation, model.source, packing, dtype)

    return write


def write_arrays(path: Path, arrays: Arrays) -> None:
    """A new safetensors file, in a folder that nobody uses yet; see `files.atomic_folder`."""
    mx.save_safetensors(str(path), arrays, {"format": "mlx"})
