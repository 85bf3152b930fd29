"""What the store keeps of a lesson: its version, what was held out, its replay buffer, and how these are named.

Each has a digest, which is compared when it is read: SQLite keeps no checksums. Imports no MLX.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_impl.database import DATABASE
from mlx_impl.errors import InputError


def check_domain(name: str) -> str:
    """The name itself, if it can be a folder everywhere; InputError says what is allowed."""
    if not is_domain(name):
        raise InputError(
            f"{name!r} cannot name a domain: up to 64 of a-z, 0-9, dot, dash and underscore, first a letter or digit"
        )
    if name in ("auto", "none") or name.startswith(DATABASE):
        raise InputError(f"{name!r} cannot name a domain: the word has another meaning here; choose another")
    return name


def is_domain(name: str) -> bool:
    """Whether a folder of this name could be a domain's."""
    return re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", name) is not None


@dataclass(frozen=True)
class HeldOut:
    """Tokens kept from a lesson's text for measuring: ids (N,) int32, trained (N,) bool or None for all."""

    ids: np.ndarray
    trained: np.ndarray | None
    documents: int
    bytes: int

    def digest(self) -> str:
        """Of all four."""
        trained = b"" if self.trained is None else self.trained.astype(np.uint8).tobytes()
        return digest_of(self.ids.astype("<i4").tobytes(), trained, self.documents, self.bytes)


@dataclass(frozen=True)
class Replay:
    """A replay buffer as `ReplayBuffer.membership` gives it, and packed windows (n + 1,) int32 under their ids.

    A commit gets the windows that are new, reading gives all that the buffer holds.
    """

    counters: dict[str, Any]
    ids: np.ndarray  # (N, 16) uint8
    priorities: np.ndarray  # (N,) float64
    windows: dict[bytes, np.ndarray]

    def digest(self) -> str:
        """Of all but the windows, whose ids are hashes of them."""
        counters = json.dumps(self.counters, sort_keys=True, allow_nan=False)
        return digest_of(counters, self.ids.astype(np.uint8).tobytes(), self.priorities.astype("<f8").tobytes())


@dataclass(frozen=True)
class Version:
    """One committed lesson. `depth` counts the lessons on the way to it; `number` names its folder for good.

    `parent` is the number of the version it stands on, which may have been pruned since; None for a first lesson.
    `files` maps names to sha256, `rows` the tables `heldout` and `replay` to digests of what they hold of the version;
    it is None where a program wrote them that did not record any.
    """

    domain: str
    number: int
    parent: int | None
    depth: int
    source: str
    created: str
    config: dict[str, Any]
    figures: dict[str, Any]
    files: dict[str, str]
    rows: dict[str, str] | None = None

    @property
    def name(self) -> str:
        """Folder name, v0001 and so on."""
        return version_name(self.number)

    def as_json(self) -> dict[str, Any]:
        """What `list --json` and `log --json` print of a lesson."""
        return {"version": self.name, "source": self.source, "created": self.created, **self.figures}


def is_version(name: str) -> bool:
    """Whether a folder of this name could be a version's."""
    return re.fullmatch(r"v\d{4,}", name) is not None


def version_name(number: int) -> str:
    """v0002 for 2."""
    return f"v{number:04d}"


def version_number(name: str) -> int:
    """2 for "v0002" and for "2"; InputError for anything else."""
    if not re.fullmatch(r"v?\d{1,9}", name):
        raise InputError(f"{name!r} is no version; they are called v0001, v0002 and so on")
    return int(name.removeprefix("v"))


def digest_of(*parts: object) -> str:
    """Sha256 of numbers, texts and bytes, each with its length before it."""
    digest = hashlib.sha256()
    for part in parts:
        content = part if isinstance(part, bytes) else repr(part).encode("utf-8", "surrogatepass")
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def mapping(text: str) -> dict[str, Any]:
    """The JSON object in a column; ValueError or TypeError for anything else."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise TypeError(f"a JSON object was expected, this is a {type(value).__name__}")
    return value
