"""What the original project's learner keeps beside its weights: replay_buffer.pt, ewc.pt, the adapter in model.pt.

Values as `legacy.read_pt` gives them in, arrays under HF names out. Its Fisher is no Fisher in any unit: squares of a
summed gradient, divided tensor by tensor by their maximum. Which weight of a tensor matters more than another is left
of it; how much one tensor matters against another, and against the loss, is not, and must be measured again.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from convert.adapter import Adapter, Shapes, from_original
from mlx_impl.errors import DamagedFileError, InputError, shown
from mlx_impl.files import read_json

MODELS = ("model.pt", "checkpoint.pt", "continual_model.pt")
"""The names that the original gives its weights, and one for a folder that has both of its kinds; the first is read."""

IMPORTANCE = 1e-6, 1e6
"""An experience below is as good as never drawn, one above is no weight that anybody gave."""


class Experience(NamedTuple):
    """A sample of the replay buffer: ids (n,) int32, trained (n,) bool, and which of them is to be predicted."""

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    source: str
    """The domain that it was taught under, "unknown" if none."""
    importance: float


class Experiences(NamedTuple):
    """The samples that can be replayed, and how many could not, by reason."""

    samples: list[Experience]
    left_out: dict[str, int]


class Consolidation(NamedTuple):
    """An ewc.pt under the adapter's names: lora_a (in, r), lora_b (r, out)."""

    fisher: dict[str, np.ndarray]
    """At least 0, in no unit."""
    anchor: dict[str, np.ndarray]
    """The adapter's values when it was estimated; empty if the file has none."""
    tasks: int


def is_checkpoint_folder(source: Path) -> bool:
    """Whether `source` is a checkpoint folder of the original project: it has one of MODELS and no safetensors.

    Its config.json, if there is one, has its learner's settings; one of a model has a model_type, as torch_ref's has.
    """
    if not source.is_dir() or any(source.glob("*.safetensors")):
        return False
    settings = source / "config.json"
    if settings.is_file() and "model_type" in read_json(settings):
        return False
    return any((source / name).is_file() for name in MODELS)


def wrapped_adapter(value: Any, alpha: float, shapes: Shapes, where: str) -> Adapter:
    """The adapter inside a LoRA-wrapped model.pt, which does not say its alpha.

    `shapes` are the base's, by HF name. Raises InputError if there is none, DamagedFileError where it does not fit.
    """
    state = value.get("state_dict", value) if isinstance(value, dict) else {}
    tensors = _lora(state) if isinstance(state, dict) else {}
    if not tensors:
        raise InputError(f"{where}: no adapter in it")
    return from_original({"state_dict": tensors, "lora_config": {"r": _rank(tensors), "alpha": alpha}}, shapes, where)


def consolidation(value: Any, adapter: Adapter, shapes: Shapes, where: str) -> Consolidation:
    """What an ewc.pt says of an adapter's weights; DamagedFileError unless it is about exactly those."""
    fisher, anchor, tasks = (value.get(key) if isinstance(value, dict) else None for key in _EWC)
    if not isinstance(fisher, dict) or not isinstance(anchor, dict) or type(tasks) is not int:
        raise DamagedFileError(f"{where}: no EWC state of the original project: it has {', '.join(_EWC)}")
    if not fisher and not anchor:
        return Consolidation({}, {}, tasks)  # saved before it was ever estimated
    arrays = _like(fisher, adapter, shapes, f"{where}: fisher")
    negative = [name for name, array in arrays.items() if (array < 0).any()]
    if negative:
        raise DamagedFileError(f"{where}: fisher: {len(negative)} tensors have values below 0, first {negative[0]}")
    return Consolidation(arrays, _like(anchor, adapter, shapes, f"{where}: old_params") if anchor else {}, tasks)


_EWC = "fisher", "old_params", "task_count"


