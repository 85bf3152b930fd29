"""Forgetting, pruning and verifying what has been learned, down to the bytes in the files.

Nothing here needs MLX but the last part, which teaches a tiny model: A, B, C without B is A, C, and a lesson after
pruning is the lesson it would have been.
"""

import dataclasses
import json
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lessons import SETTINGS, text, tiny_base, tiny_tokenizer
from test_store import HELD, Failing, commit, forget, nothing, opened, prune, state, tree, undo, verified

from mlx_impl import database, files, lora, states, store
from mlx_impl.adapters import read_adapter, read_statistics
from mlx_impl.config import Budget
from mlx_impl.errors import InputError, LockedError
from mlx_impl.learner import ContinualLearner
from mlx_impl.verify import verify
from mlx_impl.versions import HeldOut


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "model" / "learner"


def holders(folder: Path, pieces: list[bytes]) -> set[str]:
    """Files below a folder, by content or name, in which one of the pieces is."""
    found = set()
    for path in folder.rglob("*"):
        content = str(path.relative_to(folder)).encode() + (path.read_bytes() if path.is_file() else b"")
        if any(piece in content for piece in pieces):
            found.add(path.name)
    return found


def pieces_of(ids: np.ndarray, length: int = 6) -> list[bytes]:
    """Every run of `length` tokens that begins at a multiple of it, as 16- and as 32-bit little-endian numbers."""
    runs = [ids[at : at + length] for at in range(0, len(ids) - length, length)]
    return [run.astype(kind).tobytes() for run in runs for kind in ("<u2", "<i4")]


# -- forget ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("undone", [False, True])
def test_forget_leaves_no_byte_of_a_domain_and_others_as_they_were(folder: Path, undone: bool) -> None:
    lessons = opened(folder)
    draw = np.random.default_rng(0)
    tokens = {name: draw.integers(256, 49152, 3000, np.int32) for name in ("law", "secret", "zoo")}
    for _ in range(3):
        for name, ids in tokens.items():
            commit(lessons, name, f"words of {name}", HeldOut(ids, None, 1, 1))
    if undone:
        undo(lessons, "secret")
    others = {name: tree(folder / name) for name in ("law", "zoo")}
    log = {name: lessons.history(name) for name in ("law", "zoo")}
    pieces = [b"secret", *pieces_of(tokens["secret"])]
    assert holders(folder, pieces) == {"learner.sqlite", "secret", "v0001", "v0002", "v0003", "weights"}
    assert [version.name for version in forget(lessons, "secret")] == ["v0001", "v0002", "v0003"]
    assert holders(folder, pieces) == set()
    assert holders(folder, pieces_of(tokens["law"])) == {"learner.sqlite"}
    assert {name: tree(folder / name) for name in ("law", "zoo")} == others
    assert {name: lessons.history(name) for name in ("law", "zoo")} == log
    held = lessons.heldout(lessons.require("zoo"))
    assert held is not None
    np.testing.assert_array_equal(held.ids, tokens["zoo"])
    assert lessons.domains() == ["law", "zoo"]
    assert verified(folder) == []


def test_forgetting_the_only_domain_leaves_nothing(folder: Path) -> None:
    lessons = opened(folder)
    for content in "ab":
        commit(lessons, "main", content, HELD)
    forget(lessons, "main")
    assert not folder.exists()
    assert commit(lessons, "main", "c").name == "v0001"


