"""Tokenizers of other formats as tokenizer.json: the ids of a plain reading of their own rules, on a megabyte of text.

Those trained here, SentencePiece models, are held against the sentencepiece library in test_tokenizer.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
from slow_bpe import BYTES, SlowBPE, learn_merges, mixed_text, pattern

from convert.original_tokenizer import is_tokenizer_folder, tokenizer_files
from convert.tokenizer import tokenizer_files as from_gguf
from mlx_impl.errors import DamagedFileError, InputError
from mlx_impl.tokenizer import Tokenizer

ORIGINAL = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = ORIGINAL.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
END = "<|endoftext|>"
STRANGE = 240_000  # characters at the end of the text, some code and what comes after it


@pytest.fixture(scope="module")
def text() -> str:
    return mixed_text()


@pytest.fixture(scope="module")
def merges(text: str) -> list[tuple[str, str]]:
    return learn_merges(pattern(ORIGINAL)(text[:30_000]), 120)


@pytest.fixture(scope="module")
def vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    tokens = [END, *BYTES, *dict.fromkeys("".join(pair) for pair in merges)]
    return {token: number for number, token in enumerate(tokens)}


def write_original(folder: Path, vocabulary: dict[str, int], merges: list[tuple[str, str]], **changes: Any) -> Path:
    """A tokenizer folder as the original writes it, its merges in any order."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"vocab_size": 600, "min_frequency": 2, "special_tokens": [END], "normalization": "NFC", **changes}
    rows = [{"pair": list(pair), "token": "".join(pair), "rank": rank} for rank, pair in enumerate(merges)]
    for name, value in (("config", config), ("vocab", vocabulary), ("merges", rows[::-1])):
        (folder / f"{name}.json").write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return folder


def load(folder: Path, files: dict[str, str]) -> Tokenizer:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")
    return Tokenizer.load(folder)


def agree(ours: Tokenizer, slow: SlowBPE, text: str) -> None:
    """Equal ids for the whole, or the first piece for which they differ."""
    if ours.encode(text) != slow.encode(text):
        pieces = [text[start : start + 40] for start in range(0, len(text), 40)]
        assert [piece for piece in pieces if ours.encode(piece) != slow.encode(piece)][:1] == []
        raise AssertionError("ids differ, but for no piece")


@pytest.mark.parametrize("form", ["NFC", "NFKD", None])
def test_the_originals_on_a_megabyte(
    tmp_path: Path, text: str, vocabulary: dict[str, int], merges: list[tuple[str, str]], form: str | None
) -> None:
    folder = write_original(tmp_path / "theirs", vocabulary, merges, normalization=form)
    ours = load(tmp_path / "ours", tokenizer_files(folder, 128))
    text = text if form == "NFC" else text[-STRANGE:]
    agree(ours, SlowBPE(pattern(ORIGINAL), vocabulary, merges, form), text)
    assert (ours.vocab_size, ours.eos_id, ours.special_ids) == (len(vocabulary), 0, {0})
    if form is None:
        assert ours.decode(ours.encode(text)) == text


def test_transformers_reads_the_originals_with_the_same_ids(
    tmp_path: Path, text: str, vocabulary: dict[str, int], merges: list[tuple[str, str]]
) -> None:
    from transformers import AutoTokenizer

    files = tokenizer_files(write_original(tmp_path / "theirs", vocabulary, merges), 128)
    ours, theirs = load(tmp_path / "ours", files), AutoTokenizer.from_pretrained(tmp_path / "ours")
    for piece in (text[:200_000], f"{END} in text", "", " e\u0301 "):
        assert theirs(piece)["input_ids"] == ours.encode(piece)
    assert theirs.eos_token_id == ours.eos_id == 0
    assert len(theirs) == ours.vocab_size


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "starcoder", "llama-bpe", "qwen2"])
def test_a_gguf_files_on_a_megabyte(
    tmp_path: Path, text: str, vocabulary: dict[str, int], merges: list[tuple[str, str]], pre: str
) -> None:
    """Against the patterns that llama.cpp has under these names."""
    words = pattern({"llama-bpe": LLAMA3, "qwen2": ORIGINAL}.get(pre, GPT2))
    split = words
    if pre in ("smollm", "starcoder"):  # each digit first, then the rest in between
        digits = regex.compile(r"\p{N}")
        split = lambda text: [word for part in _around(digits, text) for word in words(part)]  # noqa: E731
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": list(vocabulary),
        "tokenizer.ggml.token_type": np.array([3] + [1] * (len(vocabulary) - 1)),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.eos_token_id": 0,
    }
    ours = load(tmp_path / "ours", from_gguf(metadata, 128, "m.gguf"))
    slow = SlowBPE(split, vocabulary, merges, "NFC" if pre == "qwen2" else None)
    if pre == "llama-bpe":  # takes a word that is a token whole, whatever the merges say
        plain = slow.word
        slow.word = lambda word: [vocabulary[t]] if (t := "".join(_spell(word))) in vocabulary else plain(word)
    text = text if pre == "smollm" else text[-STRANGE:]
    agree(ours, slow, text)
    if pre != "qwen2":
        assert ours.decode(ours.encode(text)) == text


