"""GGUF files that we write, read by three others: our own reader, the gguf package and transformers' loader.

Layout and rounding are held against loops and formulas that share nothing with the writer (`tiny_models`).
"""

import io
import json
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
import sentencepiece
import tiny_models as tiny
import torch
from comparing import assert_close, weights
from slow_bpe import mixed_text
from terminal import TEXT, isolate, run, write_model

from convert import gguf_writer
from convert.detect import read_model
from convert.spm import _merged
from convert.tokenizer import gguf_metadata, tokenizer_files
from mlx_impl import generate, modeldir
from mlx_impl.config import ModelConfig
from mlx_impl.conversion import convert
from mlx_impl.errors import DamagedFileError, InputError
from mlx_impl.model import ContinualLLM
from mlx_impl.tokenizer import Tokenizer

KINDS = {"gguf-f16": "F16", "gguf-q8_0": "Q8_0"}


def tokenizer_of(vocab_size: int) -> dict[str, str]:
    """The files of the tiny byte-level tokenizer, for a model with so many rows."""
    config = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "chat_template": "{{ messages }}"}
    assert vocab_size >= len(tiny.vocabulary())
    return {"tokenizer.json": tiny.tokenizer_json(), "tokenizer_config.json": json.dumps(config)}


def written(folder: Path, **changes: Any) -> tuple[Path, ModelConfig]:
    """A model directory with the tiny byte-level tokenizer, heads that Q8_0's blocks fit, and unit-size logits."""
    shape = {"d_model": 64, "num_layers": 2, "num_query_heads": 4, "num_kv_heads": 2, "d_ff": 96, "max_seq_len": 128}
    config = ModelConfig(**{"vocab_size": 280, "rope_base": 100000.0, "norm_eps": 1e-5, **shape, **changes})
    files = tokenizer_of(config.vocab_size)
    return modeldir.write_model_directory(folder, config, weights(config), files, {}, {"folder": "tiny"}), config


def stored(array: np.ndarray, kind: str) -> np.ndarray:
    """What a matrix becomes in F16, and in Q8_0: 32 neighbours in whole multiples of a 127th of their largest."""
    if array.ndim == 1:
        return array
    if kind == "F16" or array.shape[1] % 32:
        return array.astype(np.float16).astype(np.float32)
    blocks = array.reshape(-1, 32).astype(np.float64)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / 127
    whole = blocks / scale
    rounded = np.sign(whole) * np.floor(np.abs(whole) + 0.5)
    return (rounded * scale.astype(np.float16)).astype(np.float32).reshape(array.shape)


@pytest.mark.parametrize("to", KINDS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": False, "attention_bias": True, "mlp_bias": True, "num_kv_heads": 1},
        {"head_dim": 24, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_base": 500000.0, "max_seq_len": 2**17, "rope_scaling": {
            "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}},
        {"d_model": 72, "num_query_heads": 6},
    ],
    ids=["tied", "untied, biases", "wide heads, linear scaling", "llama3", "rows of 72"],
)  # fmt: skip
def test_our_reader_gets_configuration_and_rounded_weights_back(
    tmp_path: Path, to: str, changes: dict[str, Any]
) -> None:
    source, config = written(tmp_path / "model", **changes)
    convert(source, tmp_path / "m.gguf", to)
    model = read_model(tmp_path / "m.gguf")
    ids = {"bos_token_id": 1, "eos_token_id": 2}  # of the tokenizer, of which config.json said nothing
    assert model.config == ModelConfig(**{**vars(config), **ids})
    arrays = dict(model.tensors)
    assert sorted(arrays) == sorted(weights(config))
    for name, array in weights(config).items():
        assert_close(name, arrays[name], stored(array, KINDS[to]), atol=1e-7)