def test_rows_that_were_moved_about_leave_no_copy(folder: Path) -> None:
    """SQLite's secure_delete alone leaves some here: rows of uneven size, added and removed in no order."""
    lessons = opened(folder)
    for name in ("a", "b"):
        commit(lessons, name, name)
    draw = np.random.default_rng(26)
    with lessons.database.connected() as db:
        db.execute("CREATE TABLE extra (domain TEXT, hash BLOB, content BLOB, PRIMARY KEY (domain, hash))")
        for number in range(600):
            name = "ab"[draw.integers(2)]
            with db:
                row = (name, draw.bytes(8), f"SECRET{name}".encode() * int(draw.integers(2, 120)))
                db.execute("INSERT INTO extra VALUES (?, ?, ?)", row)
                if number % 5 == 0:
                    db.execute("DELETE FROM extra WHERE hash = (SELECT min(hash) FROM extra)")
    count = (folder / "learner.sqlite").read_bytes().count(b"SECRETa")
    assert b"SECRETb" in (folder / "learner.sqlite").read_bytes()
    forget(lessons, "b")
    content = (folder / "learner.sqlite").read_bytes()
    assert b"SECRETb" not in content
    assert 0 < content.count(b"SECRETa") <= count
    with lessons.database.connected() as db:
        assert db.execute("SELECT DISTINCT domain FROM extra").fetchall() == [("a",)]


def test_every_table_of_the_schema_is_erased_by_domain() -> None:
    with sqlite3.connect(":memory:") as db:
        db.executescript(database.TABLES)
        tables = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        without = [t for t in tables if "domain" not in [c[1] for c in db.execute(f"PRAGMA table_info({t})")]]
    db.close()
    assert without == ["base"]


def dump(folder: Path) -> list[str]:
    """All rows of the database as SQL."""
    with sqlite3.connect(folder / "learner.sqlite") as db:
        lines = list(db.iterdump())
    db.close()
    return lines


def test_without_b_the_database_is_that_of_a_and_c(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store.time, "strftime", lambda *arguments: "2026-01-01T00:00:00Z")
    for name, domains in (("abc", "abcbac"), ("ac", "acac")):
        lessons = opened(folder / name)
        for domain in domains:
            commit(lessons, domain, domain, HELD)
    assert dump(folder / "abc") != dump(folder / "ac")
    forget(opened(folder / "abc"), "b")
    assert dump(folder / "abc") == dump(folder / "ac")
    files_of = [
        {name: digest for name, digest in tree(folder / each).items() if name != "learner.sqlite"}
        for each in ("abc", "ac")
    ]
    assert files_of[0] == files_of[1]


@pytest.mark.parametrize("act", [forget, lambda lessons, domain: prune(lessons, 1)], ids=["forget", "prune"])
@pytest.mark.parametrize("statement", ["DELETE FROM versions", "VACUUM"])
def test_a_full_disk_leaves_every_version(
    folder: Path, monkeypatch: pytest.MonkeyPatch, act: Any, statement: str
) -> None:
    lessons = opened(folder)
    for content in "ab":
        commit(lessons, "main", content, HELD)
    before = tree(folder)
    error = sqlite3.OperationalError("database or disk is full")
    error.sqlite_errorcode = sqlite3.SQLITE_FULL
    monkeypatch.setattr(Failing, "error", error)
    with nothing(statement, monkeypatch), pytest.raises(OSError, match="disk is full"):
        act(lessons, "main")
    assert tree(folder) == before
    act(lessons, "main")
    assert tree(folder) != before


SMALL_DISK = """
import pathlib, resource, signal, sys
sys.path.insert(0, sys.argv[1])
import test_store as t
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = pathlib.Path(sys.argv[2])
lessons = t.opened(folder)
resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384))
try:
    t.forget(lessons, "b")
except OSError as error:
    print("refused")
"""


def test_a_disk_that_fills_up_while_the_database_is_written_over(folder: Path) -> None:
    """The journal needs room for the pages that change; where it finds none, nothing changes."""
    lessons = opened(folder)
    for name in "abc":
        commit(lessons, name, name, HeldOut(np.arange(9000, dtype=np.int32), None, 1, 1))
    before = tree(folder)
    script = [sys.executable, "-c", SMALL_DISK, str(Path(__file__).parent), str(folder)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "refused\n"), done.stderr
    assert state(opened(folder)) == {"a": "a", "b": "b", "c": "c"}
    assert tree(folder) == before


# -- prune -----------------------------------------------------------------------------------------------------------


