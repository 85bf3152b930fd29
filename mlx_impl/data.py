"""Documents -> one stream of tokens, each document closed by EOS and, where the tokenizer adds it, begun by BOS.

Which tokens count in the loss travels as a mask beside them. A stream lies in memory (`Tokens`) or in a
memory-mapped folder (`TokenFile`) that may be larger than memory and is made once for the same inputs.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mlx_impl.config import LOSS_ON
from mlx_impl.errors import DamagedFileError, InputError
from mlx_impl.files import atomic_folder, read_json, sha256, write_json
from mlx_impl.readers import (
    Document,
    Exchange,
    InputFile,
    Message,
    Skipped,
    find_files,
    nothing_to_read,
    pieces,
    read_file,
)

Ids = NDArray[np.int32]
Flags = NDArray[np.bool_]
Progress = Callable[[int, int], None]
"""Told of bytes done and bytes in all."""

FORMAT_VERSION = 1


class TextTokenizer(Protocol):
    """What is asked of a tokenizer here; `mlx_impl.tokenizer.Tokenizer` is one."""

    @property
    def adds_bos(self) -> bool:
        """Whether `bos_id` goes before a plain text."""

    @property
    def bos_id(self) -> int | None:
        """The id that begins a text, if there is one."""

    @property
    def eos_id(self) -> int | None:
        """The id that ends a document, if there is one."""

    @property
    def vocab_size(self) -> int:
        """All ids are smaller than this."""

    @property
    def digest(self) -> str:
        """Equal for tokenizers that behave alike."""

    @property
    def has_chat_template(self) -> bool:
        """Whether `encode_chat` works."""

    @property
    def chat_digest(self) -> str | None:
        """Equal for tokenizers with the same chat template; None without one."""

    def render_chat(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The text of a conversation."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without specials."""

    def encode_chat(self, messages: list[Message], add_generation_prompt: bool) -> list[int]:
        """Ids of a conversation as the chat template renders it."""


# Documents -> tokens


def encode_document(
    document: Document, tokenizer: TextTokenizer, loss_on: str = "all", begins: bool = True
) -> tuple[Ids, Flags | None]:
    """Ids (N,) of a document with its closing EOS, and which of them are trained on (N,), None for all.

    Where the tokenizer adds BOS, it comes before a text that is not empty, unless a chat template writes what is
    needed or the document continues the one before (`begins` False). It is not trained on, but for `loss_on` "all":
    there it counts between documents, as EOS does, and needs no mask.
    Raises InputError for an unknown `loss_on`, for a conversation without a chat template, and for a template
    that does not allow to say which tokens are the assistant's.
    """
    if loss_on not in LOSS_ON:
        raise InputError(f"loss_on is {loss_on!r}; {', '.join(LOSS_ON)} are known")
    content, closed = document.content, False
    if isinstance(content, str):
        ids = [token for piece in pieces([content]) for token in tokenizer.encode(piece)]
        trained = [True] * len(ids)
    elif isinstance(content, Exchange) and not tokenizer.has_chat_template:
        prompt, completion = tokenizer.encode(content.prompt), tokenizer.encode(content.completion)
        ids, trained = prompt + completion, [False] * len(prompt) + [True] * len(completion)
    else:
        ids, trained, closed = _encode_chat(document, tokenizer, loss_on)
    templated = not isinstance(content, str) and tokenizer.has_chat_template
    if begins and ids and tokenizer.adds_bos and tokenizer.bos_id is not None and not templated:
        ids, trained = [tokenizer.bos_id, *ids], [False, *trained]
    if document.ends and tokenizer.eos_id is not None and not closed:
        ids.append(tokenizer.eos_id)
        trained.append(isinstance(content, Exchange) or not trained or trained[-1])
    if max(ids, default=0) >= tokenizer.vocab_size:
        raise InputError(
            f"{document.name}: the tokenizer gave the id {max(ids)}, its vocab_size is {tokenizer.vocab_size}"
        )
    return np.array(ids, np.int32), None if loss_on == "all" else np.array(trained, bool)


