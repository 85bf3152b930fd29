"""The commit log of lessons: versions, heads, undo, and what is left after a crash, a full disk or a flipped byte.

Nothing here needs MLX: a version's files are any files. The kills are real and exhaustive: a process of its own forks
a writer for every line of Python that a commit executes, and kills it there.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_impl import database, files, verify
from mlx_impl.errors import DamagedFileError, InputError, LockedError, MiniMacError
from mlx_impl.store import Store
from mlx_impl.versions import HeldOut, Version, check_domain, version_number

HELD = HeldOut(np.arange(7, dtype=np.int32), np.array([0, 1, 1, 0, 1, 1, 1], bool), 2, 19)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "model" / "learner"


def opened(folder: Path, base: str = "base", tokenizer: str = "tokenizer") -> Store:
    return Store(folder, base, tokenizer)


def commit(lessons: Store, domain: str, content: str, heldout: HeldOut | None = None) -> Version:
    """One lesson whose only file holds `content`."""
    with lessons.writing():
        return commit_locked(lessons, domain, content, heldout)


def commit_locked(lessons: Store, domain: str, content: str, heldout: HeldOut | None = None) -> Version:
    parent = lessons.head(domain)
    write: Callable[[Path], Any] = lambda folder: (folder / "weights").write_text(content)  # noqa: E731
    return lessons.commit(
        domain, parent, write, source=f"{content}.txt", config={"seed": 1}, figures={"loss": 1.5}, heldout=heldout
    )


def undo(lessons: Store, domain: str, to: int | None = None) -> Version | None:
    with lessons.writing():
        return lessons.undo(domain, to)


def forget(lessons: Store, domain: str) -> list[Version]:
    with lessons.writing():
        return lessons.forget(domain)


def prune(lessons: Store, keep: int) -> list[Version]:
    with lessons.writing():
        return lessons.prune(keep)


def verified(folder: Path) -> list[str]:
    """What `verify` finds wrong with the lessons in a folder."""
    found = verify.Verification()
    try:
        verify.verify_lessons(opened(folder), found)
    except DamagedFileError as error:
        found.problems.append(str(error))
    return found.problems


def tree(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder but the lock, whose content is a pid."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): files.sha256(path) for path in paths}


def state(lessons: Store) -> dict[str, str]:
    """What each domain's head holds, its hash checked."""
    return {name: (lessons.files_of(lessons.require(name)) / "weights").read_text() for name in lessons.domains()}


# -- versions and heads ----------------------------------------------------------------------------------------------


def test_a_lesson_comes_back_as_it_was_committed(folder: Path) -> None:
    made = commit(opened(folder), "medical", "a", HELD)
    lessons = opened(folder)
    version = lessons.require("medical")
    assert version == made
    assert (version.name, version.number, version.depth, version.parent) == ("v0001", 1, 1, None)
    assert (version.source, version.config, version.figures) == ("a.txt", {"seed": 1}, {"loss": 1.5})
    assert version.files == {"weights": hashlib.sha256(b"a").hexdigest()}
    assert lessons.files_of(version) == folder / "medical" / "v0001"
    assert (folder / "learner.sqlite").is_file()


@pytest.mark.parametrize("trained", [HELD.trained, None], ids=["masked", "all"])
def test_held_out_tokens_come_back(folder: Path, trained: np.ndarray | None) -> None:
    lessons = opened(folder)
    version = commit(lessons, "main", "a", HeldOut(HELD.ids, trained, 2, 19))
    held = lessons.heldout(version)
    assert held is not None
    assert held.ids.dtype == np.int32
    np.testing.assert_array_equal(held.ids, HELD.ids)
    assert (held.documents, held.bytes) == (2, 19)
    assert (held.trained is None) == (trained is None)
    if trained is not None:
        assert held.trained is not None
        assert held.trained.dtype == bool
        np.testing.assert_array_equal(held.trained, trained)
    assert lessons.heldout(commit(lessons, "main", "b")) is None


