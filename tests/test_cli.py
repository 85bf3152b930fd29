"""The command line, command by command: what it prints, where, and with which exit code.

Models are tiny and commands run in this process (see terminal.py). A process of its own is started only for what
cannot be had without one: a signal, a terminal, a reader that leaves, the modules that --help loads.
"""

import contextlib
import json
import math
import os
import pty
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from pydoc_data import topics
from typing import Any

import click
import pytest
import tiny_models
from terminal import ROOT, TEXT, isolate, run, start, tiny_tokenizer, tree, write_model

import cli
from mlx_impl import demo
from mlx_impl.modeldir import verify_manifest
from mlx_impl.tokenizer import Tokenizer

COMMANDS = sorted(cli.cli.commands)


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


def as_json(*arguments: str | Path, stdin: bytes = b"") -> Any:
    """The one JSON object that a command with --json prints."""
    done = run(*arguments, "--json", stdin=stdin)
    assert done.code == 0, done.err
    assert done.out.isascii()
    assert done.out.endswith("}\n")
    assert done.out.count("\n") == 1
    return json.loads(done.out)


def learned(model: Path, *more: str | Path) -> Any:
    """Teach one quick lesson."""
    return as_json("learn", "-m", model, "--text", "The key lies under the pot. " * 8, "--steps", "2", *more)


