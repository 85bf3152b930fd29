"""Bare weights: state dicts of torch_ref, which have HF's names, and of the original project, which have its own.

A .pt file is told apart by its names and by what it keeps beside them: the original's `model.pt` and `checkpoint.pt`
bring a configuration, those of its continual learner also an adapter (LoRA) inside the base. A state dict alone needs
a config.json. What the original has and this model does not is named and refused.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert import legacy
from convert.model import Model, described, generation_config, read_tokenizer
from convert.names import rename
from mlx_impl import modeldir
from mlx_impl.config import ModelConfig
from mlx_impl.errors import DamagedFileError, InputError, listed, shown
from mlx_impl.files import read_json

Arrays = dict[str, np.ndarray]

_SAME = (
    "vocab_size",
    "d_model",
    "num_layers",
    "num_query_heads",
    "num_kv_heads",
    "d_ff",
    "max_seq_len",
    "dropout",
    "norm_eps",
    "rope_base",
    "tie_embeddings",
)
"""Fields of the original's configuration that mean the same here."""
_FIXED = {"norm_type": "rmsnorm", "ff_type": "swiglu"}
_UNUSED = {"attention_dropout": 0.0}  # the original writes it and never reads it
_LARGEST = {"float32": 3.4028235e38, "float16": 65504.0, "bfloat16": 3.3895314e38}
_SCALAR = str | int | float | None


def from_safetensors(path: Path, config_file: Path | None = None) -> Model:
    """A state dict of torch_ref as .safetensors, with its config.json beside it or in `config_file`."""
    config, beside = _config_for(path, config_file)
    infos = modeldir.validate_safetensors(path, modeldir.expected_shapes(config))
    dtypes = sorted({info.dtype for info in infos.values()})
    return Model(
        config,
        modeldir.read_tensors(infos),
        read_tokenizer(beside),
        generation_config(config),
        dtypes[0] if len(dtypes) == 1 else "float32",
        f"a state dict of torch_ref: {described(config)}, {' and '.join(dtypes)}",
        {"file": path.name},
        "torch",
    )


def from_pt(path: Path, config_file: Path | None = None) -> Model:
    """A .pt file of torch_ref or of the original project.

    `config_file` is a config.json of Hugging Face's or the original's fields; where it is None and the .pt holds no
    configuration, config.json beside it is read. Raises InputError for what this model does not have, DamagedFileError
    listing every tensor that is missing, unknown or of the wrong shape.
    """
    value = legacy.read_pt(path)
    state, inside = _state_in(value, path)
    ours = any(name.startswith("model.") for name in state)
    arrays, adapter = (state, 0) if ours else _unwrapped(state, str(path))
    if config_file is None and inside is not None:
        config, beside = read_config(inside, f"{path}: config"), path.parent
    else:
        config, beside = _config_for(path, config_file)
    if config.tie_embeddings and "lm_head.weight" in arrays:
        embedding = arrays.get("model.embed_tokens.weight")
        if embedding is None or not np.array_equal(arrays["lm_head.weight"], embedding):
            raise DamagedFileError(f"{path}: the head is tied, and lm_head.weight is not the embedding")
        arrays = {name: array for name, array in arrays.items() if name != "lm_head.weight"}
    expected = modeldir.expected_shapes(config)
    modeldir.check_shapes({name: array.shape for name, array in arrays.items()}, expected, str(path))
    what = "a state dict of torch_ref" if ours else "a model of the original project"
    wrapped = f" with an adapter in it ({adapter} tensors)" if adapter else ""
    note = "the adapter inside is left out; `minimac-mlx import NAME adapter.pt` takes in the one saved beside it"
    return Model(
        config,
        [(name, arrays[name]) for name in expected],
        read_tokenizer(beside),
        generation_config(config),
        "float32",
        f"{what}{wrapped}: {described(config)}",
        {"file": path.name},
        "torch",
        (note,) if adapter else (),
    )


def write_torch(model: Model, path: Path, dtype: str) -> None:
    """A state dict that `torch_ref.model.ContinualLLM.load_state_dict` takes: .safetensors, or .pt.

    The caller writes the config.json that goes with it.
    """
    expected = modeldir.expected_shapes(model.config)
    if path.suffix.lower() == ".safetensors":
        modeldir.write_safetensors(path, expected, model.tensors, dtype)
    else:
        legacy.write_pt(path, _complete(model, expected, dtype), dtype)


def write_original(model: Model, path: Path, dtype: str) -> None:
    """The original project's `model.pt`: {"model_state_dict", "config"}, a tied head being the embedding once more.

    InputError for a configuration that it cannot express.
    """
    config = original_config(model.config)
    arrays = _complete(model, modeldir.expected_shapes(model.config), dtype)
    names = rename(arrays, "hf", "original", "the model")
    state = {str(theirs): arrays[name] for name, theirs in names.items()}
    if model.config.tie_embeddings:
        state["lm_head.weight"] = arrays["model.embed_tokens.weight"]
    legacy.write_pt(path, {"model_state_dict": state, "config": config}, dtype)


# -- configurations ------------------------------------------------------------------


