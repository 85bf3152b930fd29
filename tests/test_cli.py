"""The command line as a whole: help, streams, interruptions, errors. Its commands are tested in test_cli_*.py.

Models are tiny and commands run in this process (see terminal.py). A process of its own is started only for what
cannot be had without one: a signal, a terminal, a reader that leaves, the modules that --help loads.
"""

import contextlib
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from terminal import ROOT, TEXT, isolate, learned, run, start, tree, write_model

import cli
from mlx_impl.commands import using

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


def test_the_list_of_commands_is_what_click_makes_of_the_commands_themselves() -> None:
    ours, theirs = click.HelpFormatter(), click.HelpFormatter()
    cli.cli.format_commands(click.Context(cli.cli), ours)
    click.Group.format_commands(cli.cli, click.Context(cli.cli), theirs)
    assert ours.getvalue() == theirs.getvalue()
    assert theirs.getvalue().count("\n  ") == len(COMMANDS) > 0


def test_what_is_no_command_is_wrong_usage() -> None:
    assert "lern" not in cli.cli.commands
    done = run("lern")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: No such command 'lern'")


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


def test_a_lesson_is_kept_where_stderr_takes_nothing(model: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with open("/dev/full", "wb") as full:
        process = start("learn", "-m", model, "--text", "the cat sat on the mat", "--steps", "3", stderr=full)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert out.startswith(b"main v0001: learned text in ")
        failing = start("log", "nope", "-m", model, stderr=full)
        failing.communicate(timeout=60)
        assert failing.returncode == 2  # the code says what nobody could be told


def test_a_lesson_is_kept_when_its_terminal_closes(model: Path) -> None:
    """As in a session of its own, which no signal reaches: what it writes from then on is an error of its own."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = start(
        "learn", "-m", model, "--text", "the cat sat on the mat", "--steps", "60", stderr=theirs, env=environment
    )
    os.close(theirs)
    seen = b""
    while b"step" not in seen:
        seen += os.read(ours, 65536)
    os.close(ours)
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
    assert re.match(rb"main v0001: learned 1\d % of reference\.txt in ", out)
    assert b"\x1b" not in out
    assert b"step 3/3" in seen
    assert b"tokens to learn" in seen
    assert b"{" not in seen
    assert 0 <= seen.rfind(b"\x1b[?25l") < seen.rfind(b"\x1b[?25h")


def test_a_run_that_the_clock_ends_shows_no_last_step(text: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    config = tmp_path / "config.yaml"
    config.write_text("model: {preset: tiny, num_layers: 1}\ntrain: {seq_len: 32, batch_size: 1, grad_accum: 1}\n")
    run_of = ("train", text, "--out", tmp_path / "run", "--config", config, "--minutes", "0.03")
    process = start(*run_of, stderr=theirs, env=environment)
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):
        while piece := os.read(ours, 65536):
            seen += piece
    os.close(ours)
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert re.search(rb"step \d+ ", seen)
    assert not re.search(rb"step \d+/", seen)


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
    plain = using.write
    pieces: list[str] = []

    def third_is_interrupted(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            raise KeyboardInterrupt
        plain(piece)

    monkeypatch.setattr(using, "write", third_is_interrupted)
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
