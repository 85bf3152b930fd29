"""Whole models from one format into another: what `minimac-mlx convert` does, without MLX and without torch.

The source's format is seen, the target's is chosen from FORMATS. A target appears whole or not at all, and never over
something that is there. Formats that need more than `convert` knows are further rows of the table.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert import gguf_writer, spm_model, state_dict
from convert.detect import ENDINGS, read_model
from convert.model import Model, TokenizerFiles, generation_config, read_tokenizer
from convert.original_tokenizer import is_tokenizer_folder, tokenizer_files
from mlx_impl import modeldir
from mlx_impl.errors import DamagedFileError, InputError, listed
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
    to = format_of(target, to)
    form = FORMATS[to]
    if form.precision and dtype:
        raise InputError(f"--dtype {dtype}: {to} says how weights are stored already; leave it out")
    if target.exists():
        raise InputError(f"{target} exists already; name another place or remove it first")
    model = read_model(source, config_file, with_tokenizer=tokenizer is None)
    say(f"{source} is {model.found}")
    if tokenizer is not None:
        model = _with_tokenizer(model, tokenizer)
    beside = source if source.is_dir() or source.suffix.lower() == ".gguf" else (config_file or source).parent
    _check_tokenizer(model.tokenizer_files, model.config.vocab_size, tokenizer or beside)
    stored = form.precision or (DTYPES[dtype] if dtype else model.dtype)
    target.parent.mkdir(parents=True, exist_ok=True)
    (write or form.write)(model, target, stored)
    return {
        "source": str(source),
        "found": model.found,
        "target": str(target),
        "format": to,
        "dtype": stored,
        "parameters": model.config.num_parameters(),
        "notes": [*(_packed_anew(model) if write else model.unpacked), *_notes(model, source, to)],
    }


def format_of(target: Path, to: str | None = None) -> str:
    """The format to write: `to`, else the first that the target's ending asks for, else a model directory.

    InputError for one that is not written, and for a target whose ending is another format's.
    """
    ending = target.suffix.lower()
    to = to or next((name for name, form in FORMATS.items() if ending in form.endings), "hf")
    if to not in FORMATS:
        there = "; ".join(f"{name}, {form.help}" for name, form in FORMATS.items())
        raise InputError(f"{to!r} is no format to write; there are: {there}")
    endings = FORMATS[to].endings
    if endings and ending not in endings:
        raise InputError(f"{target}: {to} writes a file that ends in {' or '.join(endings)}")
    if not endings and ending in (*ENDINGS, ".bin"):
        files = ", ".join(dict.fromkeys(ending for form in FORMATS.values() for ending in form.endings))
        raise InputError(f"{target}: {to} writes a folder; files that are written end in {files}")
    return to


def _packed_anew(model: Model) -> tuple[str, ...]:
    """What there is to say where weights are quantised that were before."""
    return (f"its weights were {model.packed} already; what that lost stays lost",) if model.packed else ()


def _notes(model: Model, source: Path, to: str) -> list[str]:
    """What the target will not have, a sentence each."""
    notes = list(model.notes)
    if to == "hf" and spm_model.NAME in model.tokenizer_files and "tokenizer.json" not in model.tokenizer_files:
        notes.append(f"the tokenizer stays as it is: {_why_no_tokenizer_json(model.tokenizer_files)}")
    elif to == "hf" and "tokenizer.json" not in model.tokenizer_files:
        notes.append("there is no tokenizer.json; --tokenizer DIR brings one, and text needs one")
    if to in ("torch", "original") and model.tokenizer_files:
        notes.append("the tokenizer is left out: this format holds weights alone")
    ends: set[int] = set()
    for value in (model.config.eos_token_id, model.generation_config.get("eos_token_id")):
        ends |= {end for end in (value if isinstance(value, list) else [value]) if type(end) is int}
    if to.startswith("gguf") and len(ends) > 1:
        ids = listed([str(end) for end in sorted(ends)])
        notes.append(f"a text ends at any of the ids {ids}; GGUF keeps one, the tokenizer's own or else the first")
    return notes + lessons_stay(source)


def lessons_stay(source: Path) -> list[str]:
    """A note that what was learned on the source is not in the target, where there is anything."""
    if not (source / "learner" / "learner.sqlite").is_file():
        return []
    return [f"its lessons stay there; `minimac-mlx export NAME OUT --fuse -m {source}` takes one along"]


def _why_no_tokenizer_json(files: TokenizerFiles) -> str:
    """What keeps a tokenizer.model from being written as tokenizer.json."""
    try:
        spm_model.tokenizer_files(files, spm_model.NAME)
    except InputError as error:
        return str(error)
    raise AssertionError("`read_tokenizer` made one")


def _with_tokenizer(model: Model, folder: Path) -> Model:
    """The model with the tokenizer of a folder, and its special ids where the configuration has none."""
    files = tokenizer_in(folder, model.config.max_seq_len)
    ours = load_tokenizer(files, folder)
    theirs = model.config
    config = dataclasses.replace(
        theirs,
        bos_token_id=ours.bos_id if theirs.bos_token_id is None else theirs.bos_token_id,
        eos_token_id=ours.eos_id if theirs.eos_token_id is None else theirs.eos_token_id,
        pad_token_id=ours.pad_id if theirs.pad_token_id is None else theirs.pad_token_id,
    )
    generation = {**generation_config(config), **model.generation_config}
    return dataclasses.replace(model, config=config, tokenizer_files=files, generation_config=generation)


def tokenizer_in(folder: Path, context_length: int) -> TokenizerFiles:
    """The tokenizer of a folder, ours or the original's, as the files of a model directory. InputError if none is."""
    if is_tokenizer_folder(folder):
        return tokenizer_files(folder, context_length)
    files = read_tokenizer(folder)
    if not {"tokenizer.json", spm_model.NAME} & files.keys():
        raise InputError(f"{folder}: no tokenizer.json and no {spm_model.NAME}")
    return files


def load_tokenizer(files: TokenizerFiles, where: Path) -> Tokenizer:
    """The tokenizer that a model directory with these files would have; `where` is their folder, named in errors."""
    if "tokenizer.json" not in files:
        return Tokenizer.load(where)
    settings = json.loads(_text(files, "tokenizer_config.json", where)) if "tokenizer_config.json" in files else None
    return Tokenizer(_text(files, "tokenizer.json", where), settings, f"{where}: tokenizer.json")


def _check_tokenizer(files: TokenizerFiles, rows: int, where: Path) -> None:
    """InputError or DamagedFileError for a tokenizer that cannot be read or has more ids than the model has rows."""
    if "tokenizer.json" not in files and spm_model.NAME in files:
        Tokenizer.load(where).check_fits(rows)
    elif "tokenizer.json" in files:
        Tokenizer(_text(files, "tokenizer.json", where), where=f"{where}: tokenizer.json").check_fits(rows)


def _text(files: TokenizerFiles, name: str, where: Path) -> str:
    content = files[name]
    try:
        return content if isinstance(content, str) else content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DamagedFileError(f"{where}: {name} is no UTF-8 ({error.reason}, byte {error.start})") from None


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
    try:
        write_json(beside, config)
    except BaseException:
        target.unlink()
        raise


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