def experiences(value: Any, vocab_size: int, where: str) -> Experiences:
    """The samples of a replay_buffer.pt.

    The original's labels are the tokens themselves or the tokens after them, with negative ones for what does not
    count: both are read. Raises DamagedFileError for what is no replay buffer and for ids outside the vocabulary.
    """
    rows = value.get("buffer") if isinstance(value, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DamagedFileError(f"{where}: no replay buffer of the original project: it has a list called buffer")
    samples = []
    left_out: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        found = _experience(row, vocab_size, f"{where}: sample {number}")
        if isinstance(found, Experience):
            samples.append(found)
        else:
            left_out[found] = left_out.get(found, 0) + 1
    return Experiences(samples, left_out)


def _experience(row: Mapping[str, Any], vocab_size: int, where: str) -> Experience | str:
    """A sample, or why it cannot be replayed."""
    ids, labels = row.get("input_ids"), row.get("labels")
    for name, array in (("input_ids", ids), ("labels", labels)):
        whole = isinstance(array, np.ndarray) and array.ndim == 1 and np.issubdtype(array.dtype, np.integer)
        if not whole or len(array) != len(ids):  # type: ignore[arg-type]
            raise DamagedFileError(f"{where}: {name} is no row of token ids, or not as long as the other one")
    assert isinstance(ids, np.ndarray)
    assert isinstance(labels, np.ndarray)
    used = np.concatenate([ids, labels[labels >= 0]])
    if len(used) and not 0 <= used.min() <= used.max() < vocab_size:
        raise DamagedFileError(f"{where}: token ids {used.min()} to {used.max()}, the model has {vocab_size:,}")
    importance, domain = row.get("importance", 1.0), row.get("domain")
    if isinstance(importance, bool) or not isinstance(importance, int | float) or not 0 <= importance <= IMPORTANCE[1]:
        raise DamagedFileError(f"{where}: importance {shown(importance)} is no number from 0 to {IMPORTANCE[1]:g}")
    if domain is not None and not isinstance(domain, str):
        raise DamagedFileError(f"{where}: its domain is a {type(domain).__name__}, a text was expected")
    counts = labels >= 0
    if (labels[:-1] == ids[1:])[counts[:-1]].all():  # the tokens after them
        tokens, trained = np.append(ids, labels[-1:]), np.append(False, counts)
        tokens, trained = (tokens, trained) if counts[-1:].all() else (tokens[:-1], trained[:-1])
    elif (labels == ids)[counts].all():
        tokens, trained = ids, counts
    else:
        return "labels that are neither the tokens nor those after them"
    if not trained[1:].any():
        return "nothing to predict"
    if importance < IMPORTANCE[0]:
        return "importance 0, never drawn there either"
    return Experience(tokens.astype(np.int32), trained, domain or "unknown", float(importance))


def _lora(state: Mapping[Any, Any]) -> dict[str, Any]:
    """The LoRA tensors of a wrapped model's state dict, named as in an adapter.pt."""
    names = {key: str(key).removeprefix("base_model.").replace(".lora.lora_", ".lora_") for key in state}
    return {name: state[key] for key, name in names.items() if name.endswith((".lora_A", ".lora_B"))}


def _rank(tensors: Mapping[str, Any]) -> int:
    """The first lora_A's; whether the others agree is seen where they are assembled."""
    shapes = (array.shape for name, array in tensors.items() if name.endswith("A") and isinstance(array, np.ndarray))
    return int(next((shape[0] for shape in shapes if len(shape) == 2), 1))


def _like(state: Mapping[Any, Any], adapter: Adapter, shapes: Shapes, where: str) -> dict[str, np.ndarray]:
    """Tensors of a wrapped model's parameters as arrays of the adapter's names and shapes."""
    tensors = _lora(state)
    if len(tensors) != len(state):
        others = len(state) - len(tensors)
        raise DamagedFileError(f"{where}: {others} of {len(state)} parameters are no adapter's, or there twice")
    settings = {"r": adapter.rank, "alpha": adapter.rank}  # a scale of 1 leaves the values as they are
    arrays = from_original({"state_dict": tensors, "lora_config": settings}, shapes, where).arrays
    differs = sorted(arrays.keys() ^ adapter.arrays.keys())
    differs += [
        name for name in arrays.keys() & adapter.arrays.keys() if arrays[name].shape != adapter.arrays[name].shape
    ]
    if differs:
        raise DamagedFileError(f"{where}: {len(differs)} tensors are not the adapter's, first {differs[0]}")
    return arrays
