"""GGUF in: dequantised weights, the q/k permutation, configuration, tokenizer; and files that lie."""

import itertools
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_models as tiny
import tokenizers

from convert.gguf import read_gguf, unpermute
from convert.names import TABLE, is_dropped, rename
from convert.tokenizer import tokenizer_files
from mlx_impl.config import ModelConfig
from mlx_impl.errors import DamagedFileError, InputError


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_weights_come_back(tmp_path: Path, kind: str) -> None:
    arrays = tiny.weights()
    read = dict(read_gguf(tiny.write_gguf(tmp_path / "m.gguf", arrays, kind)).tensors())
    assert read.keys() == arrays.keys()
    stored = gguf.GGMLQuantizationType[kind]
    for name, array in arrays.items():
        # Quantisation goes row by row, so that permuting rows before it or after it is the same.
        exact = array if array.ndim == 1 else gguf.dequantize(gguf.quantize(array, stored), stored)
        assert read[name].dtype == np.float32
        np.testing.assert_array_equal(read[name], exact, err_msg=name)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"])
def test_k_quants_keep_their_shape_and_row_order(tmp_path: Path, kind: str) -> None:
    """The package cannot write these, so the blocks are random bytes under a small scale."""
    stored = gguf.GGMLQuantizationType[kind]
    block_bytes = gguf.GGML_QUANT_SIZES[stored][1]
    raw = np.random.default_rng(1).integers(0, 60, (256, block_bytes), dtype=np.uint8)  # no fp16 NaN below 60
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for key in ("block_count", "context_length", "attention.head_count"):
        writer.add_uint32(f"llama.{key}", 1)
    for key in ("embedding_length", "feed_forward_length", "rope.dimension_count"):
        writer.add_uint32(f"llama.{key}", 256)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-6)
    blocks = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    for name in ["token_embd", *(f"blk.0.{block}" for block in blocks)]:
        writer.add_tensor(f"{name}.weight", raw, raw_dtype=stored)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(256, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = dict(read_gguf(tmp_path / "m.gguf").tensors())
    expected = gguf.dequantize(raw, stored)
    assert np.abs(expected).max() > 0
    np.testing.assert_array_equal(read["model.layers.0.self_attn.v_proj.weight"], expected)
    q = read["model.layers.0.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(tiny.permuted(q, 1), expected)


def test_permutation_is_the_one_between_the_two_kinds_of_rope() -> None:
    """Interleaved RoPE on GGUF's rows and half-split RoPE on ours give the same attention scores."""
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 16))
    angles = 3.0 * 10000.0 ** (-np.arange(8) / 8)
    cos, sin = np.cos(angles), np.sin(angles)

    def half_split(x: np.ndarray) -> np.ndarray:
        return np.concatenate([x[:8] * cos - x[8:] * sin, x[8:] * cos + x[:8] * sin])

    def interleaved(x: np.ndarray) -> np.ndarray:
        return np.stack([x[::2] * cos - x[1::2] * sin, x[1::2] * cos + x[::2] * sin], 1).ravel()

    np.testing.assert_allclose(half_split(unpermute(q, 1)) @ unpermute(k, 1), interleaved(q) @ k, rtol=1e-12)
    both = rng.standard_normal((32, 5))
    np.testing.assert_array_equal(unpermute(tiny.permuted(both, 2), 2), both)


