"""Model directories as files: Hugging Face Llama folders plus `minimac.json`, checked without MLX.

A safetensors file from outside is checked here against its own length before anyone maps it, because
`mx.load` accepts overlapping and negative entries. Writing streams one tensor at a time to its place in the
file, so that a model larger than memory can be converted. Hashes in `minimac.json` catch what no
safetensors reader notices: a flipped bit in the data.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from convert.names import is_dropped
from mlx_impl import hashes
from mlx_impl.config import ModelConfig
from mlx_impl.errors import DamagedFileError, InputError, listed
from mlx_impl.files import atomic_folder, read_json, sha256, write_json
from mlx_impl.packing import KEYS, Quantization, dense_shape, packed_shapes, read_quantization, unpack

FORMAT_VERSION = 1
MANIFEST = "minimac.json"
CONFIG = "config.json"
METRICS = "metrics.jsonl"
LOSS_PLOT = "loss.png"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

MAX_HEADER = 100_000_000  # bytes; the safetensors library's own limit
MAX_DIMENSIONS = 8  # of a tensor; numpy's limit is 64, and the product of many sizes takes long

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_CODES = {name: code for code, name in _DTYPES.items()}
_INTEGERS = {"BOOL": "bool"} | {f"{n[0].upper()}{b}": f"{n}{b}" for n in ("uint", "int") for b in (8, 16, 32, 64)}
_STORED: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    **{name: np.dtype(name).newbyteorder("<") for name in _INTEGERS.values()},
}


class TensorInfo(NamedTuple):
    """Where one tensor lies; `start` and `stop` are byte positions in `file`, not in its data section."""

    file: Path
    dtype: str  # float32, float16 or bfloat16; where asked for also uint32 and other integers
    shape: tuple[int, ...]
    start: int
    stop: int


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """HF name -> shape of every weight that a model of this configuration has, in file order.

    Linear weights are (out, in).
    """
    d, f, v = config.d_model, config.d_ff, config.vocab_size
    q, kv = config.num_query_heads * config.head_width, config.num_kv_heads * config.head_width
    attention = {"q_proj": (q, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, q)}
    mlp = {"gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, d)}
    for layer in range(config.num_layers):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.{norm}.weight": (d,) for norm in ("input_layernorm", "post_attention_layernorm")}
        for block, linears, bias in (
            ("self_attn", attention, config.attention_bias),
            ("mlp", mlp, config.mlp_bias),
        ):
            for name, shape in linears.items():
                shapes[f"{at}.{block}.{name}.weight"] = shape
                if bias:
                    shapes[f"{at}.{block}.{name}.bias"] = shape[:1]
    shapes["model.norm.weight"] = (d,)
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (v, d)
    return shapes


# -- reading -------------------------------------------------------------------------


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory: `model.safetensors`, else the shards that its index names.

    Raises InputError where there are none, DamagedFileError for an index that names a file outside the
    folder or one that is not there.
    """
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    index = directory / INDEX
    if not index.is_file():
        others = sorted(p.name for p in directory.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
        found = f"; found {listed(others)} instead (`convert FILE DIR` reads .gguf and .pt)" if others else ""
        raise InputError(f"{directory}: no {WEIGHTS} and no {INDEX}{found}")
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(n, str) for n in names.values()):
        raise DamagedFileError(f"{index}: weight_map must map tensor names to file names")
    shards = sorted(set(names.values()))
    strange = [name for name in shards if not _is_plain_name(name) or not name.endswith(".safetensors")]
    if strange:
        raise DamagedFileError(f"{index}: {', '.join(map(repr, strange))} is no file of this folder")
    missing = [name for name in shards if not (directory / name).is_file()]
    if missing:
        raise DamagedFileError(f"{index}: {', '.join(missing)} is missing; copy the whole model")
    return [directory / name for name in shards]


def read_config(directory: Path) -> tuple[ModelConfig, Quantization | None]:
    """What a Llama directory's config.json says of the model, and how its weights are packed; None: not at all."""
    path = directory / CONFIG
    document = read_json(path)
    quantization = read_quantization(document, str(path)) if document.get("model_type") == "llama" else None
    if quantization is not None:
        document = {key: value for key, value in document.items() if key not in KEYS}
    return ModelConfig.from_hf(document, str(path)), quantization


def checked_weights(directory: Path, config: ModelConfig, quantization: Quantization | None = None) -> list[Path]:
    """The weight files of a model directory, after every check that needs no more than their headers.

    Hashes are compared where there is a manifest. Raises InputError or DamagedFileError.
    """
    checked_tensors(directory, config, quantization)
    return weight_files(directory)


