"""Readers: files and folders in, documents out, and what part of the documents is held out.

Nothing is ever read whole: a text file arrives in pieces of at most `PIECE` characters, cut where a tokenizer
would cut anyway, so that a corpus larger than memory or one endless line costs no more than a small file.
Text is kept as it is: line ends are not translated (CRLF stays CRLF), only a byte order mark is dropped.
Whatever cannot be read as UTF-8, or UTF-16 with its mark, is refused by name and byte offset, never guessed
at or repaired.
"""

import codecs
import json
import logging
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_impl.errors import DamagedFileError, InputError, listed

PIECE = 1 << 20
"""Longest piece of a text, in characters; also how many bytes are read at once."""
LINE_LIMIT = 64 << 20
"""Longest row of a .jsonl file, in characters: a row has to be parsed whole."""
TEXT_SUFFIXES = frozenset(
    """.adoc .asm .awk .bash .bat .bib .c .cc .cfg .clj .cljs .cmake .conf .cpp .cs .css .csv .cu .cxx
    .dart .diff .el .elm .erl .ex .exs .f .f90 .fish .fs .go .gradle .graphql .h .hh .hpp .hrl .hs .htm
    .html .hxx .ini .ipp .java .jl .js .json .jsx .kt .kts .less .lisp .lua .m .markdown .md .mdx .metal
    .mjs .mk .ml .mli .mm .nim .nix .org .pas .patch .php .pl .pm .properties .proto .ps1 .py .pyi .pyx
    .r .rb .rkt .rs .rst .s .sass .scala .scm .scss .sh .sql .srt .svelte .swift .tcl .tex .text
    .tf .toml .ts .tsv .tsx .txt .v .vb .vhd .vim .vue .xml .yaml .yml .zig .zsh""".split()  # noqa: SIM905
)
"""What is read as text inside a folder; a file named by the user is tried whatever its name."""

Message = dict[str, str]
"""One turn of a conversation: {"role": ..., "content": ...}."""
Skipped = Callable[[Path, str], None]
"""Told of each file passed over inside a folder, and why."""


@dataclass
class PassedOver:
    """A `Skipped` that remembers, for one line about all of it."""

    files: list[tuple[Path, str]] = field(default_factory=list)

    def __call__(self, path: Path, reason: str) -> None:
        """Remember one file."""
        self.files.append((path, reason))

    def __str__(self) -> str:
        """The files and why, those first that one would have thought were read; empty where there are none."""
        files = sorted(self.files, key=lambda file: not is_read(file[0]))
        shown = listed([f"{path} ({reason})" for path, reason in files], longest=400)
        return f"passed over {shown}" if files else ""


