"""A whole model on its way between formats, and the readers of the two that carry a tokenizer: a HF folder and GGUF.

Configuration, names and shapes are checked when a model is read; its tensors come one at a time, float32 under HF
names, when somebody asks for them. `state_dict` has the readers of bare weights, `detect` tells the formats apart.
"""

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert import spm_model
from convert.gguf import read_gguf
from convert.tokenizer import tokenizer_files
from mlx_impl import modeldir
from mlx_impl.config import ModelConfig
from mlx_impl.errors import DamagedFileError, InputError
from mlx_impl.files import read_json

MAX_TEXT = 64 * 1024 * 1024  # bytes of one tokenizer file

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
GENERATION_CONFIG = "generation_config.json"

TokenizerFiles = Mapping[str, str | bytes]


@dataclass(frozen=True)
class Model:
    """A checked model, ready to be written in another format."""

    config: ModelConfig
    tensors: Iterable[tuple[str, np.ndarray]]
    """(HF name, float32 array) in any order, each once; see `modeldir.expected_shapes`. May be gone through once."""
    tokenizer_files: TokenizerFiles
    """File name -> content, as in a HF folder; empty where there is none."""
    generation_config: Mapping[str, Any]
    dtype: str
    """float32, float16 or bfloat16: in which all of its values can be written again without loss."""
    found: str
    """What was read, in words."""
    source: Mapping[str, Any]
    """Where it came from, for minimac.json."""
    framework: str = "mlx"
    """Which implementation runs this format: mlx, or torch for torch_ref."""
    notes: tuple[str, ...] = ()
    """What was left out on purpose, a sentence each."""
    packed: str = ""
    """How its weights were quantised, in words; empty where they were not."""

    @property
    def unpacked(self) -> tuple[str, ...]:
        """What there is to say where quantised weights are written as plain ones."""
        return (f"its weights were {self.packed}, and come out unpacked",) if self.packed else ()


def described(config: ModelConfig) -> str:
    """A few words on the size of a model."""
    return f"{config.num_parameters():,} weights in {config.num_layers} layers, {config.d_model} wide"


def generation_config(config: ModelConfig) -> dict[str, Any]:
    """The `generation_config.json` of a model that brings none: its special ids."""
    ids = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {key: value for key, value in ids.items() if value is not None}


def from_folder(folder: Path) -> Model:
    """A HF Llama folder, sharded or not: headers, shapes and, where recorded, hashes are checked.

    What MLX quantised is unpacked, to float32, which is exact.

    Raises InputError or DamagedFileError; see `modeldir.checked_weights`.
    """
    check_kind(read_json(folder / modeldir.CONFIG), f"{folder}", f"-m {folder}")
    config, quantization = modeldir.read_config(folder)
    infos = modeldir.checked_tensors(folder, config, quantization)
    dtypes = sorted({info.dtype for info in infos.values()})
    stored = f"quantised to {quantization.default.bits} bits" if quantization is not None else " and ".join(dtypes)
    generation, files = folder / GENERATION_CONFIG, {info.file for info in infos.values()}
    shards = f" in {len(files)} files" if len(files) > 1 else ""
    return Model(
        config,
        modeldir.read_dense(infos, quantization),
        read_tokenizer(folder),
        read_json(generation) if generation.is_file() else generation_config(config),
        dtypes[0] if len(dtypes) == 1 else "float32",
        f"a model directory in Hugging Face's layout: {described(config)}, {stored}{shards}",
        {"folder": folder.resolve().name},
        packed=stored if quantization is not None else "",
    )


def check_kind(config: Mapping[str, Any], where: str, usable: str) -> None:
    """InputError for the config.json of another architecture; `usable` says how such a model is named to commands."""
    kind = config.get("model_type", "llama")
    if isinstance(kind, str) and kind != "llama":
        raise InputError(
            f"{where}: model_type is {kind!r:.60}, only 'llama' is read here; if mlx-lm knows it, learn, generate, "
            f"chat and eval take it as it is ({usable}), and `convert --quantize 4` packs it"
        )


def from_gguf(path: Path, with_tokenizer: bool = True) -> Model:
    """A GGUF file, with its tokenizer if that is wanted, which must then be of a kind that is known.

    Its type is float32: what a quantised block stands for fits nothing shorter.
    """
    gguf = read_gguf(path)
    config = ModelConfig.from_hf(gguf.config, str(path))
    return Model(
        config,
        gguf.tensors(),
        tokenizer_files(gguf.metadata, config.max_seq_len, str(path)) if with_tokenizer else {},
        generation_config(config),
        "float32",
        f"a GGUF file{' with its tokenizer' * with_tokenizer}: {described(config)}, {' and '.join(gguf.types)}",
        {"file": path.name},
    )


def read_tokenizer(folder: Path) -> dict[str, bytes]:
    """The tokenizer's files in a folder as they are; the JSON among them must be JSON and name no code.

    Of a bare tokenizer.model a tokenizer.json is made, where one can give the same ids (see `spm_model`).
    """
    found: dict[str, bytes] = {}
    for path in (folder / name for name in TOKENIZER_FILES):
        if not path.is_file():
            continue
        if path.stat().st_size > MAX_TEXT:
            raise DamagedFileError(f"{path}: {path.stat().st_size:,} bytes, at most {MAX_TEXT:,} expected")
        if path.suffix == ".json" and read_json(path).get("auto_map"):
            raise InputError(f"{path}: auto_map names code to be run, which is never done; remove it")
        found[path.name] = path.read_bytes()
    if spm_model.NAME in found and "tokenizer.json" not in found:
        with contextlib.suppress(InputError):
            found |= spm_model.tokenizer_files(found, str(folder / spm_model.NAME))
    return found
