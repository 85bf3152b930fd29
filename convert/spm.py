"""SentencePiece's byte-pair vocabularies: pieces with scores in GGUF, pieces with merges in tokenizer.json.

SentencePiece merges any two neighbours whose concatenation is a piece, the best score first; a tokenizer.json merges
listed pairs, the first first. They agree where the pairs come in the order of their pieces' scores. Of the pairs that
could make a piece only one ever does, whatever stands around it: the one that is left when its own text is merged.
"""

import heapq
import re
from collections.abc import Mapping
from typing import Any

from mlx_impl.errors import DamagedFileError, InputError

SPACE = "▁"  # U+2581
BYTE = re.compile("<0x[0-9A-F]{2}>")
_REPLACED = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREPENDED = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, _REPLACED]}
LONGEST = 256  # characters of a piece; longer ones would take long to merge, and no vocabulary has them


def merges_of(scores: Mapping[str, float], where: str) -> list[tuple[str, str]]:
    """The pair that makes each piece that can be reached, the best score first; `scores` are of normal pieces.

    DamagedFileError for a piece that is too long to be one, InputError for one of characters that are no pieces: it
    could be reached there, but not through the pairs of a tokenizer.json.
    """
    pairs: dict[tuple[str, str], float] = {}
    for piece, score in scores.items():
        if len(piece) > LONGEST:
            raise DamagedFileError(f"{where}: a token of {len(piece):,} characters, at most {LONGEST} are read")
        parts = _merged(piece, scores)
        if len(parts) != 2:
            continue
        alone = [part for part in parts if part not in scores]
        if alone:
            raise InputError(f"{where}: token {piece!r:.60} is made of {alone[0]!r:.60}, which is no token")
        pairs[parts[0], parts[1]] = score
    return sorted(pairs, key=lambda pair: -pairs[pair])


def _merged(piece: str, scores: Mapping[str, float]) -> list[str]:
    """What SentencePiece makes of a piece's text short of the piece itself; of equal scores the first comes first.

    A part is known by where it begins. The queue may hold pairs that are gone: what is merged by then no longer ends
    where they do.
    """
    length = parts = len(piece)
    ends: list[int] = list(range(1, length + 1))  # of the part that begins here, 0 where none does
    begins: list[int] = list(range(-1, length))  # of the part that ends here
    queue: list[tuple[float, int, int]] = []

    def offer(begin: int, end: int) -> None:
        score = scores.get(piece[begin:end])
        if score is not None:
            heapq.heappush(queue, (-score, begin, end))

    for begin in range(length - 1):
        offer(begin, begin + 2)
    while parts > 2 and queue:
        _, begin, end = heapq.heappop(queue)
        middle = ends[begin]
        if not middle or middle == length or ends[middle] != end:
            continue
        ends[begin], ends[middle], begins[end] = end, 0, begin
        parts -= 1
        if begin:
            offer(begins[begin], end)
        if end < length:
            offer(begin, ends[end])
    return [piece[begin:end] for begin, end in enumerate(ends) if end]


def scores_of(state: Mapping[str, Any], where: str) -> dict[str, float]:
    """Scores of the normal pieces of a tokenizer.json whose order is that of its merges.

    InputError where SentencePiece would merge other pairs than are listed.
    """
    special = {token["content"] for token in state["added_tokens"]}
    pieces = [piece for piece in state["model"]["vocab"] if piece not in special and not BYTE.fullmatch(piece)]
    listed = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in state["model"]["merges"]]
    ranks: dict[str, int] = {}
    for left, right in listed:
        ranks.setdefault(left + right, len(ranks))
    scores = {piece: -float(ranks.get(piece, len(ranks) + n)) for n, piece in enumerate(pieces)}
    at = {pair: n for n, pair in enumerate(listed)}
    order = [at.get(pair, -1) for pair in merges_of(scores, where)]
    if -1 in order or order != sorted(order):
        raise InputError(f"{where}: merges other pairs than SentencePiece would; GGUF cannot say which")
    return scores


def puts_space_first(state: Mapping[str, Any], where: str) -> bool:
    """Whether a tokenizer.json puts a space before a text; InputError where it does more to it before it merges."""
    normalizer, pre = state.get("normalizer"), state.get("pre_tokenizer")
    if pre is None and normalizer in (_REPLACED, _PREPENDED):
        return bool(normalizer == _PREPENDED)
    if (
        normalizer is None
        and pre
        and (pre["type"], pre["replacement"], pre.get("split")) == ("Metaspace", SPACE, False)
    ):
        return bool(pre.get("prepend_scheme", "always") != "never")
    raise InputError(f"{where}: changes or splits text before it merges in a way that GGUF cannot say")


def tokenizer_json(
    vocabulary: Mapping[str, int], scores: Mapping[str, float], unknown: str | None, space_first: bool, where: str
) -> dict[str, Any]:
    """The content of a tokenizer.json without its added tokens; `scores` are of the normal pieces alone."""
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": _PREPENDED if space_first else _REPLACED,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [*steps, {"type": "Strip", "content": " ", "start": 1, "stop": 0}] if space_first else steps,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": dict(vocabulary),
            "merges": [list(pair) for pair in merges_of(scores, where)],
        },
    }