def test_configuration(tmp_path: Path) -> None:
    config = ModelConfig.from_hf(read_gguf(tiny.write_gguf(tmp_path / "m.gguf")).config)
    assert config == ModelConfig.from_hf(
        tiny.HF_CONFIG | {"vocab_size": len(tiny.vocabulary()), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    )
    assert (config.rope_base, config.norm_eps) == (100000.0, 1e-5)  # float32 in the file, decimal here


def test_own_output_head_and_biases(tmp_path: Path) -> None:
    arrays = tiny.weights()
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"] + 1
    for layer, name in itertools.product(range(tiny.LAYERS), "qkvo"):
        at = f"model.layers.{layer}.self_attn.{name}_proj"
        arrays[f"{at}.bias"] = np.arange(len(arrays[f"{at}.weight"]), dtype=np.float32)
    model = read_gguf(tiny.write_gguf(tmp_path / "m.gguf", arrays))
    assert model.config["tie_word_embeddings"] is False
    assert model.config["attention_bias"] is True
    for name, array in model.tensors():
        np.testing.assert_array_equal(array, arrays[name], err_msg=name)


def test_linear_rope_scaling(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 4.0}
    config = read_gguf(tiny.write_gguf(tmp_path / "m.gguf", **changes)).config
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


def test_llama3_rope_scaling(tmp_path: Path) -> None:
    """Factors by the loop of llama.cpp's converter, with the parameters of Llama 3.2."""
    factors = []
    for i in range(tiny.HEAD_DIM // 2):
        wavelength = 2 * np.pi * 500000.0 ** (2 * i / tiny.HEAD_DIM)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192 / 1:
            factors.append(32.0)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / 32 + smooth))
    extra = {"rope_freqs.weight": np.array(factors, np.float32)}
    path = tiny.write_gguf(tmp_path / "m.gguf", extra=extra, llama__rope__freq_base=500000.0)
    scaling = read_gguf(path).config["rope_scaling"]
    assert (scaling["rope_type"], scaling["factor"]) == ("llama3", 32.0)
    extra["rope_freqs.weight"][2] *= 1.1
    path = tiny.write_gguf(tmp_path / "m.gguf", extra=extra, llama__rope__freq_base=500000.0)
    with pytest.raises(InputError, match="not those of Llama 3"):
        read_gguf(path)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"llama__expert_count": [8, 8]}, DamagedFileError, "expert_count is an array"),
        ({"general__architecture": [1, 2]}, DamagedFileError, "general.architecture is an array"),
        ({"llama__rope__scaling__type": [1, 2]}, DamagedFileError, "rope.scaling.type is an array"),
        ({"llama__expert_count": 8}, InputError, "mixture of 8 experts"),
        ({"llama__rope__scaling__type": "yarn"}, InputError, "'yarn'"),
        ({"llama__rope__dimension_count": 8}, InputError, "rope.dimension_count is 8, only head_dim = 16"),
        ({"llama__attention__head_count_kv": [2, 1]}, InputError, "differs between layers"),
        ({"llama__block_count": None}, DamagedFileError, "block_count is None"),
        ({"llama__block_count": 3}, DamagedFileError, "missing: model.layers.2.input_layernorm.weight, "),
        ({"llama__block_count": 2**31 - 1}, DamagedFileError, "num_layers = 2,147,483,647"),
        ({"llama__feed_forward_length": 100}, DamagedFileError, r"is \[96, 64\].*says \[100, 64\]"),
        ({"llama__rope__freq_base": -1.0}, DamagedFileError, "freq_base is -1.0"),
        ({"general__alignment": 24}, DamagedFileError, "alignment is 24"),
    ],
)
def test_refusals(tmp_path: Path, changes: dict, error: type, words: str) -> None:
    path = tiny.write_gguf(tmp_path / "m.gguf", **{"llama__vocab_size": 1, **changes})
    with pytest.raises(error, match=words) as caught:
        read_gguf(path)
    assert str(path) in str(caught.value) or error is InputError


def test_unknown_tensors_are_all_named(tmp_path: Path) -> None:
    extra = {f"blk.0.{name}.weight": np.ones(4, np.float32) for name in ("attn_qkv", "ffn_gate_inp")}
    with pytest.raises(DamagedFileError, match=r"blk.0.attn_qkv.weight, blk.0.ffn_gate_inp.weight"):
        read_gguf(tiny.write_gguf(tmp_path / "m.gguf", extra=extra))


def test_name_table_is_invertible() -> None:
    keys = [f"{row.hf}.weight".replace("{n}", "11") for row in TABLE if row.hf and row.gguf]
    there = rename(keys, "hf", "gguf", "here")
    back = rename([name for name in there.values() if name], "gguf", "hf", "here")
    assert list(back.values()) == keys
    assert is_dropped("model.layers.3.self_attn.rotary_emb.inv_freq", "hf")
    assert not is_dropped("model.layers.3.self_attn.q_proj.weight", "hf")
    with pytest.raises(DamagedFileError, match=r"here: unknown .*: blk.01.attn_q.weight, blk.attn_q.weight"):
        rename(["blk.01.attn_q.weight", "blk.1.attn_q.weight", "blk.attn_q.weight"], "gguf", "hf", "here")


# -- tokenizer ----------------------------------------------------------------------


def tokenizer_of(tmp_path: Path, **changes: Any) -> tokenizers.Tokenizer:
    metadata = read_gguf(tiny.write_gguf(tmp_path / "m.gguf", **changes)).metadata
    return tokenizers.Tokenizer.from_str(tokenizer_files(metadata, 128, "m.gguf")["tokenizer.json"])


