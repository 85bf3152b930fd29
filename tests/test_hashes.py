"""Remembered hashes: given again only for the very same file, and never needed."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from mlx_impl import files, hashes


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is remembered, last changed long ago, and a home of its own."""
    monkeypatch.setenv("MINIMAC_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(hashes, "SETTLED", -1.0)
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(hashes.LARGE))
    return path


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were really hashed."""
    names: list[str] = []
    real = files.sha256
    monkeypatch.setattr(files, "sha256", lambda path: (names.append(path.name), real(path))[1])
    return names


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_same_file_is_hashed_once(large: Path, hashed: list[str]) -> None:
    assert [hashes.sha256(large) for _ in range(3)] == 3 * [digest(large)]
    assert hashed == [large.name]


def test_one_that_changed_is_hashed_again(large: Path, hashed: list[str]) -> None:
    """Also where it has the same size, and whoever changed it put its time back."""
    hashes.sha256(large)
    then = large.stat()
    with large.open("r+b") as file:
        file.write(b"x")
    os.utime(large, ns=(then.st_atime_ns, then.st_mtime_ns))
    assert large.stat().st_mtime_ns == then.st_mtime_ns
    assert hashes.sha256(large) == digest(large)
    assert len(hashed) == 2


def test_another_in_its_place_is_hashed(large: Path, hashed: list[str]) -> None:
    hashes.sha256(large)
    other = large.with_name("other")
    other.write_bytes(b"y" * hashes.LARGE)
    other.replace(large)
    assert hashes.sha256(large) == digest(large)
    assert len(hashed) == 2


def test_one_that_changed_just_now_is_not_remembered(
    large: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "SETTLED", 2.0)
    os.utime(large)
    hashes.sha256(large)
    assert not (files.home_path() / "hashes.json").exists()


def test_small_files_are_not_remembered(large: Path, hashed: list[str]) -> None:
    large.write_bytes(b"z")
    assert [hashes.sha256(large) for _ in range(2)] == 2 * [digest(large)]
    assert len(hashed) == 2
    assert not files.home_path().exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"%s": 1}', '{"%s": {"stamp": [1]}}'])
def test_a_damaged_memory_is_written_anew(large: Path, hashed: list[str], text: str) -> None:
    memory = files.home() / "hashes.json"
    memory.write_text(text.replace("%s", str(large)))
    assert [hashes.sha256(large) for _ in range(2)] == 2 * [digest(large)]
    assert len(hashed) == 1
    assert json.loads(memory.read_text())[str(large)]["sha256"] == digest(large)


def test_no_memory_is_needed(large: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIMAC_HOME", str(large / "home"))  # a file is no folder
    assert hashes.sha256(large) == digest(large)


def test_it_does_not_grow_forever(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "MOST", 2)
    for name in "abc":
        hashes.sha256(large.rename(large.with_name(name)))
        (large.with_name(name)).rename(large)
    known = json.loads((files.home_path() / "hashes.json").read_text())
    assert [Path(name).name for name in known] == ["b", "c"]


def test_a_name_that_is_no_text_is_remembered_too(large: Path, hashed: list[str]) -> None:
    named = large.rename(large.parent / os.fsdecode(b"mod\xff"))
    for _ in range(2):
        assert hashes.sha256(named)
    assert len(hashed) == 1
