"""Tokenizers of other formats as tokenizer.json: the ids of a plain reading of their own rules, on a megabyte of text.

A bare tokenizer.model is held against the sentencepiece library, and those trained here are in test_tokenizer.
"""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import mutations
import numpy as np
import pytest
import regex
import sentencepiece
import tiny_models
from slow_bpe import BYTES, SlowBPE, learn_merges, mixed_text, pattern
from terminal import tiny_tokenizer

from convert import spm_model
from convert.model import read_tokenizer
from convert.original_tokenizer import is_tokenizer_folder, tokenizer_files
from convert.tokenizer import tokenizer_files as from_gguf
from mlx_impl.errors import DamagedFileError, InputError
from mlx_impl.tokenizer import Tokenizer
from mlx_impl.tokenizer_train import _field

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


# -- a tokenizer.model alone ---------------------------------------------------------

LLAMA = {"tokenizer_class": "LlamaTokenizer"}
OTHERS = {
    "normalising": (
        {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
        "normalises by nmt_nfkc",
    ),
    "fewer spaces": ({"remove_extra_whitespaces": True}, "removes extra spaces before it splits"),
    "own pieces": ({"user_defined_symbols": ["<|im_start|>", "▁▁"]}, "2 pieces such as '<|im_start|>' are the user's"),
    "no bytes": ({"byte_fallback": False}, "it has 0 of the 256 bytes"),
    "unigram": ({"model_type": "unigram"}, "it is no BPE model"),
}


@cache
def trained(**options: Any) -> bytes:
    return tiny_models.sentencepiece_model(**options)


def write_bare(folder: Path, content: bytes, config: dict[str, Any] | None = None, **beside: Any) -> Path:
    """A folder with a tokenizer.model, tokenizer_config.json and further JSON files by their names."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(content)
    (folder / "config.json").write_text('{"model_type": "llama"}')  # by which transformers knows what to open
    for name, value in {"tokenizer_config": LLAMA | (config or {}), **beside}.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def made(bare: Path, folder: Path) -> Path:
    """What convert makes of a folder: a tokenizer.json beside it all."""
    folder.mkdir()
    for name, content in read_tokenizer(bare).items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_bytes((bare / "config.json").read_bytes())
    assert (folder / "tokenizer.json").is_file()
    return folder


@pytest.mark.parametrize("space_first", [True, False])
def test_a_bare_tokenizer_model_on_a_megabyte(tmp_path: Path, text: str, space_first: bool) -> None:
    """Read as it is, and as the tokenizer.json that is made of it: the library's own ids."""
    content = trained() if space_first else trained(add_dummy_prefix=False)
    bare = write_bare(tmp_path / "bare", content)
    text = text if space_first else text[-STRANGE:]
    theirs = sentencepiece.SentencePieceProcessor(model_proto=content).encode(text)
    for folder in (bare, made(bare, tmp_path / "made")):
        ours = Tokenizer.load(folder)
        assert ours.encode(text) == theirs
        assert ours.decode(theirs) == text.replace("▁", " ")
        assert (ours.vocab_size, ours.bos_id, ours.eos_id, ours.unk_id, ours.adds_bos) == (420, 1, 2, 0, True)
        assert ours.encode("<s>") != [1]
        assert (ours.decode([263, 1, 264], skip_special=True) == ours.decode([263, 264])) is True


@pytest.mark.parametrize("name", OTHERS)
def test_what_no_tokenizer_json_can_say_is_read_all_the_same(tmp_path: Path, text: str, name: str) -> None:
    options, reason = OTHERS[name]
    content = trained() if not options else tiny_models.sentencepiece_model(**options)
    bare = write_bare(tmp_path / "bare", content)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=content)
    text = text[-STRANGE:]
    assert Tokenizer.load(bare).encode(text) == theirs.encode(text)
    assert read_tokenizer(bare).keys() == {"tokenizer.model", "tokenizer_config.json"}
    with pytest.raises(InputError, match=re.escape(reason)):
        spm_model.tokenizer_files(read_tokenizer(bare), "here")


def test_equal_scores_are_no_order(tmp_path: Path) -> None:
    """Of pieces with one score the library takes the leftmost, a tokenizer.json the first: it would not be the same."""
    more = b"".join(_field(1, _field(1, piece) + _field(2, 1.0)) for piece in (b"he", b"th"))
    kept = [(n, part) for n, part in mutations.messages(trained()) if not (n == 1 and part[2:4] in (b"he", b"th"))]
    tied = b"".join(_field(n, part) for n, part in kept) + more
    bare = write_bare(tmp_path / "bare", tied)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=tied)
    assert [theirs.id_to_piece(i) for i in theirs.encode("xthe")][-2:] == ["th", "e"]
    assert Tokenizer.load(bare).encode("xthe the") == theirs.encode("xthe the")
    with pytest.raises(InputError, match="1 pieces have the score of another"):
        spm_model.tokenizer_files(read_tokenizer(bare), "here")


