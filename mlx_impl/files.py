"""Durable files and folders: what is written here is whole after a crash, or not there at all.

The order is always: write beside the target, fsync, rename, fsync the parent. On macOS `os.fsync` does not reach
the disk, `F_FULLFSYNC` does. A process killed on the way leaves a name that starts with `.tmp-`, or a folder that was
to be replaced under one that starts with `.old-`; `sweep` removes the first and puts the second back. A folder that
somebody is still writing is locked, and stays.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_impl.errors import DamagedFileError, InputError, LockedError

TEMPORARY = ".tmp-"
REPLACED = ".old-"


def home_path() -> Path:
    """Where `home` is, or would be."""
    return Path(os.environ.get("MINIMAC_HOME") or Path.home() / ".minimac-mlx").expanduser()


def home() -> Path:
    """The folder that holds pulled models and caches: `MINIMAC_HOME`, else `~/.minimac-mlx`, mode 0700."""
    folder = home_path()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def fsync(path: Path) -> None:
    """Flush a file or a folder to the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if sys.platform == "darwin":
            try:
                fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
                return
            except OSError:
                pass  # not every file system knows it (network drives); fsync is what is left
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends without an error, it becomes `path`, durably."""
    temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        yield temporary
        fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)
    except OSError as error:
        if error.filename in (None, str(temporary)):  # a write that fails does not say where
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file so that a crash leaves the old content or the new."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, durably."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a path that is no UTF-8
        text = json.dumps(value, indent=2, allow_nan=False)
    write_text(path, text + "\n")


def read_json(path: Path, limit: int = 64 * 1024 * 1024) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes; anything else is a DamagedFileError naming the file."""
    try:
        size = path.stat().st_size
        if size > limit:
            raise DamagedFileError(f"{path}: {size:,} bytes, at most {limit:,} expected of this file")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or an integer of thousands of digits
        raise DamagedFileError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise DamagedFileError(f"{path}: a JSON object was expected, this is a {type(value).__name__}")
    return value


@contextlib.contextmanager
def atomic_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a new folder beside `target`; when the block ends without an error, it becomes `target`, durably.

    Every file in it is fsynced first. With `replace` an existing target is moved aside and removed afterwards;
    without it an existing target is an InputError, raised before anything is written.
    """
    if target.exists() and not replace:
        raise InputError(f"{target} exists already; name another folder or remove it first")
    target.parent.mkdir(parents=True, exist_ok=True)
    name = f"{uuid.uuid4().hex[:8]}-{target.name}"
    temporary, aside = target.with_name(TEMPORARY + name), target.with_name(REPLACED + name)
    try:
        temporary.mkdir(mode=0o700)
        with _at_work(temporary):
            yield temporary
            for path in sorted(temporary.rglob("*")):
                fsync(path)
            fsync(temporary)
            if target.exists():
                os.rename(target, aside)
            os.rename(temporary, target)
            fsync(target.parent)
    except OSError as error:
        if error.filename is None or str(error.filename).startswith(str(temporary)):  # nobody asked for that name
            error.filename = str(target)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if aside.exists():
            _put_back(aside)


@contextlib.contextmanager
def _at_work(folder: Path) -> Iterator[None]:
    """Keep `sweep` away from a folder until the block, or the process, ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # not every file system has locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _abandoned(folder: Path) -> bool:
    """Whether nobody is writing a temporary folder any more."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:  # renamed or removed just now
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # without locks nobody can tell
        pass
    finally:
        os.close(descriptor)
    return True


def _put_back(aside: Path) -> None:
    """Give a folder that was moved aside its name again; where the new one has it already, remove the old."""
    target = aside.with_name(aside.name[len(REPLACED) + 9 :])  # after eight hex digits and a dash
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        os.rename(aside, target)


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold an exclusive lock on the file `path` for the block; it goes with the process, however that ends.

    Creates the file and its folder. Who holds the lock may remove the file. Raises LockedError naming the pid that
    holds it; `what` says what is being written, for that message.
    """
    descriptor = _lock(path, what)
    while not _is_open_file(descriptor, path):  # the last holder removed it after we had opened it
        os.close(descriptor)
        descriptor = _lock(path, what)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)  # who finds it locked next must not be told of this process
        os.close(descriptor)


@contextlib.contextmanager
def unlocked(path: Path) -> Iterator[str | None]:
    """Keep writers of `locked` out for the block and yield None; where one is at work, yield its pid, or "unknown".

    The block must be shorter than a writer's patience of a tenth of a second. Creates and writes nothing.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        yield None
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            yield _holder(descriptor) or "unknown"
        else:
            yield None
    finally:
        os.close(descriptor)


def _lock(path: Path, what: str) -> int:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        for patience in (0.05, 0.05, 0.0):  # who only looks is gone soon
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not patience:
                    holder = _holder(descriptor)
                    doing = f"is being written by process {holder}" if holder else "is in use by another process"
                    raise LockedError(f"{what} {doing}; wait until it ends") from None
                time.sleep(patience)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _holder(descriptor: int) -> str:
    """The pid in a lock file, as text; empty where nobody writes, or has not said so yet."""
    return os.pread(descriptor, 32, 0).decode(errors="replace").strip()


def _is_open_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def sweep(folder: Path) -> list[Path]:
    """Remove what crashed writers left in `folder` and put back what they had moved aside; returns these paths."""
    replaced = sorted(folder.glob(f"{REPLACED}*"))
    for path in replaced:
        _put_back(path)
    leftovers = []
    for path in sorted(folder.glob(f"{TEMPORARY}*")):
        if not path.is_dir() or path.is_symlink():
            path.unlink(missing_ok=True)
        elif _abandoned(path):
            shutil.rmtree(path)
        else:
            continue
        leftovers.append(path)
    return leftovers + replaced
