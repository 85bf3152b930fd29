"""Adapters out of a store and into it, in the formats of others: mlx-lm, PEFT, GGUF and the original project.

Files from outside are checked before their values are read, and against the base before anything is written. What
comes in becomes the first version of a new domain, without replay windows, Fisher or statistics for the router.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from convert import adapter as lora
from convert import gguf, legacy
from mlx_impl import foreigndir, modeldir
from mlx_impl.config import ModelConfig
from mlx_impl.errors import InputError, printable
from mlx_impl.files import atomic_folder, read_json, write_json, write_text
from mlx_impl.packing import read_quantization
from mlx_impl.store import Store
from mlx_impl.versions import Version, check_domain

FORMATS = ("mlx-lm", "peft", "gguf", "original")
CONFIG, MLX_LM, PEFT, GGUF, ORIGINAL = (
    "adapter_config.json",
    "adapters.safetensors",
    "adapter_model.safetensors",
    "adapter.gguf",
    "adapter.pt",
)
_MODELFILE = """\
# The base in GGUF, or its name in Ollama, must stand here; then: ollama create NAME -f Modelfile
FROM ./base.gguf
ADAPTER ./adapter.gguf
"""


def export_adapter(store: Store, domain: str, model: Path, out: Path, to: str) -> dict[str, Any]:
    """Write the current version of a domain into the folder `out`, which must be new or empty; says what it wrote.

    `model` is the base's directory, `to` one of FORMATS. Raises InputError where `out` is taken or is the current
    folder, and nothing is left there on any error.
    """
    if to not in FORMATS:
        raise InputError(f"{to!r} is no format to export to; there are: {', '.join(FORMATS)}")
    version = store.require(domain)
    place = place_of(out)
    folder = store.files_of(version)
    with atomic_folder(place, replace=place.exists()) as target:
        if to == "mlx-lm":
            for name in (MLX_LM, CONFIG):
                shutil.copyfile(folder / name, target / name)
        else:
            _write_other(target, to, folder, domain, model)
        names = sorted(path.name for path in target.iterdir())
    settings = read_json(folder / CONFIG)["lora_parameters"]
    described = {"format": to, "rank": settings["rank"], "scale": settings["scale"]}
    return {"domain": domain, "version": version.name, "out": str(out), "files": names, **described}


def _write_other(target: Path, to: str, folder: Path, domain: str, model: Path) -> None:
    """The adapter in `folder` in another format than the store's own."""
    config, shapes = _base(model)
    if config is None and to != "peft":
        raise InputError(f"{model}: {to} is for Llama models alone; mlx-lm and peft take adapters of others")
    adapter = _read_mlx_lm(folder, shapes)
    if to == "peft":
        tensors, settings = lora.to_peft(adapter, model.resolve().name, shapes)
        _write_folder(target, PEFT, tensors, settings)
    elif to == "original":
        legacy.write_pt(target / ORIGINAL, lora.to_original(adapter, domain))
    elif config is not None:
        tensors, alpha = lora.to_gguf(adapter, _heads(config))
        gguf.write_adapter(target / GGUF, tensors, alpha, domain)
        write_text(target / "Modelfile", _MODELFILE)


