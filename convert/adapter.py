"""LoRA adapters between mlx-lm, PEFT, GGUF and the original project: arrays in, arrays out.

In the middle stands mlx-lm's layout: `<path>.lora_a` (in, r), `<path>.lora_b` (r, out), and one scale that is applied
as it is. The others keep transposes and an alpha, of which the scale is alpha / r, or alpha / sqrt(r) with rsLoRA
(Kalajdzievski 2023). Where modules of one adapter differ in rank or scale, smaller ranks are padded with zeros and
scales are multiplied into lora_b. Everything is compared with the base's shapes, and all offenders are named at once.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from convert.gguf import permute, unpermute
from convert.names import Format, rename
from mlx_impl.errors import DamagedFileError, InputError, listed, shown

Arrays = dict[str, np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]
"""The base's weights by HF name, (out, in); see `modeldir.expected_shapes`."""

_PEFT_REFUSED = {
    "use_dora": "DoRA rescales the base's weights, which an adapter here cannot",
    "fan_in_fan_out": "its weights are stored the other way round, as for GPT-2",
    "lora_bias": "it trains biases",
    "modules_to_save": "it replaces whole modules",
    "layers_pattern": "it names layers in a way that Llama models do not have",
    "layer_replication": "it repeats layers of the base",
    "trainable_token_indices": "it trains embeddings",
    "target_parameters": "it adapts parameters that are no linear layers",
    "alora_invocation_tokens": "it switches itself on at certain tokens",
    "use_qalora": "QALoRA pools inputs",
    "auto_map": "it names code to be run, which is never done",
    "model_file": "it names code to be run, which is never done",
}
_PEFT_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin training that change the base's own weights; the adapter alone is then only half of it."""


@dataclass(frozen=True)
class Adapter:
    """`<path>.lora_a` (in, r) and `<path>.lora_b` (r, out), float32, all of one rank, under HF paths."""

    arrays: Arrays
    scale: float

    @property
    def paths(self) -> list[str]:
        """The adapted modules."""
        return list(dict.fromkeys(name.rpartition(".")[0] for name in self.arrays))

    @property
    def rank(self) -> int:
        """Columns of each lora_a."""
        return int(next(iter(self.arrays.values())).shape[1])


# -- mlx-lm ----------------------------------------------------------------------------------------------------------


def from_mlx_lm(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], shapes: Shapes, where: str) -> Adapter:
    """An adapter of mlx-lm from its tensors and its adapter_config.json."""
    kind, parameters = config.get("fine_tune_type", "lora"), config.get("lora_parameters")
    if kind in ("dora", "full"):
        raise InputError(f"{where}: fine_tune_type is {kind!r}; only lora can be imported")
    if kind != "lora" or not isinstance(parameters, dict):
        raise DamagedFileError(f"{where}: not an adapter of mlx-lm (fine_tune_type {kind!r:.60})")
    scale = _number(parameters.get("scale"), "lora_parameters.scale", where)
    halves = _halves(((name, name) for name in tensors), tensors, (".lora_a", ".lora_b"), False, where)
    return _assembled(halves, lambda path, rank: scale, shapes, where)


def to_mlx_lm(adapter: Adapter, layers: int) -> tuple[Arrays, dict[str, Any]]:
    """Tensors and adapter_config.json for `mlx_lm.load(adapter_path=...)` on a base of so many layers."""
    keys = sorted({re.sub(r"^.*?\.\d+\.", "", path) for path in adapter.paths})
    parameters = {"rank": adapter.rank, "scale": adapter.scale, "dropout": 0.0, "keys": keys}
    return adapter.arrays, {"fine_tune_type": "lora", "num_layers": layers, "lora_parameters": parameters}


# -- PEFT ------------------------------------------------------------------------------------------------------------