@dataclass(frozen=True)
class Exchange:
    """A prompt and the answer to be learned."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Document:
    """One text, exchange or conversation. `name` is its file, with `#line` for a row of a .jsonl file.

    A long text comes as several documents in a row, all but the last with `ends` False: joined without
    anything between them they are the text. Raises InputError for a lone surrogate, which no tokenizer can
    encode.
    """

    name: str
    content: str | Exchange | tuple[Message, ...]
    ends: bool = True

    def __post_init__(self) -> None:
        """Refuse half a surrogate pair (from JSON escapes, or a command line that is not UTF-8)."""
        try:
            self.text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{self.name}: half a surrogate pair at character {error.start:,}; replace it") from None

    @property
    def text(self) -> str:
        """All of its text, without roles and without what a chat template would add."""
        if isinstance(self.content, str):
            return self.content
        if isinstance(self.content, Exchange):
            return self.content.prompt + self.content.completion
        return "\n".join(message["content"] for message in self.content)


@dataclass(frozen=True)
class InputFile:
    """A file to be read; one that was found in a folder may turn out unusable without being an error."""

    path: Path
    in_folder: bool = False

    @property
    def kind(self) -> str:
        """How it is read: "jsonl", "pdf" or "text"."""
        return {".jsonl": "jsonl", ".ndjson": "jsonl", ".pdf": "pdf"}.get(self.path.suffix.lower(), "text")


def read_documents(paths: Sequence[Path], skipped: Skipped | None = None) -> Iterator[Document]:
    """The documents of files and folders, in the order given; folders recursively, sorted by name.

    Raises InputError for what cannot be used (missing, empty, binary, not UTF-8, rows without a known key, a
    folder with nothing to read) and DamagedFileError for a broken PDF or a line that is not JSON. Inside a
    folder, text files and PDFs for which that holds are passed over and reported to `skipped` instead.
    """
    empty = True
    for file in find_files(paths, skipped):
        for document in read_file(file, skipped):
            empty = False
            yield document
    if empty:
        raise nothing_to_read(paths)


def nothing_to_read(paths: Sequence[Path]) -> InputError:
    """The error for paths in which no document was found."""
    return InputError(f"{', '.join(map(str, paths)) or 'no path given'}: nothing to read; name a file that holds text")


def find_files(paths: Sequence[Path], skipped: Skipped | None = None) -> list[InputFile]:
    """All files that `read_documents` would read; InputError for a missing path or a folder without any."""
    files: list[InputFile] = []
    for path in map(Path, paths):
        if os.path.isdir(path):  # unlike Path's, these take a name that is too long for what is not there
            found = [InputFile(file, in_folder=True) for file in _walk(path, skipped or _ignore)]
            if not found:
                raise InputError(f"{path}: no file in this folder is of a kind that is read (text, code, .jsonl, .pdf)")
            files += found
        elif not os.path.exists(path):
            shown = " ".join(str(path).split())[:100]
            raise InputError(f"{shown}: no such file or folder; `learn --text` takes a text itself")
        elif not os.path.isfile(path):
            raise InputError(f"{path}: not a regular file; use - to read from a pipe")
        elif not os.access(path, os.R_OK):
            raise InputError(f"{path}: no permission to read it")
        else:
            files.append(InputFile(path))
    return files


def read_file(file: InputFile, skipped: Skipped | None = None) -> Iterator[Document]:
    """The documents of one file; errors as for `read_documents`."""
    path = file.path
    if file.kind == "jsonl":
        yield from _read_jsonl(path, may_be_empty=file.in_folder)
        return
    try:
        if file.in_folder and file.kind == "text":
            deque(_decoded(path), maxlen=0)  # to the end, before the first piece of it is handed out
        documents = _read_pdf(path) if file.kind == "pdf" else _read_text(path)
        first = next(documents)
    except (InputError, DamagedFileError) as error:
        if not file.in_folder:
            raise
        (skipped or _ignore)(path, str(error).removeprefix(f"{path}: "))
        return
    yield first
    yield from documents


def text_document(text: str, name: str) -> Document:
    """A text that came from standard input or --text as a document; InputError if it is unusable."""
    text = text.removeprefix("\ufeff")
    if not text.strip():
        raise InputError(f"{name}: empty, there is no text in it")
    if "\0" in text:
        raise InputError(f"{name}: binary, not text (a NUL at character {text.index(chr(0)):,})")
    return Document(name, text)


def pieces(chunks: Iterable[str], size: int = PIECE) -> Iterator[str]:
    """The same text in pieces of 1 to `size` characters, cut at a line, else a word, else anywhere."""
    pending = ""
    for chunk in chunks:
        pending += chunk
        while len(pending) > size:
            cut = _last_boundary(pending, size)
            yield pending[:cut]
            pending = pending[cut:]
    if pending:
        yield pending


# No byte-level tokenizer has a token across the first two. Not after a blank line: GPT-2's pattern takes line
# ends one by one before a word, and together where a text stops.
_BOUNDARIES = [re.compile(pattern) for pattern in (r"(?<=\S)\n(?=\S)", r"(?<=\S)(?=[ ]\S)", r"\s(?=\S)")]


def _last_boundary(text: str, limit: int, reach: int = 1 << 16) -> int:
    """Where to cut, at most at `limit`: the last boundary of the best kind in the last `reach` characters."""
    for boundary in _BOUNDARIES:
        last = deque(boundary.finditer(text, max(1, limit - reach), limit), maxlen=1)
        if last:
            return last[0].end()
    return limit


def _ignore(path: Path, reason: str) -> None:
    pass


def _walk(folder: Path, skipped: Skipped) -> Iterator[Path]:
    """Files of the kinds that are read, sorted; links to folders are not followed, so there are no loops.

    A model directory below `folder` is passed over: what `train .` writes into is no text to train on.
    """

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: {error.strerror}")

    for parent, folders, names in os.walk(folder, onerror=refuse):
        for name in sorted(name for name in folders if name.startswith(".")):
            skipped(Path(parent, name), "hidden")
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in [name for name in folders if _is_model(Path(parent, name))]:
            skipped(Path(parent, name), "a model directory")
            folders.remove(name)
        for path in sorted(Path(parent, name) for name in names):
            if path.name.startswith("."):
                skipped(path, "hidden")
            elif not is_read(path):
                skipped(path, f"unknown extension {path.suffix!r}")
            elif not path.is_file() or not os.access(path, os.R_OK):
                skipped(path, "not a regular file, or no permission to read it")
            else:
                yield path


def is_read(path: Path) -> bool:
    """Whether a file inside a folder is of a kind that is read, going by its name."""
    known = path.suffix.lower() in TEXT_SUFFIXES or InputFile(path).kind != "text"
    return known and not path.name.startswith(".")


def _is_model(folder: Path) -> bool:
    """Whether a folder is laid out like a model, of ours or of Hugging Face's, perhaps without weights yet."""
    return all((folder / name).is_file() for name in ("config.json", "tokenizer.json"))