def checked_tensors(
    directory: Path, config: ModelConfig, quantization: Quantization | None = None
) -> dict[str, TensorInfo]:
    """As `checked_weights`; says where each tensor of the model lies (see `read_dense`)."""
    files = weight_files(directory)
    if (directory / MANIFEST).is_file():
        verify_manifest(directory, hashes.sha256)
    expected = expected_shapes(config)
    if quantization is None:
        return validate_safetensors(files, expected)
    there = validate_safetensors(files, integers=True)
    shapes = packed_shapes(expected, quantization, there, str(directory))
    found = {name: info for name, info in there.items() if name in shapes or not _is_ignored(name)}
    check_shapes({name: info.shape for name, info in found.items()}, shapes, str(directory))
    for name, info in found.items():
        allowed = ["uint32"] if f"{name.removesuffix('.weight')}.scales" in shapes else list(_DTYPES.values())
        if info.dtype not in allowed:
            raise DamagedFileError(f"{info.file}: {name} is stored as {info.dtype}, not as {' or '.join(allowed)}")
    return found


def validate_safetensors(
    paths: Path | Sequence[Path], expected: Mapping[str, tuple[int, ...]] | None = None, integers: bool = False
) -> dict[str, TensorInfo]:
    """Check one safetensors file, or all shards of a model together, and say where each tensor lies.

    Only floats are taken unless `integers` are asked for too. With `expected` (see `expected_shapes`) what
    transformers ignores is left out of the result (rotary buffers, a second copy of a tied head), and every
    missing, unknown and wrongly shaped tensor is listed at once. Reads headers only. Raises DamagedFileError.
    """
    found: dict[str, TensorInfo] = {}
    for path in [paths] if isinstance(paths, Path) else paths:
        for name, info in _read_header(path, _DTYPES | _INTEGERS if integers else _DTYPES).items():
            if name in found:
                raise DamagedFileError(f"{path}: tensor {name} is in {found[name].file.name} already")
            found[name] = info
    if expected is not None:
        found = {name: i for name, i in found.items() if name in expected or not _is_ignored(name)}
        where = paths if isinstance(paths, Path) else paths[0].parent if len(paths) > 1 else paths[0]
        check_shapes({name: info.shape for name, info in found.items()}, expected, str(where))
    return found


def _is_ignored(name: str) -> bool:
    """Keys a Llama checkpoint may hold that no model loads; lm_head.weight counts where the model is tied."""
    return name == "lm_head.weight" or is_dropped(name, "hf")