def from_peft(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], shapes: Shapes, where: str) -> Adapter:
    """An adapter of PEFT from its tensors and its adapter_config.json; rank and alpha patterns of plain names too.

    InputError for what plain LoRA cannot express: DoRA, trained biases, modules stored whole and the like.
    """
    if config.get("peft_type") != "LORA":
        raise InputError(f"{where}: peft_type is {config.get('peft_type')!r:.60}; only LORA can be imported")
    refused = [f"{key} ({reason})" for key, reason in _PEFT_REFUSED.items() if config.get(key)]
    refused += ["bias (it trains biases)"] if config.get("bias", "none") != "none" else []
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_PEFT_STARTS):
        refused.append(f"init_lora_weights {start!r:.60} (the base's own weights were changed)")
    if refused:
        raise InputError(f"{where}: more than plain LoRA: {'; '.join(refused)}")
    ranks, alphas = (_pattern(config, key, where) for key in ("rank_pattern", "alpha_pattern"))
    default_rank, default_alpha = config.get("r"), config.get("lora_alpha")

    def scale_of(path: str, rank: int) -> float:
        said = _number(_matched(ranks, path, default_rank), "r", where)
        if said != rank:
            raise DamagedFileError(f"{where}: r is {said:g} for {path}, its tensors have rank {rank}")
        alpha = _number(_matched(alphas, path, default_alpha), "lora_alpha", where)
        return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank

    names = ((name, name.removeprefix("base_model.model.")) for name in tensors)
    halves = _halves(names, tensors, (".lora_A.weight", ".lora_B.weight"), True, where)
    return _assembled(halves, scale_of, shapes, where)


def to_peft(adapter: Adapter, base: str, shapes: Shapes) -> tuple[Arrays, dict[str, Any]]:
    """Tensors and adapter_config.json for `peft.PeftModel.from_pretrained`; `base` is the base's name."""
    tensors = {}
    targets = sorted({path.rpartition(".")[2] for path in adapter.paths})
    meant = {path for path in _linears(shapes) if path.rpartition(".")[2] in targets}
    for path in adapter.paths:
        at = f"base_model.model.{path}"
        tensors[f"{at}.lora_A.weight"] = _transposed(adapter.arrays[f"{path}.lora_a"])
        tensors[f"{at}.lora_B.weight"] = _transposed(adapter.arrays[f"{path}.lora_b"])
    alpha = _alpha(adapter)
    return tensors, {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": targets if meant == set(adapter.paths) else adapter.paths,  # a few layers: by whole paths
    }


# -- the original ----------------------------------------------------------------------------------------------------


def from_original(value: Any, shapes: Shapes, where: str) -> Adapter:
    """An adapter of the original project from what its adapter.pt holds."""
    state, settings = (value.get(key) if isinstance(value, dict) else None for key in ("state_dict", "lora_config"))
    if not isinstance(state, dict) or not isinstance(settings, dict):
        raise DamagedFileError(f"{where}: no adapter of the original project: it has a state_dict and a lora_config")
    strange = [str(name) for name, array in state.items() if not isinstance(array, np.ndarray)]
    if strange:
        raise DamagedFileError(f"{where}: not a tensor: {listed(strange)}")
    scale = _number(settings.get("alpha"), "lora_config.alpha", where) / _count(settings.get("r"), "r", where)
    names = _renamed(state, (".lora_A", ".lora_B"), "original", "", where)
    halves = _halves(names, state, (".lora_A", ".lora_B"), True, where)
    return _assembled(halves, lambda path, rank: scale, shapes, where)


def to_original(adapter: Adapter, name: str) -> dict[str, Any]:
    """What the original project's `torch.load` expects of an adapter.pt."""
    renamed = rename(adapter.paths, "hf", "original", "the adapter")
    state = {}
    for path, theirs in renamed.items():
        state[f"{theirs}.lora_A"] = _transposed(adapter.arrays[f"{path}.lora_a"])
        state[f"{theirs}.lora_B"] = _transposed(adapter.arrays[f"{path}.lora_b"])
    targets = sorted({str(theirs).rpartition(".")[2] for theirs in renamed.values()})
    settings = {"r": adapter.rank, "alpha": _alpha(adapter), "dropout": 0.0}
    return {
        "adapter_name": name,
        "lora_config": {**settings, "merge_weights": False, "target_modules": targets},
        "state_dict": state,
    }


# -- GGUF ------------------------------------------------------------------------------------------------------------


def check_gguf(metadata: Mapping[str, Any], where: str) -> None:
    """InputError where a GGUF file is something else than a LoRA adapter: whole models have the same ending."""
    kinds = {key: metadata.get(key) for key in ("general.type", "adapter.type", "general.architecture")}
    if [value if isinstance(value, str) else None for value in kinds.values()] != ["adapter", "lora", "llama"]:
        found = ", ".join(f"{key} {_shown(value)}" for key, value in kinds.items())
        raise InputError(f"{where}: no LoRA adapter for a Llama model ({found})")