@pytest.mark.parametrize("to", KINDS)
def test_the_gguf_package_finds_what_llama_cpp_asks_for(tmp_path: Path, to: str) -> None:
    source, config = written(tmp_path / "model", tie_embeddings=False, attention_bias=True)
    convert(source, tmp_path / "m.gguf", to)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items()}
    expected = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "model",
        "general.file_type": gguf.LlamaFileType[f"MOSTLY_{KINDS[to]}"].value,
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        "llama.block_count": 2,
        "llama.context_length": 128,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        "llama.rope.freq_base": 100000.0,
        "llama.rope.dimension_count": 16,
        "llama.vocab_size": 280,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.merges": tiny.MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages }}",
    }
    assert {key: fields.get(key) for key in expected} == expected
    known = tiny.vocabulary()
    filling = [f"[PAD{row}]" for row in range(len(known), 280)]
    assert fields["tokenizer.ggml.tokens"] == known + filling
    types = [3] * 3 + [1] * (len(known) - 3) + [5] * len(filling)  # control, normal, unused
    assert fields["tokenizer.ggml.token_type"] == types

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    heads = {"q_proj": 4, "k_proj": 2}
    assert sorted(tensors) == sorted(tiny.gguf_name(name) for name in weights(config))
    for name, array in weights(config).items():
        tensor = tensors[tiny.gguf_name(name)]
        assert tensor.tensor_type.name == ("F32" if array.ndim == 1 else KINDS[to])
        projection = name.split(".")[-2]
        rows = tiny.permuted(array, heads[projection]) if projection in heads else array
        values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(array.shape)
        assert_close(name, values, stored(rows, KINDS[to]), atol=1e-7)


