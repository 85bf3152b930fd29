"""A conversation with a model that can be taught on the way, as an object that knows no terminal.

Lines that begin with a slash are commands, everything else is said to the model: through its chat template, or as plain
text to go on with where it has none. Turns that no longer fit into the context are left out, oldest first. Keys and
values of what two prompts have in common are not computed again, as long as the adapter is the same.
"""

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from mlx_impl import readers
from mlx_impl.cache import PromptCache
from mlx_impl.config import Budget
from mlx_impl.console import Reporter
from mlx_impl.errors import InputError, MiniMacError, OutputError, legible, printable
from mlx_impl.generate import Completion, Sampling, complete, prompt_ids
from mlx_impl.learner import ContinualLearner
from mlx_impl.report import report
from mlx_impl.results import count, forgetting_text, lesson_text, report_text, undo_record, undo_text

COMMANDS = {
    "/learn": ("[--domain NAME] FILE|TEXT", "teach it a file, a folder or a text"),
    "/domain": ("[NAME|auto|none]", "show or choose what answers come from"),
    "/undo": ("[NAME]", "take the last lesson of a domain back"),
    "/forget": ("NAME", "erase a domain for good"),
    "/report": ("[NAME]", "measure what was learned and what was kept"),
    "/clear": ("", "begin a new conversation"),
    "/help": ("", "these lines"),
    "/quit": ("", "leave, like Ctrl-D"),
}

Message = dict[str, str]


class Screen(Protocol):
    """Where a conversation shows itself, and what it asks."""

    def begin(self, domain: str | None) -> None:
        """An answer begins, from this domain or with None from the base."""

    def piece(self, text: str) -> None:
        """The next piece of the answer's text."""

    def end(self, record: dict[str, Any]) -> None:
        """The answer has ended: see `Answer`."""

    def result(self, record: dict[str, Any], text: str) -> None:
        """What a command did, for programs and for people."""

    def note(self, text: str) -> None:
        """A remark in passing."""

    def failed(self, text: str) -> None:
        """Why nothing came of a line that was typed, for programs and for people."""

    def confirm(self, question: str) -> bool:
        """A yes to something that cannot be taken back. InputError where there is nobody to ask."""


@dataclass
class Answer:
    """One turn. `finish`: stop (it came to an end), length (--max-tokens), context (no room is left) or interrupted."""

    prompt: str
    text: str
    domain: str | None
    tokens: int
    finish: str


