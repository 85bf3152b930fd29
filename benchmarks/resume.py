"""Benchmarks that take an hour go on where they were stopped, and say beforehand how long they will take.

What depends on the settings lies in a folder named by their digest: whoever changes one starts anew and finds the old
figures again when it is changed back. Lessons are in a store there, figures in a JSON file. The code is no part of the
digest: remove the folder after changing how lessons are learned.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx_impl  # noqa: F401  before MLX, for the fast BLAS

# isort: split
import mlx.core as mx
import yaml

from mlx_impl import files
from mlx_impl.base import BaseModel
from mlx_impl.config import Budget, ContinualLearningConfig, checked
from mlx_impl.errors import InputError
from mlx_impl.learner import ContinualLearner
from mlx_impl.readers import Document

WORK = Path(__file__).parent / "work"

BACKWARD = 3
"""A training step's time in forward passes, as a lesson assumes it too."""


def say(text: str) -> None:
    """A line of progress, on standard error: standard output is the JSON's."""
    print(text, file=sys.stderr, flush=True)


def digest_of(value: Any) -> str:
    """Sha256 of what JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class Work:
    """A folder of results under one set of settings.

    Several processes may fill it at a time, each with keys of its own; what two need both may be measured twice.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], kept: Path | None = None) -> None:
        """`settings`, which JSON must hold, decide the folder inside `folder`.

        `kept` is a file that `keep` wrote, perhaps on another machine: what is in there is not measured again.
        """
        self.folder = folder / digest_of(settings)[:12]
        self.folder.mkdir(parents=True, exist_ok=True)
        files.write_json(self.folder / "settings.json", settings)
        self._path = self.folder / "figures.json"
        self._settings, self._kept = digest_of(settings), kept
        self._figures = self._read()

    def __contains__(self, key: str) -> bool:
        """Whether this was measured already."""
        return key in self._figures

    def once(self, key: str, measure: Callable[[], Any]) -> Any:
        """What `measure` returned when it was first asked for under this key; JSON must hold it."""
        if key not in self._figures:
            value = measure()
            with self.alone("figures"):
                self._figures = self._read() | {key: value}
                files.write_json(self._path, self._figures)
        return self._figures[key]

    @contextlib.contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Keep other processes that ask for the same name waiting while the block runs."""
        with open(self.folder / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def keep(self, keys: Iterable[str]) -> None:
        """Write these figures, as far as they are there, into the file `kept`, to go on from on another machine."""
        assert self._kept is not None
        found = {key: self._figures[key] for key in keys if key in self._figures}
        self._kept.parent.mkdir(exist_ok=True)
        files.write_json(self._kept, {"settings": self._settings, "figures": found})

    def _read(self) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        if self._kept is not None and self._kept.is_file():
            kept = files.read_json(self._kept)
            figures = kept["figures"] if kept["settings"] == self._settings else {}
        return figures | (files.read_json(self._path) if self._path.is_file() else {})


def taught(
    learner: ContinualLearner, domain: str, number: int, documents: Sequence[Document], source: str, steps: int
) -> dict[str, Any]:
    """Figures of a domain's lesson `number`, from 1: of the one in the store, or of this text, taught now."""
    history = learner.store.history(domain)
    if len(history) < number:
        lesson = learner.learn(documents, domain, source, Budget(steps=steps))
        say(
            f"{domain}: lesson {number}, {source}: {lesson.steps} steps in {lesson.seconds:.0f} s, "
            f"{lesson.before:.3f} -> {lesson.after:.3f} nats per token ({lesson.measured})"
        )
        history = learner.store.history(domain)
    return history[number - 1].figures


def forward_speed(model: BaseModel, length: int) -> float:
    """Tokens a second of a forward pass over one window, the fastest of three after a first."""
    tokens = mx.zeros((1, length), mx.int32)
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        mx.eval(model(tokens))
        seconds.append(time.perf_counter() - started)
    return length / min(seconds[1:])


def duration(seconds: float) -> str:
    """About how long, for people: "40 s" or "12 min"."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def add_common_options(parser: argparse.ArgumentParser, name: str, quick: bool = True) -> None:
    """Options that every benchmark of lessons has; `quick` if it has a small version."""
    parser.add_argument("--model", type=Path, help="model directory  [default: the last one pulled]")
    parser.add_argument(
        "--work", type=Path, default=WORK / name, help=f"resumable state  [default: {WORK.name}/{name}]"
    )
    parser.add_argument("--seed", type=int, default=0, help="of texts, adapters and order  [default: 0]")
    parser.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of the lessons, a field of ContinualLearningConfig, such as learning_rate=3e-4",
    )
    if quick:
        parser.add_argument(
            "--quick", action="store_true", help="a small version, to see that it works; records nothing"
        )


def lesson_settings(pairs: Sequence[str], base: ContinualLearningConfig) -> ContinualLearningConfig:
    """`base` changed by NAME=VALUE pairs; InputError for what is no setting."""
    values = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"--set {pair}: NAME=VALUE is expected, such as learning_rate=3e-4")
        values[name] = yaml.safe_load(value)
    settings: ContinualLearningConfig = checked(ContinualLearningConfig, values, "--set", base)
    return settings