@pytest.mark.parametrize("to", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_reads_it_and_writes_the_same_text(tmp_path: Path, to: str, tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    source, _ = written(tmp_path / "model", tie_embeddings=tied)
    convert(source, tmp_path / "m.gguf", to)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    convert(tmp_path / "m.gguf", tmp_path / "back")
    ours = ContinualLLM.from_checkpoint(tmp_path / "back")
    prompt = [5, 40, 100, 7, 260]
    start = torch.tensor([prompt])
    with torch.no_grad():
        assert_close("logits", ours(mx.array([prompt])), theirs(start).logits.numpy(), atol=2e-5)
        done = theirs.generate(
            start, attention_mask=torch.ones_like(start), max_new_tokens=16, do_sample=False, eos_token_id=None
        )
    assert list(generate.decode(ours, prompt, 16, generate.Sampling())) == done[0, len(prompt) :].tolist()


@pytest.mark.parametrize("ends", [[2, 5], 2])
def test_that_gguf_keeps_one_of_several_end_tokens_is_told(tmp_path: Path, ends: Any) -> None:
    source = write_model(tmp_path / "model")
    path = source / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": ends}))
    (source / "minimac.json").unlink(missing_ok=True)
    notes = convert(source, tmp_path / "m.gguf")["notes"]
    told = "a text ends at any of the ids 2, 5; GGUF keeps one, the tokenizer's own or else the first"
    assert notes == ([told] if isinstance(ends, list) else [])
    assert convert(source, tmp_path / "copy")["notes"] == []


def test_what_f16_cannot_hold_is_refused(tmp_path: Path) -> None:
    source, config = written(tmp_path / "model")
    for value, to in ((70000.0, "gguf-f16"), (1e7, "gguf-q8_0")):
        arrays = weights(config)
        arrays["model.layers.0.mlp.down_proj.weight"][3, 4] = value
        modeldir.write_model_directory(source, config, arrays, tokenizer_of(280), {}, {}, replace=True)
        with pytest.raises(DamagedFileError, match=r"layers\.0\.mlp\.down_proj\.weight: values that are not finite in"):
            convert(source, tmp_path / "m.gguf", to)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("to", KINDS)
def test_the_command_checks_what_it_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    isolate(monkeypatch, tmp_path / "home")
    source, _ = written(tmp_path / "model")
    done = run("convert", source, tmp_path / "m.gguf", "--to", to, "--check", "--json")
    assert done.code == 0
    checked = json.loads(done.out)["check"]
    assert checked["first"] is None
    assert 0 < checked["difference"] < checked["at_most"]

    monkeypatch.setattr(gguf_writer, "permute", lambda array, heads: array)
    done = run("convert", source, tmp_path / "wrong.gguf", "--to", to, "--check", "--json")
    assert done.code == 3
    assert json.loads(done.out)["check"]["first"] == "model.layers.0.self_attn.q_proj"


# -- tokenizers ----------------------------------------------------------------------


def library_json(change: dict[str, Any]) -> str:
    """The tiny tokenizer.json with other top-level entries."""
    return json.dumps(json.loads(tiny.tokenizer_json()) | change)


def split(pattern: str) -> dict[str, Any]:
    """A pre-tokeniser as Llama 3 and Qwen have it."""
    return {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    }


DIGITS = {"type": "Digits", "individual_digits": True}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
OTHER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("pre", "change"),
    [
        ("gpt-2", {}),
        ("smollm", {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [DIGITS, BYTES]}}),
        ("qwen2", {"pre_tokenizer": split(OTHER % ""), "normalizer": {"type": "NFC"}}),
        ("llama-bpe", {"pre_tokenizer": split(OTHER % "{1,3}"), "model": "ignore_merges"}),
    ],
)
def test_a_tokenizer_gives_the_same_ids_after_gguf(pre: str, change: dict[str, Any]) -> None:
    if change.get("model"):
        change = change | {"model": json.loads(tiny.tokenizer_json())["model"] | {"ignore_merges": True}}
    config = ModelConfig(vocab_size=300, max_seq_len=128, bos_token_id=0, eos_token_id=[2, 1])
    text = library_json(change)
    metadata = gguf_metadata({"tokenizer.json": text}, config, "here")
    assert metadata["tokenizer.ggml.pre"] == pre
    assert (metadata["tokenizer.ggml.bos_token_id"], metadata["tokenizer.ggml.eos_token_id"]) == (0, 2)
    types = np.array(metadata["tokenizer.ggml.token_type"])
    back = tokenizer_files(metadata | {"tokenizer.ggml.token_type": types}, 128, "here")
    before, after = Tokenizer(text), Tokenizer(back["tokenizer.json"])
    sample = TEXT + "123 the the 1234567é\u0301 <|im_end|> \r\n\t  x's I'LL \U0001f600"
    assert after.encode(sample) == before.encode(sample)
    assert after.vocab_size == before.vocab_size == len(tiny.vocabulary())


def test_bos_is_asked_for_where_the_tokenizer_puts_it() -> None:
    framing = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }
    config, named = ModelConfig(vocab_size=300), json.dumps({"bos_token": "<|im_start|>"})
    for post, asked in ((framing, True), (None, False)):
        files = {"tokenizer.json": library_json({"post_processor": post}), "tokenizer_config.json": named}
        assert gguf_metadata(files, config, "here")["tokenizer.ggml.add_bos_token"] is asked


def test_a_template_comes_from_its_own_file_or_a_list() -> None:
    config, text = ModelConfig(vocab_size=300), tiny.tokenizer_json()
    listed = json.dumps({"chat_template": [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]})
    files: dict[str, str | bytes] = {"tokenizer.json": text, "tokenizer_config.json": listed}
    assert gguf_metadata(files, config, "here")["tokenizer.chat_template"] == "d"
    files["chat_template.jinja"] = b"own"
    assert gguf_metadata(files, config, "here")["tokenizer.chat_template"] == "own"
    assert "tokenizer.chat_template" not in gguf_metadata({"tokenizer.json": text}, config, "here")


