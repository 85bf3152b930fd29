"""The terminal round a conversation: editing, history and completion by prompt_toolkit, or plain lines from a pipe.

Answers and what commands say go to stdout, remarks to stderr. With --json stdout holds one object for each line that
was answered. What a model writes is made harmless before a terminal sees it.
"""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import click
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import is_searching
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from mlx_impl import files
from mlx_impl.chat import COMMANDS, Chat
from mlx_impl.console import silence
from mlx_impl.errors import InputError, MiniMacError, legible
from mlx_impl.shell import harmless, write

PROMPT = "> "


def is_interactive(as_json: bool) -> bool:
    """Whether a person sits at both ends."""
    return not as_json and all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))


class Terminal:
    """What `Chat` shows, on the standard streams."""

    def __init__(self, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json, self.quiet = as_json, quiet
        self.interactive = is_interactive(as_json)
        self.shows = sys.stdout is not None and sys.stdout.isatty()  # also where the lines come from a pipe

    def begin(self, domain: str | None) -> None:
        """The domain, before its answer."""
        tag = f"[{domain or 'none'}]"
        if self.interactive:
            write(f"{_dim(tag, sys.stdout)} ")
        elif not self.as_json and not self.quiet:
            self.note(tag)

    def piece(self, text: str) -> None:
        """A piece of the answer."""
        if not self.as_json:
            write(harmless(text) if self.shows else text)

    def end(self, record: dict[str, Any]) -> None:
        """The end of the answer. Where nobody could take the next turn, an interruption ends the program."""
        write(f"{json.dumps(record)}\n" if self.as_json else "\n")
        if record["finish"] == "interrupted":
            if not self.interactive:
                raise KeyboardInterrupt
            self.note("(stopped)")
        elif record["finish"] == "length" and self.interactive:
            self.note(f"(ends after {record['tokens']} tokens; --max-tokens gives it more)")
        elif record["finish"] == "context" and self.interactive:
            self.note(f"(ends after {record['tokens']} tokens: the model's context is full; /clear begins anew)")

    def result(self, record: dict[str, Any], text: str) -> None:
        """What a command did."""
        lines = "\n".join(legible(line) for line in text.split("\n"))
        write(f"{json.dumps(record, allow_nan=False) if self.as_json else lines}\n")

    def failed(self, text: str) -> None:
        """A line on stderr, and with --json an object too: who sends a line is waiting for one."""
        self.note(f"error: {text}")
        if self.as_json:
            write(f"{json.dumps({'error': text})}\n")

    def note(self, text: str) -> None:
        """A line on stderr, which --quiet does not silence: errors come this way."""
        if sys.stderr is None:
            return
        try:
            click.echo(_dim(legible(text), sys.stderr), err=True)
        except OSError:  # who reads stderr may leave
            silence(sys.stderr)

    def confirm(self, question: str) -> bool:
        """Ask y/N; InputError where stdin is no terminal."""
        if sys.stdin is None or not sys.stdin.isatty():
            raise InputError("this asks before it goes on, and there is no terminal to ask on; use the command line")
        try:
            return click.confirm(legible(question), err=True)
        except click.Abort:
            return False


def converse(chat: Chat, screen: Terminal) -> None:
    """Take lines until they end, or until one says to leave."""
    lines = _typed(chat, screen) if screen.interactive else _piped()
    for line in lines:
        try:
            if not chat.handle(line):
                return
        except KeyboardInterrupt as interrupt:
            if not screen.interactive:
                raise
            screen.note(f"interrupted; {str(interrupt) or 'nothing was changed'}")


def _piped() -> Iterator[str]:
    """Lines of stdin, without a byte order mark; one that ends with a backslash goes on in the next."""
    if sys.stdin is None:
        raise InputError("stdin is closed: there is nothing to read")
    kept = ""
    for number, raw in enumerate(sys.stdin.buffer, 1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise InputError(f"stdin, line {number}: not UTF-8 at byte {error.start:,}; convert it first") from None
        if line.endswith("\\"):
            kept += f"{line[:-1]}\n"
            continue
        yield kept + line
        kept = ""
    if kept:
        yield kept


def _typed(chat: Chat, screen: Terminal) -> Iterator[str]:
    """Lines, or several at once, as they are typed. Ctrl-C drops what was typed, Ctrl-D ends."""
    chat.history, history = _history()
    session: PromptSession[str] = PromptSession(
        PROMPT,
        history=history,
        multiline=True,
        prompt_continuation=lambda width, line, wrapped: " " * width,
        key_bindings=_keys(),
        completer=_Completer(chat),
        complete_while_typing=False,
    )
    if not screen.quiet:
        screen.note("/help shows the commands, Ctrl-D leaves")
    while True:
        try:
            yield session.prompt()
        except KeyboardInterrupt:
            screen.note("Ctrl-D leaves")
        except EOFError:
            return


def _history() -> tuple[Path | None, History]:
    """The file that keeps what was typed, for its owner's eyes only, and prompt_toolkit's view of it."""
    try:
        path = files.home() / "chat_history"
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600))
        path.chmod(0o600)
    except OSError:
        return None, InMemoryHistory()
    return path, FileHistory(str(path))


def _keys() -> KeyBindings:
    """Enter sends, unless the line ends with a backslash; Alt-Enter goes on in the next line.

    In a search of the history (Ctrl-R) both stay prompt_toolkit's, which takes over what was found.
    """
    keys = KeyBindings()

    @keys.add("enter", filter=~is_searching)
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.current_line_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=~is_searching)
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return keys


class _Completer(Completer):
    """Commands, and after them files or domains."""

    def __init__(self, chat: Chat) -> None:
        self.chat, self.paths = chat, PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """What could follow what stands before the cursor."""
        text = document.text_before_cursor
        name, space, rest = text.partition(" ")
        if not text.startswith("/"):
            return
        if not space:
            choices, typed = list(COMMANDS), name
        elif name == "/learn":
            yield from self.paths.get_completions(Document(rest), complete_event)
            return
        elif name in ("/domain", "/undo", "/forget", "/report"):
            try:
                choices = [*self.chat.learner.store.domains(), *(["auto", "none"] if name == "/domain" else [])]
            except MiniMacError:  # the command itself will say it
                return
            typed = rest
        else:
            return
        yield from (Completion(choice, -len(typed)) for choice in choices if choice.startswith(typed))


def _dim(text: str, stream: TextIO) -> str:
    """The text dimmed, where the stream is a terminal that shows it so (https://no-color.org)."""
    plain = not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain else f"\x1b[2m{text}\x1b[0m"
