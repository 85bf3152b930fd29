"""A bare `tokenizer.model`, the file of SentencePiece itself, which older Llama checkpoints have and no tokenizer.json.

Reading needs no more than the vocabulary: the ids are the library's own (see `tokenizer.Tokenizer`). A tokenizer.json
is made of it where that gives the same ids for every text, and refused with the reason elsewhere. Special tokens stand
in the JSON files beside it. Unusual: the protocol buffer is read here, in some lines, as far as it is needed; a message
in several pieces is what they are joined, and the last value of a field counts.
"""

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert import spm
from mlx_impl.errors import DamagedFileError, InputError, printable, shown
from mlx_impl.files import read_json

NAME, SETTINGS = "tokenizer.model", "tokenizer_config.json"
BESIDE = (SETTINGS, "special_tokens_map.json", "added_tokens.json")

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # of sentencepiece_model.proto
_BPE = 2
_MOST_PIECES = 2**22
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")

Fields = dict[int, list[int | bytes]]
"""Field number -> its values in order: numbers, or the bytes of texts, messages and floats."""


@dataclass(frozen=True)
class SentencePieceModel:
    """What the file and those beside it say."""

    file: bytes
    """As it is."""
    pieces: dict[str, int]
    """Piece -> id, in the order of ids."""
    scores: list[float]
    """Of each id; the best pair is merged first."""
    kinds: list[int]
    """Of each id: normal, control and so on, by sentencepiece_model.proto's numbers."""
    space_first: bool
    """Whether a text gets a space before it."""
    changes: str | None
    """What is done to a text before it is split, in words; None where nothing is."""
    bpe: bool
    """Whether it merges pairs; else it is a unigram model or one of words."""
    added: list[dict[str, Any]]
    """The special tokens, as `added_tokens` of a tokenizer.json; those beyond the last piece among them."""
    config: dict[str, Any]
    """tokenizer_config.json, with what it left to the defaults of transformers' LlamaTokenizer spelled out."""
    where: str

    @property
    def first(self) -> bytes:
        """For the library: the file, and what the settings say of the space that a text gets before it."""
        return self.file + _space_first(self.space_first)

    @property
    def later(self) -> bytes:
        """The same for a text after a special token: there is no space before it, but with `legacy` as before any."""
        return self.file + _space_first(self.space_first and self.config["legacy"])

    def described(self) -> dict[str, Any]:
        """The content of a tokenizer.json but for its merges: enough to decode."""
        return self._document({})

    def tokenizer_json(self) -> dict[str, Any]:
        """The content of a tokenizer.json with the ids of the library. InputError where there can be none."""
        others = [piece for piece, i in self.pieces.items() if self.kinds[i] in (_USER_DEFINED, _UNUSED)]
        bytes_there = sum(self.kinds[i] == _BYTE for i in self.pieces.values())
        reasons = [] if self.bpe else ["it is no BPE model"]
        reasons += [f"it {self.changes} before it splits a text"] if self.changes else []
        reasons += [f"{len(others):,} pieces such as {others[0]!r:.40} are the user's own or unused"] if others else []
        reasons += [f"it has {bytes_there} of the 256 bytes"] if bytes_there != 256 else []
        if reasons:
            raise self._impossible("; ".join(reasons))
        state = self._document({p: self.scores[i] for p, i in self.pieces.items() if self.kinds[i] == _NORMAL})
        merged = [self.scores[self.pieces["".join(pair)]] for pair in state["model"]["merges"]]
        if len(set(merged)) < len(merged):  # the library takes the leftmost of equal ones, a tokenizer.json the first
            raise self._impossible(f"{len(merged) - len(set(merged)):,} pieces have the score of another")
        return {**state, "post_processor": self._bos_first()}

    def _impossible(self, reason: str) -> InputError:
        return InputError(f"{self.where}: no tokenizer.json gives the same ids: {printable(reason)}")

    def _bos_first(self) -> dict[str, Any] | None:
        """What puts the beginning's token before a text, where that is asked for and there is one."""
        bos = self.config.get("bos_token")
        ids = [token["id"] for token in self.added if token["content"] == bos]
        if not self.config["add_bos_token"] or not ids:
            return None
        single, more = (
            [{"SpecialToken": {"id": bos, "type_id": n}}, {"Sequence": {"id": name, "type_id": n}}]
            for n, name in enumerate("AB")
        )
        known = {bos: {"id": bos, "ids": ids, "tokens": [bos]}}
        return {"type": "TemplateProcessing", "single": single, "pair": [*single, *more], "special_tokens": known}

    def _document(self, scores: Mapping[str, float]) -> dict[str, Any]:
        unknown = next(piece for piece, i in self.pieces.items() if self.kinds[i] == _UNKNOWN)
        state = spm.tokenizer_json(self.pieces, scores, unknown, self.space_first, self.where)
        return {**state, "added_tokens": self.added}


