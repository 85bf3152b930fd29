"""Conversations: what the model is shown of them, what is left out, commands, and the terminal round them."""

import contextlib
import json
import os
import pty
import select
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lessons
import pytest
from terminal import TEXT, isolate, run, start, write_model

from mlx_impl import terminal
from mlx_impl.chat import COMMANDS, Chat
from mlx_impl.config import Budget
from mlx_impl.errors import DamagedFileError, InputError, OutputError
from mlx_impl.generate import Sampling, complete
from mlx_impl.learner import ContinualLearner
from mlx_impl.shell import harmless

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "


class Recording:
    """A screen that keeps what it is shown; `on_piece` is called for each piece of an answer."""

    def __init__(self, yes: bool = True, on_piece: Callable[[str], None] = lambda text: None) -> None:
        self.yes, self.on_piece = yes, on_piece
        self.domains: list[str | None] = []
        self.records: list[dict[str, Any]] = []
        self.answers: list[dict[str, Any]] = []
        self.texts: list[str] = []
        self.notes: list[str] = []
        self.questions: list[str] = []

    def begin(self, domain: str | None) -> None:
        self.domains.append(domain)

    def piece(self, text: str) -> None:
        self.on_piece(text)

    def end(self, record: dict[str, Any]) -> None:
        self.answers.append(record)

    def result(self, record: dict[str, Any], text: str) -> None:
        self.records.append(record)
        self.texts.append(text)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def failed(self, text: str) -> None:
        self.note(f"error: {text}")

    def confirm(self, question: str) -> bool:
        self.questions.append(question)
        return self.yes


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory without a chat template."""
    return lessons.tiny_base(tmp_path_factory.mktemp("base"), lessons.tiny_tokenizer())


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isolate(monkeypatch, tmp_path / "home")


@pytest.fixture
def learner(base: Path, tmp_path: Path) -> ContinualLearner:
    return lessons.opened(base, tmp_path / "store")


@pytest.fixture
def screen() -> Recording:
    return Recording()


def with_template(learner: ContinualLearner) -> ContinualLearner:
    learner.tokenizer.chat_template = TEMPLATE
    return learner


def chat(learner: ContinualLearner, screen: Recording, **options: Any) -> Chat:
    return Chat(learner, screen, **{"max_tokens": 6, "quiet": True, **options})


# -- talking -----------------------------------------------------------------------------------------------------


def test_turns_go_through_the_template_and_the_cache_changes_nothing(
    learner: ContinualLearner, screen: Recording
) -> None:
    talk = chat(with_template(learner), screen, system="Be brief.")
    first = talk.say("What is a name?")
    second = talk.say("And a module?")
    said = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is a name?"},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "And a module?"},
    ]
    again = complete(learner.model, learner.tokenizer, learner.tokenizer.encode_chat(said), 6, Sampling())
    assert (second.text, second.tokens, second.finish) == (again.text, len(again.tokens), again.finish)
    assert [record["text"] for record in screen.answers] == [first.text, second.text]


def test_a_second_turn_computes_only_what_is_new(
    learner: ContinualLearner, screen: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = chat(with_template(learner), screen)
    talk.say("What is a name, and what is it good for?")
    fed: list[int] = []
    hidden = type(learner.model).hidden

    def counting(self: Any, tokens: Any, *more: Any) -> Any:
        fed.append(tokens.shape[1])
        return hidden(self, tokens, *more)

    monkeypatch.setattr(type(learner.model), "hidden", counting)
    new = len(learner.tokenizer.encode("user: Why?\nassistant: "))
    talk.say("Why?")
    assert sum(fed) <= new + 2 * 6 + 4  # the answers are fed too, the first one maybe in other tokens
    talk.handle("/clear")
    assert talk.turns == []


def test_without_a_template_the_text_goes_on(learner: ContinualLearner, screen: Recording) -> None:
    talk = chat(learner, screen, system="A reference.")
    first = talk.say("Names are")
    second = talk.say("Modules are")
    whole = f"A reference.\nNames are\n{first.text}\nModules are"
    assert second.text == complete(learner.model, learner.tokenizer, whole, 6, Sampling()).text


def test_the_oldest_turns_are_left_out_when_the_context_is_full(learner: ContinualLearner, screen: Recording) -> None:
    talk = chat(with_template(learner), screen, system="Be brief.", max_tokens=8)
    for number in range(12):
        talk.say(f"Question number {number}: what is a name?")
        ids = learner.tokenizer.encode_chat([*talk.system, *talk.turns])
        assert len(ids) <= learner.model.config.max_seq_len + 8
    assert talk.turns[0]["role"] == "user"
    assert talk.turns[-2]["content"].startswith("Question number 11")
    assert len(talk.turns) < 24
    assert all("messages no longer fit into the 128 tokens" in note for note in screen.notes)
    assert 1 <= len(screen.notes) < 11  # each time some room is made for the turns that follow
    assert {record["finish"] for record in screen.answers} <= {"stop", "length"}


def test_a_message_longer_than_the_context_is_refused_and_forgotten(
    learner: ContinualLearner, screen: Recording
) -> None:
    talk = chat(learner, screen)
    assert talk.handle(lessons.text(0, 2000))
    assert "tokens and the model's context 128; shorten it" in screen.notes[0]
    assert (talk.turns, screen.answers) == ([], [])
    chat(learner, screen, system=lessons.text(0, 2000)).handle("Why?")
    assert screen.notes[1].startswith("error: this message and --system have ")


def test_an_answer_that_the_context_ends_says_so(learner: ContinualLearner, screen: Recording) -> None:
    answer = chat(learner, screen, max_tokens=500).say("What is a name?")
    assert answer.finish == "context"
    assert answer.tokens < 128


def test_an_empty_stop_string_is_refused_at_the_start(learner: ContinualLearner, screen: Recording) -> None:
    with pytest.raises(InputError, match="stop string must not be empty"):
        chat(learner, screen, stop=[".", ""])


def test_an_interruption_keeps_what_was_said_and_the_next_answer_is_right(learner: ContinualLearner) -> None:
    pieces: list[str] = []

    def interrupt(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 2:
            raise KeyboardInterrupt

    screen = Recording(on_piece=interrupt)
    talk = chat(with_template(learner), screen)
    first = talk.say("What is a name?")
    assert (first.finish, first.text) == ("interrupted", "".join(pieces[:2]))
    assert first.tokens == len(learner.tokenizer.encode(first.text)) > 0
    assert talk.turns[-1] == {"role": "assistant", "content": first.text}
    second = talk.say("Why?")
    said = [*talk.turns[:2], {"role": "user", "content": "Why?"}]
    ids = learner.tokenizer.encode_chat(said)
    assert second.text == complete(learner.model, learner.tokenizer, ids, 6, Sampling()).text


# -- commands ----------------------------------------------------------------------------------------------------


def test_learn_undo_and_forget(learner: ContinualLearner, screen: Recording, tmp_path: Path) -> None:
    talk = chat(learner, screen)
    path = tmp_path / "key notes.md"
    path.write_text(lessons.text(0))
    assert talk.handle(f'/learn "{path}"')
    assert talk.handle("/learn --domain keys The key lies under the pot.")
    assert [(r["domain"], r["version"], r["source"]) for r in screen.records] == [
        ("main", "v0001", "key notes.md"),
        ("keys", "v0001", "text"),
    ]
    assert screen.texts[1].startswith("keys v0001: learned text in ")
    talk.handle("/domain keys")
    talk.handle("/learn 'The.other/key'")
    assert screen.records[-1]["version"] == "v0002"
    talk.say("The key")
    assert screen.domains == ["keys"]
    talk.handle("/report")
    assert [record["domain"] for record in screen.records[-1]["domains"]] == ["keys", "main"]
    talk.handle("/report keys")
    assert [record["domain"] for record in screen.records[-1]["domains"]] == ["keys"]
    assert "v0002" in screen.texts[-1]
    talk.handle("/undo")
    assert screen.questions[-1] == "Take v0002 of keys (text) back?"
    assert learner.store.require("keys").name == "v0001"
    talk.handle("/forget keys")
    assert learner.store.domains() == ["main"]
    assert talk.domain == "auto"
    assert screen.notes == []


def test_the_next_answer_uses_what_was_learned_meanwhile(learner: ContinualLearner, screen: Recording) -> None:
    learner.learn_from_text(lessons.text(0))
    talk = chat(learner, screen, domain="main")
    before = talk.say("The key")
    learner.learn_from_text(lessons.text(1), budget=Budget(steps=4))
    talk.turns = []
    after = talk.say("The key")
    learner.set_adapter("main")
    assert after.text == complete(learner.model, learner.tokenizer, "The key", 6, Sampling()).text
    assert before.domain == after.domain == "main"


def test_what_another_process_did_while_we_asked_is_left_alone(learner: ContinualLearner, tmp_path: Path) -> None:
    learner.learn_from_text("The key lies under the pot.", budget=Budget(steps=1))
    screen = Recording()

    def confirm(question: str) -> bool:
        learner.learn_from_text("Another lesson.", budget=Budget(steps=1))
        return True

    screen.confirm = confirm  # type: ignore[method-assign]
    chat(learner, screen).handle("/undo")
    assert learner.store.require("main").name == "v0002"
    chat(learner, screen).handle("/forget main")
    assert learner.store.require("main").name == "v0003"
    assert ["meanwhile" in note for note in screen.notes] == [True, True]


def test_an_interruption_after_the_lesson_does_not_deny_it(
    learner: ContinualLearner, screen: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    learn = learner.learn

    def then_interrupted(*arguments: Any) -> None:
        learn(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(learner, "learn", then_interrupted)
    with pytest.raises(KeyboardInterrupt, match="/learn was done already"):
        chat(learner, screen).handle("/learn The key lies under the pot.")
    monkeypatch.setattr(learner, "learn", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt, match=r"\A\Z"):
        chat(learner, screen).handle("/learn The key lies under the pot.")


def test_two_files_at_once_are_not_taken_for_a_text(
    learner: ContinualLearner, screen: Recording, tmp_path: Path
) -> None:
    (tmp_path / "notes.md").write_text("The key lies under the pot.")
    chat(learner, screen).handle(f"/learn {tmp_path / 'notes.md'} and the rest")
    assert "one at a time" in screen.notes[0]
    assert learner.store.domains() == []


def test_what_a_folder_has_beside_texts_is_named(learner: ContinualLearner, screen: Recording, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("The key lies under the pot.")
    (tmp_path / "notes" / "b.txt").write_bytes(b"\0\1\2")
    chat(learner, screen).handle(f"/learn {tmp_path / 'notes'}")
    assert learner.store.domains() == ["main"]
    assert len(screen.notes) == 1
    assert "b.txt" in screen.notes[0]


def test_where_nobody_can_be_told_the_program_ends(learner: ContinualLearner, screen: Recording) -> None:
    def full(record: dict[str, Any]) -> None:
        raise OutputError("the result could not be written to stdout")

    screen.end = full  # type: ignore[method-assign]
    with pytest.raises(OutputError):
        chat(learner, screen).handle("the cat")


def test_no_means_no(learner: ContinualLearner) -> None:
    learner.learn_from_text("The key lies under the pot.")
    screen = Recording(yes=False)
    talk = chat(learner, screen)
    talk.handle("/undo")
    talk.handle("/forget main")
    assert screen.texts == ["nothing was undone", "nothing was erased"]
    assert screen.records == [{"command": c, "domain": "main", "declined": True} for c in ("undo", "forget")]
    assert learner.store.domains() == ["main"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/lern notes.md", "no command /lern; did you mean /learn? /help"),
        ("/xyzzy", "no command /xyzzy; /help shows them"),
        ("/", "no command /; "),
        ("/domain medical", "no domain called 'medical'"),
        ("/domain Ä", "cannot name a domain"),
        ("/undo", "no domain called 'main'"),
        ("/forget", "which domain?"),
        ("/report", "nothing learned yet"),
        ("/learn", "nothing to learn"),
        ("/learn missing.md", "missing.md: no such file"),
        ("/learn ~nobody/notes", "~nobody/notes: no such file"),
        ("/learn --domain keys", "nothing to learn"),
        ("/learn missing.md other.md", "missing.md other.md: no such file"),
        ("/learn notes.md --domain keys", "takes --domain NAME before the text"),
        ("/learn --seconds 3 The key lies there.", "and no other option"),
        ("/learn --domain AB some text", "cannot name a domain"),
        (f"/learn --domain AB {'a' * 5000}", "cannot name a domain"),
        (f"/learn {'a' * 5000}\0", "binary, not text"),
    ],
)
def test_a_command_that_fails_says_so_in_one_line_and_the_chat_goes_on(
    learner: ContinualLearner, screen: Recording, line: str, words: str
) -> None:
    assert chat(learner, screen).handle(line)
    (note,) = screen.notes
    assert note.startswith("error: ")
    assert words in note
    assert "\n" not in note
    assert learner.store.domains() == []


def test_a_lesson_while_another_process_writes_is_an_error_and_no_end(
    learner: ContinualLearner, screen: Recording
) -> None:
    with learner.store.writing():
        assert chat(learner, screen).handle("/learn The key lies under the pot.")
    assert "is being written by process" in screen.notes[0]


def test_domain_help_and_what_leaves(learner: ContinualLearner, screen: Recording) -> None:
    talk = chat(learner, screen)
    talk.history = Path("/somewhere/chat_history")
    talk.handle("/domain none")
    assert screen.records[-1] == {"command": "domain", "domain": "none", "domains": []}
    talk.handle("/domain")
    assert "the bare base" in screen.texts[-1]
    talk.handle("/help")
    assert all(name in screen.texts[-1] for name in COMMANDS)
    assert "/somewhere/chat_history" in screen.texts[-1]
    assert talk.handle(" /quit is a word here")
    assert talk.turns[0]["content"] == "/quit is a word here"
    assert talk.handle("   ")
    assert len(screen.answers) == 1
    assert not talk.handle("/quit")
    with pytest.raises(InputError, match="no domain called 'medical'"):
        chat(learner, screen, domain="medical")


# -- the terminal ------------------------------------------------------------------------------------------------


def test_what_a_terminal_would_obey_is_made_harmless() -> None:
    scientist = "\U0001f469\u200d\U0001f52c"  # held together by a joiner, which is not printable by itself
    written = f"a\x1b]0;title\x07\r\x9b2J\u202eb\n\tc {scientist} é"
    assert harmless(written) == f"a\ufffd]0;title\ufffd\ufffd\ufffd2J\ufffdb\n\tc {scientist} é"


def test_line_ends_of_windows_are_line_ends() -> None:
    assert harmless("one\r\ntwo\r") + harmless("\nthree\rfour") == "one\ntwo\nthree\ufffdfour"


def test_labels_are_shown_as_they_were_written(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.Terminal().result({}, "learned Shot 10.30\u202fAM.txt \U0001f469\u200d\U0001f52c\x1b[2J")
    assert capsys.readouterr().out == "learned Shot 10.30\u202fAM.txt \U0001f469\u200d\U0001f52c\ufffd[2J\n"


def test_a_terminal_is_spared_also_where_lines_come_from_a_pipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    screen = terminal.Terminal()
    assert not screen.interactive
    screen.piece("a\x1b[2Jb")
    assert capsys.readouterr().out == "a\ufffd[2Jb"


def test_a_remark_that_nobody_reads_is_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    with os.fdopen(theirs, "w") as stream:
        monkeypatch.setattr("sys.stderr", stream)
        screen = terminal.Terminal()
        for _ in range(2):
            screen.note("error: nobody reads this")


def test_piped_lines_are_answered_one_by_one(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    options = ("-m", model, "--max-tokens", "4", "--temperature", "0")
    done = run("chat", *options, stdin=b"the cat\n/nonsense\n\nthe \\\nmat")
    assert done.code == 0
    assert done.out.endswith("\n")
    lines = done.err.splitlines()
    assert (lines[0], lines[2]) == ("[none]", "[none]")
    assert lines[1].startswith("error: no command /nonsense")
    done = run("chat", *options, "--json", stdin=b"the cat\n/domain\nthe \\\nmat\n/quit\nnever")
    records = [json.loads(line) for line in done.out.splitlines()]
    assert [record.get("prompt") for record in records] == ["the cat", None, "the \nmat"]
    assert records[0].keys() == {"prompt", "text", "domain", "tokens", "finish"}
    assert (done.code, done.err, done.out.isascii()) == (0, "", True)
    done = run("chat", *options, "--json", stdin=b"\xef\xbb\xbf/domain\n")
    assert json.loads(done.out)["command"] == "domain"
    done = run("chat", *options, "--json", stdin=b"/undo\nthe cat\n/nonsense\n")
    records = [json.loads(line) for line in done.out.splitlines()]
    assert [sorted(record.keys() & {"error", "text"}) for record in records] == [["error"], ["text"], ["error"]]
    assert [f"error: {record['error']}" for record in records if "error" in record] == done.err.splitlines()


def test_report_is_what_the_command_prints(tmp_path: Path) -> None:
    options = ("-m", write_model(tmp_path / "model"), "--quiet")
    run("learn", *options, "--text", TEXT, "--steps", "2")
    alone = run("report", *options, "--out", tmp_path / "report")
    assert alone.out.startswith("main: 1 lesson")
    assert run("chat", *options, stdin=b"/report\n").out == alone.out


def test_piped_lines_must_be_text_and_nothing_is_asked(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    done = run("chat", "-m", model, stdin=b"/undo\n\xff\n")
    assert done.code == 2
    assert done.err.splitlines()[-1] == "error: stdin, line 2: not UTF-8 at byte 0; convert it first"
    run("learn", "-m", model, "--text", "the cat sat", "--steps", "1")
    done = run("chat", "-m", model, stdin=b"/forget main\n")
    assert done.code == 0
    assert "there is no terminal to ask on" in done.err


READY = b"\x1b[?2004h"
"""What prompt_toolkit switches on when it begins to read (bracketed paste)."""


class Pseudo:
    """A `chat` in a pseudo-terminal."""

    def __init__(self, *arguments: str | Path, **environment: str) -> None:
        self.ours, theirs = pty.openpty()
        env = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", **environment}
        streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
        self.process = start("chat", *arguments, env=env, start_new_session=True, **streams)
        os.close(theirs)
        self.seen = b""

    def until(self, words: bytes, after: int = 0) -> int:
        """Read until `words` were shown behind position `after`; returns where they end."""
        deadline = time.monotonic() + 15
        while words not in self.seen[after:]:
            ready, _, _ = select.select([self.ours], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, self.seen[-2000:]
            self.seen += os.read(self.ours, 65536)
        return self.seen.index(words, after) + len(words)

    def type(self, keys: bytes) -> None:
        os.write(self.ours, keys)

    def close(self) -> int:
        with contextlib.suppress(OSError):  # EIO: how Linux says that the other end was closed
            while select.select([self.ours], [], [], 60)[0] and (piece := os.read(self.ours, 65536)):
                self.seen += piece
        code = self.process.wait(timeout=60)
        os.close(self.ours)
        return code


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    """A model that never ends a text: its tokenizer names no end token."""
    model = write_model(tmp_path / "model", manifest=False, max_seq_len=1_000_000)
    for name in ("tokenizer_config.json", "generation_config.json"):
        path = model / name
        settings = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({k: v for k, v in settings.items() if "eos" not in k}))
    return model


def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves(endless: Path, tmp_path: Path) -> None:
    pseudo = Pseudo("-m", endless, "--max-tokens", "400000", "--temperature", "0", NO_COLOR="")
    try:
        at = pseudo.until(READY)
        pseudo.type(b"the cat\r")
        at = pseudo.until(b"[none]", at)
        time.sleep(0.2)  # into the answer
        pseudo.process.send_signal(signal.SIGINT)
        at = pseudo.until(b"(stopped)", at)
        at = pseudo.until(READY, at)
        pseudo.type(b"/dom\t")
        at = pseudo.until(b"ain", at)
        pseudo.type(b"\r")
        at = pseudo.until(b"domains: none yet", at)
        at = pseudo.until(READY, at)
        pseudo.type(b"\x04")
        assert pseudo.close() == 0, pseudo.seen
    finally:
        pseudo.process.kill()
        pseudo.process.wait()
    assert b"Traceback" not in pseudo.seen
    assert b"\x1b[2m[none]\x1b[0m" in pseudo.seen
    kept = tmp_path / "home" / "chat_history"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert "+the cat\n" in kept.read_text()


def test_several_lines_and_no_colour(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    pseudo = Pseudo("-m", model, "--max-tokens", "3", "--temperature", "0", NO_COLOR="1")
    try:
        at = pseudo.until(READY)
        pseudo.type(b"one\\\rtwo\x1b\rthree\r")
        at = pseudo.until(b"[none] ", at)
        at = pseudo.until(READY, at)
        pseudo.type(b"/quit\r")
        assert pseudo.close() == 0
    finally:
        pseudo.process.kill()
        pseudo.process.wait()
    assert b"\x1b[2m" not in pseudo.seen
    assert "+one\n+two\n+three\n" in (tmp_path / "home" / "chat_history").read_text()


def test_what_a_search_found_is_taken_over_and_sent(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    pseudo = Pseudo("-m", model, "--max-tokens", "3", "--temperature", "0", NO_COLOR="1")
    try:
        at = pseudo.until(READY)
        pseudo.type(b"the cat\r")
        at = pseudo.until(READY, pseudo.until(b"[none] ", at))
        pseudo.type(b"\x12cat")  # Ctrl-R
        at = pseudo.until(b"I-search backward", at)
        time.sleep(0.2)
        pseudo.type(b"\r")
        time.sleep(0.2)
        pseudo.type(b"\r")
        at = pseudo.until(READY, pseudo.until(b"[none] ", at))
        pseudo.type(b"\x04")
        assert pseudo.close() == 0, pseudo.seen
    finally:
        pseudo.process.kill()
        pseudo.process.wait()


def test_tab_knows_commands_files_and_domains(
    learner: ContinualLearner, screen: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner.learn_from_text("The key lies under the pot.", domain="keys")
    (tmp_path / "notes.md").write_text("x")
    monkeypatch.chdir(tmp_path)
    completer = terminal._Completer(chat(learner, screen))

    def offered(text: str) -> list[str]:
        event = terminal.CompleteEvent(completion_requested=True)
        return [text + c.text[-c.start_position :] for c in completer.get_completions(terminal.Document(text), event)]

    assert offered("/f") == ["/forget"]
    assert offered("/domain ") == ["/domain keys", "/domain auto", "/domain none"]
    assert offered("/undo k") == ["/undo keys"]
    assert offered("/learn no") == ["/learn notes.md"]
    assert offered("hello") == offered("/help x") == []
    monkeypatch.setattr(learner.store, "domains", lambda: (_ for _ in ()).throw(DamagedFileError("damaged")))
    assert offered("/undo k") == []


def test_without_a_place_for_it_what_is_typed_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("MINIMAC_HOME", str(tmp_path / "file" / "home"))
    assert terminal._history()[0] is None
