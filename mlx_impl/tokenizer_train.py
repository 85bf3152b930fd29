"""Train a byte-pair vocabulary, and write it as a SentencePiece model and a tokenizer.json with the same ids.

Unusual: the merges are counted by the trainer of the `tokenizers` library. SentencePiece's own has no minimum
frequency, drops tabs and NUL, strips newlines and skips lines over 4 kB. Both files come from one list.

Why the ids agree: SentencePiece merges any two neighbours whose concatenation is a piece, best piece first; a
tokenizer.json merges listed pairs, best pair first. Merges inside what becomes one piece happen in the same
order whatever stands around it, so a piece is always completed from one and the same pair: the one seen in
training, which is the only one listed. Neither pre-tokenises; both use a heap, so that even one character
repeated costs n log n.
"""

import json
import re
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from mlx_impl.errors import InputError

SPACE = "▁"  # U+2581, how SentencePiece writes a space inside a piece
UNKNOWN, BEGIN, END, PADDING = SPECIALS = ("<unk>", "<s>", "</s>", "<pad>")
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))

# What training never merges across: single digits; words and runs of signs, each with one space before it;
# runs of white space. The bounds keep the trainer, quadratic in the length of a word, quick.
_WORDS = (
    rf"\p{{N}}|{SPACE}?[\p{{L}}\p{{M}}]{{1,64}}|{SPACE}?[^\s{SPACE}\p{{L}}\p{{M}}\p{{N}}]{{1,64}}"
    rf"|[\s{SPACE}]{{1,64}}(?![^\s{SPACE}])|[\s{SPACE}]{{1,64}}"
)
_LONGEST_PIECE = 16  # characters, as in SentencePiece
_COVERAGE = 0.9995  # of all characters; the rarer ones are spelled in bytes, as in SentencePiece
_CHUNK = 65536  # characters handed to the trainer at a time, which needs 16 bytes for each


def learn(texts: Iterable[str], vocab_size: int, min_frequency: int, special_tokens: Sequence[str]) -> dict[str, Any]:
    """The content of a tokenizer.json of at most `vocab_size` ids, fewer where there is too little text.

    Ids: `SPECIALS`, `special_tokens`, the 256 bytes, single characters (most frequent first), merges (in the
    order in which they apply). No character and no pair seen fewer than `min_frequency` times gets one. The
    texts are held in memory. Raises InputError for texts that are all empty, a lone surrogate, unusable
    special tokens, and a `vocab_size` that has no room for more than the specials and bytes.
    """
    specials = [*SPECIALS, *special_tokens]
    _check_specials(specials)
    room = vocab_size - len(specials) - len(BYTES)
    if room < 1 or min_frequency < 1:
        raise InputError(
            f"vocab_size = {vocab_size} must be at least {vocab_size - room + 1} (specials and bytes take "
            f"{vocab_size - room}) and min_frequency = {min_frequency} at least 1"
        )
    texts = [text.replace(" ", SPACE) for text in texts]
    counts: Counter[str] = Counter()
    for text in texts:
        check_encodable(text)
        counts.update(text)
    if not counts:
        raise InputError("no text to train a tokenizer on: every text given is empty")
    characters = _alphabet(counts, min_frequency, at_most=(room + 1) // 2)
    merges = _merges(_chunks(texts, characters, specials), characters, room - len(characters), min_frequency)
    return tokenizer_json(specials, characters, merges)


def tokenizer_json(
    specials: Sequence[str], characters: Sequence[str], merges: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """The content of tokenizer.json as the `tokenizers` library itself would write it."""
    pieces = [*specials, *BYTES, *characters, *("".join(pair) for pair in merges)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **flags} for i, token in enumerate(specials)],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": UNKNOWN,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": [list(pair) for pair in merges],
        },
    }


