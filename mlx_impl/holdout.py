"""Which part of a text is held out for measuring, whole documents or blocks of the few there are; and which part of
one that is too long is taken at all.

What is held out is a function of the seed and the units' text alone, not of their order, and equal units fall on the
same side, so that nothing that is measured was trained on. Tokens are estimated: no choice here is worth encoding a
text for.
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mlx_impl.errors import InputError
from mlx_impl.readers import Document

FEW_DOCUMENTS = 10
"""Below so many documents the held-out part is drawn from their paragraphs."""
SMALLEST_BLOCK = 50
"""Tokens that a held-out paragraph has at least; shorter ones are joined to their neighbour."""
SAMPLED_BLOCK = 4096
"""Characters of the blocks that a sample of a plain text consists of: several windows of training."""


def estimated_tokens(text: str) -> int:
    """About how many tokens a text and its end are: one for four bytes of UTF-8, which suits English."""
    return len(text.encode()) // 4 + 1


def sample_documents(documents: list[Document], max_tokens: int, seed: int) -> list[Document]:
    """A part of the documents of at most `max_tokens`, estimated, drawn uniformly over all of them, in their order.

    Whole conversations and exchanges, and blocks of plain texts, cut at the end of a line if there is one; a text's
    blocks stay one document. At least one of these is taken, whatever its size. A function of documents and seed.
    """
    whole = joined(documents)
    units = [
        _Unit(index, block, estimated_tokens(block))
        for index, document in enumerate(whole)
        for block in (_blocks(document.text) if isinstance(document.content, str) else [document.text])
    ]
    key = np.array([seed % 2**64, 0], np.uint64)
    order = np.random.Philox(key=key).random_raw(len(units)).argsort(kind="stable")
    sizes = np.cumsum([units[index].tokens for index in order])
    taken = order[: max(1, int(np.searchsorted(sizes, max_tokens, side="right")))]
    return _gathered(whole, [units[index] for index in sorted(taken)])


@dataclass(frozen=True)
class _Unit:
    """What is held out or kept as a whole: a document (by its index) or a block of one."""

    document: int
    text: str
    tokens: int


def split_holdout(
    documents: list[Document], fraction: float, max_tokens: int, count: Callable[[str], int], seed: int
) -> tuple[list[Document], list[Document]]:
    """Divide into (train, heldout), with about `fraction` of the tokens, at most `max_tokens`, held out.

    Whole documents are held out where there are at least `FEW_DOCUMENTS`; of fewer, or where these are too
    long to come near the size wanted, blocks of the plain texts: paragraphs, else lines, sentences, words.
    The blocks of a document that fall on one side stay one document, in their order. Equal units fall on the
    same side. `count` gives the tokens of a text. The choice depends on the units' text and the seed alone.
    The training part is never empty; the held-out part is, if there is nothing that can be divided.
    """
    if not 0 <= fraction < 1:
        raise InputError(f"--holdout {fraction}: must be at least 0 and less than 1")
    whole = joined(documents)
    held: set[_Unit] = set()
    units: list[_Unit] = []
    for cut in _CUTS[1:] if len(whole) < FEW_DOCUMENTS else _CUTS:
        units = [unit for index, document in enumerate(whole) for unit in _units(index, document, cut, count)]
        wanted = min(max_tokens, fraction * sum(unit.tokens for unit in units))
        held = _draw(units, wanted, max_tokens, seed)
        if sum(unit.tokens for unit in units if unit in held) >= wanted / 2:
            break
    train = _gathered(whole, [unit for unit in units if unit not in held])
    return train, _gathered(whole, [unit for unit in units if unit in held])


def joined(documents: list[Document]) -> list[Document]:
    """The documents with the pieces of long texts put together again."""
    whole: list[Document] = []
    parts: list[str] = []
    for document in documents:
        if document.ends and not parts:
            whole.append(document)
            continue
        parts.append(document.text)
        if document.ends:
            whole.append(Document(document.name, "".join(parts)))
            parts = []
    return whole


def _units(index: int, document: Document, cut: Callable[[str], list[str]], count: Callable[[str], int]) -> list[_Unit]:
    """A plain text cut into blocks of at least `SMALLEST_BLOCK` tokens; anything else is one unit."""
    parts = cut(document.text) if isinstance(document.content, str) else [document.text]
    blocks: list[_Unit] = []
    for part in parts:
        if blocks and blocks[-1].tokens < SMALLEST_BLOCK:
            blocks[-1] = _Unit(index, blocks[-1].text + part, blocks[-1].tokens + count(part))
        else:
            blocks.append(_Unit(index, part, count(part)))
    if len(blocks) > 1 and blocks[-1].tokens < SMALLEST_BLOCK:
        last = blocks.pop()
        blocks[-1] = _Unit(index, blocks[-1].text + last.text, blocks[-1].tokens + last.tokens)
    return blocks


def _draw(units: list[_Unit], wanted: float, max_tokens: int, seed: int) -> set[_Unit]:
    """Units of together at most `wanted` tokens, drawn in the order of a hash of seed and text.

    Equal ones go together. Where not one is small enough, the smallest, if it leaves at least half to train
    on.
    """
    alike: dict[str, list[_Unit]] = {}
    for unit in units:
        alike.setdefault(unit.text.strip(), []).append(unit)
    sizes = {text: sum(unit.tokens for unit in group) for text, group in alike.items()}
    room, chosen = wanted, []
    for text in sorted(sizes, key=lambda text: hashlib.sha256(f"{seed}\n{text}".encode()).digest()):
        if 0 < sizes[text] <= room:
            chosen.append(text)
            room -= sizes[text]
    smallest = min(sizes, key=lambda text: sizes[text], default="")
    if not chosen and wanted > 0 and sizes[smallest] <= min(max_tokens, sum(sizes.values()) / 2):
        chosen = [smallest]
    return {unit for text in chosen for unit in alike[text]}


def _blocks(text: str) -> list[str]:
    """A text in blocks of at most `SAMPLED_BLOCK` characters, cut behind a line, else a word, else anywhere."""
    blocks: list[str] = []
    start = 0
    while start < len(text):
        stop = start + SAMPLED_BLOCK
        if stop < len(text):
            marks = [text.rfind(mark, start, stop) for mark in "\n "]
            stop = next((mark + 1 for mark in marks if mark >= 0), stop)
        blocks.append(text[start:stop])
        start = stop
    return blocks


def _gathered(whole: list[Document], units: list[_Unit]) -> list[Document]:
    """The documents that these units make up; the units of each are in their order."""
    texts: dict[int, list[str]] = {}
    for unit in units:
        texts.setdefault(unit.document, []).append(unit.text)
    return [
        Document(whole[index].name, "".join(parts)) if isinstance(whole[index].content, str) else whole[index]
        for index, parts in texts.items()
    ]


def lines(text: str) -> list[str]:
    """A text cut behind each line."""
    return re.findall(r"[^\n]*\n|[^\n]+", text)


def sentences(text: str) -> list[str]:
    """A text cut behind each sentence, as far as its full stops tell."""
    return re.findall(r"(?s).+?(?:[.!?]\s+|[。！？]\s*|\Z)", text)


def _paragraphs(text: str) -> list[str]:
    """Runs of lines, each with the blank lines that follow it."""
    blocks: list[list[str]] = []
    previous = "\n"
    for line in lines(text):
        if not blocks or (line.strip() and not previous.strip()):
            blocks.append([])
        blocks[-1].append(line)
        previous = line
    return ["".join(block) for block in blocks]


_CUTS: list[Callable[[str], list[str]]] = [
    lambda text: [text],
    _paragraphs,
    lines,
    sentences,
    lambda text: re.findall(r"\S+\s*|\s+", text),
    lambda text: re.findall(r"(?s).{1,64}", text),
]
"""Ways to cut a text, coarsest first: not at all, at blank lines, lines, sentences, words, anywhere."""
