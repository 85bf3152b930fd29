"""Hashes of large files, remembered for as long as a file has not changed, as git does with its index.

To hash a model takes longer than to read it, at every command. A file of the same size, times and place on the disk as
when it was hashed last is taken to be the same: the time of its last change cannot be set by who writes it. What a
failing disk does to it is not seen so; `minimac-mlx verify` hashes everything.
"""

import contextlib
import os
import time
from pathlib import Path

from mlx_impl import files
from mlx_impl.errors import MiniMacError

LARGE = 2**20
"""Bytes of a file from which its hash is remembered."""

SETTLED = 2.0
"""Seconds since a file changed: clocks of file systems are coarse, and a later change could have the same time."""

MOST = 1000
"""Files that are remembered; the oldest go first."""


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes, the one found last where it has not changed since."""
    before = path.stat()
    if before.st_size < LARGE:
        return files.sha256(path)
    memory, name, stamp = files.home_path() / "hashes.json", str(path.resolve()), _stamp(before)
    known = _known(memory)
    entry = known.get(name)
    if isinstance(entry, dict) and entry.get("stamp") == stamp and isinstance(entry.get("sha256"), str):
        return str(entry["sha256"])
    digest = files.sha256(path)
    if _stamp(path.stat()) == stamp and time.time() - max(before.st_mtime, before.st_ctime) > SETTLED:
        known.pop(name, None)
        known[name] = {"stamp": stamp, "sha256": digest}
        with contextlib.suppress(OSError):  # a folder that cannot be written is no reason not to open a model
            files.home()
            files.write_json(memory, dict(list(known.items())[-MOST:]))
    return digest


def _known(memory: Path) -> dict[str, object]:
    """What is remembered: nothing, where the file is not there or not what it should be."""
    try:
        return files.read_json(memory)
    except (OSError, MiniMacError):
        return {}


def _stamp(found: os.stat_result) -> list[int]:
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
