"""Base and adapter as one model directory, for programs that know no adapters.

Every adapted matrix is read from the base's files, the low-rank product added in float32, and written in float32: in 16
bits a part of it would be rounded away. A quantised base comes out unpacked. Packing it again loses most where the
product is smaller than the steps between codes, so that is done on request, and says what was left.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from convert.model import GENERATION_CONFIG, read_tokenizer
from mlx_impl import foreigndir, modeldir, quantised
from mlx_impl.adapters import read_adapter
from mlx_impl.arrays import Arrays
from mlx_impl.errors import InputError
from mlx_impl.exchange import place_of
from mlx_impl.files import atomic_folder, read_json, write_json
from mlx_impl.packing import KEYS, Quantization, read_quantization
from mlx_impl.store import Store

Factors = dict[str, tuple[mx.array, mx.array]]
"""Of what the adapter adds to each weight: (in, r) and (r, out) float32, the scale in the second, by weight's name."""


def fuse(store: Store, domain: str, model: Path, out: Path, requantise: bool = False) -> dict[str, Any]:
    """Write the base in `model` with the current version of a domain added to it into `out`; says what it wrote.

    `out` must be new or empty. With `requantise` a quantised base is packed again as it was. `survived_percent` is then
    the share of the changes d of weights W that is in W', what was written: 100 * sum <W' - W, d> / sum <d, d> over all
    adapted layers. It does not see the noise that rounding adds across d, and a few layers may overshoot 100.

    Raises InputError where `out` is taken, where the base is not quantised and should be packed again, and where
    mlx-lm has other names for the weights than the files; nothing is then left behind.
    """
    version = store.require(domain)
    place = place_of(out)
    where = str(model / modeldir.CONFIG)
    document = read_json(model / modeldir.CONFIG)
    quantization = read_quantization(document, where)
    if requantise and quantization is None:
        raise InputError(f"{model}: the base is not quantised; leave --requantize out, `convert` quantises the result")
    infos = _infos(model, document)
    dense = modeldir.dense_infos(infos, quantization)
    factors = _factors(*read_adapter(store.files_of(version)), dense, where)
    record: dict[str, Any] = {"domain": domain, "version": version.name, "out": str(out), "format": "model"}
    source: dict[str, Any] = {"fused": f"{domain} {version.name}", "base": modeldir.identity(model)}
    with atomic_folder(place, replace=place.exists()) as folder:
        for name, content in read_tokenizer(model).items():
            (folder / name).write_bytes(content)
        if (model / GENERATION_CONFIG).is_file():
            shutil.copyfile(model / GENERATION_CONFIG, folder / GENERATION_CONFIG)
        tensors = modeldir.read_dense(infos, quantization)
        if requantise and quantization is not None:
            arrays, left = _repacked(tensors, factors, infos, quantization)
            quantised.write_arrays(folder / modeldir.WEIGHTS, arrays)
            source["survived_percent"] = record["survived_percent"] = left
        else:
            shapes = {name: info.shape for name, info in dense.items()}
            fused = ((n, array + _delta(*factors[n]) if n in factors else array) for n, array in tensors)
            modeldir.write_safetensors(folder / modeldir.WEIGHTS, shapes, fused)
        stored = infos[_NORM].dtype if requantise and _NORM in infos else "float32"
        write_json(folder / modeldir.CONFIG, _config(model, document, requantise, stored))
        modeldir.write_manifest(folder, source=source)
        record["files"] = sorted(path.name for path in folder.iterdir())
    return record


def _infos(model: Path, document: dict[str, Any]) -> dict[str, modeldir.TensorInfo]:
    """What lies where in the base's files, checked as when the base is opened."""
    if document.get("model_type", "llama") != "llama":
        foreigndir.check_config(document, str(model / modeldir.CONFIG))
        return foreigndir.checked_tensors(model)
    return modeldir.checked_tensors(model, *modeldir.read_config(model))


_NORM = "model.norm.weight"  # a tensor that is never packed: it has the dtype of what is not


def _config(model: Path, document: dict[str, Any], requantise: bool, dtype: str) -> dict[str, Any]:
    """config.json of what is written. A Llama's is spelled out for every reader; of others not all keys are known."""
    packing = {key: document[key] for key in KEYS if requantise and key in document}
    if document.get("model_type", "llama") == "llama":
        config, _ = modeldir.read_config(model)
        return {**config.to_hf(dtype), **packing}
    if requantise:
        return document
    plain = {key: value for key, value in document.items() if key not in KEYS}
    return {**plain, "dtype": dtype, "torch_dtype": dtype}


def _factors(arrays: Arrays, scale: float, dense: dict[str, modeldir.TensorInfo], where: str) -> Factors:
    factors = {}
    for path in dict.fromkeys(name.rpartition(".")[0] for name in arrays):
        name, a, b = f"{path}.weight", arrays[f"{path}.lora_a"], scale * arrays[f"{path}.lora_b"]
        shape = b.shape[1], a.shape[0]
        if name not in dense or dense[name].shape != shape:
            raise InputError(
                f"{where}: {name} {list(shape)} is not in the files, mlx-lm makes it from others; this base "
                "cannot be written with its adapter as one model, but export --to mlx-lm works"
            )
        factors[name] = a, b
    return factors


def _delta(a: mx.array, b: mx.array) -> np.ndarray:
    """(out, in): one at a time, all of them would be as large as the model."""
    return np.array(a @ b).T


def _repacked(
    tensors: Iterator[tuple[str, np.ndarray]],
    factors: Factors,
    infos: dict[str, modeldir.TensorInfo],
    quantization: Quantization,
) -> tuple[Arrays, float]:
    """What the files held with the deltas in it, packed again, and the percentage of them that is in it."""
    arrays: Arrays = {}
    left = whole = 0.0
    for name, array in tensors:
        path, delta = name.removesuffix(".weight"), _delta(*factors[name]) if name in factors else None
        fused = array if delta is None else array + delta
        if f"{path}.scales" in infos:
            packing = quantization.of(path)
            parts = quantised.pack(fused, packing, infos[f"{path}.scales"].dtype)
            arrays |= {f"{path}.{kind}": part for kind, part in parts.items()}
            stored = quantised.unpack(parts, packing)
        else:
            arrays[name] = mx.array(fused).astype(getattr(mx, infos[name].dtype))
            stored = arrays[name].astype(mx.float32)
        mx.eval(arrays)
        if delta is not None:
            left += float(np.sum((np.array(stored) - array) * delta, dtype=np.float64))
            whole += float(np.sum(np.square(delta), dtype=np.float64))
    return arrays, 100 * left / whole if whole else 100.0