def test_lessons_stand_on_one_another(folder: Path) -> None:
    lessons = opened(folder)
    for domain, content in (("b", "1"), ("a", "2"), ("b", "3"), ("b", "4")):
        commit(lessons, domain, content)
    assert lessons.domains() == ["a", "b"]
    assert [(v.name, v.depth, v.source) for v in lessons.history("b")] == [
        ("v0001", 1, "1.txt"),
        ("v0002", 2, "3.txt"),
        ("v0003", 3, "4.txt"),
    ]
    assert lessons.history("c") == []
    overview = [(r["domain"], r["version"], r["lessons"], r["source"], r["loss"]) for r in lessons.overview()]
    assert overview == [("a", "v0001", 1, "2.txt", 1.5), ("b", "v0003", 3, "4.txt", 1.5)]
    assert state(lessons) == {"a": "2", "b": "4"}


def test_undo_goes_back_one_lesson_and_a_number_is_used_once(folder: Path) -> None:
    lessons = opened(folder)
    for content in "abc":
        commit(lessons, "main", content)
    back = undo(lessons, "main")
    assert back is not None
    assert (back.name, back.depth) == ("v0002", 2)
    fourth = commit(lessons, "main", "d")
    assert (fourth.name, fourth.depth, fourth.parent) == ("v0004", 3, 2)
    assert [v.name for v in lessons.history("main")] == ["v0001", "v0002", "v0004"]
    assert state(lessons) == {"main": "d"}


def test_undo_to_a_version_in_either_direction(folder: Path) -> None:
    lessons = opened(folder)
    for content in "abc":
        commit(lessons, "main", content)
    for number, content in ((1, "a"), (3, "c"), (2, "b"), (2, "b")):
        version = undo(lessons, "main", number)
        assert version is not None
        assert version.number == number
        assert state(lessons) == {"main": content}
    with pytest.raises(InputError, match="no version 9; there are: v0001, v0002, v0003"):
        undo(lessons, "main", 9)
    assert state(lessons) == {"main": "b"}


def test_undoing_the_only_lesson_leaves_nothing(folder: Path) -> None:
    lessons = opened(folder)
    commit(lessons, "main", "a", HELD)
    assert undo(lessons, "main") is None
    assert not folder.exists()
    assert lessons.domains() == []
    assert opened(folder, "another base").domains() == []
    assert commit(lessons, "main", "b").name == "v0001"


def test_undoing_the_first_of_a_domain_leaves_no_row_file_or_byte_of_it(folder: Path) -> None:
    lessons = opened(folder)
    commit(lessons, "other", "a", HELD)
    kept = tree(folder / "other")
    secret = HeldOut(np.random.default_rng(0).integers(0, 2**31, 3000, np.int32), None, 1, 1)
    commit(lessons, "secret", "b", secret)
    commit(lessons, "secret", "c")
    piece = secret.ids[1000:1010].astype("<i4").tobytes()
    assert piece in (folder / "learner.sqlite").read_bytes()
    undo(lessons, "secret")
    assert undo(lessons, "secret") is None
    assert piece not in (folder / "learner.sqlite").read_bytes()
    assert b"secret" not in (folder / "learner.sqlite").read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "learner.sqlite", "other"]
    assert tree(folder / "other") == kept
    with sqlite3.connect(folder / "learner.sqlite") as db:
        counts = [db.execute(f"SELECT count(*) FROM {t}").fetchone()[0] for t in ("versions", "heads", "heldout")]
    db.close()
    assert counts == [1, 1, 1]


def test_an_unknown_domain_names_those_there_are(folder: Path) -> None:
    lessons = opened(folder)
    with pytest.raises(InputError, match="no domain called 'law'; there are: none yet"):
        lessons.require("law")
    commit(lessons, "medical", "a")
    with pytest.raises(InputError, match="no domain called 'law'; there are: medical"):
        undo(lessons, "law")
    assert state(lessons) == {"medical": "a"}


@pytest.mark.parametrize(
    "name", ["", "A", "../x", ".x", "-x", "x" * 65, "a/b", "a\n", "é", "auto", "none", "learner.sqlite"]
)
def test_names_that_no_domain_can_have(folder: Path, name: str) -> None:
    with pytest.raises(InputError, match="cannot name a domain"):
        check_domain(name)
    with pytest.raises(InputError, match="cannot name a domain"):
        commit(opened(folder), name, "a")
    assert not folder.exists()


