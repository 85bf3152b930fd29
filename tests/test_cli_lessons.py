"""Lessons on the command line: taught, seen, taken back, erased, checked."""

import json
import math
import os
import pty
import shutil
from pathlib import Path
from pydoc_data import topics

import pytest
from terminal import TEXT, as_json, isolate, learned, run, start, tree, write_model

from mlx_impl.learner import ContinualLearner
from mlx_impl.modeldir import verify_manifest


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isolate(monkeypatch, tmp_path / "home")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "reference.txt"
    path.write_text(TEXT)
    return path


# -- learn, list, undo -------------------------------------------------------------------------------------------


def test_learn_a_file(model: Path, text: Path) -> None:
    before = tree(model)
    lesson = as_json("learn", "-m", model, text, "--steps", "3", "--lr", "5e-3")
    assert {"domain": "main", "version": "v0001", "source": "reference.txt", "steps": 3}.items() <= lesson.items()
    assert lesson["tokens"] > 2000
    assert lesson["kept"] == []
    assert lesson["trainable_parameters"] == 14 * 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
    assert lesson["seconds"] > 0
    assert lesson["tokens_per_second"] > 0
    assert lesson["heldout"]["after"] < lesson["heldout"]["before"] < 7  # ln 400 = 6.0 at chance
    assert {path: content for path, content in tree(model).items() if not path.startswith("learner/")} == before


def test_windows_as_long_as_asked_for(model: Path, text: Path) -> None:
    lesson = ("learn", "-m", model, text, "--steps", "3", "--batch-size", "2")
    assert as_json(*lesson, "--seq-len", "8")["trained_tokens"] == 3 * 2 * 8
    assert as_json(*lesson, "--seq-len", "16")["trained_tokens"] == 3 * 16  # beside windows of 8 that are replayed
    done = run(*lesson, "--seq-len", "0")
    assert (done.code, done.err.count("\n")) == (2, 1)


def test_learn_again_tells_what_was_kept(model: Path, text: Path) -> None:
    as_json("learn", "-m", model, text, "--steps", "1", "--source", "first")
    second = learned(model, "--source", "second")
    assert (second["version"], second["source"]) == ("v0002", "second")
    assert "heldout" not in second
    assert second["fit"]["after"] < second["fit"]["before"]
    (kept,) = second["kept"]
    assert kept.items() >= {"version": "v0001", "source": "first"}.items()
    assert math.isclose(kept["ppl_forget_percent"], 100 * math.expm1(kept["after"] - kept["before"]), abs_tol=1e-6)
    assert kept["taught_percent"] == 0


