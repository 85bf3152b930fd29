"""What a training run writes: the model directory that users open, and the state it resumes from.

The directory is whole at any moment: the manifest with the hashes goes first, then the weights are replaced, then
a new manifest is written, so that a crash leaves the old weights or the new ones, unhashed at worst. A resumable
state is a folder of its own, renamed into place; `trainer/` holds the latest.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_impl import files, modeldir
from mlx_impl.arrays import Tree, flatten, load, unflatten
from mlx_impl.config import ModelConfig
from mlx_impl.errors import DamagedFileError, InputError
from mlx_impl.tokenizer import Tokenizer

STATE_VERSION = 1


def begin(directory: Path, config: ModelConfig, tokenizer: Tokenizer, init: Path | None = None) -> None:
    """Create a model directory that has all but weights: configuration and tokenizer.

    Of the model `init` that training goes on from, how it generates is kept: its ends of text may stand only there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(directory)
    files.write_json(directory / modeldir.CONFIG, config.to_hf())
    generation = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "do_sample": False,
    }
    if init is not None and (init / "generation_config.json").is_file():
        generation = files.read_json(init / "generation_config.json")
    files.write_json(directory / "generation_config.json", generation)


def publish(directory: Path, parameters: Tree, config: ModelConfig, training: Mapping[str, Any]) -> None:
    """Put weights (float32) and a summary of their training into a model directory, replacing earlier ones."""
    (directory / modeldir.MANIFEST).unlink(missing_ok=True)
    arrays = ((name, np.array(array.astype(mx.float32))) for name, array in flatten(parameters).items())
    with files.atomic_file(directory / modeldir.WEIGHTS) as temporary:
        modeldir.write_safetensors(temporary, modeldir.expected_shapes(config), arrays)
    modeldir.write_manifest(directory, training=training)


def save_state(folder: Path, step: int, parameters: Tree, optimizer_state: Tree, rest: Mapping[str, Any]) -> Path:
    """Write the state after `step` as `folder/step-N`, durably, then remove the older ones.

    `rest` is JSON: cursor, counters, configuration. MLX's random state, which dropout draws from, is added.
    """
    target = folder / f"step-{step:08d}"
    with files.atomic_folder(target, replace=True) as temporary:
        for name, tree in (("parameters", parameters), ("optimizer", optimizer_state)):
            _save(temporary / f"{name}.safetensors", tree)
        digests = {path.name: files.sha256(path) for path in sorted(temporary.iterdir())}
        random = mx.random.state[0].tolist()  # type: ignore[index]
        state = {"version": STATE_VERSION, "step": step, "random": random, "files": digests}
        files.write_json(temporary / "state.json", {**rest, **state})
    for path in folder.glob("step-*"):
        if path != target:
            shutil.rmtree(path)
    return target


def _save(path: Path, tree: Tree) -> None:
    """Write a tree in the order of its names, so that equal trees are equal files; OSError where the disk is full."""
    try:
        mx.save_safetensors(str(path), dict(sorted(flatten(tree).items())))
    except RuntimeError as error:  # MLX does not say why; too little room is the usual reason
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error


def latest_state(folder: Path) -> Path:
    """The newest state in `folder`; InputError if there is none."""
    states = sorted(folder.glob("step-*"))
    if not states:
        raise InputError(f"{folder.parent}: nothing to resume; start without --resume")
    return states[-1]


def read_state(state: Path) -> dict[str, Any]:
    """The JSON part of a state, its files' hashes checked; DamagedFileError names the file that changed."""
    rest = files.read_json(state / "state.json")
    if rest.get("version") != STATE_VERSION:
        raise DamagedFileError(f"{state}: state of version {rest.get('version')!r}, this program reads {STATE_VERSION}")
    for name in ("parameters.safetensors", "optimizer.safetensors"):
        path = state / name
        if not path.is_file() or files.sha256(path) != rest.get("files", {}).get(name):
            raise DamagedFileError(f"{path}: missing or changed since it was written; resume is not possible from it")
    return rest


def load_state(state: Path, rest: Mapping[str, Any]) -> tuple[Tree, Tree]:
    """Parameters and optimizer state; sets MLX's random state to the saved one."""
    trees = [unflatten(load(state / name)) for name in ("parameters.safetensors", "optimizer.safetensors")]
    mx.eval(trees)
    high, low = rest["random"]
    mx.random.seed((int(high) << 32) | int(low))  # assigning to mx.random.state has no effect
    return trees[0], trees[1]


def append_metrics(path: Path, record: Mapping[str, Any]) -> None:
    """Add one JSON line."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file; a last line cut short by a crash is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def cut_metrics(path: Path, step: int) -> None:
    """Drop the records after `step`, which a resumed run is about to write again."""
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    files.write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