@pytest.mark.parametrize("name", ["lock", "v0001", "x" * 64, "0", "a.b_c-d"])
def test_names_that_a_domain_can_have(folder: Path, name: str) -> None:
    lessons = opened(folder)
    commit(lessons, name, "a")
    commit(lessons, name, "b")
    assert state(lessons) == {name: "b"}


def test_version_names() -> None:
    assert [version_number(name) for name in ("v0002", "2", "v12345")] == [2, 2, 12345]
    for name in ("", "v", "-1", "1.0", "v0001x", "head"):
        with pytest.raises(InputError, match="is no version"):
            version_number(name)


# -- whose lessons, and where ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("base", "tokenizer", "what"), [("x", "tokenizer", "base model"), ("base", "x", "tokenizer")])
def test_lessons_of_another_base_or_tokenizer_are_refused(folder: Path, base: str, tokenizer: str, what: str) -> None:
    early = opened(folder, base, tokenizer)  # opened while there was nothing to compare with
    lessons = opened(folder)
    commit(lessons, "main", "a")
    before = tree(folder)
    with pytest.raises(InputError, match=f"belong to another {what}"):
        opened(folder, base, tokenizer)
    with pytest.raises(InputError, match=f"belong to another {what}"):
        commit(early, "main", "b")
    assert tree(folder) == before


def test_a_newer_schema_is_refused(folder: Path) -> None:
    commit(opened(folder), "main", "a")
    with sqlite3.connect(folder / "learner.sqlite") as db:
        db.execute("PRAGMA user_version = 3")
    db.close()
    with pytest.raises(InputError, match="schema 3, this one knows 2"):
        opened(folder)


def test_an_older_schema_is_brought_up_to_date(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(opened(folder), "main", "a")
    steps = {
        2: ("ALTER TABLE versions ADD COLUMN mood TEXT", "UPDATE versions SET mood = 'fine'"),
        3: ("CREATE TABLE extra (domain TEXT)",),
    }
    monkeypatch.setattr(database, "SCHEMA", 4)
    monkeypatch.setattr(database, "MIGRATIONS", steps)
    assert opened(folder).require("main").number == 1
    with contextlib.closing(sqlite3.connect(folder / "learner.sqlite")) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (4,)
        assert db.execute("SELECT mood FROM versions").fetchall() == [("fine",)]
        assert db.execute("SELECT * FROM extra").fetchall() == []
    before = tree(folder)
    opened(folder)
    assert tree(folder) == before


def test_lessons_of_the_first_schema_are_read_and_go_on(folder: Path) -> None:
    commit(opened(folder), "main", "a", HELD)
    with contextlib.closing(sqlite3.connect(folder / "learner.sqlite")) as db:
        for column in ("rows", "sha256"):
            db.execute(f"ALTER TABLE versions DROP COLUMN {column}")
        db.execute("PRAGMA user_version = 1")
        db.commit()
    lessons = opened(folder)
    first = lessons.require("main")
    assert first.rows is None
    held = lessons.heldout(first)
    assert held is not None
    assert held.ids.tolist() == HELD.ids.tolist()
    assert commit(lessons, "main", "b", HELD).rows == {"heldout": HELD.digest()}
    assert verified(folder) == []


def test_a_migration_that_fails_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(opened(folder), "main", "a")
    before = tree(folder)
    with monkeypatch.context() as patched:
        patched.setattr(database, "SCHEMA", 4)
        steps = {2: ("CREATE TABLE extra (x TEXT)",), 3: ("ALTER TABLE no ADD y TEXT",)}
        patched.setattr(database, "MIGRATIONS", steps)
        with pytest.raises(DamagedFileError, match="no such table"):
            opened(folder)
    assert tree(folder) == before
    assert opened(folder).require("main").number == 1


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "project" / "v1").mkdir(parents=True)
    (tmp_path / "project" / "v0002").mkdir()
    with pytest.raises(InputError, match=r"holds project but no learner\.sqlite"):
        commit(opened(tmp_path), "main", "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is no folder"):
        commit(opened(tmp_path / "file"), "main", "a")
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == [
        "file",
        "project",
        "project/v0002",
        "project/v1",
    ]