def place_of(out: Path) -> Path:
    """Where a folder named by a person will be: new, or empty and then replaced. Else InputError."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists already; name another folder or empty it first")
    place = Path(os.path.realpath(out))  # of a link, where it leads: what is replaced is a folder
    if Path.cwd().is_relative_to(place):
        raise InputError(f"{out} is the current folder or holds it, and would be replaced; name a new folder")
    return place


def import_adapter(store: Store, domain: str, model: Path, source: Path) -> Version:
    """Make an adapter from elsewhere, a folder or a file, the first version of a new domain on the base in `model`.

    Which base it was made for no format says for sure: what can be compared are shapes. A base that is no Llama is
    opened for that, because what its linear layers are called only mlx-lm knows. Raises InputError where the domain has
    lessons or the format is not known, DamagedFileError listing all that does not fit; nothing is then written.
    """
    check_domain(domain)
    _refuse_existing(store, domain)
    config, shapes, layers = _layers(model)
    kind, adapter = _read(source, config, shapes)
    tensors, settings = lora.to_mlx_lm(adapter, layers)
    figures = {
        "imported": kind,
        "rank": adapter.rank,
        "scale": adapter.scale,
        "trainable_parameters": sum(array.size for array in tensors.values()),
    }
    with store.writing():
        _refuse_existing(store, domain)
        return store.commit(
            domain,
            None,
            lambda folder: _write_folder(folder, MLX_LM, tensors, settings),
            source=printable(source.resolve().name),
            config={},
            figures=figures,
            heldout=None,
        )


def _refuse_existing(store: Store, domain: str) -> None:
    if store.head(domain) is not None:
        raise InputError(
            f"{domain} has lessons already; import under another name, or `minimac-mlx forget {domain}` first"
        )


def _layers(model: Path) -> tuple[ModelConfig | None, lora.Shapes, int]:
    """As `_base`, but the weights are those that an adapter can be put on in the open base; and the layers' number."""
    if read_json(model / modeldir.CONFIG).get("model_type", "llama") == "llama":
        config, _ = modeldir.read_config(model)
        return config, modeldir.expected_shapes(config), config.num_layers
    from mlx_impl.foreign import linear_shapes, open_model

    base = open_model(model)
    return None, linear_shapes(base), len(base.layers)


def _base(model: Path) -> tuple[ModelConfig | None, lora.Shapes]:
    """The configuration of a base, None of another architecture than Llama, and the shapes of its weights by name."""
    document = read_json(model / modeldir.CONFIG)
    if document.get("model_type", "llama") == "llama":
        config, _ = modeldir.read_config(model)
        return config, modeldir.expected_shapes(config)
    where = str(model / modeldir.CONFIG)
    foreigndir.check_config(document, where)
    infos = modeldir.dense_infos(foreigndir.checked_tensors(model), read_quantization(document, where))
    if not any(name.startswith("model.layers.") for name in infos):
        raise InputError(
            f"{model}: a {document['model_type']} names its layers otherwise than peft does; export --to mlx-lm works"
        )
    return None, {name: info.shape for name, info in infos.items() if name.startswith("model.layers.")}


def _heads(config: ModelConfig) -> tuple[int, int]:
    return config.num_query_heads, config.num_kv_heads


def _read(source: Path, config: ModelConfig | None, shapes: lora.Shapes) -> tuple[str, lora.Adapter]:
    """The format of an adapter, by the files that it consists of, and the adapter."""
    if (source / PEFT).is_file():
        tensors = dict(modeldir.read_tensors(modeldir.validate_safetensors(source / PEFT)))
        return "peft", lora.from_peft(tensors, read_json(source / CONFIG), shapes, str(source))
    if (source / MLX_LM).is_file():
        return "mlx-lm", _read_mlx_lm(source, shapes)
    file = next((source / name for name in (GGUF, ORIGINAL) if (source / name).is_file()), source)
    if config is None and file.is_file():
        raise InputError(f"{source}: {file.suffix} adapters are for Llama models alone; the base is another one")
    if config is not None and file.is_file() and file.suffix == ".gguf":
        metadata, table = gguf.read_file(file)
        lora.check_gguf(metadata, str(file))
        arrays: dict[str, np.ndarray] = {name: gguf.read_tensor(file, name, entry) for name, entry in table.items()}
        return "gguf", lora.from_gguf(metadata, arrays, _heads(config), shapes, str(file))
    if file.is_file() and file.suffix == ".pt":
        return "original", lora.from_original(legacy.read_pt(file), shapes, str(file))
    if not source.exists():
        raise InputError(f"{source}: no such file or folder")
    raise InputError(
        f"{source}: no adapter that is known: a folder with {MLX_LM} (mlx-lm) or {PEFT} (PEFT), a .gguf file, or a "
        ".pt file of the original project"
    )


def _read_mlx_lm(folder: Path, shapes: lora.Shapes) -> lora.Adapter:
    tensors = dict(modeldir.read_tensors(modeldir.validate_safetensors(folder / MLX_LM)))
    return lora.from_mlx_lm(tensors, read_json(folder / CONFIG), shapes, str(folder))


def _write_folder(folder: Path, name: str, tensors: lora.Arrays, settings: dict[str, Any]) -> None:
    modeldir.write_safetensors(folder / name, {name: array.shape for name, array in tensors.items()}, tensors)
    write_json(folder / CONFIG, settings)
