"""Byte-level BPE as the papers and projects describe it, in plain Python: what the fast tokenizers are held against.

Nothing here comes from the `tokenizers` library. Merges for tests are counted from text by `learn_merges`.
"""

import itertools
import os
import random
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from pydoc_data import topics

import regex
import tiny_models

BYTES = tiny_models.byte_characters()

Pair = tuple[str, str]
Split = Callable[[str], list[str]]


def merged(tokens: list[str], pair: Pair) -> list[str]:
    """Every place where the pair stands, from the left, becomes one token."""
    out: list[str] = []
    for token in tokens:
        if out and (out[-1], token) == pair and out[-1] is not None:
            out[-1:] = ["".join(pair), None]  # type: ignore[list-item]
        else:
            out.append(token)
    return [token for token in out if token is not None]


def spelled(word: str) -> list[str]:
    return [BYTES[byte] for byte in word.encode()]


def learn_merges(words: Iterable[str], count: int) -> list[Pair]:
    """The pairs that are most frequent one after the other, `count` of them."""
    counted = Counter(words)
    spellings = {word: spelled(word) for word in counted}
    merges: list[Pair] = []
    for _ in range(count):
        pairs: Counter[Pair] = Counter()
        for word, tokens in spellings.items():
            for pair in itertools.pairwise(tokens):
                pairs[pair] += counted[word]
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        spellings = {word: merged(tokens, best) for word, tokens in spellings.items()}
    return merges


class SlowBPE:
    """Words are spelled in bytes; the pair of lowest rank, leftmost first, is merged while there is one."""

    def __init__(self, split: Split, vocabulary: dict[str, int], merges: list[Pair], form: str | None = None) -> None:
        self.split, self.vocabulary, self.form = split, vocabulary, form
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.word = cache(self._word)

    def encode(self, text: str) -> list[int]:
        text = unicodedata.normalize(self.form, text) if self.form else text
        return [id for word in self.split(text) for id in self.word(word)]

    def _word(self, word: str) -> list[int]:
        tokens = spelled(word)
        while True:
            ranks = [self.ranks.get(pair, len(self.ranks)) for pair in itertools.pairwise(tokens)]
            if min(ranks, default=len(self.ranks)) == len(self.ranks):
                return [self.vocabulary[token] for token in tokens]
            at = ranks.index(min(ranks))
            tokens[at : at + 2] = [tokens[at] + tokens[at + 1]]


def pattern(text: str) -> Split:
    return regex.compile(text).findall


def mixed_text() -> str:
    """More than a megabyte: English, code, characters from all of Unicode, every kind of white space."""
    draw = random.Random(0)
    english = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    code = (Path(os.__file__).parent / "tarfile.py").read_text(encoding="utf-8")
    # Of an old Unicode: what a later one added, two libraries may know differently.
    assigned = [chr(x) for x in range(0x110000) if unicodedata.ucd_3_2_0.category(chr(x)) not in ("Cn", "Cs")]
    strange = "".join(draw.choices(assigned, k=130_000))
    spaces = "".join(draw.choices(" \t\n\r\v\f\u00a0\u2003\u2028\u0085ab1'sſ", k=60_000))
    text = english + code + strange + spaces + "'S 'LL 'ſ e\u0301 \u1112\u1161\u11ab ﬁ Å 🌍👩‍🚀 <|endoftext|>"
    assert len(text.encode()) > 1_000_000
    return text