def read_config(values: Mapping[str, Any], where: str) -> ModelConfig:
    """A model's configuration in Hugging Face's fields or the original's; InputError for what this model has not."""
    if "d_model" not in values:
        return ModelConfig.from_hf(dict(values), where)
    known = (*_SAME, *_FIXED, *_UNUSED, "bias")
    refused = [f"{key} = {shown(values[key])}" for key in values if key not in known]
    for key, ours in _FIXED.items():
        value = values.get(key, ours)
        if not isinstance(value, str) or value.lower() != ours:
            refused.append(f"{key} = {shown(value)} (here it is {ours})")
    if refused:
        raise InputError(f"{where}: this model does not have {listed(refused, '; ')}")
    bias = values.get("bias", False)
    if not isinstance(bias, bool):
        raise DamagedFileError(f"{where}: bias is {shown(bias)}, true or false was expected")
    try:
        same = {key: values[key] for key in _SAME if key in values}
        return ModelConfig(**same, attention_bias=bias, mlp_bias=bias)
    except (InputError, TypeError) as error:
        raise DamagedFileError(f"{where}: {error}") from None


def original_config(config: ModelConfig) -> dict[str, Any]:
    """The original's configuration; InputError naming every field that it has no word for."""
    missing = []
    if config.head_width * config.num_query_heads != config.d_model:
        missing.append(f"head_dim = {config.head_dim}, it is always d_model / num_query_heads there")
    if config.rope_scaling is not None:
        missing.append(f"rope_scaling = {config.rope_scaling}")
    if config.attention_bias != config.mlp_bias:
        missing.append("biases in attention or MLP alone")
    if missing:
        raise InputError(f"the original project's format cannot express {'; '.join(missing)}")
    same = {name: getattr(config, name) for name in _SAME}
    return {**same, **_UNUSED, **_FIXED, "bias": config.attention_bias}


def _config_for(path: Path, config_file: Path | None) -> tuple[ModelConfig, Path]:
    """The configuration for a state dict without one, and the folder it was found in."""
    place = config_file or path.parent / modeldir.CONFIG
    if not place.is_file():
        raise InputError(f"{path}: weights without a configuration, and no {place}; --config FILE names a config.json")
    return read_config(read_json(place), str(place)), place.parent


# -- state dicts ---------------------------------------------------------------------


def _state_in(value: Any, path: Path) -> tuple[Arrays, dict[str, Any] | None]:
    """The state dict in what a .pt file holds, and the configuration beside it if there is one."""
    if not isinstance(value, dict):
        raise DamagedFileError(f"{path}: holds a {type(value).__name__}, a state dict was expected")
    if "lora_config" in value:
        raise InputError(f"{path}: an adapter, no model; `minimac-mlx import NAME {path.name}` takes it in")
    named = next((value[key] for key in ("model_state_dict", "state_dict") if key in value), None)
    state = value if named is None else named
    inside = value.get("config") if named is not None else None
    if not isinstance(state, dict) or not state or not isinstance(inside, dict | None):
        raise DamagedFileError(f"{path}: no state dict with names and tensors")
    nested = [f"{key} = {shown(value)}" for key, value in (inside or {}).items() if not _is_plain(value)]
    if nested:
        raise DamagedFileError(f"{path}: no configuration: {listed(nested)}")
    strange = [
        f"{name!s:.80}"
        for name, array in state.items()
        if not isinstance(name, str) or not isinstance(array, np.ndarray) or array.dtype != np.float32
    ]
    if strange:
        raise DamagedFileError(f"{path}: not tensors of real numbers: {listed(strange)}")
    return state, inside


def _is_plain(value: Any) -> bool:
    """Whether a value of a configuration is what JSON could say too: a .pt file can hold arrays, and itself."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and isinstance(item, _SCALAR) for key, item in value.items())
    return all(isinstance(item, _SCALAR) for item in (value if isinstance(value, list) else [value]))


def _unwrapped(state: Arrays, where: str) -> tuple[Arrays, int]:
    """The original's weights under HF names, without its LoRA wrapping, and the number of tensors that were LoRA's.

    `base_model.layers.0.attention.q_proj.base_layer.weight` and `...q_proj.lora.lora_A` become one weight of the base.
    """
    plain: Arrays = {}
    adapter, liquid, twice = 0, [], []
    for key, array in state.items():
        name = key.removeprefix("base_model.").replace(".base_layer.", ".")
        if name.endswith((".lora.lora_A", ".lora.lora_B")):
            adapter += 1
        elif ".lora." in name:
            liquid.append(key)
        elif name in plain:
            twice.append(key)
        else:
            plain[name] = array
    if liquid:
        raise InputError(f"{where}: this model has no liquid LoRA, whose state is {listed(liquid)}")
    if twice:
        raise DamagedFileError(f"{where}: there under another name too: {listed(twice)}")
    names = rename(plain, "original", "hf", where)
    return {str(name): plain[key] for key, name in names.items()}, adapter


def _complete(model: Model, expected: Mapping[str, tuple[int, ...]], dtype: str) -> Arrays:
    """All tensors at once, in order; DamagedFileError for any that does not fit or is not finite in `dtype`."""
    arrays = dict(model.tensors)
    modeldir.check_shapes({name: array.shape for name, array in arrays.items()}, expected, "weights")
    infinite = [name for name, array in arrays.items() if not np.abs(array).max() <= _LARGEST[dtype]]  # or NaN
    if infinite:
        raise DamagedFileError(f"weights: values that are not finite in {dtype} in {listed(infinite)}")
    return {name: arrays[name] for name in expected}