def from_gguf(
    metadata: Mapping[str, Any], tensors: Mapping[str, np.ndarray], heads: tuple[int, int], shapes: Shapes, where: str
) -> Adapter:
    """An adapter of llama.cpp; `heads` are the base's query and key/value heads. alpha 0 means scale 1 there."""
    alpha = _number(metadata.get("adapter.lora.alpha"), "adapter.lora.alpha", where)
    names = _renamed(tensors, (".lora_a", ".lora_b"), "gguf", ".weight", where)
    halves = _halves(names, tensors, (".lora_a", ".lora_b"), True, where)
    for path, pair in halves.items():
        count = _rotated(path, heads)
        if "b" in pair and count and pair["b"].ndim == 2 and pair["b"].shape[1] % (2 * count) == 0:
            pair["b"] = _transposed(unpermute(_transposed(pair["b"]), count))
    return _assembled(halves, lambda path, rank: alpha / rank if alpha else 1.0, shapes, where)


def to_gguf(adapter: Adapter, heads: tuple[int, int]) -> tuple[Arrays, float]:
    """Tensors of a GGUF adapter and its alpha, the float32 that gives the scale exactly if there is one.

    Of some scales the nearest alpha is a rounding error away: a float32 divided by the rank does not reach all.
    """
    tensors = {}
    for path, theirs in rename(adapter.paths, "hf", "gguf", "the adapter").items():
        a, b = (_transposed(adapter.arrays[f"{path}.{half}"]) for half in ("lora_a", "lora_b"))
        count = _rotated(path, heads)
        tensors[f"{theirs}.weight.lora_a"] = a  # (r, in)
        tensors[f"{theirs}.weight.lora_b"] = permute(b, count) if count else b  # (out, r)
    rank, scale = np.float32(adapter.rank), np.float32(adapter.scale)
    near = np.float32(adapter.scale * adapter.rank)
    choices = (near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf)))
    alpha = float(min(choices, key=lambda choice: abs(float(choice / rank) - float(scale))))
    if alpha == 0:
        raise InputError("the adapter's scale is 0, which GGUF cannot say; it would do nothing anyway")
    return tensors, alpha


def _rotated(path: str, heads: tuple[int, int]) -> int | None:
    """Number of heads whose rows GGUF has in another order, None for modules without."""
    return {"q_proj": heads[0], "k_proj": heads[1]}.get(path.rpartition(".")[2])


# -- what they share -------------------------------------------------------------------------------------------------


def _renamed(
    tensors: Iterable[Any], suffixes: tuple[str, str], source: Format, ending: str, where: str
) -> list[tuple[str, str]]:
    """(name, name with the HF path) of each tensor; `ending` stands between module and suffix. Unknown ones raise."""
    split = []
    for name in map(str, tensors):
        suffix = next((s for s in suffixes if name.endswith(ending + s)), "")
        split.append((name, name.removesuffix(suffix).removesuffix(ending) if suffix else name, suffix))
    renamed = rename([module for _, module, _ in split], source, "hf", where)
    return [(name, f"{renamed[module]}{suffix}") for name, module, suffix in split]


def _halves(
    names: Iterable[tuple[str, str]],
    tensors: Mapping[str, np.ndarray],
    suffixes: tuple[str, str],
    transposed: bool,
    where: str,
) -> dict[str, Arrays]:
    """Path -> {"a": (in, r), "b": (r, out)}; `names` pair each tensor's name with one that begins with a HF path."""
    halves: dict[str, Arrays] = {}
    unknown, twice = [], []
    for name, path in names:
        half = next((half for half, suffix in zip("ab", suffixes, strict=True) if path.endswith(suffix)), None)
        if half is None:
            unknown.append(name)
            continue
        pair = halves.setdefault(path.removesuffix(suffixes["ab".index(half)]), {})
        if half in pair:
            twice.append(name)
        pair[half] = _transposed(tensors[name]) if transposed else tensors[name]
    if unknown:
        raise DamagedFileError(f"{where}: neither half of an adapter: {listed(unknown)}")
    if twice:
        raise DamagedFileError(f"{where}: there under another name too: {listed(twice)}")
    return halves