def check_shapes(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise DamagedFileError for missing, unknown and wrongly shaped tensors, if there are any.

    All are counted and the first `errors.SHOWN` of a kind named: a wrong num_layers makes thousands.
    """
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    wrong = [
        f"{name} is {list(shape)}, the configuration says {list(expected[name])}"
        for name, shape in found.items()
        if name in expected and tuple(shape) != tuple(expected[name])
    ]
    problems = [
        f"{what}: {listed(names)}"
        for what, names in (("missing", missing), ("unknown", unknown), ("wrong shape", wrong))
        if names
    ]
    if problems:
        raise DamagedFileError(f"{where}: {'; '.join(problems)}")


def read_tensors(infos: Mapping[str, TensorInfo]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, float32 array) for what `validate_safetensors` found, one in memory at a time.

    float16 and bfloat16 fit into float32 exactly.
    """
    for name, info in infos.items():
        yield name, _read_tensor(info).astype(np.float32, copy=False)


def dense_infos(infos: Mapping[str, TensorInfo], quantization: Quantization | None) -> dict[str, TensorInfo]:
    """Of what the files hold, one entry a weight: a packed matrix with the shape that it stands for.

    Raises DamagedFileError for scales and biases that do not fit their matrix.
    """
    dense = {}
    for name, info in infos.items():
        path, _, kind = name.rpartition(".")
        if quantization is None or f"{path}.scales" not in infos or kind == "bias":
            dense[name] = info
        elif kind == "weight":
            parts = (infos.get(f"{path}.{part}") for part in ("scales", "biases"))
            beside = [part.shape if part is not None else None for part in parts]
            shape = dense_shape(path, info.shape, beside, quantization.of(path), str(info.file))
            dense[name] = info._replace(shape=shape)
    return dense


def read_dense(infos: Mapping[str, TensorInfo], quantization: Quantization | None) -> Iterator[tuple[str, np.ndarray]]:
    """As `read_tensors`, packed matrices unpacked: (name, float32 array) under the names of `dense_infos`."""
    for name, info in dense_infos(infos, quantization).items():
        array = _read_tensor(infos[name])
        if quantization is not None and info.shape != infos[name].shape:
            path = name.removesuffix(".weight")
            scales, biases = (_read_tensor(infos[f"{path}.{kind}"]) for kind in ("scales", "biases"))
            array = unpack(array, scales, biases, quantization.of(path).bits)
        yield name, array.astype(np.float32, copy=False)


def _read_tensor(info: TensorInfo) -> np.ndarray:
    """As stored, but bfloat16 as float32, which it fits into."""
    with open(info.file, "rb") as file:
        file.seek(info.start)
        raw = np.frombuffer(file.read(info.stop - info.start), dtype=_STORED[info.dtype])
    if info.dtype == "bfloat16":
        raw = (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.reshape(info.shape)


def _read_header(path: Path, dtypes: Mapping[str, str]) -> dict[str, TensorInfo]:
    """Header of one file: its entries lie inside the file, do not overlap and leave no gap."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                limit = max(0, min(size - 8, MAX_HEADER))
                raise DamagedFileError(f"{path}: header of {length:,} bytes, at most {limit:,} can be there")
            header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_unique_keys)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path}: no safetensors header ({error})") from None
    if not isinstance(header, dict):
        raise DamagedFileError(f"{path}: no safetensors header (a {type(header).__name__}, not an object)")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # null is what mx.save_safetensors writes where it is given none
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise DamagedFileError(f"{path}: no safetensors header (its __metadata__ does not map texts to texts)")
    infos = {name: _entry(path, name, entry, 8 + length, size, dtypes) for name, entry in header.items()}
    at = 8 + length
    for name, info in sorted(infos.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != at:
            what = "overlaps another" if info.start < at else "leaves a gap"
            raise DamagedFileError(f"{path}: tensor {name} {what}, starts at {info.start:,}, not {at:,}")
        at = info.stop
    if at != size:
        raise DamagedFileError(f"{path}: {size:,} bytes, but its tensors end at {at:,}")
    return infos


def _entry(path: Path, name: str, entry: Any, data_start: int, size: int, dtypes: Mapping[str, str]) -> TensorInfo:
    """One header entry, checked with Python's own integers."""
    if not name.isprintable():
        raise DamagedFileError(f"{path}: {name!r:.60} is no name of a tensor")
    if not isinstance(entry, dict):
        raise DamagedFileError(f"{path}: tensor {name}: its entry is a {type(entry).__name__}, not an object")
    code: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not isinstance(code, str) or code not in dtypes:
        raise DamagedFileError(f"{path}: tensor {name}: dtype {code!r:.60}; only {', '.join(dtypes)} are read")
    sound = _counts(shape) and len(shape) <= MAX_DIMENSIONS
    if sound and 0 in shape:  # no bytes, whatever the others are; numpy multiplies them all the same
        sound = math.prod(n or 1 for n in shape) < 2**60
    if not sound or not _counts(offsets) or len(offsets) != 2:
        raise DamagedFileError(
            f"{path}: tensor {name}: shape {shape!r:.60} and data_offsets {offsets!r:.60} make no sense"
        )
    start, stop = data_start + offsets[0], data_start + offsets[1]
    wanted = math.prod(shape) * _STORED[dtypes[code]].itemsize
    if stop - start != wanted:
        raise DamagedFileError(f"{path}: tensor {name}: {stop - start:,} bytes, {code} {shape!r:.60} has {wanted:,}")
    if stop > size:
        raise DamagedFileError(f"{path}: tensor {name} ends at byte {stop:,}, the file at {size:,}: cut off?")
    return TensorInfo(path, dtypes[code], tuple(shape), start, stop)


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook` that refuses a key given twice, where json would keep the last one."""
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise ValueError(f"key {key!r:.60} appears twice")
        seen[key] = value
    return seen


def _is_plain_name(name: str) -> bool:
    return name not in ("", ".", "..") and name.isprintable() and "/" not in name and "\\" not in name


# -- writing -------------------------------------------------------------------------


def write_model_directory(
    target: Path,
    config: ModelConfig,
    tensors: Mapping[str, np.ndarray] | Iterable[tuple[str, np.ndarray]],
    tokenizer_files: Mapping[str, str | bytes],
    generation_config: Mapping[str, Any],
    source: Mapping[str, Any],
    dtype: str = "float32",
    replace: bool = False,
) -> Path:
    """Write a whole model directory, or nothing; returns `target`.

    `tensors` are float32 under HF names in any order (see `expected_shapes`); a generator is consumed one
    tensor at a time. `source` says in minimac.json where the model came from. Raises InputError where
    `target` exists and `replace` is not set, DamagedFileError for tensors that do not fit `config` or are
    not finite.
    """
    with atomic_folder(target, replace=replace) as folder:
        write_json(folder / CONFIG, config.to_hf(dtype))
        write_json(folder / "generation_config.json", dict(generation_config))
        for name, content in tokenizer_files.items():
            (folder / name).write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        write_safetensors(folder / WEIGHTS, expected_shapes(config), tensors, dtype)
        write_manifest(folder, source=source)
    return target


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, np.ndarray] | Iterable[tuple[str, np.ndarray]],
    dtype: str = "float32",
) -> None:
    """Write float32 arrays as safetensors in `dtype`, streaming; every name in `shapes` exactly once.

    Raises DamagedFileError for a missing, unknown, repeated, wrongly shaped or non-finite tensor. Not
    atomic by itself: write into an `atomic_folder` or to an `atomic_file`.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}  # transformers and mlx-lm both take this one
    at, itemsize = 0, _STORED[dtype].itemsize
    for name, shape in shapes.items():
        stop = at + math.prod(shape) * itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)  # the data begins on a multiple of 8, as the format asks
    found: dict[str, tuple[int, ...]] = {}
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, array in tensors.items() if isinstance(tensors, Mapping) else tensors:
            if name in found:
                raise DamagedFileError(f"tensor {name} was given twice")
            found[name] = array.shape
            if shapes.get(name) == array.shape:
                _write_tensor(file, 8 + len(text) + header[name]["data_offsets"][0], name, array, dtype)
        file.truncate(8 + len(text) + at)
    check_shapes(found, shapes, "weights")


def _write_tensor(file: BinaryIO, at: int, name: str, array: np.ndarray, dtype: str) -> None:
    with np.errstate(over="ignore", invalid="ignore"):  # looked at below, with the tensor's name
        rounded = array.astype(np.float16 if dtype == "float16" else np.float32)
    if dtype == "bfloat16":  # the upper half of a float32, rounded half to even
        bits = rounded.view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32)
    bad = rounded.size - int(np.count_nonzero(np.isfinite(array) & np.isfinite(rounded)))
    if bad:
        raise DamagedFileError(f"tensor {name}: {bad:,} of {rounded.size:,} values are not finite in {dtype}")
    stored = rounded.view(np.uint32) >> 16 if dtype == "bfloat16" else rounded
    file.seek(at)
    file.write(stored.astype(_STORED[dtype], order="C").tobytes())


# -- manifest ------------------------------------------------------------------------


def write_manifest(
    directory: Path, source: Mapping[str, Any] | None = None, training: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write `minimac.json` over the model's files in `directory`; returns it.

    A training run's own files, which go on changing, hidden ones and subfolders are left out.
    """
    others = {MANIFEST, METRICS, LOSS_PLOT}
    names = sorted(p.name for p in directory.iterdir() if p.is_file() and p.name[0] != "." and p.name not in others)
    manifest = {
        "format_version": FORMAT_VERSION,
        "files": {name: sha256(directory / name) for name in names},
        "source": dict(source) if source is not None else None,
        "training": dict(training) if training is not None else None,
    }
    write_json(directory / MANIFEST, manifest)
    return manifest


def verify_manifest(directory: Path, sha256: Callable[[Path], str] = sha256) -> dict[str, Any]:
    """Hash every file that `minimac.json` lists and return the manifest; `hashes.sha256` remembers what it found.

    Raises DamagedFileError naming all files that changed or are gone, InputError where there is no manifest.
    Files that it does not list are not looked at.
    """
    manifest = _read_manifest(directory)
    wrong = []
    for name, digest in manifest["files"].items():
        actual = sha256(directory / name) if (directory / name).is_file() else None
        if actual is None:
            wrong.append(f"{name} is missing")
        elif actual != digest:
            wrong.append(f"{name} has sha256 {actual[:12]}, recorded was {str(digest)[:12]}")
    if wrong:
        raise DamagedFileError(f"{directory}: {'; '.join(wrong)}; pull or convert the model again")
    return manifest


def _read_manifest(directory: Path) -> dict[str, Any]:
    """What `minimac.json` says, unless it is not of this format."""
    path = directory / MANIFEST
    manifest = read_json(path)
    if manifest.get("format_version") != FORMAT_VERSION:
        raise DamagedFileError(
            f"{path}: format_version {manifest.get('format_version')!r:.60}, this program: {FORMAT_VERSION}"
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(_is_plain_name(name) for name in files):
        raise DamagedFileError(f"{path}: files must map names in this folder to sha256 digests")
    return manifest


def identity(directory: Path) -> str:
    """Sha256 that names a base model: over its configuration and weights, not its name or other files.

    The manifest's hashes are taken where there is one; whoever loads the weights compares them. Others are remembered.
    """
    listed = _read_manifest(directory)["files"] if (directory / MANIFEST).is_file() else {}
    names = [CONFIG, *(path.name for path in weight_files(directory))]
    digests = [[name, listed.get(name) or hashes.sha256(directory / name)] for name in names]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()