def _around(found: regex.Pattern, text: str) -> list[str]:
    """The matches and what lies between them, in order."""
    parts, at = [], 0
    for match in found.finditer(text):
        parts += [text[at : match.start()], match[0]]
        at = match.end()
    return [*parts, text[at:]]


def _spell(word: str) -> list[str]:
    return [BYTES[byte] for byte in word.encode()]


# -- what is refused -----------------------------------------------------------------


def test_a_folder_is_known_by_its_files(tmp_path: Path, vocabulary: dict[str, int], merges: list) -> None:
    folder = write_original(tmp_path / "t", vocabulary, merges)
    assert is_tokenizer_folder(folder)
    (folder / "config.json").write_text('{"lora_r": 16}')
    assert not is_tokenizer_folder(folder)
    (folder / "config.json").unlink()
    assert not is_tokenizer_folder(folder)


def _early(folder: Path) -> None:
    (folder / "vocab.json").write_text(json.dumps({"<PAD>": 0, END: 1, "a": 2, "</w>": 3}))


def _edit(name: str, change: Any) -> Any:
    def edit(folder: Path) -> None:
        value = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        change(value)
        (folder / f"{name}.json").write_text(json.dumps(value))

    return edit


REFUSED = {
    "an early one": (_early, InputError, "of characters with </w>"),
    "normalization": (_edit("config", lambda c: c.update(normalization="NFX")), InputError, "normalization is 'NFX'"),
    "specials": (_edit("config", lambda c: c.update(special_tokens="x")), DamagedFileError, "is no list of texts"),
    "special": (_edit("config", lambda c: c.update(special_tokens=["<x>"])), DamagedFileError, "first '<x>'"),
    "id": (_edit("vocab", lambda v: v.update({"Ġ": -1})), DamagedFileError, "'Ġ' has no id"),
    "id size": (_edit("vocab", lambda v: v.update({"Ġ": 2**40})), DamagedFileError, "'Ġ' has no id"),
    "two ids": (_edit("vocab", lambda v: v.update({"Ġ": 5})), DamagedFileError, "share"),
    "byte": (_edit("vocab", lambda v: v.pop("Ġ")), DamagedFileError, "lacks 1 of the 256 bytes, first 'Ġ'"),
    "surrogate": (_edit("vocab", lambda v: v.update({"\ud800": 999})), DamagedFileError, "a token that is no text"),
    "no list": (_edit("merges", lambda m: m.append(7)), DamagedFileError, "no list of {pair, token, rank}"),
    "rank": (_edit("merges", lambda m: m[0].update(rank="1")), DamagedFileError, "no list of {pair, token, rank}"),
    "pair": (_edit("merges", lambda m: m[0].update(pair=["a"])), DamagedFileError, "does not make the token"),
    "token": (_edit("merges", lambda m: m[0].update(token="a")), DamagedFileError, "does not make the token"),
    "twice": (_edit("merges", lambda m: m.append({**m[0], "rank": 9999})), DamagedFileError, "comes twice"),
    "same rank": (_edit("merges", lambda m: m[0].update(rank=m[1]["rank"])), DamagedFileError, "comes twice"),
    "no JSON": (lambda f: (f / "merges.json").write_text("["), DamagedFileError, "JSONDecodeError"),
    "deep": (lambda f: (f / "merges.json").write_text("[" * 10**6), DamagedFileError, "RecursionError"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_pieces_that_do_not_fit_are_refused(
    tmp_path: Path, vocabulary: dict[str, int], merges: list[tuple[str, str]], name: str
) -> None:
    change, error, words = REFUSED[name]
    folder = write_original(tmp_path / "t", vocabulary, merges)
    change(folder)
    with pytest.raises(error, match=words) as raised:
        tokenizer_files(folder, 128)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400
