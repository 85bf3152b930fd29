"""Which format a model is in: by what lies at the path, for a .pt file by what it holds. Never by what is hoped for."""

from pathlib import Path

from convert.model import Model, from_folder, from_gguf
from convert.state_dict import from_pt, from_safetensors
from mlx_impl import modeldir
from mlx_impl.errors import InputError

ENDINGS = (".gguf", ".safetensors", ".pt", ".pth")
READ = "a model directory, a .gguf file, or weights as .safetensors or .pt"


def read_model(path: Path, config_file: Path | None = None, with_tokenizer: bool = True) -> Model:
    """Read the model at a path, whatever its format; `found` says in words which that is.

    `config_file` is for weights without a configuration (see `state_dict.from_pt`). Without `with_tokenizer` the one
    in a GGUF file, which may be of a kind that is not known, is not looked at. Raises InputError where there is nothing
    that is read here, and what the reader of the format raises.
    """
    ending = path.suffix.lower()
    if config_file is not None and (path.is_dir() or ending == ".gguf"):
        raise InputError(f"{path} has its own configuration; --config is for weights alone")
    if path.is_dir():
        if not (path / modeldir.CONFIG).is_file():
            files = sorted(file.name for file in path.iterdir() if file.suffix.lower() in ENDINGS)
            there = f"; in it are {', '.join(files[:10])}, name one of them" if files else ""
            raise InputError(f"{path}: no {modeldir.CONFIG}, so no model directory{there}")
        return from_folder(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file or folder")
    if ending == ".gguf":
        return from_gguf(path, with_tokenizer)
    if ending == ".safetensors":
        return from_safetensors(path, config_file)
    if ending in ENDINGS:
        return from_pt(path, config_file)
    raise InputError(f"{path}: not known by its name {path.suffix!r:.60}; read are {READ}")