@pytest.mark.parametrize(
    ("files", "error", "words"),
    [
        ({}, InputError, "no tokenizer.json, which a GGUF file holds; --tokenizer DIR"),
        ({"tokenizer.json": "{"}, DamagedFileError, "not a tokenizer.json"),
        ({"tokenizer.json": "{}"}, DamagedFileError, "not a tokenizer.json"),
        ({"tokenizer.json": library_json({"pre_tokenizer": split("x+")})}, InputError, "no name for here; known are"),
        ({"tokenizer.json": library_json({"normalizer": {"type": "NFD"}})}, InputError, "no name for here; known are"),
        ({"tokenizer.json": library_json({"decoder": {"type": "Fuse"}})}, InputError, "only byte-level BPE"),
        ({"tokenizer.json": tiny.tokenizer_json(), "tokenizer_config.json": "[]"}, DamagedFileError, "not a tokenizer"),
    ],
)
def test_tokenizers_that_gguf_cannot_hold_are_refused(files: dict[str, str], error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        gguf_metadata(files, ModelConfig(vocab_size=300), "here")


def test_a_tokenizer_larger_than_the_model_is_refused() -> None:
    with pytest.raises(InputError, match=r"has an id 263, but the model only 100 rows"):
        gguf_metadata({"tokenizer.json": tiny.tokenizer_json()}, ModelConfig(vocab_size=100), "here")


# -- SentencePiece ---------------------------------------------------------------------


SAMPLE = TEXT + "  two  spaces\tand tabs\r\n\n é\u0301 \U0001f600 <s> </s> x's ▁"


def test_a_model_trained_here_keeps_its_tokenizer_in_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the byte: it is known again as one of ours, and goes on using the sentencepiece library."""
    isolate(monkeypatch, tmp_path / "home")
    source = write_model(tmp_path / "model", vocab_size=410)
    done = run("convert", source, tmp_path / "m.gguf", "--check")
    assert done.code == 0, done.err
    convert(tmp_path / "m.gguf", tmp_path / "back")
    before, after = (json.loads((folder / "tokenizer.json").read_text()) for folder in (source, tmp_path / "back"))
    assert after == before
    ids = Tokenizer.load(source).encode(SAMPLE)
    assert Tokenizer.load(tmp_path / "back").encode(SAMPLE) == ids
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    types = fields["tokenizer.ggml.token_type"].contents()
    assert (
        types[:4] + types[4:260] + types[400:] == [2, 3, 3, 3] + [6] * 256 + [5] * 10
    )  # unknown, control, byte, unused
    assert fields["tokenizer.ggml.add_space_prefix"].contents() is False
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False


@pytest.fixture(scope="module")
def pieces() -> sentencepiece.SentencePieceProcessor:
    """A model as Llama 2's was trained: BPE with bytes, a space before a text, single digits."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()), model_writer=model, model_type="bpe", vocab_size=500,
        byte_fallback=True, split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        character_coverage=0.9995, minloglevel=2,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def metadata_of(pieces: sentencepiece.SentencePieceProcessor, **changes: Any) -> dict[str, Any]:
    """What llama.cpp's converter writes for it."""
    ids = range(pieces.get_piece_size())
    kinds = [2 if pieces.is_unknown(i) else 3 if pieces.is_control(i) else 6 if pieces.is_byte(i) else 1 for i in ids]
    metadata = {
        "model": "llama",
        "tokens": [pieces.id_to_piece(i) for i in ids],
        "scores": np.array([pieces.get_score(i) for i in ids], np.float32),
        "token_type": np.array(kinds, np.int32),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    } | changes
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}