def taught(folder: Path, contents: str, domain: str = "main") -> store.Store:
    lessons = opened(folder)
    for content in contents:
        commit(lessons, domain, content, HELD)
    return lessons


def names(lessons: store.Store, domain: str = "main") -> list[str]:
    return [version.name for version in lessons.history(domain)]


def test_prune_keeps_the_last_of_each_domain(folder: Path) -> None:
    lessons = taught(folder, "abcdef")
    taught(folder, "gh", "law")
    head, bytes_before = lessons.require("main"), lessons.size()
    assert [version.name for version in prune(lessons, 3)] == ["v0001", "v0002", "v0003"]
    assert names(lessons) == ["v0004", "v0005", "v0006"]
    assert names(lessons, "law") == ["v0001", "v0002"]
    assert lessons.require("main") == head
    assert (head.depth, lessons.overview()[1]["lessons"]) == (6, 6)
    assert sorted(path.name for path in (folder / "main").iterdir()) == ["v0004", "v0005", "v0006"]
    assert lessons.size() < bytes_before
    assert lessons.heldout(head) is not None
    with lessons.database.connected() as db:
        assert db.execute("SELECT number FROM heldout WHERE domain = 'main'").fetchall() == [(4,), (5,), (6,)]
    assert verified(folder) == []
    before = tree(folder)
    assert prune(lessons, 3) == []
    assert tree(folder) == before


def test_prune_deletes_what_was_undone_and_numbers_are_not_used_again(folder: Path) -> None:
    lessons = taught(folder, "abc")
    undo(lessons, "main")
    taught(folder, "d")
    undo(lessons, "main")
    assert [version.name for version in prune(lessons, 5)] == ["v0003", "v0004"]
    assert names(lessons) == ["v0001", "v0002"]
    fifth = commit(lessons, "main", "e")
    assert (fifth.name, fifth.depth, fifth.parent) == ("v0005", 3, 2)


def test_undo_reaches_back_to_what_was_kept(folder: Path) -> None:
    lessons = taught(folder, "abcd")
    prune(lessons, 2)
    with pytest.raises(InputError, match="version 2 of domain main was pruned; there are: v0003, v0004"):
        undo(lessons, "main", 2)
    with pytest.raises(InputError, match="no version 9; there are: v0003, v0004"):
        undo(lessons, "main", 9)
    assert undo(lessons, "main") is not None
    with pytest.raises(InputError, match=r"v0003 is the oldest version of main that is kept.*minimac-mlx forget main"):
        undo(lessons, "main")
    assert state(lessons) == {"main": "c"}
    assert undo(lessons, "main", 4) is not None
    assert commit(lessons, "main", "e").depth == 5
    assert prune(lessons, 1)
    forget(lessons, "main")
    assert not folder.exists()


def test_prune_keeps_at_least_the_head(folder: Path) -> None:
    lessons = taught(folder, "ab")
    for keep in (0, -1):
        with pytest.raises(InputError, match=f"--keep {keep}: "):
            prune(lessons, keep)
    prune(lessons, 1)
    assert state(lessons) == {"main": "b"}
    assert prune(opened(folder / "none yet"), 1) == []
    assert not (folder / "none yet").exists()


WRITER = """
import sys
sys.path.insert(0, sys.argv[1])
import pathlib, test_store as t
folder = pathlib.Path(sys.argv[2])
lessons = t.opened(folder)
def write(temporary):
    (temporary / "weights").write_text("x")
    print("writing", flush=True)
    sys.stdin.readline()
with lessons.writing():
    lessons.commit("main", lessons.head("main"), write, source="", config={}, figures={}, heldout=None)
    if sys.argv[3] == "commits and waits":
        (folder / "main" / "v0099").mkdir()
        print("written", flush=True)
        sys.stdin.readline()
"""


def writer(folder: Path, what: str) -> "subprocess.Popen[str]":
    arguments = [sys.executable, "-c", WRITER, str(Path(__file__).parent), str(folder), what]
    return subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("act", [lambda s: forget(s, "main"), lambda s: prune(s, 1), lambda s: undo(s, "main")])