class Chat:
    """A conversation with `learner`'s model. `domain` is a name, "none" for the base, or "auto": each message's own."""

    def __init__(
        self,
        learner: ContinualLearner,
        screen: Screen,
        domain: str = "auto",
        system: str | None = None,
        max_tokens: int = 512,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        quiet: bool = False,
    ) -> None:
        if not all(stop):
            raise InputError("a stop string must not be empty")
        self.learner, self.screen = learner, screen
        self.max_tokens, self.sampling, self.stop, self.quiet = max_tokens, sampling or Sampling(), stop, quiet
        self.system: list[Message] = [{"role": "system", "content": system}] if system else []
        self.turns: list[Message] = []
        self.domain = "auto"
        self.history: Path | None = None
        """The file that keeps what is typed, if any; /help names it."""
        self._cache = PromptCache()
        self.use(domain)

    def handle(self, line: str) -> bool:
        """Take a line that was typed; False to leave. A failed command says so and leaves all as it was.

        Raises OutputError where nobody can be told anything any more.
        """
        text = line.strip()
        try:
            if line.startswith("/"):
                name, *rest = text.split(maxsplit=1)
                return self._command(name, "".join(rest))
            if text:
                self.say(text)
        except OutputError:
            raise
        except (MiniMacError, OSError) as error:
            self.screen.failed(printable(str(error)))
        return True

    # -- talking -------------------------------------------------------------------------------------------------

    def say(self, text: str) -> Answer:
        """Say something to the model and show its answer. Ctrl-C keeps what was said until then.

        Raises InputError for a message that alone is longer than the model's context; it is then not part of the
        conversation.
        """
        ids, dropped = self._fitted({"role": "user", "content": text})
        used = self.learner.choose(self.domain, prompt_ids(self.learner.tokenizer, text))
        if dropped:
            of = f"{self._context:,} tokens that the model can look back on"
            self.screen.note(f"the oldest {count(dropped, 'message')} no longer fit into the {of}: left out from here")
        self.screen.begin(used)
        pieces: list[str] = []

        def show(piece: str) -> None:
            pieces.append(piece)
            self.screen.piece(piece)

        tokens, finish = 0, "interrupted"
        try:
            done = self._complete(ids, show)
            tokens, finish = len(done.tokens), done.finish
            if finish == "length" and tokens < self.max_tokens:
                finish = "context"
        except KeyboardInterrupt:
            pass
        answer = Answer(text, "".join(pieces), used, tokens, finish)
        if finish == "interrupted" and answer.text:
            answer.tokens = len(self.learner.tokenizer.encode(answer.text))
        said = [{"role": "user", "content": text}, {"role": "assistant", "content": answer.text}]
        self.turns = [*self.turns[dropped:], *said]
        self.screen.end(asdict(answer))
        return answer

    @property
    def _context(self) -> int:
        return self.learner.model.config.max_seq_len

    def _fitted(self, message: Message) -> tuple[list[int], int]:
        """Ids of the conversation with one more message, and how many of the oldest messages do not fit any more.

        Once it is full, a quarter of the room is made free at once: with every turn left out, what follows begins
        differently and has to be computed again.
        """
        room = self._context - min(self.max_tokens, self._context // 2)  # the rest is the answer's
        for dropped in range(0, len(self.turns) + 1, 2):
            ids = self._ids([*self.system, *self.turns[dropped:], message])
            if len(ids) <= (3 * room // 4 if dropped else room):
                return ids, dropped
        if len(ids) >= self._context:
            what = "this message and --system have" if self.system else "this message has"
            raise InputError(
                f"{what} {len(ids):,} tokens and the model's context {self._context:,}; "
                "shorten it, or teach it with /learn"
            )
        return ids, dropped

    def _ids(self, messages: list[Message]) -> list[int]:
        tokenizer = self.learner.tokenizer
        if tokenizer.has_chat_template:
            return tokenizer.encode_chat(messages)
        return prompt_ids(tokenizer, "\n".join(message["content"] for message in messages))

    def _complete(self, ids: list[int], show: Callable[[str], None]) -> Completion:
        """Continue `ids`. An interruption leaves layers at different tokens, so the cache is kept only without one."""
        learner, owner = self.learner, self.learner.weights_id()
        cache = self._cache.take(ids, owner) or learner.model.make_cache()
        most = min(self.max_tokens, self._context - len(ids))
        done = complete(learner.model, learner.tokenizer, ids, most, self.sampling, self.stop, None, show, cache)
        self._cache.put([*ids, *done.tokens], owner, cache)
        return done

    # -- commands ------------------------------------------------------------------------------------------------

    def _command(self, name: str, rest: str) -> bool:
        if name in ("/quit", "/exit"):
            return False
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, 1, 0.5)
            meant = f"did you mean {near[0]}? " if near else ""
            raise InputError(f"no command {name}; {meant}/help shows them (a space before the / makes it a message)")
        store = self.learner.store
        before = store.overview() if name in ("/learn", "/undo", "/forget") else None
        try:
            getattr(self, f"_{name[1:]}")(rest)
        except KeyboardInterrupt:
            if before is not None and store.overview() != before:
                raise KeyboardInterrupt(f"{name} was done already") from None
            raise
        return True

    def use(self, domain: str) -> None:
        """Answer from this domain from now on; InputError naming those there are."""
        if domain not in ("auto", "none"):
            self.learner.store.require(domain)
        self.domain = domain

    def _domain(self, name: str) -> None:
        if name:
            self.use(name)
        known = ", ".join(self.learner.store.domains()) or "none yet"
        meaning = {"auto": "the domain of each message", "none": "the bare base"}.get(self.domain, self.domain)
        record = {"command": "domain", "domain": self.domain, "domains": self.learner.store.domains()}
        self.screen.result(record, f"answers come from {meaning}; domains: {known}")

    def _learn(self, rest: str) -> None:
        named = re.fullmatch(r"--domain(?:=|\s+)(\S+)(?:\s+(.*))?", rest, re.DOTALL)
        domain, what = (named[1], named[2] or "") if named else (self._taught(), rest)
        if not what:
            raise InputError("nothing to learn: /learn FILE or /learn TEXT")
        documents, label, skipped = _material(what)
        if skipped.files:
            self.screen.note(str(skipped))
        with Reporter(self.quiet) as reporter:
            lesson = self.learner.learn(documents, domain, legible(label), Budget(), reporter)
        record = lesson.as_json()
        self.screen.result({"command": "learn", **record}, lesson_text(record, ""))

    def _taught(self) -> str:
        """The domain that lessons go into: the one that was chosen by name, else main."""
        return self.domain if self.domain not in ("auto", "none") else "main"

    def _undo(self, name: str) -> None:
        domain = name or self._taught()
        store = self.learner.store
        last = store.require(domain)
        before, there = store.history(domain), store.versions(domain)
        if not self.screen.confirm(f"Take {last.name} of {domain} ({last.source}) back?"):
            self.screen.result({"command": "undo", "domain": domain, "declined": True}, "nothing was undone")
            return
        if store.require(domain) != last:
            raise InputError(f"{domain} was changed by another process meanwhile; nothing was undone")
        if self.learner.undo(domain) is None:
            self._leave(domain)
        record = undo_record(domain, before, store.history(domain), there)
        self.screen.result({"command": "undo", **record}, undo_text(record))

    def _forget(self, domain: str) -> None:
        if not domain:
            raise InputError("/forget NAME: which domain?")
        self.learner.store.require(domain)
        versions = self.learner.store.versions(domain)
        sources = [version.source for version in versions]
        if not self.screen.confirm(f"{forgetting_text(domain, sources)}. Erase it for good?"):
            self.screen.result({"command": "forget", "domain": domain, "declined": True}, "nothing was erased")
            return
        if self.learner.store.versions(domain) != versions:
            raise InputError(f"{domain} was changed by another process meanwhile; nothing was erased")
        gone = self.learner.forget(domain)
        self._leave(domain)
        record = {"command": "forget", "domain": domain, "forgotten": [version.name for version in gone]}
        typed = f"; {self.history} keeps what was typed" if self.history is not None else ""
        said = f"this conversation still holds what was said, /clear drops it{typed}"
        self.screen.result(record, f"{domain} is forgotten: {count(len(gone), 'version')}; {said}")

    def _leave(self, domain: str) -> None:
        """Do not go on answering from a domain that is gone."""
        if self.domain == domain:
            self.domain = "auto"

    def _report(self, name: str) -> None:
        with Reporter(self.quiet) as reporter:
            record = report(self.learner, [name] if name else None, tell=reporter)
        self.screen.result({"command": "report", **record}, report_text(record))

    def _clear(self, rest: str) -> None:
        self.turns, self._cache = [], PromptCache()
        self.screen.result({"command": "clear"}, "a new conversation")

    def _help(self, rest: str) -> None:
        lines = [f"{f'{name} {arguments}':<34} {what}" for name, (arguments, what) in COMMANDS.items()]
        lines += [
            "Enter sends; Alt-Enter, or a backslash at the end of a line, goes on in the next line",
            "Ctrl-C stops an answer, Ctrl-D leaves",
        ]
        if self.history is not None:
            lines.append(f"what you type is kept in {self.history}, also after /forget: delete the file to erase it")
        self.screen.result({"command": "help", "commands": list(COMMANDS)}, "\n".join(lines))


def _material(what: str) -> tuple[list[readers.Document], str, readers.PassedOver]:
    """The documents that /learn was given, as a path or as the text itself, a label, and what was passed over."""
    skipped = readers.PassedOver()
    quoted = re.fullmatch(r"([\"'])(.+)\1", what, re.DOTALL)
    what = quoted[2] if quoted else what
    path = _existing(what)
    if path is not None:
        return list(readers.read_documents([path], skipped)), path.name or str(path), skipped
    words = [] if quoted else what.split()
    if words and (words[0].startswith("--") or "--domain" in words):
        raise InputError("/learn takes --domain NAME before the text and no other option; put such a text in quotes")
    if words and all(map(_is_like_path, words)):
        raise InputError(f"{what}: no such file; if it is a text, put it in quotes")
    if words and _is_like_path(words[0]) and _existing(words[0]) is not None:
        raise InputError(f"{words[0]} is a file, but what follows is not: one at a time, and a text in quotes")
    return [readers.text_document(what, "text")], "text", skipped


def _is_like_path(word: str) -> bool:
    return re.fullmatch(r"[~./].*|.*/.*|.+\.[A-Za-z0-9]{1,5}", word) is not None


def _existing(what: str) -> Path | None:
    """The file or folder that a text names, None if it names none."""
    try:
        path = Path(what).expanduser()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long for a name, or with a null in it, or the home of nobody
        return None
