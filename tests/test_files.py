"""Durable files: whole or not there, whatever fails on the way; locks that a second writer runs into.

A crash is played by raising at each system call in turn, and at each the folder must hold the old content or the new
once it has been swept. Real kills are in test_store.py.
"""

import errno
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_impl import files
from mlx_impl.errors import DamagedFileError, InputError, LockedError


class Killed(BaseException):
    """What a test raises where a process would die; no code under test may catch it and go on."""


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fail(monkeypatch: pytest.MonkeyPatch, name: str, number: int) -> None:
    """Let call number `number` of a function of `os` fail as on a full disk."""
    original, calls = getattr(os, name), itertools.count(1)

    def call(*arguments: object) -> object:
        if next(calls) == number:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*arguments)

    monkeypatch.setattr(os, name, call)


def write(target: Path) -> None:
    with files.atomic_folder(target, replace=True) as folder:
        (folder / "one").write_text("new")
        (folder / "two").write_text("new")


def test_an_atomic_file_is_written_whole(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"x": ["ä", 1.5]})
    assert files.read_json(tmp_path / "a.json") == {"x": ["ä", 1.5]}
    assert list(tree(tmp_path)) == ["a.json"]


def test_a_failed_file_leaves_the_old_one(tmp_path: Path) -> None:
    def half() -> None:
        with files.atomic_file(tmp_path / "a") as temporary:
            temporary.write_text("half")
            raise Killed

    files.write_text(tmp_path / "a", "old")
    with pytest.raises(Killed):
        half()
    assert tree(tmp_path) == {"a": b"old"}


@pytest.mark.parametrize(
    ("call", "number", "left"), [("fsync", 1, b"old"), ("replace", 1, b"old"), ("fsync", 2, b"new")]
)
def test_a_full_disk_leaves_a_file_old_or_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, left: bytes
) -> None:
    (tmp_path / "a").write_text("old")
    fail(monkeypatch, call, number)
    with pytest.raises(OSError, match="No space"):
        files.write_text(tmp_path / "a", "new")
    assert tree(tmp_path) == {"a": left}


@pytest.mark.parametrize(
    ("call", "number"), [("fsync", 1), ("fsync", 2), ("fsync", 3), ("rename", 1), ("rename", 2), ("fsync", 4)]
)
def test_a_full_disk_leaves_a_folder_old_or_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    target = tmp_path / "t"
    target.mkdir()
    (target / "one").write_text("old")
    fail(monkeypatch, call, number)
    with pytest.raises(OSError, match="No space"):
        write(target)
    new = {"t/one": b"new", "t/two": b"new"}
    assert tree(tmp_path) == (new if number == 4 else {"t/one": b"old"})
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_killed_replacement_is_swept_to_old_or_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    """Nothing that Python would do at the end is done: that is what a kill is."""
    target = tmp_path / "t"
    target.mkdir()
    (target / "one").write_text("old")
    original, done = os.rename, [0]

    def rename(source: Path, destination: Path) -> None:
        if done[0] == renames:
            raise Killed
        done[0] += 1
        original(source, destination)

    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(files.shutil, "rmtree", lambda *a, **k: None)
    monkeypatch.setattr(files, "_put_back", lambda aside: None)
    if renames < 2:
        with pytest.raises(Killed):
            write(target)
    else:
        write(target)
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) > 1
    assert files.sweep(tmp_path)
    new = {"t/one": b"new", "t/two": b"new"}
    assert tree(tmp_path) == (new if renames == 2 else {"t/one": b"old"})
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_an_existing_folder_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    with pytest.raises(InputError, match="exists already"), files.atomic_folder(tmp_path / "t"):
        pytest.fail("the block was entered")
    assert tree(tmp_path) == {}


def test_sweep_leaves_what_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / ".tmp-12345678-x").mkdir()
    (tmp_path / ".tmp-12345678-y").write_text("")
    (tmp_path / ".other").write_text("")
    (tmp_path / "mine").mkdir()
    (tmp_path / ".tmp-link").symlink_to(tmp_path / "mine")
    assert len(files.sweep(tmp_path)) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other", "mine"]


def test_sweep_leaves_what_somebody_is_writing(tmp_path: Path) -> None:
    (tmp_path / ".tmp-12345678-x").mkdir()
    with files.atomic_folder(tmp_path / "model") as folder:
        (folder / "weights").write_text("new")
        assert files.sweep(tmp_path) == [tmp_path / ".tmp-12345678-x"]
    assert tree(tmp_path) == {"model/weights": b"new"}


@pytest.mark.parametrize(
    "content",
    [b"{", b"\xff\xfe", b"[1]", b'"x"', b"[" * 100_000, b'{"a": ' + b"1" * 5000 + b"}"],
    ids=["cut off", "not UTF-8", "a list", "a string", "deep", "a huge number"],
)
def test_json_that_is_none_names_the_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"a\.json"):
        files.read_json(tmp_path / "a.json")


def test_json_that_is_absent_or_too_large(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        files.read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"a": 1}')
    with pytest.raises(DamagedFileError, match="8 bytes, at most 7"):
        files.read_json(tmp_path / "a.json", limit=7)


def test_a_second_lock_names_the_process_that_has_it(tmp_path: Path) -> None:
    lock = tmp_path / "deep" / "lock"
    script = (
        "import sys; from mlx_impl.files import locked\nwith locked(__import__('pathlib').Path(sys.argv[1]), 'it'):"
    )
    script += "\n print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout
        assert child.stdout.readline() == "held\n"
        with (
            pytest.raises(LockedError, match=rf"it is being written by process {child.pid};"),
            files.locked(lock, "it"),
        ):
            pytest.fail("two hold it")
        child.kill()
    with files.locked(lock, "it"):  # it went with the process
        assert lock.read_text() == f"{os.getpid()}\n"


def test_a_lock_that_its_holder_removed_is_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened before the holder removed it, locked after: such a lock would not exclude who comes next."""
    path, original = tmp_path / "lock", files._lock
    path.write_text("")

    def late(path: Path, what: str) -> int:
        descriptor = original(path, what)
        path.unlink()
        monkeypatch.undo()
        return descriptor

    monkeypatch.setattr(files, "_lock", late)
    with files.locked(path, "it"), pytest.raises(LockedError), files.locked(path, "it"):
        pytest.fail("two hold it")


def test_an_error_names_the_file_that_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "notes.txt"
    with pytest.raises(FileNotFoundError) as raised:
        files.write_text(path, "x")
    assert raised.value.filename == str(path)  # and not the temporary one beside it