def test_while_another_process_learns(folder: Path, act: Any) -> None:
    lessons = taught(folder, "ab")
    with writer(folder, "commits") as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "writing\n"
        with pytest.raises(LockedError, match=f"by process {other.pid};") as raised:
            act(lessons)
        assert raised.value.exit_code == 4
        other.communicate("\n")
    assert names(lessons) == ["v0001", "v0002", "v0003"]


# -- verify ----------------------------------------------------------------------------------------------------------


def test_verify_finds_each_kind_of_damage(folder: Path) -> None:
    taught(folder, "ab")
    taught(folder, "c", "law")
    assert verified(folder) == []
    (folder / "main" / "v0001" / "weights").write_text("x")
    (folder / "law" / "v0001" / "weights").unlink()
    (folder / "main" / "v0002" / "more").write_text("")
    (folder / "main" / "v0007").mkdir()
    (folder / "main" / ".tmp-1234-v0003").mkdir()
    (folder / "notes.txt").write_text("")
    (folder / "notes").mkdir()
    (folder / ".DS_Store").write_text("")
    found = [line.removeprefix(f"{folder}/").partition(";")[0] for line in verified(folder)]
    assert sorted(found) == [
        "law/v0001/weights: missing",
        "main/.tmp-1234-v0003: belongs to no lesson",
        "main/v0001/weights: changed since it was learned",
        "main/v0002/more: belongs to no lesson",
        "main/v0007: belongs to no lesson",
        "notes.txt: belongs to no lesson",
        "notes: belongs to no lesson",
    ]
    with opened(folder).writing():
        pass
    assert len(verified(folder)) == 4  # the next writer has swept the temporary, the unknown and the empty folder


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("UPDATE heads SET number = 9", "a row of heads belongs to none of versions"),
        ("DELETE FROM heads", "domain 'main' has versions and no head"),
        ("DELETE FROM versions WHERE number = 1", "a row of heldout belongs to none of versions"),
        ("UPDATE heldout SET ids = x'010203'", "buffer size must be a multiple"),
        ("UPDATE versions SET figures = '{', sha256 = NULL", "Expecting property name"),
        ("UPDATE versions SET figures = '[]', sha256 = NULL", "a JSON object was expected, this is a list"),
        ("UPDATE versions SET figures = '{}'", "version 1 of main has changed since it was learned"),
        ("UPDATE versions SET files = '{}'", "version 1 of main has changed since it was learned"),
        ("UPDATE versions SET sha256 = 'x' WHERE number = 2", "version 2 of main has changed since it was learned"),
        ("UPDATE heldout SET bytes = 20", "held-out text has changed since it was learned"),
        ("DELETE FROM heldout", "held-out text has changed since it was learned"),
    ],
)
def test_verify_finds_rows_that_make_no_sense(folder: Path, damage: str, words: str) -> None:
    taught(folder, "ab")
    with sqlite3.connect(folder / "learner.sqlite") as db:
        db.execute(damage)
    db.close()
    problems = verified(folder)
    assert any(words in line for line in problems), problems


def test_verify_finds_a_broken_page(folder: Path) -> None:
    lessons = taught(folder, "ab")
    path = folder / "learner.sqlite"
    with lessons.database.connected() as db:
        page = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'sqlite_autoindex_versions_1'").fetchone()[0]
    content = bytearray(path.read_bytes())
    size = int.from_bytes(content[16:18], "big")
    content[page * size - 40 : page * size] = bytes(40)  # the index's cells
    path.write_bytes(content)
    assert any("index" in line for line in lessons.database.problems())


@pytest.mark.parametrize("what", ["commits", "commits and waits"])
def test_verify_is_not_misled_by_a_writer(folder: Path, what: str) -> None:
    lessons = taught(folder, "ab")
    with writer(folder, what) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "writing\n"
        if what == "commits and waits":
            other.stdin.write("\n")
            other.stdin.flush()
            assert other.stdout.readline() == "written\n"
        with lessons.looking() as holder:
            assert holder == str(other.pid)
        assert verified(folder) == []
        other.kill()
    assert len(verified(folder)) == 1  # nobody writes any more