def _encoded(
    documents: Iterable[Document], tokenizer: TextTokenizer, loss_on: str
) -> Iterator[tuple[Document, Ids, Flags | None]]:
    """Each document with what `encode_document` makes of it; the pieces of a long text begin once."""
    begins = True
    for document in documents:
        yield document, *encode_document(document, tokenizer, loss_on, begins)
        begins = document.ends


def _turns(document: Document) -> list[Message]:
    """A conversation or an exchange as chat messages."""
    content = document.content
    if isinstance(content, Exchange):
        return [
            {"role": "user", "content": content.prompt},
            {"role": "assistant", "content": content.completion},
        ]
    assert not isinstance(content, str)
    return list(content)


def _trained_turns(document: Document, loss_on: str) -> list[int]:
    """Indices of the messages that are trained on; InputError if there is none."""
    messages = _turns(document)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise InputError(f"{document.name}: no assistant turn to train on; remove it or train on all text")
    return turns if loss_on == "assistant" else turns[-1:]


def _encode_chat(document: Document, tokenizer: TextTokenizer, loss_on: str) -> tuple[list[int], list[bool], bool]:
    """Ids of a conversation, which are trained on, and whether the template closed the last turn with EOS.

    A turn is what rendering it adds to the conversation before it with the generation prompt, so its end
    marker is part of it. That each rendering goes on where the shorter one stopped is checked.
    """
    if not tokenizer.has_chat_template:
        raise InputError(
            f"{document.name}: a conversation, but this tokenizer has no chat template; use prompt/completion"
        )
    messages = _turns(document)
    ids = tokenizer.encode_chat(messages, False)
    # ChatML puts a line end behind its EOS, so the whole last turn is looked at.
    answered = messages[-1]["role"] == "assistant"
    last = len(tokenizer.encode_chat(messages[:-1], answered)) if len(messages) > 1 else 0
    closed = tokenizer.eos_id in ids[last:]
    if loss_on == "all":
        return ids, [True] * len(ids), closed
    trained = [False] * len(ids)
    for turn in _trained_turns(document, loss_on):
        before = tokenizer.encode_chat(messages[:turn], True)
        after = tokenizer.encode_chat(messages[: turn + 1], False)
        if ids[: len(before)] != before or ids[: len(after)] != after or len(before) > len(after):
            raise InputError(
                f"{document.name}: with message {turn + 1} the chat template changes the text before it, so "
                "its tokens cannot be told apart; train on all text"
            )
        trained[len(before) : len(after)] = [True] * (len(after) - len(before))
    return ids, trained, closed


def _trained_bytes(document: Document, tokenizer: TextTokenizer, loss_on: str) -> int:
    """UTF-8 bytes of the text that is trained on, for bits per byte: of a whole chat with its template and roles."""
    if isinstance(document.content, str) or (loss_on == "all" and not tokenizer.has_chat_template):
        return len(document.text.encode())
    messages = _turns(document)
    if loss_on == "all":
        return len(tokenizer.render_chat(messages, False).encode())
    return sum(len(messages[turn]["content"].encode()) for turn in _trained_turns(document, loss_on))


# Streams of tokens: in memory, and in a memory-mapped folder


@dataclass(frozen=True)
class Tokens:
    """A stream in memory: ids (N,), and trained (N,), None for all.

    `n_bytes` are the UTF-8 bytes of the text that is trained on, what bits per byte divide by.
    """

    ids: Ids
    trained: Flags | None
    n_documents: int
    n_bytes: int

    def __len__(self) -> int:
        """Number of tokens N."""
        return len(self.ids)

    @property
    def masked(self) -> bool:
        """Whether some tokens may be left out of the loss."""
        return self.trained is not None

    @property
    def digest(self) -> str:
        """Hex digest of the stream."""
        hashed = hashlib.sha256(self.ids.tobytes())
        if self.trained is not None:
            hashed.update(self.trained.tobytes())
        return hashed.hexdigest()

    def span(self, start: int, stop: int) -> tuple[Ids, Flags]:
        """Ids and trained of the tokens [start, stop), both (stop - start,)."""
        trained = np.ones(stop - start, bool) if self.trained is None else self.trained[start:stop]
        return self.ids[start:stop], trained


