"""Outside files are data: whatever a mutated one holds, it is read, or refused with one clear error.

A child process a parser opens the files, one by one, through what the commands call (`outside_files`); a file of which
it crashes, hangs or takes too much memory is known by what it said last. The long run prints what came of the files.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import mutations
import pytest
import tiny_models
from outside_files import PARSERS
from terminal import ROOT

CHILD = ROOT / "tests" / "read_mutated.py"
CRASHES = 5
"""After so many, the rest is not looked at."""

Record = dict[str, Any]


def read_all(parser: str, folder: Path, count: int, program: Path = CHILD) -> list[Record]:
    """What came of the files of seeds 0 to `count`; after a crash a new child goes on with the next one."""
    records: list[Record] = []
    paths = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    environment = {**os.environ, "PYTHONPATH": paths, "MLX_ENABLE_TF32": "0", "TOKENIZERS_PARALLELISM": "false"}
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    for attempt in range(CRASHES):
        arguments = [parser, str(folder / str(attempt)), str(len(records)), str(count)]
        log = folder / f"{attempt}.log"
        with open(log, "wb") as errors:
            command = [sys.executable, str(program), *arguments]
            child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment, cwd=folder)
            lines = _lines(child, 60.0 + count)
        done = [line for line in lines if "result" in line]
        names = {line["seed"]: line["subject"] for line in lines if "subject" in line}
        records += [{**record, "subject": names[record["seed"]]} for record in done]
        if child.returncode == 0:
            break
        said = log.read_text(errors="replace")[:2000]
        assert len(names) > len(done), f"{parser}: the child did not begin: {said}"
        crash = {"result": "failed", "error": f"ended with {child.returncode}: {said}", "seconds": 0.0, "grown": 0}
        records.append({**lines[-1], **crash})
        if len(records) == count:
            break
    return records


def _lines(child: "subprocess.Popen[bytes]", seconds: float) -> list[Record]:
    """What the child says until it ends, or is ended: what uses the processor for too long ends by itself before."""
    try:
        out, _ = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        out, _ = child.communicate()
    return [json.loads(line) for line in out.splitlines() if line.endswith(b"}")]


def again(parser: str, seed: int) -> str:
    """The command that opens one file again, and leaves it in the folder."""
    return f"PYTHONPATH=. python tests/read_mutated.py {parser} FOLDER {seed} {seed + 1}"


@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.soak)])
@pytest.mark.parametrize("parser", PARSERS)
def test_files_are_read_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], parser: str, count: int) -> None:
    records = read_all(parser, tmp_path, count)
    failed = [record for record in records if record["result"] == "failed"]
    told = [f"\n{again(parser, record['seed'])}: {record['subject']}: {record['error']}" for record in failed[:3]]
    assert not failed, f"{len(failed)} of {len(records)} files were neither read nor refused{''.join(told)}"
    results = Counter(record["result"] for record in records)
    assert len(records) == count
    assert results["refused"] > count / 4
    assert results["unchanged"] + results["other"] > count / 100
    if count >= 2000:
        summary = {"parser": parser, "files": count, **dict(sorted(results.items()))}
        summary |= {"most_seconds": max(r["seconds"] for r in records), "most_bytes": max(r["grown"] for r in records)}
        with capsys.disabled():
            print(f"\n{json.dumps(summary)}")


def test_a_seed_gives_the_same_file_and_another_one_another() -> None:
    whole = tiny_models.tokenizer_json().encode()
    for change in (mutations.bytes_changed, mutations.json_changed):
        made = [change(whole, Random(f"x {seed}")) for seed in range(50)]
        assert made == [change(whole, Random(f"x {seed}")) for seed in range(50)]
        assert len(set(made) - {whole}) > 40


HARMFUL = """
import os, sys, warnings
from pathlib import Path
import read_mutated
from outside_files import PARSERS, Subject
from mlx_impl.errors import DamagedFileError

held = []

def hang():
    while True:
        pass

def refuse(words):
    raise DamagedFileError(words)

harm = {
    "nothing": lambda: refuse("damaged"),
    "crash": os.abort,
    "hang": hang,
    "memory": lambda: held.append(b"x" * (2 << 30)),
    "warning": lambda: warnings.warn("careful"),
    "two lines": lambda: refuse("one\\ntwo"),
    "a long line": lambda: refuse("x" * 2000),
    "not finite": lambda: [read_mutated.np.full(2, float("inf"))],
    "written": Path("ran").touch,
    "another error": lambda: int("x"),
}

def subject(folder, kind):
    path = folder / kind
    path.write_text("good")
    use = lambda: path.read_text() if path.read_text() == "good" else harm[kind]()
    return Subject(kind, path, lambda content, draw: b"bad", use)

PARSERS["harmful"] = lambda folder: [subject(folder, kind) for kind in harm]
read_mutated.SECONDS = 0.2
read_mutated.main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
"""


def test_what_a_reader_must_not_do_is_noticed(tmp_path: Path) -> None:
    """A crash, a hang and the others, each by its own file, and the file after it is looked at too."""
    program = tmp_path / "harmful.py"
    program.write_text(HARMFUL)
    records = read_all("harmful", tmp_path, 10, program)
    assert [record["seed"] for record in records] == list(range(10))
    assert [record["result"] for record in records] == ["refused", *["failed"] * 9]
    words = {record["subject"]: record["error"] for record in records}
    assert "-6" in words["crash"]
    assert "in hang" in words["hang"]
    assert "MemoryError" in words["memory"] or "more memory" in words["memory"]
    for kind, said in (
        ("warning", "careful"),
        ("two lines", "not one printable line"),
        ("a long line", "2,000 characters"),
        ("not finite", "not finite"),
        ("written", "ran was written"),
        ("another error", "ValueError"),
    ):
        assert said in words[kind]