def test_verify_says_nothing_of_a_version_that_goes_meanwhile(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lessons = taught(folder, "abc")
    plain, calls = files.sha256, []

    def late(path: Path) -> str:
        calls.append(path)
        if len(calls) == 1:
            prune(lessons, 1)
        return plain(path)

    monkeypatch.setattr(files, "sha256", late)
    assert verified(folder) == []
    assert names(lessons) == ["v0003"]


def test_a_look_keeps_writers_out_for_a_moment_only(folder: Path) -> None:
    lessons = taught(folder, "a")
    with lessons.looking() as holder:
        assert holder is None
        with lessons.looking() as second:
            assert second is None
        with pytest.raises(LockedError):
            commit(lessons, "main", "b")
    assert commit(lessons, "main", "b").name == "v0002"
    with opened(folder / "none").looking() as holder:
        assert holder is None
    assert not (folder / "none").exists()


# -- lessons of a model ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"), tiny_tokenizer())


def teach(base: Path, folder: Path, number: int, domain: str, characters: int = 1200) -> ContinualLearner:
    learner = ContinualLearner.from_checkpoint(base, dataclasses.replace(SETTINGS, lora_dropout=0.1), folder)
    learner.learn_from_text(text(number, characters), domain, budget=Budget(steps=2))
    return learner


TIMES = {"seconds", "training_seconds", "tokens_per_second"}


def without_times(lines: list[str]) -> list[str]:
    """A dump of the database without what a clock says."""
    kept = []
    for line in lines:
        if line.startswith('INSERT INTO "versions"'):
            values = [json.loads(f"{{{part}}}") for part in _objects(line)]
            line = json.dumps([{k: v for k, v in each.items() if k not in TIMES} for each in values])
        kept.append(line)
    return kept


def _objects(line: str) -> Iterator[str]:
    """What is between the braces of each JSON document in a line of SQL."""
    for piece in line.replace("''", "'").split("','"):
        if "{" in piece:
            yield piece[piece.index("{") + 1 : piece.rindex("}")]


def test_a_b_c_without_b_is_a_c(base: Path, tmp_path: Path) -> None:
    for number, domain in ((1, "a"), (2, "b"), (3, "c"), (4, "b"), (5, "a")):
        teach(base, tmp_path / "abc", number, domain, 6000)
    for number, domain in ((1, "a"), (3, "c"), (5, "a")):
        teach(base, tmp_path / "ac", number, domain, 6000)
    learner = ContinualLearner.from_checkpoint(base, SETTINGS, tmp_path / "abc")
    held = learner.store.heldout(learner.store.require("b"))
    assert held is not None
    pieces = [*pieces_of(held.ids, 24), learner.tokenizer.decode(held.ids[:40].tolist()).encode()]
    assert holders(tmp_path / "abc", pieces) == {"learner.sqlite"}
    forget(learner.store, "b")
    assert holders(tmp_path / "abc", pieces) == set()
    trees = [
        {name: digest for name, digest in tree(tmp_path / each).items() if name != "learner.sqlite"}
        for each in ("abc", "ac")
    ]
    assert trees[0] == trees[1]
    assert len(trees[0]) >= 6
    assert without_times(dump(tmp_path / "abc")) == without_times(dump(tmp_path / "ac"))
    for each in ("abc", "ac"):
        teach(base, tmp_path / each, 7, "c")
    assert tree(tmp_path / "abc" / "c") == tree(tmp_path / "ac" / "c")


def test_a_b_c_without_b_is_a_c_where_only_b_had_the_time_for_the_base_s_text(base: Path, tmp_path: Path) -> None:
    for each in ("abc", "ac"):
        for number, domain, characters in ((1, "a", 300), (2, "b", 12_000), (3, "c", 1_000)):
            if domain not in each:
                continue
            learner = ContinualLearner.from_checkpoint(base, SETTINGS, tmp_path / each)
            assert learner.learn_from_text(text(number, characters), domain, budget=Budget(seconds=600)).complete
    lessons = store.open_store(base, tmp_path / "abc")
    assert states.BACKGROUND in (read_statistics(lessons.files_of(lessons.require("b"))) or {})
    forget(lessons, "b")
    for domain in "ac":
        assert tree(tmp_path / "abc" / domain) == tree(tmp_path / "ac" / domain)


def test_a_b_c_without_b_is_a_c_whatever_numbers_b_was_taught_with(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in ("abc", "ac"):
        for number, domain in ((2, "b"), (1, "a"), (3, "c")):
            if domain not in each:
                continue
            monkeypatch.setenv("MINIMAC_DTYPE", "bfloat16" if domain == "b" else "float32")
            learner = ContinualLearner.from_checkpoint(base, SETTINGS, tmp_path / each)
            assert learner.learn_from_text(text(number, 12_000), domain, budget=Budget(seconds=600)).complete
    lessons = store.open_store(base, tmp_path / "abc")
    assert states.BACKGROUND in (read_statistics(lessons.files_of(lessons.require("b"))) or {})
    forget(lessons, "b")
    for domain in "ac":
        assert tree(tmp_path / "abc" / domain) == tree(tmp_path / "ac" / domain)


def test_pruning_does_not_hide_lessons_from_a_later_fisher(base: Path, tmp_path: Path) -> None:
    for each in ("pruned", "whole"):
        for number in (1, 2, 3):
            config = dataclasses.replace(SETTINGS, replay_targets="tokens", use_ewc=number == 3)
            learner = ContinualLearner.from_checkpoint(base, config, tmp_path / each)
            if each == "pruned" and number == 3:
                prune(learner.store, 1)
            learner.learn_from_text(text(number, 1000), budget=Budget(steps=4))
    assert tree(tmp_path / "pruned" / "main" / "v0003") == tree(tmp_path / "whole" / "main" / "v0003")


@pytest.mark.parametrize("targets", ["tokens", "predictions"])
def test_a_lesson_after_pruning(base: Path, tmp_path: Path, targets: str) -> None:
    """It is the one it would have been, unless windows are held to a version that is gone: then to the oldest kept."""
    for each in ("pruned", "whole"):
        for number in (1, 2, 3, 4):
            config = dataclasses.replace(SETTINGS, replay_targets=targets)
            learner = ContinualLearner.from_checkpoint(base, config, tmp_path / each)
            if each == "pruned" and number == 4:
                prune(learner.store, 1)
            learner.learn_from_text(text(number), budget=Budget(steps=8))
    heads = [opened_version(base, tmp_path / each) for each in ("pruned", "whole")]
    assert (heads[0] == heads[1]) == (targets == "tokens")


def opened_version(base: Path, folder: Path) -> dict[str, bytes]:
    lessons = store.open_store(base, folder)
    arrays, _ = read_adapter(lessons.files_of(lessons.require("main")))
    assert lora.num_parameters(arrays)
    return {name: np.array(array).tobytes() for name, array in arrays.items()}


def test_verify_looks_at_the_base_too(base: Path, tmp_path: Path) -> None:
    teach(base, tmp_path / "s", 1, "main")
    found = verify(base, tmp_path / "s")
    assert found.problems == []
    assert (found.domains, found.versions, found.writer) == (1, 1, None)
    assert found.files >= 2
    assert found.base_files >= 4
    weights = base / "model.safetensors"
    whole = weights.read_bytes()
    try:
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        (problem,) = verify(base, tmp_path / "s").problems
        assert "model.safetensors has sha256" in problem
    finally:
        weights.write_bytes(whole)
    (tmp_path / "s" / "learner.sqlite").write_bytes(b"no database" * 99)
    (problem,) = verify(base, tmp_path / "s").problems
    assert "not a database" in problem
