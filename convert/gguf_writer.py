"""Llama models as GGUF files with their tokenizer, as llama.cpp's own converter writes them.

Matrices are stored as F16 or Q8_0, vectors as F32; the rows of q and k are permuted for interleaved RoPE, Llama 3's
scaling becomes a tensor of divisors. The gguf package writes, one tensor at a time through a temporary file. Format:
ggml's docs/gguf.md, names: llama.cpp's convert_hf_to_gguf.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.gguf import llama3_factors, permute
from convert.model import Model
from convert.names import rename
from convert.tokenizer import gguf_metadata
from mlx_impl import modeldir
from mlx_impl.config import ModelConfig
from mlx_impl.errors import DamagedFileError

_FILE_TYPES = {"F16": 1, "Q8_0": 7}  # llama.cpp's numbers for what most of the file is
_LARGEST = {"F32": float(np.finfo(np.float32).max), "F16": 65504.0, "Q8_0": 127 * 65504.0}


def write_gguf(model: Model, path: Path, kind: str) -> None:
    """Write a model as `kind`, F16 or Q8_0; matrices whose rows are no multiple of Q8_0's 32 stay F16.

    Raises InputError for a tokenizer that GGUF cannot hold or llama.cpp would read differently, DamagedFileError for a
    tensor that is missing, unknown, of the wrong shape, or not finite as stored.
    """
    import gguf

    writer = gguf.GGUFWriter(path, "llama", use_temp_file=True)
    try:
        _fill(writer, model, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
        if writer.temp_file is not None:
            writer.temp_file.close()


def _fill(writer: Any, model: Model, kind: str) -> None:
    """Hand metadata and tensors to the writer."""
    import gguf

    config, expected = model.config, modeldir.expected_shapes(model.config)
    name = str(next(iter(model.source.values()), "model"))
    for key, value in {**_metadata(config, name, kind), **gguf_metadata(model.tokenizer_files, config, name)}.items():
        _add(writer, key, value)
    if config.rope_scaling is not None and config.rope_scaling["rope_type"] == "llama3":
        factors = llama3_factors(config.rope_scaling, config.rope_base, config.head_width)
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    names = rename(expected, "hf", "gguf", "the model")
    heads = {"q_proj": config.num_query_heads, "k_proj": config.num_kv_heads}
    found: dict[str, tuple[int, ...]] = {}
    for key, array in model.tensors:
        if key in found:
            raise DamagedFileError(f"tensor {key} was given twice")
        found[key] = array.shape
        if expected.get(key) != array.shape:
            continue  # all of these are named at the end
        projection = key.split(".")[-2]
        if projection in heads:
            array = permute(array, heads[projection])
        stored = gguf.GGMLQuantizationType[_kind(array, kind)]
        if not np.abs(array).max() <= _LARGEST[stored.name]:  # NaN is no less than anything
            raise DamagedFileError(f"tensor {key}: values that are not finite in {stored.name}")
        writer.add_tensor(str(names[key]), gguf.quantize(np.ascontiguousarray(array), stored), raw_dtype=stored)
    modeldir.check_shapes(found, expected, "weights")


def _kind(array: np.ndarray, kind: str) -> str:
    if array.ndim == 1:
        return "F32"
    return "F16" if kind == "Q8_0" and array.shape[1] % 32 else kind


def _metadata(config: ModelConfig, name: str, kind: str) -> dict[str, Any]:
    values: dict[str, Any] = {
        "general.type": "model",
        "general.name": name,
        "general.file_type": _FILE_TYPES[kind],
        "general.quantization_version": 2,
        "llama.vocab_size": config.vocab_size,
        "llama.context_length": config.max_seq_len,
        "llama.embedding_length": config.d_model,
        "llama.block_count": config.num_layers,
        "llama.feed_forward_length": config.d_ff,
        "llama.attention.head_count": config.num_query_heads,
        "llama.attention.head_count_kv": config.num_kv_heads,
        "llama.attention.key_length": config.head_width,
        "llama.attention.value_length": config.head_width,
        "llama.attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "llama.rope.freq_base": float(config.rope_base),
        "llama.rope.dimension_count": config.head_width,
    }
    if config.rope_scaling is not None and config.rope_scaling["rope_type"] == "linear":
        values["llama.rope.scaling.type"] = "linear"
        values["llama.rope.scaling.factor"] = float(config.rope_scaling["factor"])
    return values


def _add(writer: Any, key: str, value: Any) -> None:
    """Whole numbers as uint32 and real ones as float32, which is what llama.cpp asks for."""
    add: Mapping[type, Any] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    add[type(value)](key, value)
