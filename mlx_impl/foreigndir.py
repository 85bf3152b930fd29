"""Model directories of other architectures as files: what is looked at before anything else reads them. No MLX.

What their tensors should be called and which shape they should have only their own class knows, which is mlx-lm's to
say. Here it is seen to that no code is named, no size is absurd, and every tensor lies where its file says.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlx_impl import hashes
from mlx_impl.config import MAX_LAYERS
from mlx_impl.errors import DamagedFileError, InputError, printable, shown
from mlx_impl.files import read_json
from mlx_impl.modeldir import CONFIG, MANIFEST, TensorInfo, validate_safetensors, verify_manifest, weight_files

_OF_LAYERS = re.compile(r"layers|^(n|num)_(\w+_)?(layer|block)s?$")
"""Names of how many layers there are; `block_dim` or `vocab_size_per_layer_input` may well be larger."""


def architecture(directory: Path) -> str | None:
    """The model_type of a directory that is not a Llama's, as far as it is a name; None for all others."""
    config = directory / CONFIG
    kind = read_json(config).get("model_type") if config.is_file() else None
    return kind if isinstance(kind, str) and kind != "llama" else None


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Refuse what is not to be built: names of code (InputError), sizes no model has (DamagedFileError)."""
    code = [key for key in ("auto_map", "model_file") if config.get(key)]
    if code:
        raise InputError(f"{where}: {', '.join(code)} names code to be run, which is never done; remove it")
    kind = config.get("model_type")
    if not isinstance(kind, str) or not re.fullmatch(r"\w[\w.-]{0,63}", kind) or ".." in kind:
        raise DamagedFileError(f"{where}: model_type is {kind!r:.60}, a name was expected")
    classes = config.get("architectures")
    if classes is not None and not (isinstance(classes, list) and {type(name) for name in classes} == {str}):
        raise DamagedFileError(f"{where}: architectures is {shown(classes)}, a list of names was expected")
    for scope, key, value in _numbers(config):
        if value >= 2**31 or (_OF_LAYERS.search(key) and value > MAX_LAYERS):
            name = printable(f"{scope}{key}", 120)
            raise DamagedFileError(f"{where}: {name} = {shown(value)} is more than any model has")


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, str, int]]:
    """(prefix, key, value) of every whole number, those of inner objects included."""
    waiting: list[tuple[str, Mapping[str, Any]]] = [("", config)]
    while waiting:
        scope, values = waiting.pop()
        yield from ((scope, key, value) for key, value in values.items() if type(value) is int)
        waiting += [(f"{scope}{key}."[-60:], value) for key, value in values.items() if isinstance(value, dict)]


def checked_tensors(directory: Path) -> dict[str, TensorInfo]:
    """What lies in the safetensors files that mlx-lm would map: all model*.safetensors, whatever the index says."""
    files = weight_files(directory)
    others = sorted(path.name for path in set(directory.glob("model*.safetensors")) - set(files))
    if others:
        raise InputError(f"{directory}: {', '.join(others)} would be read too, and is no part of the model; move it")
    if (directory / MANIFEST).is_file():
        verify_manifest(directory, hashes.sha256)
    return validate_safetensors(files, integers=True)