def test_a_sentencepiece_model_in_gguf_gives_the_library_s_ids(pieces: sentencepiece.SentencePieceProcessor) -> None:
    files = tokenizer_files(metadata_of(pieces), 128, "here")
    ours = Tokenizer(files["tokenizer.json"], json.loads(files["tokenizer_config.json"]))
    text = mixed_text()
    assert ours.encode(text) == pieces.encode(text)
    assert ours.decode(ours.encode(SAMPLE)) == SAMPLE.replace("▁", " ")
    assert (ours.bos_id, ours.eos_id, ours.adds_bos) == (1, 2, True)  # asked for where the file does not say

    again = gguf_metadata(dict(files), ModelConfig(vocab_size=500), "here")
    for name, value in metadata_of(pieces).items():
        if name != "tokenizer.ggml.scores":
            assert np.array_equal(again[name], value), name
    assert again["tokenizer.ggml.add_space_prefix"] is again["tokenizer.ggml.add_bos_token"] is True
    scores = np.array(again["tokenizer.ggml.scores"], np.float32)
    types = np.array(again["tokenizer.ggml.token_type"])
    twice = tokenizer_files(again | {"tokenizer.ggml.scores": scores, "tokenizer.ggml.token_type": types}, 128, "here")
    assert twice["tokenizer.json"] == files["tokenizer.json"]


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_the_other_spelling_of_a_space_before_a_text(pieces: sentencepiece.SentencePieceProcessor, scheme: str) -> None:
    state = json.loads(tokenizer_files(metadata_of(pieces), 128, "here")["tokenizer.json"])
    state["normalizer"] = None
    state["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    metadata = gguf_metadata({"tokenizer.json": json.dumps(state)}, ModelConfig(vocab_size=500), "here")
    assert metadata["tokenizer.ggml.add_space_prefix"] is (scheme != "never")


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"scores": None}, DamagedFileError, "scores are not as many numbers"),
        ({"scores": np.zeros(3, np.float32)}, DamagedFileError, "scores are not as many numbers"),
        ({"scores": np.full(500, np.nan, np.float32)}, DamagedFileError, "scores are not as many numbers"),
        ({"token_type": np.ones(500)}, InputError, "without a token for each byte"),
        ({"token_type": np.full(500, np.nan)}, InputError, "without a token for each byte"),
    ],
)
def test_sentencepiece_metadata_that_does_not_fit_is_refused(
    pieces: sentencepiece.SentencePieceProcessor, changes: dict[str, Any], error: type, words: str
) -> None:
    with pytest.raises(error, match=words):
        tokenizer_files(metadata_of(pieces, **changes), 128, "here")


def test_pieces_that_merges_cannot_make_are_refused(pieces: sentencepiece.SentencePieceProcessor) -> None:
    tokens = metadata_of(pieces)["tokenizer.ggml.tokens"]
    with pytest.raises(InputError, match=r"token 'x\u4e00' is made of '\u4e00', which is no token"):
        tokenizer_files(metadata_of(pieces, tokens=[*tokens[:-1], "x\u4e00"]), 128, "here")
    with pytest.raises(DamagedFileError, match="a token of 300 characters, at most 256"):
        tokenizer_files(metadata_of(pieces, tokens=[*tokens[:-1], "x" * 300]), 128, "here")


def test_the_work_a_piece_takes_grows_with_its_length_alone() -> None:
    """A small file of long pieces that all merge must not keep a reader busy for minutes."""

    class Counted(dict[str, float]):
        looked_up = 0

        def get(self, key: str, default: Any = None) -> Any:
            self.looked_up += 1
            return super().get(key, default)

    scores = Counted({("ab" * 128)[:length]: -float(length) for length in range(1, 257)})
    assert _merged("ab" * 128, scores) == ["ab" * 64] * 2
    assert scores.looked_up < 4 * 256


@pytest.mark.parametrize("what", ["order", "split"])
def test_merges_that_sentencepiece_would_not_make_are_refused(
    pieces: sentencepiece.SentencePieceProcessor, what: str
) -> None:
    state = json.loads(tokenizer_files(metadata_of(pieces), 128, "here")["tokenizer.json"])
    if what == "order":
        del state["model"]["merges"][10]  # the piece is there, but nothing makes it
        words = "merges other pairs than SentencePiece would"
    else:
        state["pre_tokenizer"] = DIGITS
        words = "changes or splits text before it merges"
    with pytest.raises(InputError, match=words):
        gguf_metadata({"tokenizer.json": json.dumps(state)}, ModelConfig(vocab_size=500), "here")