def read_beside(folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> content of the JSON files beside a tokenizer.model, those that are there."""
    return {name: read_json(folder / name) for name in BESIDE if (folder / name).is_file()}


def tokenizer_files(files: Mapping[str, Any], where: str) -> dict[str, bytes]:
    """`tokenizer.json` and `tokenizer_config.json` with the ids of a tokenizer.model, by name as `files` are.

    InputError where there can be none, DamagedFileError as of `read`.
    """
    model = read(files[NAME], {name: json.loads(files[name]) for name in BESIDE if name in files}, where)
    whole = json.dumps(model.tokenizer_json(), ensure_ascii=False, indent=2)
    return {"tokenizer.json": f"{whole}\n".encode(), SETTINGS: f"{json.dumps(model.config, indent=2)}\n".encode()}


def read(content: bytes, beside: Mapping[str, Mapping[str, Any]], where: str) -> SentencePieceModel:
    """The content of a tokenizer.model; `beside` are the JSON files next to it by name (see `read_beside`).

    Raises DamagedFileError for what is no SentencePiece model, InputError for one that writes spaces in another way.
    """
    top = _fields(content, where)
    trainer, normalizer = (_fields(b"".join(_messages(top, number, where)), where) for number in (2, 3))
    pieces: dict[str, int] = {}
    scores, kinds = [], []
    for message in _messages(top, 1, where):
        fields = _fields(message, where)
        piece, kind = _text(fields, 1, "", where), _number(fields, 3, _NORMAL, where)
        if not piece or piece in pieces or not _NORMAL <= kind <= _BYTE or len(pieces) == _MOST_PIECES:
            raise _damaged(where, f"piece {len(pieces):,}, {piece!r:.40} of kind {kind}, is empty, known or none")
        pieces[piece] = len(pieces)
        kinds.append(kind)
        scores.append(_float(fields, 2, where))
    if kinds.count(_UNKNOWN) != 1:
        raise _damaged(where, f"{kinds.count(_UNKNOWN)} of {len(pieces):,} pieces are for the unknown, one should be")
    if _number(trainer, 24, 0, where) or not _number(normalizer, 5, 1, where):
        raise InputError(f"{where}: writes spaces behind words or as they are; only U+2581 before words is read")
    added = _added(beside, pieces, kinds, where)
    config = _config(beside, pieces, kinds, trainer, where)
    config["added_tokens_decoder"] = {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in added
    }
    own = bool(_number(normalizer, 3, 1, where))
    space_first = config["add_prefix_space"] if isinstance(config.get("add_prefix_space"), bool) else own
    config["add_prefix_space"] = space_first
    name = printable(_text(normalizer, 1, "", where), 40)
    changes = [f"normalises by {name or 'rules'}"] if _last(normalizer, 2, b"") else []
    changes += ["removes extra spaces"] if _number(normalizer, 4, 1, where) else []
    return SentencePieceModel(
        content,
        pieces,
        scores,
        kinds,
        space_first,
        " and ".join(changes) or None,
        _number(trainer, 3, 1, where) == _BPE,
        added,
        config,
        where,
    )


# -- special tokens ------------------------------------------------------------------


def _config(
    beside: Mapping[str, Mapping[str, Any]], pieces: Mapping[str, int], kinds: list[int], trainer: Fields, where: str
) -> dict[str, Any]:
    """What LlamaTokenizer would be made with: the settings, before them the old map of special tokens, then defaults.

    Its own defaults but for the names of the beginning and the end of a text, which the file itself knows.
    """
    given = dict(beside.get(SETTINGS, {}))
    if "added_tokens_decoder" not in given:
        given |= beside.get(BESIDE[1], {})
    for name in _NAMED:  # transformers takes no objects here
        token = given.pop(name, None)
        token = token.get("content") if isinstance(token, dict) else token
        given |= {name: token} if token and isinstance(token, str) else {}
    names = {name: _text(trainer, number, default, where) for name, number, default in _ENDS}
    names = {name: piece for name, piece in names.items() if piece in pieces and kinds[pieces[piece]] == _CONTROL}
    unknown = next(piece for piece, i in pieces.items() if kinds[i] == _UNKNOWN)
    switches = {"add_bos_token": True, "add_eos_token": False, "legacy": False}
    for name, usual in switches.items():
        if given.get(name) is None:
            given.pop(name, None)
        elif not isinstance(given[name], bool):
            raise DamagedFileError(f"{where}: {SETTINGS} beside it has {name} {shown(given[name])}, not {usual}")
    defaults = {"tokenizer_class": "LlamaTokenizer", **names, "unk_token": unknown, **switches}
    return {**defaults, "clean_up_tokenization_spaces": False, **given}


_ENDS = (("bos_token", 46, "<s>"), ("eos_token", 47, "</s>"))  # with their fields in the trainer's settings


def _added(
    beside: Mapping[str, Mapping[str, Any]], pieces: Mapping[str, int], kinds: list[int], where: str
) -> list[dict[str, Any]]:
    """The control pieces and the tokens that were added after training, all special: no text ever becomes one."""
    found = {i: piece for piece, i in pieces.items() if kinds[i] in (_UNKNOWN, _CONTROL)}
    try:
        decoder = beside.get(SETTINGS, {}).get("added_tokens_decoder")
        if decoder is not None:
            more = {int(i): token["content"] for i, token in decoder.items()}
        else:
            more = {i: token for token, i in beside.get(BESIDE[2], {}).items()}
        if not all(type(token) is str and type(i) is int and 0 <= i < _MOST_PIECES for i, token in more.items()):
            raise ValueError("a token has no text, or an id that is none")
        "".join(more.values()).encode()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DamagedFileError(f"{where}: the tokens added to it beside it are none ({error})") from None
    found |= {i: token for i, token in more.items() if token not in pieces and i >= len(pieces)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return [{"id": i, "content": token, **flags} for i, token in sorted(found.items())]


# -- protocol buffers ----------------------------------------------------------------


def _space_first(yes: bool) -> bytes:
    """A piece of a model that, behind the others, says whether a text gets a space before it: add_dummy_prefix."""
    return bytes([3 << 3 | 2, 2, 3 << 3, yes])


def _fields(data: bytes, where: str) -> Fields:
    """The fields of a message."""
    found: Fields = {}
    for number, value in _parsed(data, where):
        found.setdefault(number, []).append(value)
    return found


def _parsed(data: bytes, where: str) -> Iterator[tuple[int, int | bytes]]:
    at = 0
    while at < len(data):
        key, at = _varint(data, at, where)
        match key & 7:
            case 0:
                value, at = _varint(data, at, where)
                yield key >> 3, value
                continue
            case 1 | 5 as wire:
                size = 8 if wire == 1 else 4
            case 2:
                size, at = _varint(data, at, where)
            case other:
                raise _damaged(where, f"byte {at:,} begins a field of kind {other}")
        if size > len(data) - at:
            raise _damaged(where, f"a field of {size:,} bytes, {len(data) - at:,} are left")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int, where: str) -> tuple[int, int]:
    """A number, and where it ends."""
    value = 0
    for place, byte in enumerate(data[at : at + 10]):
        value |= (byte & 127) << 7 * place
        if byte < 128:
            return value, at + place + 1
    raise _damaged(where, f"byte {at:,} begins a number that does not end")


def _messages(fields: Fields, number: int, where: str) -> list[bytes]:
    values = fields.get(number, [])
    if not all(isinstance(value, bytes) for value in values):
        raise _damaged(where, f"field {number} is no message")
    return [value for value in values if isinstance(value, bytes)]


def _last(fields: Fields, number: int, default: int | bytes) -> int | bytes:
    return fields.get(number, [default])[-1]


def _number(fields: Fields, number: int, default: int, where: str) -> int:
    value = _last(fields, number, default)
    if not isinstance(value, int):
        raise _damaged(where, f"field {number} is no number")
    return value


def _text(fields: Fields, number: int, default: str, where: str) -> str:
    value = _last(fields, number, default.encode())
    try:
        if isinstance(value, bytes):
            return value.decode()
    except UnicodeDecodeError:
        pass
    raise _damaged(where, f"field {number} is no text")


def _float(fields: Fields, number: int, where: str) -> float:
    value = _last(fields, number, bytes(4))
    score = struct.unpack("<f", value)[0] if isinstance(value, bytes) and len(value) == 4 else float("nan")
    if not abs(score) < float("inf"):
        raise _damaged(where, "a score is no number")
    return float(score)


def _damaged(where: str, reason: str) -> DamagedFileError:
    return DamagedFileError(f"{where}: no SentencePiece model ({printable(reason)})")
