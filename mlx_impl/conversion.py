"""Whole models from one format into another: what `minimac-mlx convert` does, without MLX and without torch.

The source's format is seen, the target's is chosen from FORMATS. A target appears whole or not at all, and never over
something that is there. Formats that need more than `convert` knows are further rows of the table.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert import gguf_writer, state_dict
from convert.detect import read_model
from convert.model import Model, TokenizerFiles, read_tokenizer
from convert.original_tokenizer import is_tokenizer_folder, tokenizer_files
from mlx_impl import modeldir
from mlx_impl.errors import DamagedFileError, InputError
from mlx_impl.files import atomic_file, read_json, write_json
from mlx_impl.tokenizer import Tokenizer

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Format:
    """A format that is written."""

    help: str
    write: Callable[[Model, Path, str], None]
    """(model, target, dtype): the target is new, and whole when this returns."""
    endings: tuple[str, ...] = ()
    """Of the file that is written; none where it is a folder."""
    precision: str | None = None
    """In which matrices are stored, where the format decides that and --dtype cannot."""


def convert(
    source: Path,
    target: Path,
    to: str | None = None,
    dtype: str | None = None,
    config_file: Path | None = None,
    tokenizer: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
    write: Callable[[Model, Path, str], Path | None] | None = None,
) -> dict[str, Any]:
    """Read the model at `source`, whatever its format, and write it to `target`; returns what was done, for JSON.

    `to` is a name in FORMATS (None: by the target's ending, else a model directory), `dtype` one in DTYPES (None: as
    the source has it). `config_file` belongs to weights without a configuration, `tokenizer` is a folder whose
    tokenizer replaces the source's. `say` gets what was found before anything is written. `write` replaces the
    format's writer (see `quantised.packed_writer`). Raises InputError and
    DamagedFileError; nothing is then at `target`.
    """
    to = to or default_format(target)
    if to not in FORMATS:
        there = "; ".join(f"{name}, {form.help}" for name, form in FORMATS.items())
        raise InputError(f"{to!r} is no format to write; there are: {there}")
    form = FORMATS[to]
    if form.endings and target.suffix not in form.endings:
        raise InputError(f"{target}: {to} writes a file that ends in {' or '.join(form.endings)}")
    if form.precision and dtype:
        raise InputError(f"--dtype {dtype}: {to} says how weights are stored already; leave it out")
    if target.exists():
        raise InputError(f"{target} exists already; name another place or remove it first")
    model = read_model(source, config_file)
    say(f"{source} is {model.found}")
    if tokenizer is not None:
        model = dataclasses.replace(model, tokenizer_files=_tokenizer_in(tokenizer, model.config.max_seq_len))
    _check_tokenizer(model.tokenizer_files, model.config.vocab_size, tokenizer or source)
    stored = form.precision or (DTYPES[dtype] if dtype else model.dtype)
    notes = list(model.notes)
    if to == "hf" and "tokenizer.json" not in model.tokenizer_files:
        notes.append("there is no tokenizer.json; --tokenizer DIR brings one, and text needs one")
    target.parent.mkdir(parents=True, exist_ok=True)
    (write or form.write)(model, target, stored)
    return {
        "source": str(source),
        "found": model.found,
        "target": str(target),
        "format": to,
        "dtype": stored,
        "parameters": model.config.num_parameters(),
        "notes": notes,
    }


def default_format(target: Path) -> str:
    """The format that a target's ending asks for, a model directory without one that is known."""
    return {".gguf": "gguf-f16", ".pt": "torch", ".safetensors": "torch"}.get(target.suffix, "hf")


def _tokenizer_in(folder: Path, context_length: int) -> TokenizerFiles:
    if is_tokenizer_folder(folder):
        return tokenizer_files(folder, context_length)
    files = read_tokenizer(folder)
    if "tokenizer.json" not in files:
        raise InputError(f"{folder}: no tokenizer.json")
    return files


def _check_tokenizer(files: TokenizerFiles, rows: int, where: Path) -> None:
    """InputError or DamagedFileError for a tokenizer that cannot be read or has more ids than the model has rows."""
    content = files.get("tokenizer.json")
    if content is None:
        return
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DamagedFileError(f"{where}: tokenizer.json is no UTF-8 ({error.reason}, byte {error.start})") from None
    Tokenizer(text, where=f"{where}: tokenizer.json").check_fits(rows)


# -- writers -------------------------------------------------------------------------


def _write_folder(model: Model, target: Path, dtype: str) -> None:
    modeldir.write_model_directory(
        target, model.config, model.tensors, model.tokenizer_files, model.generation_config, model.source, dtype
    )


def _write_torch(model: Model, target: Path, dtype: str) -> None:
    """The state dict, and the config.json without which nobody can read it, beside it."""
    config, beside = model.config.to_hf(dtype), target.with_name(modeldir.CONFIG)
    if beside.exists() and read_json(beside) != config:
        raise InputError(f"{beside} is another model's, and {target.name} would need one there; name another folder")
    with atomic_file(target) as temporary:
        state_dict.write_torch(model, temporary, dtype)
        write_json(beside, config)


def _write_original(model: Model, target: Path, dtype: str) -> None:
    with atomic_file(target) as temporary:
        state_dict.write_original(model, temporary, dtype)


def _write_gguf(model: Model, target: Path, kind: str) -> None:
    with atomic_file(target) as temporary:
        gguf_writer.write_gguf(model, temporary, kind)


FORMATS = {
    "hf": Format("a model directory for this program, mlx-lm and transformers", _write_folder),
    "torch": Format("a state dict of torch_ref with config.json beside it", _write_torch, (".pt", ".safetensors")),
    "original": Format("model.pt of the original PyTorch project", _write_original, (".pt",)),
    "gguf-f16": Format("for llama.cpp and Ollama, with the tokenizer", _write_gguf, (".gguf",), "F16"),
    "gguf-q8_0": Format("the same at half the size", _write_gguf, (".gguf",), "Q8_0"),
}
