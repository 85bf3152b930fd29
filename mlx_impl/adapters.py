"""Adapters as files: ordinary mlx-lm adapter folders, which `mlx_lm.generate --adapter-path` opens as they are."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_impl import lora, modeldir
from mlx_impl.arrays import load
from mlx_impl.base import BaseModel
from mlx_impl.errors import DamagedFileError
from mlx_impl.files import read_json

_IN_LAYER = re.compile(r"^.*?\.\d+\.")
"""What of a path names the layer, model.layers.0. and the like; mlx-lm's keys go on from there."""

STATE = "state.safetensors"
ROUTER = "router."
UNESTIMATED = "unestimated"

Statistics = dict[str, np.ndarray]
"""What the router keeps of a domain's texts, by name; see `router`."""


def write_adapter(folder: Path, arrays: lora.Arrays, shape: lora.LoRAConfig, model: BaseModel) -> None:
    """An mlx-lm adapter: `adapters.safetensors` (float32) and `adapter_config.json`; `shape` is that of `arrays`.

    Raises OSError where the disk is full, DamagedFileError for values that are not finite.
    """
    shapes = {name: array.shape for name, array in arrays.items()}
    modeldir.write_safetensors(
        folder / "adapters.safetensors", shapes, ((name, np.array(array)) for name, array in arrays.items())
    )
    keys = sorted({_IN_LAYER.sub("", path).rpartition(".")[0] for path in arrays})
    config = {
        "fine_tune_type": "lora",
        "num_layers": len(model.layers),
        "lora_parameters": {"rank": shape.rank, "scale": shape.scale, "dropout": shape.dropout, "keys": keys},
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_state(
    folder: Path, fisher: lora.Arrays | None, statistics: Statistics, unestimated: Sequence[int] = ()
) -> None:
    """`state.safetensors` beside an adapter, float32: what the domain's next lesson and the router need of this one.

    The accumulated Fisher (nats^2 per token) has the adapter's names, the router's statistics have `router.` before.
    `unestimated` are the lessons, this one among them, that the Fisher does not know, where it is not this one alone.
    """
    arrays = {name: np.array(array) for name, array in (fisher or {}).items()}
    arrays |= {ROUTER + name: array for name, array in statistics.items()}
    if unestimated:
        arrays[UNESTIMATED] = np.array(unestimated, np.float32)  # exact up to 2**24
    modeldir.write_safetensors(folder / STATE, {name: array.shape for name, array in arrays.items()}, arrays)


def read_fisher(folder: Path, adapter: lora.Arrays) -> lora.Arrays | None:
    """The Fisher that lies beside an adapter, None if there is none; DamagedFileError if it is another adapter's."""
    path = folder / STATE
    if not path.is_file():
        return None
    infos = modeldir.validate_safetensors(path).items()
    found = {n: info.shape for n, info in infos if not n.startswith(ROUTER) and n != UNESTIMATED}
    if not found:
        return None
    modeldir.check_shapes(found, {name: tuple(array.shape) for name, array in adapter.items()}, str(path))
    arrays = {name: array for name, array in load(path).items() if name in found}
    mx.eval(arrays)
    return arrays


def read_statistics(folder: Path) -> Statistics | None:
    """The router's statistics that lie beside an adapter, None if there are none; DamagedFileError if unreadable."""
    path = folder / STATE
    if not path.is_file():
        return None
    found = {n: info for n, info in modeldir.validate_safetensors(path).items() if n.startswith(ROUTER)}
    return {name.removeprefix(ROUTER): array for name, array in modeldir.read_tensors(found)} or None


def read_unestimated(folder: Path) -> list[int] | None:
    """The lessons that `write_state` was told of; None where it was told of none."""
    path = folder / STATE
    if not path.is_file():
        return None
    found = {n: info for n, info in modeldir.validate_safetensors(path).items() if n == UNESTIMATED}
    return next((array.astype(int).ravel().tolist() for _, array in modeldir.read_tensors(found)), None)


def read_adapter(folder: Path) -> tuple[lora.Arrays, float]:
    """Arrays and scale of an mlx-lm adapter folder; DamagedFileError for what cannot be one."""
    where = folder / "adapter_config.json"
    config = read_json(where)
    parameters = config.get("lora_parameters")
    if config.get("fine_tune_type", "lora") != "lora" or not isinstance(parameters, dict):
        raise DamagedFileError(f"{where}: not a LoRA adapter (fine_tune_type {config.get('fine_tune_type')!r})")
    scale = parameters.get("scale")
    if not isinstance(scale, int | float) or not math.isfinite(scale):
        raise DamagedFileError(f"{where}: scale is {scale!r}, a number was expected")
    path = folder / "adapters.safetensors"
    modeldir.validate_safetensors(path)
    arrays = load(path)
    mx.eval(arrays)
    return arrays, float(scale)