def test_what_was_held_out_and_is_taught_later_is_told(model: Path, text: Path, tmp_path: Path) -> None:
    """A text, and then a folder with it: what a lesson holds out depends on all that it is given."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number}.txt").write_text(topics.topics[sorted(topics.topics)[number]][:3000])
    (folder / "notes.txt").write_bytes(text.read_bytes())
    as_json("learn", "-m", model, text, "--steps", "1")
    done = run("learn", "-m", model, str(folder), "--steps", "1")
    (kept,) = as_json("log", "-m", model, "main")["lessons"][0]["kept"]
    assert kept["taught_percent"] > 50
    assert f"({kept['taught_percent']:.0f} % of that text was in this lesson)" in done.out
    assert f"({kept['taught_percent']:.0f} % of that text was in v0002)" in run("log", "-m", model, "main").out
    (told,) = [
        line for line in run("report", "-m", model, "--out", tmp_path / "r").out.splitlines() if "v0001's" in line
    ]
    assert told.startswith(f"{kept['taught_percent']:.0f} % of v0001's held-out text was taught by a later lesson:")
    forgotten = json.loads((tmp_path / "r/report.json").read_text())["domains"][0]["matrix"]["ppl_forget_percent"]
    assert forgotten["each"][0] is not None
    assert forgotten["mean"] is None


def test_labels_keep_their_letters_and_answers_obey_no_one(
    model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ContinualLearner, "answer", lambda self, prompt, domain: "red\x1b[31m\nand\u202fblue")
    source = "Screenshot 9.41\u202fPM \x1b]0;x\x07.txt"
    record = as_json("learn", "-m", model, text, "--steps", "1", "--source", source, "--probe", "What?")
    assert record["source"] == "Screenshot 9.41\u202fPM \ufffd]0;x\ufffd.txt"
    done = run("learn", "-m", model, text, "--steps", "1", "--probe", "What?")
    assert done.out.endswith("after: red\ufffd[31m and blue\n")
    assert "\x1b" not in done.out


def test_ctrl_c_while_the_probe_answers_says_that_the_lesson_is_kept(
    model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(self: ContinualLearner, prompt: str, domain: str) -> str:
        if self.store.domains():
            raise KeyboardInterrupt
        return "before"

    monkeypatch.setattr(ContinualLearner, "answer", answer)
    done = run("learn", "-m", model, text, "--steps", "1", "--probe", "What?")
    assert (done.code, done.out) == (130, "")
    assert "main v0001 was learned already; `minimac-mlx undo main` takes it back" in done.err
    assert done.err.endswith("interrupted\n")


def test_replay_and_ewc_can_be_switched_off(model: Path, text: Path) -> None:
    lesson = ("learn", "-m", model, text, "--steps", "2", "--quiet")
    as_json("learn", "-m", model, "--text", "Something else before.", "--steps", "2", "--quiet", "--importance", "2")
    assert as_json(*lesson)["replayed_tokens"] > 0
    states = [model / "learner" / "main" / name / "state.safetensors" for name in ("v0002", "v0003")]
    assert as_json(*lesson, "--no-replay", "--no-ewc")["replayed_tokens"] == 0
    assert states[1].stat().st_size >= states[0].stat().st_size  # the Fisher that was there is kept for later


def test_windows_longer_than_the_context_are_said_to_be_shorter(model: Path, text: Path) -> None:
    lesson = ("learn", "-m", model, text, "--steps", "1", "--seq-len")
    said = [run(*lesson, length).err for length in ("16", "100000")]
    assert "windows of" not in said[0]
    assert "tokens, the model's context, not 100,000" in said[1]


def test_a_weight_of_a_lesson_is_positive(model: Path, text: Path) -> None:
    lesson = ("learn", "-m", model, text, "--steps", "2", "--quiet")
    done = run(*lesson, "--importance", "0")
    assert (done.code, done.err.count("\n")) == (2, 1)


def test_what_learn_reads_and_how_it_is_labelled(tmp_path: Path, model: Path) -> None:
    folder = tmp_path / "papers"
    folder.mkdir()
    (folder / "a.txt").write_text("the cat sat on the mat")
    (folder / "b.bin").write_bytes(b"\0\1")
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9\n\x1b[31m.txt"))
    odd.write_text("the dog sat on the cat")
    common = ("learn", "-m", model, "--steps", "1", "--quiet")
    assert as_json(*common, "-", stdin="the bird sang — twice".encode())["source"] == "stdin"
    assert as_json(*common, "--text", "the fish swam")["source"] == "text"
    assert as_json(*common, folder / "a.txt", odd)["source"] == "a.txt and 1 more"
    assert as_json(*common, odd)["source"] == "caf\ufffd\ufffd\ufffd[31m.txt"
    done = run("learn", "-m", model, "--steps", "1", folder)
    assert done.code == 0
    assert f"passed over {folder / 'b.bin'} (unknown extension '.bin')\n" in done.err
    assert "learned papers in" in done.out
    assert run(*common, folder).err == f"passed over {folder / 'b.bin'} (unknown extension '.bin')\n"
    (folder / "torn.pdf").write_bytes(b"%PDF-1.4")
    told = run("learn", "-m", model, "--steps", "1", folder).err
    assert f"passed over {folder / 'torn.pdf'} (not a readable PDF" in told, "before what nobody expects to be read"
    assert f", {folder / 'b.bin'} (unknown" in told
    (folder / "b.bin").rename(folder / "\x1b[31mb.bin")
    assert "papers/\ufffd[31mb.bin (unknown" in run("learn", "-m", model, "--steps", "1", folder).err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--epochs", "1e306"), "--epochs 1e+306 must be a positive number, at most 1,000,000,000"),
        (("--base-data", "-"), "- is stdin, which is read once: as the text or as --base-data"),
    ],
)
def test_what_cannot_be_meant_is_refused(model: Path, options: tuple[str, ...], told: str) -> None:
    done = run("learn", "-m", model, "-", *options, stdin=b"some words")
    assert (done.code, told in done.err) == (2, True)


def test_distilling_on_nothing_is_told(model: Path, text: Path) -> None:
    done = run("learn", "-m", model, text, "--steps", "1", "--distill", "1")
    assert "but --base-data names none" in done.err


def test_progress_goes_to_stderr_and_quiet_shows_none(model: Path) -> None:
    arguments = ("learn", "-m", model, "--text", "the cat sat on the mat", "--steps", "2")
    loud, quiet = run(*arguments), run(*arguments, "--quiet")
    events = [json.loads(line)["event"] for line in loud.err.splitlines()]
    assert events[0] == "begin"
    assert "step" in events
    assert quiet.err == ""
    assert loud.out.startswith("main v0001: learned text in ")
    assert quiet.out.startswith("main v0002: learned text in ")


def test_lessons_elsewhere(tmp_path: Path, model: Path) -> None:
    before = tree(model)
    learned(model, "--store", tmp_path / "lessons")
    assert tree(model) == before
    assert [record["domain"] for record in as_json("list", "-m", model, "--store", tmp_path / "lessons")["domains"]]
    assert as_json("list", "-m", model) == {"domains": []}


def test_list_and_undo(model: Path) -> None:
    there = f"nothing learned yet in {model / 'learner'}; teach it with `minimac-mlx learn`\n"
    assert run("list", "-m", model).out == there
    bare = as_json("generate", "-m", model, "the key", "--max-tokens", "6", "--temperature", "0")
    for domain in ("main", "main", "main", "law"):
        learned(model, "--domain", domain)
    records = as_json("list", "-m", model)["domains"]
    assert [(r["domain"], r["version"], r["lessons"]) for r in records] == [("law", "v0001", 1), ("main", "v0003", 3)]
    lines = run("list", "-m", model).out.splitlines()
    assert [line.split()[:2] for line in lines] == [["law", "v0001"], ["main", "v0003"]]
    back = {"domain": "main", "undone": ["v0003"], "erased": [], "version": "v0002"}
    assert as_json("undo", "-m", model, "main") == back
    assert run("undo", "-m", model, "main", "--to", "v0003").out == "main is at v0003 again\n"
    assert run("undo", "-m", model, "main", "--to", "v0001").out == "undone v0003, v0002; main is at v0001\n"
    assert run("undo", "-m", model, "main").out == (
        "undone v0001; main has no other lesson and is removed, with v0002, v0003, which had been undone before\n"
    )
    assert [r["domain"] for r in as_json("list", "-m", model)["domains"]] == ["law"]
    again = as_json("generate", "-m", model, "the key", "--max-tokens", "6", "--temperature", "0", "--domain", "none")
    assert (again["text"], again["domain"]) == (bare["text"], None)


def test_undo_takes_back_what_was_learned_last(model: Path) -> None:
    assert run("undo", "-m", model).err == "error: nothing learned yet; teach it with `minimac-mlx learn`\n"
    for domain in ("main", "law", "main", "law"):
        learned(model, "--domain", domain)
    assert [as_json("undo", "-m", model)["domain"] for _ in range(4)] == ["law", "main", "law", "main"]
    assert as_json("list", "-m", model) == {"domains": []}


def test_how_much_was_learned_and_measured_is_told(model: Path, text: Path) -> None:
    for _ in range(3):
        last = run("learn", "-m", model, text, "--steps", "1")
    assert last.code == 0
    record = as_json("log", "-m", model)["lessons"][0]
    assert record["not_measured"] == 2 - len(record["kept"]) > 0
    seen = record["seen_percent"]
    assert 0 < seen < 100
    first, *rest = last.out.splitlines()
    assert first.startswith(f"main v0003: learned {seen:.0f} % of reference.txt in ")
    assert "1 step of 1 window" in first
    assert rest[-1].endswith(" not measured, to keep this one short: `minimac-mlx report main` measures all")
    line = run("log", "-m", model).out.splitlines()[0]
    assert f"{record['tokens']:,} tokens ({seen:.0f} % of the text), 1 step, " in line


def test_a_text_of_which_only_answers_count_was_learned_whole(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "qa.jsonl"
    file.write_text(json.dumps({"prompt": "the cat sat on the mat " * 9, "completion": "the dog"}) + "\n")
    record = as_json("learn", "-m", model, file, "--loss-on", "completion", "--epochs", "1", "--seconds", "600")
    assert record["trained_tokens"] < record["tokens"] / 2
    assert (record["seen_percent"], record["complete"]) == (100, True)
    assert f"{record['tokens']:,} tokens, 1 step, " in run("log", "-m", model).out


def test_a_model_may_be_named_by_what_it_was_pulled_as(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned(model)
    monkeypatch.setenv("MINIMAC_HOME", str(tmp_path / "home"))
    shutil.copytree(model, tmp_path / "home" / "models" / "mine")
    assert as_json("list", "-m", "mine") == as_json("list", "-m", model)
    for name in ("yours", "../models/mine", "."):
        assert run("generate", "x", "-m", name).code == 2


# -- log, forget, prune, verify ----------------------------------------------------------------------------------


def test_log(model: Path, text: Path) -> None:
    as_json("learn", "-m", model, text, "--steps", "1")
    learned(model, "--source", "second")
    record = as_json("log", "-m", model)
    assert (record["domain"], record["pruned"]) == ("main", 0)
    assert [(r["version"], r["source"]) for r in record["lessons"]] == [("v0002", "second"), ("v0001", "reference.txt")]
    latest, first = record["lessons"]
    assert {"created", "tokens", "steps", "seconds", "fit", "kept"} <= latest.keys()
    assert [kept["version"] for kept in latest["kept"]] == ["v0001"]
    assert first["heldout"].keys() == {"before", "after", "tokens", "taught_percent"}
    lines = run("log", "-m", model, "main").out.splitlines()
    assert [line.split()[0] for line in lines] == ["v0002", "perplexity", "v0001"]
    assert f"{latest['tokens']:,} tokens, 2 steps, " in lines[0]
    assert f"fit {latest['fit']['before']:.3f} -> {latest['fit']['after']:.3f}  second" in lines[0]
    assert f"v0001 {latest['kept'][0]['ppl_forget_percent']:+.1f} %" in lines[1]
    as_json("undo", "-m", model)
    assert [r["version"] for r in as_json("log", "-m", model)["lessons"]] == ["v0001"]
    unknown = run("log", "-m", model, "law")
    assert (unknown.code, unknown.out) == (2, "")
    assert unknown.err == "error: no domain called 'law'; there are: main\n"


def test_forget_needs_a_yes(model: Path) -> None:
    for domain in ("law", "law", "main"):
        learned(model, "--domain", domain, "--source", f"about {domain}.txt")
    before = tree(model)
    for stdin in (b"", b"y\n", None):
        done = run("forget", "-m", model, "law", stdin=stdin)
        assert (done.code, done.out) == (2, "")
        assert "say --yes if it is meant" in done.err
        assert done.err.count("\n") == 1
    assert tree(model) == before
    record = as_json("forget", "-m", model, "law", "--yes")
    assert (record["domain"], record["forgotten"]) == ("law", ["v0001", "v0002"])
    assert record["bytes"] > 20_000
    after = tree(model)
    assert {path for path in before if path.startswith("learner/law/")} == before.keys() - after.keys()
    changed = {path for path in after if after[path] != before[path]}
    assert changed == {"learner/learner.sqlite"}
    assert not any(b"law" in content for path, content in after.items() if path.startswith("learner/"))
    again = run("forget", "-m", model, "law", "--yes")
    assert (again.code, again.err) == (2, "error: no domain called 'law'; there are: main\n")
    assert run("forget", "-m", model, "main", "--yes").out.startswith("main is forgotten: 1 version, ")
    assert not (model / "learner").exists()


@pytest.mark.parametrize(("answer", "code"), [(b"y\n", 0), (b"\n", 1), (b"n\n", 1), (b"\x04", 130)])
def test_forget_asks_on_a_terminal(model: Path, answer: bytes, code: int) -> None:
    learned(model, "--source", "notes.md")
    before = tree(model)
    ours, theirs = pty.openpty()
    process = start("forget", "-m", model, "main", stdin=theirs)
    os.close(theirs)
    os.write(ours, answer)
    out, err = process.communicate(timeout=60)
    os.close(ours)
    assert process.returncode == code
    assert err.startswith(b"main: 1 version, learned from notes.md. Erase it for good? [y/N]: ")
    assert out.startswith(b"main is forgotten: ") == (code == 0)
    if code:
        assert err.endswith(b"error: nothing was erased\n" if code == 1 else b"interrupted\n")
        assert tree(model) == before


def test_prune(model: Path) -> None:
    for _ in range(4):
        learned(model)
    assert run("prune", "-m", model).out == "nothing to prune\n"
    size = sum(len(content) for content in tree(model).values())
    record = as_json("prune", "-m", model, "--keep", "2")
    assert record["pruned"] == [{"domain": "main", "version": name} for name in ("v0001", "v0002")]
    assert record["bytes"] == size - sum(len(content) for content in tree(model).values()) > 20_000
    assert run("log", "-m", model).out.splitlines()[-1] == "2 older lessons of main pruned"
    as_json("undo", "-m", model)
    done = run("undo", "-m", model)
    assert (done.code, done.out) == (2, "")
    assert "v0003 is the oldest version of main that is kept" in done.err
    assert run("prune", "-m", model, "--keep", "1").out.startswith("pruned 1 version, ")
    assert run("prune", "-m", model, "--keep", "0").code == 2


def test_verify(model: Path) -> None:
    files = len(verify_manifest(model)["files"])
    counts = {"base_files": files, "domains": 0, "versions": 0, "files": 0}
    assert as_json("verify", "-m", model) == {"problems": [], **counts, "writer": None}
    for domain in ("law", "main", "main"):
        learned(model, "--domain", domain)
    before = tree(model)
    done = run("verify", "-m", model)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("all is well: 2 domains, 3 versions, ")
    assert done.out.endswith(f" files, {files} files of the base\n")
    assert tree(model) == before
    adapter = model / "learner" / "main" / "v0001" / "adapters.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-1] + b"?")
    (model / "learner" / "odd\x1b name").write_text("")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    bad = run("verify", "-m", model)
    assert (bad.code, bad.err) == (3, "")
    lines = bad.out.splitlines()
    assert len(lines) == 3
    assert "model.safetensors has sha256" in lines[0]
    assert lines[1].startswith(f"{model}/learner/odd\ufffd name: belongs to no lesson")
    assert lines[2] == f"{adapter}: changed since it was learned"
    as_record = run("verify", "-m", model, "--json")
    assert as_record.code == 3
    assert json.loads(as_record.out)["problems"] == lines
    (model / "learner" / "learner.sqlite").write_bytes(b"x" * 5000)
    broken = run("verify", "-m", model)
    assert broken.code == 3
    assert "learner.sqlite: file is not a database" in broken.out.splitlines()[1]


def test_forget_and_prune_wait_for_a_lesson(model: Path, text: Path) -> None:
    learned(model)
    process = start("learn", "-m", model, text, "--steps", "1000000")
    try:
        assert process.stderr is not None
        while b'"step"' not in process.stderr.readline():
            assert process.poll() is None
        for arguments in (("forget", "main", "--yes"), ("prune",), ("undo",)):
            done = run(*arguments, "-m", model)
            assert (done.code, done.out) == (4, "")
            assert f"process {process.pid};" in done.err
        looked = run("verify", "-m", model)
        assert looked.code == 0
        assert looked.out.endswith(f"; process {process.pid} is writing, so leftovers were not looked for\n")
        assert [r["version"] for r in as_json("log", "-m", model)["lessons"]] == ["v0001"]
    finally:
        process.kill()
        process.communicate()