# -- help --------------------------------------------------------------------------------------------------------


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys, cli\n"
        "for arguments in [], *([name] for name in cli.cli.commands):\n"
        "    try: cli.main([*arguments, '--help'])\n"
        "    except SystemExit as ended: assert ended.code == 0\n"
        "print(sorted({'mlx', 'torch', 'numpy', 'rich', 'transformers', 'yaml'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"
    assert done.stdout.count("Usage: ") == 1 + len(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_option_and_its_examples_parse(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").mkdir()
    command = cli.cli.commands[name]
    shown = run(name, "--help")
    assert shown.code == 0
    examples = [line.partition("minimac-mlx ")[2] for line in shown.out.splitlines() if "  minimac-mlx " in line]
    examples += [line.partition("minimac-mlx ")[2] for line in shown.out.splitlines() if "| minimac-mlx " in line]
    assert examples, "no example"
    for example in examples:
        first, *arguments = shlex.split(example)
        assert first == name
        command.make_context(name, arguments)  # raises for an option that does not exist or a value that is wrong
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    assert [option.name for option in options if not option.help] == []
    assert {"as_json", "quiet", "debug"} <= {option.name for option in options}


def test_without_a_command_the_help_is_shown_and_the_code_is_wrong_usage() -> None:
    done = run()
    assert (done.code, done.out) == (2, "")
    assert "minimac-mlx learn notes.md" in done.err


def test_version() -> None:
    done = run("--version")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("minimac-mlx")


# -- pull and the default model ----------------------------------------------------------------------------------


def test_pull_a_folder_then_commands_need_no_model(tmp_path: Path, model: Path) -> None:
    done = run("pull", model, "--quiet")
    pulled = tmp_path / "home" / "models" / "model"
    assert (done.code, done.out, done.err) == (0, f"{pulled} is now the default model\n", "")
    verify_manifest(pulled)
    assert as_json("doctor")["model"] == str(pulled)
    assert as_json("generate", "the", "--max-tokens", "3")["tokens"] == 3


def test_pull_a_gguf(tmp_path: Path) -> None:
    path = tiny_models.write_gguf(tmp_path / "Tiny.gguf")
    assert as_json("pull", path) == {"model": str(tmp_path / "home" / "models" / "tiny")}
    assert as_json("generate", "the 123", "--max-tokens", "2", "--domain", "none")["domain"] is None


def test_which_model_is_used(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("list").err == "error: no model yet: run `minimac-mlx pull`, or name one with --model\n"
    as_json("pull", model)
    other = write_model(tmp_path / "other", d_model=48)
    monkeypatch.setenv("MINIMAC_MODEL", str(other))
    assert as_json("doctor")["model"] == str(other)
    assert as_json("doctor", "--model", model)["model"] == str(model)
    monkeypatch.setenv("MINIMAC_MODEL", str(tmp_path / "gone"))
    done = run("generate", "x")
    assert (done.code, done.out) == (2, "")
    assert "MINIMAC_MODEL names it" in done.err


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


def test_learn_again_tells_what_was_kept(model: Path, text: Path) -> None:
    as_json("learn", "-m", model, text, "--steps", "1", "--source", "first")
    second = learned(model, "--source", "second")
    assert (second["version"], second["source"]) == ("v0002", "second")
    assert "heldout" not in second
    assert second["fit"]["after"] < second["fit"]["before"]
    (kept,) = second["kept"]
    assert kept.items() >= {"version": "v0001", "source": "first"}.items()
    assert math.isclose(kept["ppl_forget_percent"], 100 * math.expm1(kept["after"] - kept["before"]), abs_tol=1e-6)


def test_replay_and_ewc_can_be_switched_off(model: Path, text: Path) -> None:
    lesson = ("learn", "-m", model, text, "--steps", "2", "--quiet")
    as_json(*lesson, "--importance", "2")
    assert as_json(*lesson)["replayed_tokens"] > 0
    states = [model / "learner" / "main" / name / "state.safetensors" for name in ("v0002", "v0003")]
    assert as_json(*lesson, "--no-replay", "--no-ewc")["replayed_tokens"] == 0
    assert states[1].stat().st_size < 0.5 * states[0].stat().st_size  # no Fisher in it
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
    assert run("list", "-m", model).out == "nothing learned yet; teach it with `minimac-mlx learn`\n"
    bare = as_json("generate", "-m", model, "the key", "--max-tokens", "6", "--temperature", "0")
    for domain in ("main", "main", "main", "law"):
        learned(model, "--domain", domain)
    records = as_json("list", "-m", model)["domains"]
    assert [(r["domain"], r["version"], r["lessons"]) for r in records] == [("law", "v0001", 1), ("main", "v0003", 3)]
    lines = run("list", "-m", model).out.splitlines()
    assert [line.split()[:2] for line in lines] == [["law", "v0001"], ["main", "v0003"]]
    assert as_json("undo", "-m", model) == {"domain": "main", "undone": "v0003", "version": "v0002"}
    assert run("undo", "-m", model, "main", "--to", "v0001").out == "undone v0002; main is at v0001\n"
    assert run("undo", "-m", model).out == "undone v0001; main had no other lesson and is removed\n"
    assert [r["domain"] for r in as_json("list", "-m", model)["domains"]] == ["law"]
    again = as_json("generate", "-m", model, "the key", "--max-tokens", "6", "--temperature", "0", "--domain", "none")
    assert (again["text"], again["domain"]) == (bare["text"], None)


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
    assert first["heldout"].keys() == {"before", "after", "tokens"}
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


# -- generate ----------------------------------------------------------------------------------------------------


def test_generate_streams_what_json_says(model: Path) -> None:
    arguments = ("generate", "-m", model, "the cat", "--max-tokens", "40", "--seed", "3")
    done, record = run(*arguments), as_json(*arguments)
    assert (done.code, done.err) == (0, "")
    assert done.out == record["text"] + "\n"
    assert record["tokens"] <= 40
    assert record["domain"] is None
    assert record["tokens_per_second"] > 0
    assert record["prompt_tokens_per_second"] > 0
    assert as_json(*arguments[:-1], "4")["text"] != record["text"]
    assert as_json(*arguments)["text"] == record["text"]


def test_generate_reads_stdin_stops_and_chooses_a_domain(model: Path) -> None:
    learned(model, "--lr", "0.05", "--steps", "12")
    common = ("generate", "-m", model, "--temperature", "0", "--max-tokens", "12")
    main, none = as_json(*common, "The key lies"), as_json(*common, "The key lies", "--domain", "none")
    assert (main["domain"], none["domain"]) == ("main", None)
    assert main["text"] != none["text"]
    assert as_json(*common, "-", stdin=b"The key lies")["text"] == main["text"]
    assert as_json(*common, "-", "--domain", "main", stdin=b"The key lies")["text"] == main["text"]
    middle = main["text"][3:5]
    stopped = as_json(*common, "The key lies", "--stop", middle)
    assert (stopped["text"], stopped["finish"]) == (main["text"].partition(middle)[0], "stop")


def test_a_prompt_cache_changes_nothing_but_the_time(model: Path, tmp_path: Path) -> None:
    learned(model, "--domain", "keys")
    kept, common = tmp_path / "kept", ("generate", "-m", model, "--temperature", "0", "--max-tokens", "5")
    for prompt, domain in (("the key", "keys"), ("the key lies", "keys"), ("the key lies", "none")):
        expected = as_json(*common, prompt, "--domain", domain)["text"]
        found = as_json(*common, prompt, "--domain", domain, "--prompt-cache", kept)["text"]
        assert (found, kept.exists()) == (expected, True)
    done = run(*common, "x", "--prompt-cache", kept, "--window", "16")
    assert (done.code, done.out) == (2, "")
    assert "give one of them" in done.err
    kept.write_bytes(b"x" * 100)
    assert run(*common, "x", "--prompt-cache", kept).code == 3


def test_generate_from_nothing_and_past_the_context(tmp_path: Path) -> None:
    model = write_model(tmp_path / "short", max_seq_len=16)
    greedy = ("generate", "-m", model, "--temperature", "0")
    assert as_json(*greedy, "", "--max-tokens", "2")["tokens"] == 2
    long = run(*greedy, "the cat " * 300, "--max-tokens", "4")
    assert long.code == 0
    assert "4 tokens, the model was trained for 16: what lies beyond gets worse\n" in long.err
    assert run(*greedy, "the cat " * 300, "--max-tokens", "4", "--window", "16", "--quiet").err == ""
    assert run(*greedy, "a", "--max-tokens", "8").err == ""


# -- eval --------------------------------------------------------------------------------------------------------


def test_eval(model: Path, text: Path) -> None:
    record = as_json("eval", "-m", model, text, "--domain", "none")
    assert {"tokens", "loss", "perplexity", "bits_per_byte", "accuracy", "domain"} <= set(record)
    ids = tiny_tokenizer().encode(TEXT)
    assert record["tokens"] == len(ids)  # its end token is predicted, its first token is not
    assert math.isclose(record["perplexity"], math.exp(record["loss"]))
    unseen = len(tiny_tokenizer().token_bytes(ids[0]))
    bits = record["loss"] * record["tokens"] / math.log(2) / (len(TEXT.encode()) - unseen)
    assert math.isclose(record["bits_per_byte"], bits)
    assert 0 <= record["accuracy"] <= 1
    assert record["domain"] is None
    assert as_json("eval", "-m", model, "-", "--domain", "none", stdin=TEXT.encode()) == record
    assert as_json("eval", "-m", model, text) == {**record, "domain": "auto", "domains": {"none": 1}}
    learned(model)
    taught = as_json("eval", "-m", model, text, "--domain", "main")
    assert taught["domain"] == "main"
    assert taught["loss"] != record["loss"]
    assert as_json("eval", "-m", model, text, "--domain", "none") == record
    lines = run("eval", "-m", model, text, "--domain", "none").out.splitlines()
    assert lines[0] == f"domain none, {len(ids):,} tokens"
    assert [line.split("  ")[0] for line in lines[1:5]] == ["loss", "perplexity", "bits per byte", "accuracy"]


def test_eval_stays_within_the_models_context(tmp_path: Path, text: Path) -> None:
    model = write_model(tmp_path / "short", max_seq_len=64)
    assert as_json("eval", "-m", model, text) == as_json("eval", "-m", model, text, "--context", "64")
    done = run("eval", "-m", model, text, "--context", "65")
    assert (done.code, done.out) == (2, "")
    assert done.err == "error: --context 65 is longer than the model's context of 64 tokens\n"


# -- tokenizer, train, doctor, demo ------------------------------------------------------------------------------


def test_tokenizer(tmp_path: Path, text: Path) -> None:
    out = tmp_path / "tok"
    arguments = ("tokenizer", text, "--out", out, "--vocab-size", "350", "--special-token", "<|user|>")
    assert as_json(*arguments) == {"tokenizer": str(out), "vocab_size": 350}
    loaded = Tokenizer.load(out)
    assert loaded.decode(loaded.encode(TEXT)) == TEXT
    assert len(loaded.special_ids) == 5
    again = run(*arguments)
    assert (again.code, again.err) == (2, f"error: {out} exists already; name another folder or remove it first\n")


def test_train_resume_and_use(tmp_path: Path, text: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("model: {preset: tiny, d_model: 32, num_layers: 1, d_ff: 48}\ntrain: {lr: 3e-4, grad_accum: 1}\n")
    out = tmp_path / "trained"
    record = as_json(
        *("train", text, "--out", out, "--config", config, "--vocab-size", "350"),
        *("--steps", "2", "--batch-size", "2", "--seq-len", "32"),
    )
    assert (record["model"], record["step"], record["tokens"]) == (str(out), 2, 128)
    verify_manifest(out)
    done = run("train", "--out", out, "--resume", "--steps", "3", "--quiet")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"{out}: 3 steps, 192 tokens in ")
    assert (out / "loss.png").stat().st_size > 1000
    assert as_json("generate", "-m", out, "the", "--max-tokens", "2", "--temperature", "0")["tokens"] == 2


def test_doctor(tmp_path: Path) -> None:
    record = as_json("doctor")
    assert record["model"] is None
    assert {"mlx", "numpy"} <= set(record["packages"])
    assert record["memory_bytes"] > 2**28
    lines = run("doctor").out.splitlines()
    assert "model     none yet: run `minimac-mlx pull`" in lines
    assert lines[-1] == "all is well" or lines[-1].startswith("! ")


@pytest.mark.parametrize("named", [True, False])
def test_demo(named: bool, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topics, "topics", {name: topics.topics[name] for name in sorted(topics.topics)[:16]})
    monkeypatch.setattr(demo, "pull", lambda progress: model)
    before = tree(model)
    if named:
        record = as_json("demo", "--seconds", "1.5", "--model", write_model(tmp_path / "mine"), "--quiet")
        assert record["model"] == str(tmp_path / "mine")
        assert record["train"]["steps"] >= 1
        assert record["learn"]["domain"] == "python"
        assert record["learn"]["answer_undone"] == record["learn"]["answer_before"]
        assert record["learn"]["domains_left"] == []
    else:
        done = run("demo", "--seconds", "1.5", "--quiet")
        assert (done.code, done.err) == (0, "")
        assert str(model) in done.out
        assert "the very same answer as before" in done.out
    assert tree(model) == before


# -- streams -----------------------------------------------------------------------------------------------------


def test_an_encoding_without_the_character_is_no_reason_to_stop(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned(model, "--source", "naïve 🎈")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    process = start("list", "-m", model)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")
    assert rb"na\xefve \U0001f388" in out


def test_closed_streams(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("learn", "-m", model, "-", stdin=None).err == "error: stdin is closed: there is nothing to read\n"
    # What Python makes of streams that were closed by whoever started it.
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with pytest.raises(SystemExit) as ended:
        cli.main(["learn", "-m", str(model), "--text", "the cat sat", "--steps", "1"])
    assert ended.value.code == 0


def test_a_reader_that_leaves_ends_generate_quietly(model: Path) -> None:
    process = start("generate", "-m", model, "the", "--max-tokens", "1000000", "--temperature", "0", "--quiet")
    assert process.stdout is not None
    assert process.stdout.read(1)
    process.stdout.close()
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")


def test_a_lesson_goes_on_when_nobody_watches(model: Path) -> None:
    read, written = os.pipe()
    os.close(read)
    process = start("learn", "-m", model, "--text", "the cat sat on the mat", "--steps", "3", stderr=written)
    os.close(written)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out.startswith(b"main v0001: learned text in ")


def test_stdout_that_takes_nothing(model: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with open("/dev/full", "wb") as full:
        process = start("list", "-m", model, stdout=full)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith(b"error: the result could not be written to stdout: ")
    assert err.count(b"\n") == 1


def test_a_terminal_sees_a_moving_line_and_gets_its_cursor_back(model: Path, text: Path) -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = start("learn", "-m", model, text, "--steps", "3", stderr=theirs, env=environment)
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # EIO: how Linux says that the other end was closed
        while piece := os.read(ours, 65536):
            seen += piece
    os.close(ours)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out.startswith(b"main v0001: learned reference.txt in ")
    assert b"\x1b" not in out
    assert b"step 3/3" in seen
    assert b"tokens to learn" in seen
    assert b"{" not in seen
    assert 0 <= seen.rfind(b"\x1b[?25l") < seen.rfind(b"\x1b[?25h")


# -- interruptions, locks, and what nobody foresaw ---------------------------------------------------------------


def test_ctrl_c_during_a_lesson_keeps_nothing_and_a_second_lesson_waits(model: Path, text: Path) -> None:
    before = tree(model)
    process = start("learn", "-m", model, text, "--steps", "1000000")
    try:
        assert process.stderr is not None
        while b'"step"' not in process.stderr.readline():
            assert process.poll() is None
        second = run("learn", "-m", model, "--text", "the cat sat", "--steps", "1")
        assert (second.code, second.out) == (4, "")
        assert second.err.splitlines()[-1].startswith("error: ")
        assert f"process {process.pid};" in second.err
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, out) == (130, b"")
    assert err.splitlines()[-1] == b"interrupted"
    assert b"Traceback" not in err
    assert tree(model) == before
    assert learned(model)["version"] == "v0001"


def test_ctrl_c_during_generate(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = cli.write
    pieces: list[str] = []

    def third_is_interrupted(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            raise KeyboardInterrupt
        plain(piece)

    monkeypatch.setattr(cli, "write", third_is_interrupted)
    done = run("generate", "-m", model, "the cat", "--max-tokens", "50", "--temperature", "0")
    assert done.code == 130
    assert done.out == "".join(pieces[:2])
    assert done.err.strip() == "interrupted"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RecursionError("too\ndeep"), "internal error: RecursionError: too deep; run it again with --debug and report"),
        (RuntimeError("[malloc] Unable to allocate 9 bytes."), "out of memory; take a smaller --batch-size"),
        (MemoryError(), "out of memory"),
        (PermissionError(13, "Permission denied", "/x"), "/x: permission denied"),
        (OSError(5, "Input/output error", "/x\n/y"), "/x\ufffd/y: Input/output error"),
    ],
)
def test_what_nobody_foresaw_is_one_line_and_debug_shows_where(
    error: Exception, words: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: object) -> None:
        raise error

    monkeypatch.setattr("mlx_impl.store.Store.overview", fail)
    done = run("list", "-m", model)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(f"error: {words}")
    assert done.err.count("\n") == 1
    with_traceback = run("list", "-m", model, "--debug")
    assert with_traceback.code == 1
    assert "Traceback (most recent call last)" in with_traceback.err
    assert with_traceback.err.endswith(done.err)