@pytest.mark.parametrize("content", [[], [".DS_Store"]], ids=["empty", "a hidden file"])
def test_an_empty_folder_of_the_users_stays_when_nothing_was_learned(tmp_path: Path, content: list[str]) -> None:
    for name in content:
        (tmp_path / name).write_text("")
    lessons = opened(tmp_path)
    with pytest.raises(ZeroDivisionError), lessons.writing():
        1 / 0  # noqa: B018
    assert [path.name for path in tmp_path.iterdir()] == content
    commit(lessons, "main", "a")
    assert state(lessons) == {"main": "a"}


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written_to(folder: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(path: Path, what: str) -> int:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(files, "_lock", refuse)
    with pytest.raises(InputError, match="cannot be written to; keep lessons elsewhere with --store"):
        commit(opened(folder), "main", "a")


# -- failures --------------------------------------------------------------------------------------------------------


class Failing(sqlite3.Connection):
    """A connection on which one kind of statement fails."""

    statement = ""
    error: BaseException = sqlite3.OperationalError("database or disk is full")

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        if self.statement and sql.startswith(self.statement):
            raise self.error
        return super().execute(sql, *values)


def full(*arguments: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@contextlib.contextmanager
def nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Break one thing that a commit needs."""
    if name in ("fsync", "sha256"):
        monkeypatch.setattr(files, name, full)
    elif name == "rename":
        monkeypatch.setattr(os, name, full)
    else:
        connect = sqlite3.connect
        monkeypatch.setattr(Failing, "statement", name)
        monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, **k, factory=Failing))
    yield
    monkeypatch.undo()


BREAKABLE = ["fsync", "sha256", "rename", "INSERT INTO versions", "INSERT INTO heldout", "INSERT OR REPLACE"]


@pytest.mark.parametrize("what", BREAKABLE)
@pytest.mark.parametrize("first", [True, False], ids=["first lesson", "second lesson"])
def test_a_full_disk_leaves_everything_as_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch, what: str, first: bool
) -> None:
    lessons = opened(folder)
    if not first:
        commit(lessons, "main", "a", HELD)
    before = tree(folder)
    error = sqlite3.OperationalError("database or disk is full")
    error.sqlite_errorcode = sqlite3.SQLITE_FULL
    monkeypatch.setattr(Failing, "error", error)
    with nothing(what, monkeypatch), pytest.raises(OSError, match=r"No space|disk is full") as raised:
        commit(lessons, "main", "b", HELD)
    assert raised.value.errno == errno.ENOSPC
    assert tree(folder) == before
    assert folder.exists() != first
    assert state(lessons) == ({} if first else {"main": "a"})
    assert commit(lessons, "main", "b").number == (1 if first else 2)


def test_an_interrupt_leaves_everything_as_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lessons = opened(folder)
    commit(lessons, "main", "a")
    before = tree(folder)
    monkeypatch.setattr(Failing, "error", KeyboardInterrupt())
    with nothing("INSERT OR REPLACE", monkeypatch), pytest.raises(KeyboardInterrupt):
        commit(lessons, "main", "b")
    assert tree(folder) == before


def test_what_was_committed_stays_when_the_block_fails_later(folder: Path) -> None:
    lessons = opened(folder)

    def learn() -> None:
        with lessons.writing():
            commit_locked(lessons, "main", "a")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn()
    assert state(lessons) == {"main": "a"}


def test_two_writers(folder: Path) -> None:
    lessons = opened(folder)
    commit(lessons, "main", "a")
    script = "import sys, pathlib; from mlx_impl.store import Store\n"
    script += "with Store(pathlib.Path(sys.argv[1]), 'base', 'tokenizer').writing():\n"
    script += " print('held', flush=True); sys.stdin.read()"
    arguments = [sys.executable, "-c", script, str(folder)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout
        assert child.stdout.readline() == "held\n"
        with pytest.raises(LockedError, match=f"by process {child.pid};"):
            commit(lessons, "main", "b")
        assert state(lessons) == {"main": "a"}  # reading needs no lock
        child.communicate("")
    assert commit(lessons, "main", "b").name == "v0002"


KILLER = '''
import os, pathlib, shutil, signal, sys
sys.path.insert(0, sys.argv[2])
import test_store as t
from mlx_impl import database, files, store

root = pathlib.Path(sys.argv[1])
watched = {module.__file__ for module in (database, files, store)}

def killed_at(line, act, folder):
    """Fork a writer that dies at its line number `line`; False when it got to its end before."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] != 0
    left = [line]
    def trace(frame, event, argument):
        if frame.f_code.co_filename not in watched:
            return None
        left[0] -= event == "line"
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace
    lessons = t.opened(folder)
    sys.settrace(trace)
    try:
        act(lessons)
    finally:
        sys.settrace(None)
        os._exit(0)

def kills(name, prepare, act, old, new):
    line, step, seen = 1, int(sys.argv[3]), set()
    while True:
        folder = root / f"{name}{line}"
        prepare(t.opened(folder))
        dead = killed_at(line, act, folder)
        found = t.state(t.opened(folder))
        assert found in (old, new), (name, line, found)
        seen.add(str(found))
        with t.opened(folder).writing():
            pass
        expected = sorted(f"{d}/{v.name}" for d in found for v in t.opened(folder).versions(d))
        assert not t.verified(folder), (name, line, t.verified(folder))
        present = sorted(f"{p.parent.name}/{p.name}" for p in folder.glob("*/*")) if folder.exists() else []
        assert present == expected, (name, line, present, expected)
        assert found or not folder.exists() or not list(folder.iterdir()), (name, line, list(folder.iterdir()))
        t.commit(t.opened(folder), "main", "z", t.HELD)
        assert t.state(t.opened(folder))["main"] == "z"
        shutil.rmtree(folder)
        if not dead:
            break
        line += step
    assert seen == {str(old), str(new)}, (name, seen)
    print(name, line)

def taught(*contents):
    return lambda lessons: [t.commit(lessons, "main", c, t.HELD) for c in contents]

kills("first", taught(), taught("a"), {}, {"main": "a"})
kills("second", taught("a"), taught("b"), {"main": "a"}, {"main": "b"})
kills("undo", taught("a", "b"), lambda s: t.undo(s, "main"), {"main": "b"}, {"main": "a"})
kills("erase", taught("a"), lambda s: t.undo(s, "main"), {"main": "a"}, {})

def both(lessons):
    t.commit(lessons, "law", "l", t.HELD)
    taught("a", "b")(lessons)

kills("forget", both, lambda s: t.forget(s, "main"), {"law": "l", "main": "b"}, {"law": "l"})
kills("prune", both, lambda s: t.prune(s, 1), {"law": "l", "main": "b"}, {"law": "l", "main": "b"})
'''


@pytest.mark.parametrize("step", [9, pytest.param(1, marks=pytest.mark.soak)], ids=["every ninth line", "every line"])
def test_a_kill_at_any_line_leaves_the_old_head_or_the_new(tmp_path: Path, step: int) -> None:
    arguments = [sys.executable, "-c", KILLER, str(tmp_path), str(Path(__file__).parent), str(step)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    ends = dict(line.split() for line in done.stdout.splitlines())
    assert sorted(ends) == ["erase", "first", "forget", "prune", "second", "undo"]
    assert all(int(lines) > 30 for lines in ends.values()), ends


# -- what others put there -------------------------------------------------------------------------------------------


def test_folders_of_others_are_not_swept(folder: Path) -> None:
    lessons = opened(folder)
    commit(lessons, "main", "a")
    (folder / "data" / "v2024").mkdir(parents=True)
    (folder / "data" / "v2024" / "results.csv").write_text("precious")
    (folder / "learner.sqlite.bak").write_text("a copy")
    commit(lessons, "main", "b")
    forget(lessons, "main")
    assert (folder / "data" / "v2024" / "results.csv").read_text() == "precious"
    assert (folder / "learner.sqlite.bak").read_text() == "a copy"


def test_a_database_from_a_backup_costs_no_later_lesson(folder: Path) -> None:
    lessons = opened(folder)
    commit(lessons, "main", "a")
    backup = (folder / "learner.sqlite").read_bytes()
    commit(lessons, "main", "b")
    commit(lessons, "law", "l")
    shutil.copytree(folder / "law", folder / "law-copy")
    (folder / "learner.sqlite").write_bytes(backup)
    lessons = opened(folder)
    undo(lessons, "main", 1)
    assert commit(lessons, "main", "c").name == "v0003"
    kept = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("weights")}
    assert kept == {
        "main/v0001/weights": "a",
        "main/v0002/weights": "b",
        "main/v0003/weights": "c",
        "law/v0001/weights": "l",
        "law-copy/v0001/weights": "l",
    }
    assert sum("belongs to no lesson" in line for line in verified(folder)) == 3
    assert undo(lessons, "main") is not None
    assert state(lessons) == {"main": "a"}


def test_forgetting_reaches_a_domain_on_another_disk(folder: Path, tmp_path: Path) -> None:
    lessons = opened(folder)
    for content in "abc":
        commit(lessons, "main", content)
    shutil.move(folder / "main", tmp_path / "larger")
    (folder / "main").symlink_to(tmp_path / "larger")
    with lessons.writing():
        lessons.prune(1)
    assert [path.name for path in (tmp_path / "larger").iterdir()] == ["v0003"]
    forget(lessons, "main")
    assert list((tmp_path / "larger").iterdir()) == []
    assert commit(lessons, "main", "d").name == "v0001"


def test_a_version_that_is_a_link_cannot_be_forgotten(folder: Path, tmp_path: Path) -> None:
    lessons = opened(folder)
    commit(lessons, "main", "a")
    shutil.move(folder / "main" / "v0001", tmp_path / "elsewhere")
    (folder / "main" / "v0001").symlink_to(tmp_path / "elsewhere")
    before = tree(folder)
    with pytest.raises(InputError, match="v0001 is a link or a file"):
        forget(lessons, "main")
    assert tree(folder) == before
    assert (tmp_path / "elsewhere" / "weights").read_text() == "a"


def test_while_another_program_reads_nothing_is_erased(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "PATIENCE", 0.2)
    lessons = opened(folder)
    commit(lessons, "main", "a")
    before = tree(folder)
    with contextlib.closing(sqlite3.connect(folder / "learner.sqlite", isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM versions").fetchone()
        with pytest.raises(OSError, match=r"another program has it open .* close it there"):
            forget(lessons, "main")
        reader.execute("COMMIT")
    assert tree(folder) == before
    forget(lessons, "main")
    assert lessons.domains() == []


def test_a_version_that_goes_meanwhile_is_not_called_damaged(folder: Path) -> None:
    lessons = opened(folder)
    versions = [commit(lessons, "main", content) for content in "ab"]
    with opened(folder).writing():
        opened(folder).prune(1)
    with pytest.raises(InputError, match="main v0001 was removed by another process meanwhile; run this again"):
        lessons.files_of(versions[0])


@pytest.mark.parametrize(
    ("kept", "advice"),
    [
        (3, "`minimac-mlx undo main` goes back a version"),
        (1, "there is no other version: restore it, or `minimac-mlx forget main` removes the domain"),
    ],
)
def test_the_advice_about_a_damaged_head_can_be_followed(folder: Path, kept: int, advice: str) -> None:
    lessons = opened(folder)
    for content in "abc":
        commit(lessons, "main", content)
    with lessons.writing():
        lessons.prune(kept)
    (folder / "main" / "v0003" / "weights").write_text("x")
    with pytest.raises(DamagedFileError, match=advice):
        lessons.files_of(lessons.require("main"))


def test_who_ended_is_not_named_as_the_one_at_work(folder: Path) -> None:
    commit(opened(folder), "main", "a")
    with open(folder / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # a reader's
        with pytest.raises(LockedError, match="is in use by another process; wait until it ends"):
            commit(opened(folder), "main", "b")


# -- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "folder gone"])
def test_a_damaged_version_says_so_and_can_be_undone(folder: Path, damage: str) -> None:
    lessons = opened(folder)
    commit(lessons, "main", "aaa")
    commit(lessons, "main", "bbb")
    path = folder / "main" / "v0002" / "weights"
    if damage == "flipped":
        path.write_text("bcb")
    elif damage == "cut":
        path.write_text("bb")
    elif damage == "gone":
        path.unlink()
    else:
        shutil.rmtree(path.parent)
    with pytest.raises(DamagedFileError, match=r"v0002/weights: (missing|changed).*minimac-mlx undo main") as raised:
        lessons.files_of(lessons.require("main"))
    assert raised.value.exit_code == 3
    undo(lessons, "main")
    assert state(lessons) == {"main": "aaa"}
    shutil.rmtree(folder / "main")
    undo(lessons, "main")
    assert not folder.exists()


@pytest.mark.parametrize("content", [b"", b"no database at all" * 99, None], ids=["empty", "text", "cut off"])
def test_a_damaged_database_says_so_and_nothing_is_swept(folder: Path, content: bytes | None) -> None:
    lessons = opened(folder)
    commit(lessons, "main", "a", HELD)
    path = folder / "learner.sqlite"
    path.write_bytes(path.read_bytes()[:5000] if content is None else content)
    before = tree(folder)
    with pytest.raises(DamagedFileError, match=r"learner\.sqlite: .*; restore it from a backup, or move"):
        opened(folder).overview()
    with pytest.raises(DamagedFileError):
        commit(lessons, "main", "b")
    assert tree(folder) == before


def test_a_lost_database_does_not_cost_the_adapters(folder: Path) -> None:
    lessons = opened(folder)
    commit(lessons, "main", "a")
    (folder / "learner.sqlite").unlink()
    with pytest.raises(InputError, match=r"holds main but no learner\.sqlite"):
        commit(opened(folder), "main", "b")
    assert (folder / "main" / "v0001" / "weights").read_text() == "a"


def test_a_flipped_byte_in_the_database_never_shows_as_a_traceback(folder: Path) -> None:
    """It may go unnoticed: SQLite has no checksums. What is noticed is one of our errors."""
    lessons = opened(folder)
    for content in "ab":
        commit(lessons, "main", content, HELD)
    whole = (folder / "learner.sqlite").read_bytes()
    used = [index for index, byte in enumerate(whole) if byte]
    draw, damaged = random.Random(0), 0
    for _ in range(300):
        position = draw.choice(used)
        content = bytearray(whole)
        content[position] ^= 1 << draw.randrange(8)
        (folder / "learner.sqlite").write_bytes(content)
        try:
            again = opened(folder)
            again.overview()
            for version in again.history("main"):
                again.heldout(version)
                again.files_of(version)
        except MiniMacError as error:
            damaged += isinstance(error, DamagedFileError)
    assert damaged > 20


def test_reading_while_the_last_lesson_is_undone_makes_no_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lessons = opened(folder)
    commit(lessons, "main", "a")
    connect = sqlite3.connect

    def late(*arguments: Any, **options: Any) -> sqlite3.Connection:
        (folder / "learner.sqlite").unlink()
        return connect(*arguments, **options)

    monkeypatch.setattr(sqlite3, "connect", late)
    with pytest.raises(OSError, match="unable to open"):
        lessons.domains()
    assert not (folder / "learner.sqlite").exists()


@pytest.mark.parametrize("code", [sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_READONLY])
def test_a_database_that_cannot_be_used_now_is_not_called_damaged(
    folder: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    lessons = opened(folder)
    commit(lessons, "main", "a")
    error = sqlite3.OperationalError("not now")
    error.sqlite_errorcode = code
    monkeypatch.setattr(Failing, "error", error)
    with nothing("SELECT", monkeypatch), pytest.raises(OSError, match=r"learner\.sqlite: (not now$|another program)"):
        lessons.domains()