def tokens_of(documents: Iterable[Document], tokenizer: TextTokenizer, loss_on: str = "all") -> Tokens:
    """The stream of these documents, in memory; errors as for `encode_document`."""
    ids, trained = [np.zeros(0, np.int32)], [np.zeros(0, bool)]
    n_documents = n_bytes = 0
    for document, more, flags in _encoded(documents, tokenizer, loss_on):
        ids.append(more)
        trained.append(np.ones(len(more), bool) if flags is None else flags)
        n_documents += document.ends
        n_bytes += _trained_bytes(document, tokenizer, loss_on)
    return Tokens(np.concatenate(ids), None if loss_on == "all" else np.concatenate(trained), n_documents, n_bytes)


def teaches(tokens: Tokens) -> bool:
    """Whether there is a token to predict that counts."""
    return len(tokens) >= 2 and (tokens.trained is None or bool(tokens.trained[1:].any()))


@dataclass(frozen=True)
class TokenFile:
    """A stream in a folder, memory-mapped; the same attributes as `Tokens`.

    `tokens.bin` holds little-endian uint16 or uint32, `mask.bin` a bit per token unless all are trained on,
    and `header.json` says what they were made from. `digest` names inputs, tokenizer and `loss_on`; `reused`
    tells whether `tokenize_files` found the folder already made.
    """

    path: Path
    ids: NDArray
    bits: NDArray | None
    n_documents: int
    n_bytes: int
    digest: str
    reused: bool = False

    def __len__(self) -> int:
        """Number of tokens N."""
        return len(self.ids)

    @property
    def masked(self) -> bool:
        """Whether some tokens may be left out of the loss."""
        return self.bits is not None

    def span(self, start: int, stop: int) -> tuple[Ids, Flags]:
        """Ids and trained of the tokens [start, stop), both (stop - start,)."""
        ids = self.ids[start:stop].astype(np.int32)
        if self.bits is None:
            return ids, np.ones(stop - start, bool)
        first = start // 8 * 8
        bits = np.unpackbits(self.bits[start // 8 : -(-stop // 8)])
        return ids, bits[start - first : stop - first].astype(bool)

    def head(self, count: int) -> "TokenFile":
        """The stream's first `count` tokens, still mapped; documents and bytes are those of the whole."""
        bits = None if self.bits is None else self.bits[: -(-count // 8)]
        return replace(self, ids=self.ids[:count], bits=bits, digest=f"{self.digest}[:{count}]")

    @classmethod
    def open(cls, path: Path, reused: bool = False) -> "TokenFile":
        """Map a stream; DamagedFileError if a file is missing or its size is not what the header says."""
        header = read_json(path / "header.json")
        if header.get("version") != FORMAT_VERSION:
            raise DamagedFileError(
                f"{path}: token file version {header.get('version')!r}, {FORMAT_VERSION} is read; remove it"
            )
        try:
            dtype = np.dtype({"uint16": "<u2", "uint32": "<u4"}[header["dtype"]])
            n = int(header["n_tokens"])
            ids = _mapped(path / "tokens.bin", dtype, n)
            bits = _mapped(path / "mask.bin", np.dtype("u1"), -(-n // 8)) if header["masked"] else None
            counts = int(header["n_documents"]), int(header["n_bytes"])
            return cls(path, ids, bits, *counts, str(header["digest"]), reused)
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedFileError(f"{path / 'header.json'}: not the header of a token file ({error!r})") from None


def _mapped(path: Path, dtype: np.dtype, count: int) -> np.memmap:
    """A read-only map of `count` numbers, at least one, which must fill the file."""
    wanted = count * dtype.itemsize
    found = path.stat().st_size if path.is_file() else 0
    if found != wanted or not wanted:
        raise DamagedFileError(f"{path}: {found:,} bytes, the header says {wanted:,}; remove it and tokenize anew")
    return np.memmap(path, dtype, mode="r")


def tokenize_files(
    paths: Sequence[Path],
    tokenizer: TextTokenizer,
    cache_dir: Path,
    loss_on: str = "all",
    progress: Progress | None = None,
    skipped: Skipped | None = None,
) -> TokenFile:
    """The stream of these files and folders, written once to a folder in `cache_dir` named by its digest.

    It is reused while the files' contents, their order and kinds, the tokenizer and `loss_on` stay the same,
    whatever the files are called; a damaged one is made anew. One document at a time is in memory. `progress`
    counts bytes of input, `skipped` is told of files passed over in folders, of those that only reading shows to be
    unusable when they are read. An error of a reader (see `read_documents`), the tokenizer or the disk leaves nothing
    behind.
    """
    files = find_files(paths, skipped)
    before = [_state(file.path) for file in files]
    digest = _digest_of(files, tokenizer, loss_on)
    target = cache_dir / f"tokens-{digest[:16]}"
    try:
        if target.exists():
            return TokenFile.open(target, reused=True)
    except (DamagedFileError, InputError):
        pass  # a cache can always be made again
    with atomic_folder(target, replace=True) as folder:
        documents = _read_counting(files, progress or (lambda done, total: None), skipped)
        header = _write_stream(folder, documents, tokenizer, loss_on)
        if not header["n_tokens"]:
            raise nothing_to_read(paths)
        changed = [str(file.path) for file, state in zip(files, before, strict=True) if _state(file.path) != state]
        if changed:
            raise InputError(f"{', '.join(changed)}: changed while being read; try again when it is written")
        write_json(
            folder / "header.json",
            header | {"digest": digest, "tokenizer": tokenizer.digest, "loss_on": loss_on},
        )
    return TokenFile.open(target)


def _digest_of(files: list[InputFile], tokenizer: TextTokenizer, loss_on: str) -> str:
    """Hex digest of all that decides what the stream will be."""
    # Not what the template makes of a conversation, in which it may name the day.
    template = tokenizer.chat_digest if any(file.kind == "jsonl" for file in files) else None
    inputs = [(file.kind, sha256(file.path)) for file in files]
    begin = tokenizer.bos_id if tokenizer.adds_bos else None
    made_of = [FORMAT_VERSION, tokenizer.digest, begin, tokenizer.eos_id, template, loss_on, inputs]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()


def _state(path: Path) -> tuple[int, int]:
    """Size and time of the last change: a cheap sign that a file is being written to."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _read_counting(files: list[InputFile], progress: Progress, skipped: Skipped | None) -> Iterator[Document]:
    """The documents of all files; `progress` is told when one has been used."""
    sizes = [file.path.stat().st_size for file in files]
    done, total = 0, sum(sizes)
    for file, size in zip(files, sizes, strict=True):
        read = 0
        for document in read_file(file, skipped):
            yield document
            read = min(size, read + len(document.text.encode()))
            progress(done + read, total)
        done += size
    progress(total, total)


def _write_stream(
    folder: Path, documents: Iterable[Document], tokenizer: TextTokenizer, loss_on: str
) -> dict[str, Any]:
    """Write `tokens.bin`, and `mask.bin` unless all are trained on; returns their part of the header."""
    dtype, name = ("<u2", "uint16") if tokenizer.vocab_size <= 1 << 16 else ("<u4", "uint32")
    header = {"version": FORMAT_VERSION, "dtype": name, "masked": loss_on != "all"}
    n_tokens = n_documents = n_bytes = 0
    rest = np.zeros(0, bool)  # flags that do not fill a byte yet
    with open(folder / "tokens.bin", "wb") as tokens, open(folder / "mask.bin", "wb") as mask:
        for document, ids, trained in _encoded(documents, tokenizer, loss_on):
            tokens.write(ids.astype(dtype).tobytes())
            if trained is not None:
                flags = np.concatenate([rest, trained])
                whole = len(flags) // 8 * 8
                mask.write(np.packbits(flags[:whole]).tobytes())
                rest = flags[whole:]
            n_tokens += len(ids)
            n_documents += document.ends
            n_bytes += _trained_bytes(document, tokenizer, loss_on)
        mask.write(np.packbits(rest).tobytes())
    if loss_on == "all":
        (folder / "mask.bin").unlink()
    return header | {"n_tokens": n_tokens, "n_documents": n_documents, "n_bytes": n_bytes}
