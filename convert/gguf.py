"""Llama models out of GGUF files: float32 arrays under HF names, a HF configuration, the tokenizer's pieces.

The header is walked here with Python integers against the file's real length, because the readers around
trust counts and offsets and die of damaged ones; the gguf package only dequantises blocks whose size is
known by then. GGUF stores the rows of q and k permuted for interleaved RoPE, which is undone. Format:
ggml's docs/gguf.md.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from convert.names import rename
from mlx_impl.config import ModelConfig
from mlx_impl.errors import DamagedFileError, InputError
from mlx_impl.modeldir import check_shapes, expected_shapes

MAX_ENTRIES = 65_536  # metadata entries, tensors: far above any model, low enough for a hostile count
MAX_ARRAY = 4_000_000  # strings in one array; the largest vocabularies have some 260,000
MAX_NAME = 256  # characters
MAX_STRING = 16 * 1024 * 1024  # bytes

_STRING, _ARRAY = 8, 9
_SCALARS = dict(enumerate(["<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?"])) | {10: "<Q", 11: "<q", 12: "<d"}


class GGUFTensor(NamedTuple):
    """One entry of the tensor table; `offset` is a byte position in the file, `shape` is numpy's order."""

    type: int
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class GGUFModel:
    """A checked GGUF file; its tensors are read and dequantised one at a time, when asked for."""

    path: Path
    config: dict[str, Any]  # a HF Llama config.json
    metadata: dict[str, Any]  # as in the file: `tokenizer.ggml.tokens` and so on
    table: dict[str, GGUFTensor]  # by HF name

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """HF name -> shape."""
        return {name: tensor.shape for name, tensor in self.table.items()}

    @property
    def types(self) -> list[str]:
        """Names of the ggml types that it is stored in, such as F32 and Q8_0."""
        import gguf

        return sorted({gguf.GGMLQuantizationType(tensor.type).name for tensor in self.table.values()})

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (HF name, float32 array) in the file's order; DamagedFileError if a value is not finite."""
        heads = {"q_proj": self.config["num_attention_heads"], "k_proj": self.config["num_key_value_heads"]}
        for name, tensor in self.table.items():
            array = read_tensor(self.path, name, tensor)
            projection = name.split(".")[-2]
            yield name, unpermute(array, heads[projection]) if projection in heads else array


def unpermute(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k (weight or bias), from pairs side by side back to the half-split layout of HF.

    Within each head GGUF has rows 0, h/2, 1, h/2+1, ... for HF's 0, 1, ..., h-1 (llama.cpp's
    LlamaModel.permute).
    """
    rows = array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:])
    return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(array.shape)


def permute(array: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `unpermute`: from the half-split layout of HF to pairs side by side."""
    rows = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(array.shape)


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    """Metadata and tensor table of a GGUF file of any kind, each place checked against the file's length.

    Raises DamagedFileError for what contradicts itself, InputError where there is no file.
    """
    try:
        with open(path, "rb") as file:
            return _read_header(_Cursor(path, file))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None


def read_gguf(path: Path) -> GGUFModel:
    """Check a GGUF file of the Llama architecture from header to last tensor; weights are not read yet.

    Raises DamagedFileError for what contradicts itself or the file's length, InputError for a sound file of a
    kind that is not supported (other architectures, mixtures of experts, partial or YaRN-scaled RoPE).
    """
    metadata, table = read_file(path)
    names = rename(table, "gguf", "hf", str(path))
    renamed = {name: table[key] for key, name in names.items() if name is not None}
    frequencies = table.get("rope_freqs.weight")
    factors = read_tensor(path, "rope_freqs.weight", frequencies) if frequencies else None
    model = GGUFModel(path, _config(path, metadata, renamed, factors), metadata, renamed)
    check_shapes(model.shapes, expected_shapes(ModelConfig.from_hf(model.config, str(path))), str(path))
    return model