def _decoded(path: Path) -> Iterator[str]:
    """The text of a file, `PIECE` bytes at a time; InputError if it is binary, not UTF-8 or not UTF-16."""
    try:
        with open(path, "rb") as file:
            start = file.read(3)
            utf16 = {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}.get(start[:2])
            encoding = utf16 or "utf-8"
            file.seek(2 if utf16 else 3 if start == codecs.BOM_UTF8 else 0)
            decoder = codecs.getincrementaldecoder(encoding)()
            at_end = False
            while not at_end:
                begin = file.tell()
                undecoded = len(decoder.getstate()[0])  # of a character that the last chunk cut in two
                chunk = file.read(PIECE)
                at_end = not chunk
                if not utf16 and b"\0" in chunk:
                    raise InputError(f"{path}: binary, not text (a NUL at byte {begin + chunk.index(0):,})")
                try:
                    text = decoder.decode(chunk, final=at_end)
                except UnicodeDecodeError as error:
                    wrong = f"not {encoding.upper()} at byte {begin - undecoded + error.start:,}"
                    raise InputError(f"{path}: {wrong}; convert it to UTF-8 first") from None
                if "\0" in text:
                    raise InputError(f"{path}: binary, not text (a NUL after byte {begin:,})")
                yield text
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def _read_text(path: Path) -> Iterator[Document]:
    """A text file as one document, or as several pieces of one."""
    parts = pieces(_decoded(path))
    part = next(parts, "")
    if not part.strip():
        raise InputError(f"{path}: empty, there is no text in it")
    for following in parts:
        yield Document(str(path), part, ends=False)
        part = following
    yield Document(str(path), part)


def _read_jsonl(path: Path, may_be_empty: bool) -> Iterator[Document]:
    """The rows of a .jsonl file; blank lines and rows with an empty text are passed over."""
    empty = not may_be_empty
    for number, line in _numbered_lines(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = str(error).replace(": line 1 column", ": column")
            raise DamagedFileError(f"{path} line {number}: not JSON ({reason}); mend or remove it") from None
        content = _row_content(row, f"{path} line {number}")
        if content:
            empty = False
            yield Document(f"{path}#{number}", content)
    if empty:
        raise InputError(f"{path}: empty, there is no text in it")


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers from 1."""
    number, pending = 0, ""
    for chunk in _decoded(path):
        *lines, pending = (pending + chunk).split("\n")
        for line in lines:
            number += 1
            if line.strip():
                yield number, line
        if len(pending) > LINE_LIMIT:
            raise InputError(f"{path} line {number + 1}: longer than {LINE_LIMIT:,} characters; split it, or use .txt")
    if pending.strip():
        yield number + 1, pending


def _row_content(row: Any, where: str) -> str | Exchange | tuple[Message, ...]:
    """What a row holds; InputError naming its keys if it is none of the three known kinds."""
    keys = set(row) if isinstance(row, dict) else set()
    if "messages" in keys:
        return _messages(row["messages"], where)
    wanted = ("prompt", "completion") if {"prompt", "completion"} <= keys else ("text",)
    if not keys.issuperset(wanted):
        has = f"keys {', '.join(map(repr, sorted(keys)))}" if keys else f"a {type(row).__name__}"
        raise InputError(f"{where}: `text`, `prompt` and `completion`, or `messages` are expected, this row has {has}")
    for key in wanted:
        if not isinstance(row[key], str):
            raise InputError(f"{where}: `{key}` must be a string, it is a {type(row[key]).__name__}")
    return Exchange(row["prompt"], row["completion"]) if len(wanted) == 2 else row["text"]


def _messages(messages: Any, where: str) -> tuple[Message, ...]:
    """Role and content of each message; other keys are of no use to a chat template of text."""
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: `messages` must be a list of at least one message")
    for index, message in enumerate(messages):
        fields = [message.get(key) for key in ("role", "content")] if isinstance(message, dict) else [None]
        if not all(isinstance(field, str) for field in fields):
            raise InputError(f"{where}: message {index + 1} needs `role` and `content`, both strings")
    return tuple({"role": message["role"], "content": message["content"]} for message in messages)


def _read_pdf(path: Path) -> Iterator[Document]:
    """The text of a PDF as one document, pages separated by a blank line."""
    import pypdf

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it logs what it mends; what it cannot mend is raised
    try:
        pages = [page.extract_text() for page in pypdf.PdfReader(path).pages]
    except (pypdf.errors.FileNotDecryptedError, pypdf.errors.DependencyError):
        raise InputError(f"{path}: encrypted; save a copy without a password first") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except Exception as error:  # on damaged files pypdf fails with whatever its parser runs into
        reason = " ".join(str(error).split())
        raise DamagedFileError(f"{path}: not a readable PDF ({type(error).__name__}: {reason})") from None
    # Some fonts' tables give surrogates one by one: pairs are joined, what is left over becomes U+FFFD.
    text = "\n\n".join(pages).replace("\0", "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if not text.strip():
        raise InputError(f"{path}: no text on its {len(pages)} pages; if they are scanned, run OCR first")
    yield Document(str(path), text)