def tokenizer_config(specials: Sequence[str]) -> dict[str, Any]:
    """tokenizer_config.json with which transformers keeps every character, and specials in text as text."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": UNKNOWN,
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PADDING,
        "additional_special_tokens": list(specials[len(SPECIALS) :]),
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
    }


def sentencepiece_model(state: dict[str, Any]) -> bytes | None:
    """The bytes of tokenizer.model for the content of a tokenizer.json; None if `learn` did not make it."""
    vocab, merges = state["model"]["vocab"], state["model"]["merges"]
    specials = [token["content"] for token in state["added_tokens"]]
    if tuple(specials[: len(SPECIALS)]) != SPECIALS:
        return None
    vocab = dict(sorted(vocab.items(), key=lambda item: item[1]))
    characters = list(vocab)[len(specials) + len(BYTES) : len(vocab) - len(merges)]
    if state != tokenizer_json(specials, characters, merges):
        return None

    unknown, normal, control, byte, bpe = 2, 1, 3, 6, 2  # enumerators of sentencepiece_model.proto
    kinds = [unknown, *[control] * (len(specials) - 1), *[byte] * len(BYTES)]
    fields = []
    for piece, index in vocab.items():
        kind = kinds[index] if index < len(kinds) else normal
        # A later piece scores lower; specials and bytes never take part in merging and score 0 by custom.
        score = float(len(kinds) - index - 1) if kind == normal else 0.0
        fields.append(_field(1, _field(1, piece.encode()) + _field(2, score) + _field(3, kind)))
    # model_type, vocab_size, split_digits, byte_fallback, unk_id, bos_id, eos_id, pad_id
    trainer: dict[int, int | bytes] = {3: bpe, 4: len(vocab), 25: 1, 35: 1, 40: 0, 41: 1, 42: 2, 43: 3}
    # name, add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces
    normalizer: dict[int, int | bytes] = {1: b"identity", 3: 0, 4: 0, 5: 1}
    for number, message in ((2, trainer), (3, normalizer)):
        fields.append(_field(number, b"".join(_field(key, value) for key, value in message.items())))
    return b"".join(fields)


def check_encodable(text: str) -> None:
    """Raise InputError for a lone surrogate, which is no character and has no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text has a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start:,}, "
            "which cannot be encoded; read the file with errors='replace' or remove it"
        ) from None


def _check_specials(specials: Sequence[str]) -> None:
    for index, token in enumerate(specials):
        # A single character could not be told from the same character in text, by SentencePiece at least.
        if len(token) < 2 or SPACE in token or re.search(r"\s", token) or token in BYTES or token in specials[:index]:
            raise InputError(
                f"special token {token!r}: two characters or more, no white space and no U+2581 are needed, "
                f"and none of {', '.join(SPECIALS)}, <0x00> to <0xFF> or another special token"
            )
        check_encodable(token)


def _alphabet(counts: Counter[str], min_frequency: int, at_most: int) -> list[str]:
    """The characters that get an id: the most frequent first, up to the coverage; ties by code point."""
    kept: list[str] = []
    missing = counts.total() * _COVERAGE
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if missing <= 0 or count < min_frequency or len(kept) == at_most:
            break
        kept.append(character)
        missing -= count
    return kept


def _chunks(texts: Iterable[str], characters: Sequence[str], specials: Sequence[str]) -> Iterator[str]:
    """Stretches of text that hold only `characters` and no special token, so that no piece can equal one."""
    outside = "|".join(map(re.escape, sorted(specials, key=len, reverse=True)))
    if characters:
        outside += f"|[^{''.join(map(re.escape, characters))}]"
    for text in texts:
        for start in range(0, len(text), _CHUNK):
            yield from filter(None, re.split(outside, text[start : start + _CHUNK]))


def _merges(chunks: Iterator[str], characters: Sequence[str], count: int, min_frequency: int) -> list[list[str]]:
    """At most `count` pairs, the most frequent first, none seen fewer than `min_frequency` times."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    if not characters:
        return []
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_WORDS), "isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=len(characters) + count,
        min_frequency=min_frequency,
        initial_alphabet=list(characters),
        max_token_length=_LONGEST_PIECE,
        show_progress=False,
    )
    tokenizer.train_from_iterator(chunks, trainer)
    merges: list[list[str]] = json.loads(tokenizer.to_str())["model"]["merges"]
    return merges


def _field(number: int, value: int | float | bytes) -> bytes:
    """One field of a protocol buffer message: int as varint, float in 32 bits, bytes with their length."""
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    groups = []
    while value > 127:
        groups.append(value & 127 | 128)
        value >>= 7
    return bytes([*groups, value])