@pytest.mark.parametrize(
    "config",
    [{}, {"legacy": True}, {"legacy": False}, {"add_prefix_space": False}, {"add_bos_token": False, "legacy": True}],
    ids=str,
)
def test_transformers_gives_a_bare_tokenizer_model_the_same_ids(
    tmp_path: Path, text: str, config: dict[str, Any]
) -> None:
    """Text and chats, read as it is and as what is made of it.

    But for a text that begins with a space: its class gives that none of its own, SentencePiece does.
    """
    from transformers import AutoTokenizer

    template = "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] }} [/INST]{{ eos_token }}{% endfor %}ok"
    bare = write_bare(tmp_path / "bare", trained(), {"chat_template": template, **config})
    chat = [{"role": "user", "content": words} for words in ("Hello  there", "and again\n")]
    for folder in (bare, made(bare, tmp_path / "made")):
        ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
        assert type(theirs).__name__ == "LlamaTokenizer"
        for piece in (text[:100_000], "a  b\n", "", "é"):
            assert theirs(piece, add_special_tokens=False)["input_ids"] == ours.encode(piece)
        assert theirs.apply_chat_template(chat, return_dict=False) == ours.encode_chat(chat, False)
        assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
        assert ours.adds_bos is config.get("add_bos_token", True)
    assert (theirs("a")["input_ids"][:1] == [ours.bos_id]) is ours.adds_bos


def test_tokens_that_were_added_later_stand_beside_it(tmp_path: Path) -> None:
    """In the old files and in the newer one; they are special, and text never becomes one."""
    from transformers import AutoTokenizer

    added = {"<pad>": 420, "<|im_end|>": 421}
    named = {"pad_token": "<pad>", "eos_token": "<|im_end|>"}
    objects = {name: {"content": token, "lstrip": False} for name, token in named.items()}
    template = "{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}"
    settings = {"bos_token": "", "chat_template": template}  # as the oldest have it
    decoder = {str(i): {"content": token, "special": True} for token, i in added.items()}
    old = write_bare(tmp_path / "old", trained(), settings, added_tokens=added, special_tokens_map=objects)
    new = write_bare(tmp_path / "new", trained(), {**settings, **named, "added_tokens_decoder": decoder})
    for n, folder in enumerate((old, new, made(old, tmp_path / "made"), made(new, tmp_path / "made new"))):
        ours = Tokenizer.load(folder)
        assert (ours.vocab_size, ours.bos_id, ours.eos_id, ours.pad_id) == (422, 1, 421, 420)
        ids = ours.encode_chat([{"role": "user", "content": "<|im_end|>"}])
        assert (ids[0], ids[-1], ids.count(421)) == (1, 421, 1)
        assert ours.decode(ids, skip_special=True) == "<|im_end|>"
        ours.save(tmp_path / f"saved {n}")
        assert Tokenizer.load(tmp_path / f"saved {n}").encode_chat([{"role": "user", "content": "x"}])[-1] == 421
        if folder != old:  # where bos_token is empty it is an error there
            theirs = AutoTokenizer.from_pretrained(folder)
            assert (theirs.eos_token_id, theirs.pad_token_id) == (421, 420)


def test_one_of_ours_comes_back_from_its_tokenizer_model(tmp_path: Path) -> None:
    tiny_tokenizer().save(tmp_path)
    whole = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").unlink()
    back = json.loads(read_tokenizer(tmp_path)["tokenizer.json"])
    assert back == whole
    assert Tokenizer.load(tmp_path).encode("a <s> b") == tiny_tokenizer().encode("a <s> b")


DAMAGED = {
    "empty": (b"", "0 of 0 pieces are for the unknown"),
    "no message": (b"tokens", "begins a field of kind 4"),
    "cut off": (b"\x0a\x7f", "a field of 127 bytes, 0 are left"),
    "long number": (b"\x08" + b"\xff" * 11, "begins a number that does not end"),
    "piece twice": (_field(1, _field(1, b"x") + _field(3, 2)) * 2, "piece 1, 'x' of kind 2, is empty, known or none"),
    "no text": (_field(1, _field(1, b"\xff")), "field 1 is no text"),
    "no score": (_field(1, _field(1, b"x") + _field(2, float("nan"))), "a score is no number"),
    "no kind": (_field(1, _field(1, b"x") + _field(3, 9)), "piece 0, 'x' of kind 9"),
    "for the library": (_field(1, _field(1, b"\0x") + _field(3, 2)), "no SentencePiece model"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_tokenizer_model_is_one_clear_error(tmp_path: Path, name: str) -> None:
    content, words = DAMAGED[name]
    bare = write_bare(tmp_path / "bare", content)
    with pytest.raises(DamagedFileError, match=words) as raised:
        Tokenizer.load(bare)
    assert str(raised.value).startswith(str(bare / "tokenizer.model"))
    assert str(raised.value).isprintable()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("added_tokens", {"x": "1"}, "the tokens added to it beside it are none"),
        ("added_tokens", {"x": 2**40}, "the tokens added to it beside it are none"),
        ("added_tokens", {"\ud800": 421}, "the tokens added to it beside it are none"),
        ("tokenizer_config", {"added_tokens_decoder": [1]}, "the tokens added to it beside it are none"),
        ("tokenizer_config", {"legacy": "no"}, "has legacy 'no', not False"),
    ],
)
def test_damaged_files_beside_it_are_named(tmp_path: Path, name: str, value: Any, words: str) -> None:
    bare = write_bare(tmp_path / "bare", trained(), **{name: value})
    for read in (Tokenizer.load, read_tokenizer):
        with pytest.raises(DamagedFileError, match=words):
            read(bare)


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