def _assembled(
    halves: Mapping[str, Arrays], scale_of: Callable[[str, int], float], shapes: Shapes, where: str
) -> Adapter:
    """One adapter of all pairs, of one rank and one scale; DamagedFileError with everything that does not fit."""
    widths = _linears(shapes)
    highest = max((min(shape) for shape in widths.values()), default=0)
    wrong = [problem for path, pair in halves.items() for problem in _misfits(path, pair, widths.get(path), highest)]
    if wrong or not halves:
        raise DamagedFileError(f"{where}: does not fit the base: {listed(wrong, '; ') or 'it holds no tensors'}")
    scales = {path: scale_of(path, pair["a"].shape[1]) for path, pair in halves.items()}
    scale = Counter(value for value in scales.values() if value).most_common(1)[0][0] if any(scales.values()) else 0.0
    rank = max(pair["a"].shape[1] for pair in halves.values())
    arrays = {}
    for path, pair in sorted(halves.items()):
        a, b = (pair[half].astype(np.float32, copy=False) for half in "ab")
        if scales[path] != scale:
            with np.errstate(all="ignore"):  # what is not finite afterwards is looked at where it is written
                b = (b.astype(np.float64) * (scales[path] / scale)).astype(np.float32)
        missing = rank - a.shape[1]
        arrays[f"{path}.lora_a"] = np.ascontiguousarray(np.pad(a, ((0, 0), (0, missing))) if missing else a)
        arrays[f"{path}.lora_b"] = np.ascontiguousarray(np.pad(b, ((0, missing), (0, 0))) if missing else b)
    return Adapter(arrays, scale)


def _linears(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Path -> (out, in) of the linear layers within the base's blocks, the only ones that all formats can adapt."""
    outside = ("model.embed_tokens.weight", "lm_head.weight")
    inside = {name: shape for name, shape in shapes.items() if name not in outside and len(shape) == 2}
    return {name.removesuffix(".weight"): shape for name, shape in inside.items()}


def _misfits(path: str, pair: Arrays, shape: tuple[int, ...] | None, highest: int) -> list[str]:
    """What is wrong with one module's halves, given the shape (out, in) that the base has there."""
    if shape is None:
        return [f"{path} is no linear layer of it"]
    if len(pair) < 2:
        return [f"{path} lacks its {'second' if 'a' in pair else 'first'} half"]
    a, b = pair["a"], pair["b"]
    if a.ndim != 2 or b.ndim != 2 or (b.shape[1], a.shape[0]) != shape or a.shape[1] != b.shape[0]:
        return [f"{path}: {list(a.shape)} and {list(b.shape)} (in, r, out) on a layer {shape[1]} -> {shape[0]}"]
    if not 1 <= a.shape[1] <= highest:
        return [f"{path}: rank {a.shape[1]}, 1 to {highest} make sense"]
    if not np.issubdtype(a.dtype, np.floating) or not np.issubdtype(b.dtype, np.floating):
        return [f"{path}: {a.dtype} and {b.dtype}, which are no real numbers"]
    bad = sum(array.size - int(np.count_nonzero(np.isfinite(array))) for array in (a, b))
    return [f"{path}: {bad:,} values are not finite"] if bad else []


def _transposed(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.T)


def _alpha(adapter: Adapter) -> float:
    """The alpha of which the scale is alpha / r, to the bit where rounding allows it; always so in float32."""
    alpha = adapter.scale * adapter.rank
    choices = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return next((choice for choice in choices if choice / adapter.rank == adapter.scale), alpha)


def _number(value: Any, what: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e30 or value != value:
        raise DamagedFileError(f"{where}: {what} is {_shown(value)}, a number was expected")
    return float(value)


def _count(value: Any, what: str, where: str) -> int:
    if type(value) is not int or not 1 <= value < 2**31:
        raise DamagedFileError(f"{where}: {what} is {_shown(value)}, a positive whole number was expected")
    return value


def _shown(value: Any) -> str:
    """A value from a file for a message; of lists and the like only the type: one that holds itself often is huge."""
    return shown(value) if value is None or isinstance(value, str | int | float) else f"a {type(value).__name__}"


def _pattern(config: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """A rank_pattern or alpha_pattern; its keys are regular expressions in PEFT, of which plain names are taken."""
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise DamagedFileError(f"{where}: {key} is a {type(patterns).__name__}, an object was expected")
    strange = [name for name in patterns if not re.fullmatch(r"\^?[A-Za-z0-9_.]+", name)]
    if strange:
        raise InputError(f"{where}: {key} with regular expressions is not supported: {listed(strange)}")
    return patterns


def _matched(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that names the module or the end of its path, as in PEFT."""
    for name, value in patterns.items():
        if path == name.removeprefix("^") or (name[0] != "^" and path.endswith(f".{name}")):
            return value
    return default