def write_adapter(path: Path, tensors: dict[str, np.ndarray], alpha: float, name: str) -> None:
    """A GGUF LoRA adapter for a Llama model, of float32 tensors `<module>.weight.lora_a` and `.lora_b`.

    The keys are those that llama.cpp asks for (its convert_lora_to_gguf.py).
    """
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_name(name)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for key, array in tensors.items():
        writer.add_tensor(key, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# -- header --------------------------------------------------------------------------


class _Cursor:
    """Reads forward through a file and knows what is left of it."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.size = path.stat().st_size
        self.at = 0

    def take(self, count: int, what: str) -> bytes:
        """The next `count` bytes, or DamagedFileError."""
        left = self.size - self.at
        if count > left:
            raise DamagedFileError(f"{self.path}: {what} needs {count:,} bytes at {self.at:,}, {left:,} are left")
        self.at += count
        return self.file.read(count)

    def number(self, code: str, what: str) -> Any:
        """One scalar in struct's notation."""
        return struct.unpack(code, self.take(struct.calcsize(code), what))[0]

    def string(self, what: str) -> str:
        """Length (u64), then UTF-8."""
        length = self.number("<Q", what)
        if length > MAX_STRING:
            raise DamagedFileError(f"{self.path}: {what} is {length:,} bytes long, at most {MAX_STRING:,} are read")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise DamagedFileError(f"{self.path}: {what} is no UTF-8 ({error.reason}, byte {error.start})") from None

    def name(self, what: str) -> str:
        """A key or a tensor's name, which error messages will show."""
        name = self.string(what)
        if len(name) > MAX_NAME or not name.isprintable():
            raise DamagedFileError(f"{self.path}: {what} is {name!r:.60}, which is no name")
        return name

    def value(self, kind: int, what: str) -> Any:
        """A metadata value: a scalar, a string, a list of strings or a numpy array."""
        if kind == _STRING:
            return self.string(what)
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], what)
        if kind != _ARRAY:
            raise DamagedFileError(f"{self.path}: {what} has type {kind}, types 0 to 12 exist")
        element, count = self.number("<I", what), self.number("<Q", what)
        if element in _SCALARS:
            dtype = np.dtype(_SCALARS[element])
            return np.frombuffer(self.take(count * dtype.itemsize, what), dtype)
        if element != _STRING:
            raise DamagedFileError(f"{self.path}: {what} is an array of type {element}, which is not read")
        limit = min(MAX_ARRAY, (self.size - self.at) // 8)
        if count > limit:
            raise DamagedFileError(f"{self.path}: {what} counts {count:,} strings, at most {limit:,} can be here")
        return [self.string(what) for _ in range(count)]


def _read_header(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    """Metadata, and the tensor table with every tensor's place checked against the file's length."""
    path = cursor.path
    if cursor.take(4, "the magic number") != b"GGUF":
        raise DamagedFileError(f"{path}: no GGUF file, it does not begin with 'GGUF'")
    version = cursor.number("<I", "the version")
    if version not in (2, 3):
        raise DamagedFileError(f"{path}: GGUF version {version}, only little-endian versions 2 and 3 are read")
    tensor_count, entry_count = (
        cursor.number("<Q", "the tensor count"),
        cursor.number("<Q", "the entry count"),
    )
    for count, what in ((tensor_count, "tensors"), (entry_count, "metadata entries")):
        if count > MAX_ENTRIES:
            raise DamagedFileError(f"{path}: the header counts {count:,} {what}, at most {MAX_ENTRIES:,}")
    metadata: dict[str, Any] = {}
    for index in range(entry_count):
        key = cursor.name(f"the name of metadata entry {index}")
        if key in metadata:
            raise DamagedFileError(f"{path}: metadata key {key} appears twice")
        metadata[key] = cursor.value(cursor.number("<I", key), key)
    table: dict[str, GGUFTensor] = {}
    for index in range(tensor_count):
        name = cursor.name(f"the name of tensor {index}")
        if name in table:
            raise DamagedFileError(f"{path}: tensor {name} appears twice")
        table[name] = _table_entry(cursor, name)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 2**20 or alignment & (alignment - 1):
        raise DamagedFileError(f"{path}: general.alignment is {alignment!r:.60}, a power of two was expected")
    start = -(-cursor.at // alignment) * alignment
    return metadata, _placed(cursor, table, start, alignment)


def _table_entry(cursor: _Cursor, name: str) -> GGUFTensor:
    """One entry of the tensor table, its offset still relative to the data section."""
    dimensions = cursor.number("<I", name)
    if not 1 <= dimensions <= 4:
        raise DamagedFileError(f"{cursor.path}: tensor {name} has {dimensions:,} dimensions, 1 to 4 are possible")
    sizes = struct.unpack(f"<{dimensions}Q", cursor.take(8 * dimensions, name))  # fastest first
    kind, offset = cursor.number("<I", name), cursor.number("<Q", name)
    block, block_bytes = _block_of(kind, f"{cursor.path}: tensor {name}")
    if min(sizes) < 1 or sizes[0] % block:
        raise DamagedFileError(f"{cursor.path}: tensor {name} is {list(sizes)}, rows come in blocks of {block}")
    return GGUFTensor(kind, tuple(reversed(sizes)), offset, math.prod(sizes) // block * block_bytes)


def _placed(cursor: _Cursor, table: dict[str, GGUFTensor], start: int, alignment: int) -> dict[str, GGUFTensor]:
    """Offsets made absolute; every tensor lies inside the file, aligned, and overlaps no other."""
    placed = {name: tensor._replace(offset=start + tensor.offset) for name, tensor in table.items()}
    end, before = start, "the header"
    for name, tensor in sorted(placed.items(), key=lambda item: item[1].offset):
        stop = tensor.offset + tensor.size
        if stop > cursor.size:
            raise DamagedFileError(
                f"{cursor.path}: tensor {name} ends at byte {stop:,}, the file at {cursor.size:,}: cut off?"
            )
        if tensor.offset < end or (tensor.offset - start) % alignment:
            raise DamagedFileError(
                f"{cursor.path}: tensor {name} starts at byte {tensor.offset:,}, {before} ends at {end:,} "
                f"and tensors are aligned to {alignment}"
            )
        end, before = stop, name
    return placed


# -- tensors -------------------------------------------------------------------------


def _block_of(kind: int, where: str) -> tuple[int, int]:
    """(values, bytes) of one block of a ggml type that the gguf package dequantises."""
    import gguf

    try:
        name = gguf.GGMLQuantizationType(kind)
    except ValueError:
        raise DamagedFileError(f"{where} has type {kind}, which is no ggml type") from None
    block, block_bytes = gguf.GGML_QUANT_SIZES[name]
    try:
        gguf.dequantize(np.zeros((1, block_bytes), np.uint8), name)
    except NotImplementedError:
        raise InputError(f"{where} is stored as {name.name}, which cannot be dequantised here") from None
    return int(block), int(block_bytes)


def read_tensor(path: Path, name: str, tensor: GGUFTensor) -> np.ndarray:
    """Read one tensor as float32 of its shape."""
    import gguf

    with open(path, "rb") as file:
        file.seek(tensor.offset)
        raw = np.frombuffer(file.read(tensor.size), np.uint8)
    if raw.size != tensor.size:
        raise DamagedFileError(f"{path}: tensor {name}: {raw.size:,} of {tensor.size:,} bytes, the file has shrunk")
    with np.errstate(all="ignore"):  # damaged scales; looked at below, with the tensor's name
        rows = gguf.dequantize(raw.reshape(math.prod(tensor.shape[:-1]), -1), gguf.GGMLQuantizationType(tensor.type))
    array = np.asarray(rows, np.float32).reshape(tensor.shape)
    bad = array.size - int(np.count_nonzero(np.isfinite(array)))
    if bad:
        raise DamagedFileError(f"{path}: tensor {name}: {bad:,} of {array.size:,} values are not finite")
    return array


# -- configuration -------------------------------------------------------------------


def _config(
    path: Path, metadata: dict[str, Any], table: dict[str, GGUFTensor], rope_factors: np.ndarray | None
) -> dict[str, Any]:
    """The HF `config.json` that the metadata and the tensors' shapes amount to."""
    for key in ("general.type", "general.architecture", "llama.expert_count", "llama.rope.scaling.type"):
        if isinstance(metadata.get(key), np.ndarray):
            raise DamagedFileError(f"{path}: {key} is an array, a single value was expected")
    kind = (metadata.get("general.type", "model"), metadata.get("general.architecture"))
    if kind != ("model", "llama"):
        raise InputError(f"{path}: a {kind[0]!r:.60} of architecture {kind[1]!r:.60}; only models of 'llama' are read")
    if metadata.get("llama.expert_count"):
        raise InputError(f"{path}: a mixture of {metadata['llama.expert_count']!r:.60} experts, which is not supported")
    if "model.embed_tokens.weight" not in table:
        raise DamagedFileError(f"{path}: tensor token_embd.weight is missing")
    values = _Values(path, metadata)
    width, heads = values.count("embedding_length"), values.count("attention.head_count")
    head_dim = values.count("attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if values.count(key, head_dim) != head_dim:
            raise InputError(f"{path}: llama.{key} is {values.count(key)}, only head_dim = {head_dim} is supported")
    theta, context = values.real("rope.freq_base", 10000.0), values.count("context_length")
    return {
        "model_type": "llama",
        "vocab_size": table["model.embed_tokens.weight"].shape[0],
        "hidden_size": width,
        "intermediate_size": values.count("feed_forward_length"),
        "num_hidden_layers": values.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": values.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "rms_norm_eps": values.real("attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(values, rope_factors, theta, head_dim),
        "tie_word_embeddings": "lm_head.weight" not in table,
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in table,
        "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in table,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }


class _Values(NamedTuple):
    """Typed access to the metadata under `llama.`."""

    path: Path
    metadata: dict[str, Any]

    def count(self, name: str, default: int | None = None) -> int:
        """A positive whole number; one per layer is read where all are equal."""
        value = self.metadata.get(f"llama.{name}", default)
        if isinstance(value, np.ndarray) and value.size:
            if (value != value[0]).any():
                raise InputError(f"{self.path}: llama.{name} differs between layers, which is not supported")
            value = value[0].item()
        if type(value) is not int or not 1 <= value < 2**31:
            raise DamagedFileError(f"{self.path}: llama.{name} is {value!r:.60}, a positive whole number was expected")
        return value

    def real(self, name: str, default: float | None = None) -> float:
        """A positive float32, as the shortest decimal that means it: 1e-05, not 9.999999747378752e-06."""
        value = self.metadata.get(f"llama.{name}", default)
        if type(value) is not float or not 0 < value < math.inf:
            raise DamagedFileError(f"{self.path}: llama.{name} is {value!r:.60}, a positive number was expected")
        return float(str(np.float32(value)))


def _rope_scaling(values: _Values, factors: np.ndarray | None, theta: float, head_dim: int) -> dict[str, Any] | None:
    """HF's rope_scaling. GGUF keeps Llama 3's as one divisor per frequency, so its factor is the largest one.

    The other parameters are not in the file; those of all Llama 3 models are tried, and must fit.
    """
    path, kind = values.path, values.metadata.get("llama.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise InputError(f"{path}: RoPE scaling {kind!r:.60} is not supported; none, linear and Llama 3's are")
    if factors is None:
        return {"rope_type": "linear", "factor": values.real("rope.scaling.factor")} if kind == "linear" else None
    factor = float(str(factors.max()))
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    expected = llama3_factors(scaling, theta, head_dim)
    if kind != "none" or factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise InputError(f"{path}: the frequency factors in rope_freqs.weight are not those of Llama 3")
    return scaling


def llama3_factors(scaling: dict[str, Any], theta: float, head_dim: int) -> np.ndarray:
    """What llama.cpp's converter writes for Llama 3's scaling: the divisor of each of the head_dim/2 frequencies."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    turns = scaling["original_max_position_embeddings"] / wavelength
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / scaling["factor"] + smooth)
