"""Lessons of the command line, each killed with -9 at a random moment, and what is left: every version, and no litter.

One in five is killed at any time since it began, the others a random time after their first write or after their folder
has its name; that time grows and shrinks with what is hit, for a commit takes milliseconds. What the lesson had
announced last says where it died. The histogram of the long run is printed.
"""

import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from terminal import ROOT, isolate, run, write_model

from mlx_impl.store import Store, open_store

CHILD = """
import os, sys
import cli
from mlx_impl import files, session, store

def announced(before, function, after):
    def call(*arguments, **options):
        if before:
            os.write(1, before)
        result = function(*arguments, **options)
        if after:
            os.write(1, after)
        return result
    return call

session.Session.run = announced(b"trains\\n", session.Session.run, None)
store.Store.commit = announced(b"writes\\n", store.Store.commit, b"committed\\n")
os.rename = announced(None, os.rename, b"renamed\\n")
os.write(1, b"starts\\n")
cli.main(sys.argv[1:])
"""
WRITES = ("writes", "renamed")
"""Between the first write and the commit."""


def lesson(model: Path, number: int) -> "subprocess.Popen[bytes]":
    arguments = ["learn", "-m", str(model), "--text", f"Lesson {number}: the key lies under the pot. " * 8]
    command = [sys.executable, "-c", CHILD, *arguments, "--domain", f"d{number % 3}", "--steps", "2", "--quiet"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def durations(model: Path) -> dict[str, float]:
    """Seconds from the start of a lesson, from its first write and from its folder's name to its commit."""
    times = {}
    with lesson(model, 0) as process:
        assert process.stdout is not None
        for line in process.stdout:
            times.setdefault(line.split()[0].decode(), time.perf_counter())
    assert process.returncode == 0
    return {name: times["committed"] - times[name] for name in ("starts", *WRITES)}


def killed(model: Path, number: int, wait_for: str, seconds: float) -> str:
    """Kill a lesson `seconds` after it announced `wait_for`; returns what it had announced last."""
    with lesson(model, number) as process:
        assert process.stdout is not None
        heard = b""
        while wait_for.encode() not in heard:
            piece = os.read(process.stdout.fileno(), 4096)
            assert piece, "the lesson ended early"
            heard += piece
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:  # sleeping would be too coarse
            pass
        process.kill()
        heard += process.stdout.read()
    words = [word for word in heard.decode().split() if word in ("starts", "trains", *WRITES, "committed")]
    return words[-1]


def versions(lessons: Store) -> dict[tuple[str, str], dict[str, str]]:
    """Hashes of every version, its files compared with them."""
    for version in lessons.versions():
        lessons.files_of(version)
    return {(version.domain, version.name): version.files for version in lessons.versions()}


@pytest.mark.parametrize("kills", [6, pytest.param(100, marks=pytest.mark.soak)])
def test_killed_lessons_lose_nothing_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kills: int
) -> None:
    isolate(monkeypatch, tmp_path / "home")
    model = write_model(tmp_path / "model")
    durations(model)  # the first lesson makes the database too, which is not what is timed
    seconds = durations(model)
    draw, where = random.Random(0), Counter[str]()
    known = versions(open_store(model))
    for number in range(kills):
        aim = "starts" if number % 5 == 0 else WRITES[number % 2]
        died = killed(model, number, aim, draw.uniform(0, seconds[aim]))
        where[died] += 1
        if aim in WRITES:
            seconds[aim] *= 0.8 if died == "committed" else 1.1
        lessons = open_store(model)
        now = versions(lessons)
        assert now.items() >= known.items(), (number, died)
        assert len(now) - len(known) <= (died in (*WRITES, "committed")), (number, died)
        known = now
        with lessons.writing():  # the next start
            pass
        looked = run("verify", "-m", model)
        assert (looked.code, looked.err) == (0, ""), (number, died, looked.out)
    if kills >= 100:
        with capsys.disabled():
            print(f"\n{kills} kills by last word: {dict(where.most_common())}; {len(known)} versions, none lost")
        assert where["writes"] + where["renamed"] >= kills / 2, where
    assert run("learn", "-m", model, "--text", "the end of it", "--steps", "1").code == 0