@pytest.mark.parametrize(
    ("pre", "numbers"),
    [
        ("smollm", ["1", "2", "3", "1", "2"]),
        ("gpt-2", ["123", "12"]),
        ("llama-bpe", ["123", "12"]),
        ("qwen2", ["1", "2", "3", "1", "2"]),
    ],
)
def test_pre_tokenisers(tmp_path: Path, pre: str, numbers: list[str]) -> None:
    changes = {"tokenizer__ggml__pre": pre, "tokenizer__ggml__add_bos_token": False}
    tokenizer = tokenizer_of(tmp_path, **changes)
    assert tokenizer.encode("12312").tokens == numbers
    assert tokenizer.encode(" the the").tokens == ["Ġthe", "Ġthe"]
    text = "naïve  \t\n\n 🎉 I'LL don't\r\n x²"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_bos_is_added_where_the_file_or_the_family_says_so(tmp_path: Path) -> None:
    assert tokenizer_of(tmp_path).encode("x").tokens == ["x"]
    llama = tokenizer_of(tmp_path, tokenizer__ggml__pre="llama-bpe")
    assert llama.encode("x").tokens == ["<|im_start|>", "x"]
    asked = tokenizer_of(tmp_path, tokenizer__ggml__add_bos_token=True)
    assert asked.encode("x").tokens == ["<|im_start|>", "x"]


def test_special_tokens_in_text_are_text(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path)
    assert tokenizer.encode("<|im_end|>").ids == [2]
    tokenizer.encode_special_tokens = True  # what split_special_tokens in tokenizer_config.json sets
    assert tokenizer.encode("<|im_end|>").tokens == list("<|im_end|>")


@pytest.mark.parametrize("template", [True, False])
def test_specials_are_special_for_others_where_a_chat_template_needs_them(tmp_path: Path, template: bool) -> None:
    tokenizer_of(tmp_path)
    metadata = read_gguf(tmp_path / "m.gguf").metadata
    if not template:
        del metadata["tokenizer.chat_template"]
    config = json.loads(tokenizer_files(metadata, 128, "m")["tokenizer_config.json"])
    assert ("chat_template" in config) == template
    assert config.get("split_special_tokens", False) != template


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"tokenizer__ggml__model": "llama"}, DamagedFileError, "264 tokens, but tokenizer.ggml.scores are not"),
        ({"tokenizer__ggml__model": "bert"}, InputError, "'bert'"),
        ({"tokenizer__ggml__pre": "default"}, InputError, "'default' is not known; known are gpt-2, smollm"),
        ({"tokenizer__ggml__token_type": [1, 1]}, DamagedFileError, "264 tokens, but 2 token types"),
        ({"tokenizer__ggml__merges": ["x y", "1 2"]}, DamagedFileError, "1 merges .* 'x y'"),
        ({"tokenizer__ggml__merges": None}, DamagedFileError, "merges is no list"),
        ({"tokenizer__ggml__eos_token_id": 264}, DamagedFileError, "eos_token_id is 264, .* 264 tokens"),
    ],
)
def test_tokenizer_refusals(tmp_path: Path, changes: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        tokenizer_of(tmp_path, **changes)


# -- damaged files ------------------------------------------------------------------


def test_offsets_are_checked_against_the_file(tmp_path: Path) -> None:
    path = tiny.write_gguf(tmp_path / "m.gguf")
    data = path.read_bytes()
    path.write_bytes(data[:-64])
    with pytest.raises(DamagedFileError, match=r"ends at byte [\d,]+, the file at [\d,]+") as caught:
        read_gguf(path)
    assert str(path) in str(caught.value)
    # The second tensor's offset set to 0: on top of the first one.
    entry = data.index(b"blk.0.attn_norm.weight") + len(b"blk.0.attn_norm.weight")
    offset = entry + 4 + 8 + 4
    path.write_bytes(data[:offset] + bytes(8) + data[offset + 8 :])
    with pytest.raises(DamagedFileError, match=r"tensor blk.0.attn_norm.weight starts at byte"):
        read_gguf(path)


def test_values_that_are_not_finite_are_named(tmp_path: Path) -> None:
    arrays = tiny.weights()
    arrays["model.norm.weight"][3] = np.nan
    model = read_gguf(tiny.write_gguf(tmp_path / "m.gguf", arrays))
    with pytest.raises(DamagedFileError, match=r"model.norm.weight: 1 of 64 values are not finite"):
        list(model.tensors())
