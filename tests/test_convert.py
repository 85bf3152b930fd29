"""Whole models between formats: the same weights to the bit and the same text, or one clear refusal and no file.

GGUF has tests of its own in test_convert_gguf.py. What only the original project can confirm runs where
MINIMAC_SEED_CHECKPOINT names a folder of its files with the logits and tokens that it computed.
"""

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
import torch
from comparing import CONFIGS, assert_close, torch_model, weights, windows
from terminal import isolate, run, tiny_tokenizer, tree, write_model

import mlx_impl.check
import torch_ref.check
from convert import check, state_dict
from convert.detect import read_model
from mlx_impl import conversion, generate, modeldir
from mlx_impl.config import ModelConfig
from mlx_impl.conversion import convert
from mlx_impl.errors import DamagedFileError, InputError
from mlx_impl.model import ContinualLLM
from mlx_impl.tokenizer import Tokenizer

Arrays = dict[str, np.ndarray]

every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
PLAIN = ModelConfig(61, 32, 2, 4, 2, 48, 64, 1e-5, 50000.0)
"""What every format can express."""
UNTIED = ModelConfig(67, 36, 2, 3, 1, 40, 64, tie_embeddings=False, attention_bias=True, mlp_bias=True)


def written(folder: Path, config: ModelConfig = PLAIN, dtype: str = "float32") -> Path:
    """A model directory without a tokenizer."""
    return modeldir.write_model_directory(folder, config, weights(config), {}, {}, {"test": True}, dtype)


def arrays_of(path: Path) -> Arrays:
    return dict(read_model(path).tensors)


def assert_same(actual: Arrays, expected: Arrays) -> None:
    assert sorted(actual) == sorted(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(actual[name], array, err_msg=name)


def original_names(arrays: Arrays) -> dict[str, torch.Tensor]:
    """The original's names by its own spelling, one replacement after the other."""
    state = {}
    for name, array in arrays.items():
        for ours, theirs in (
            ("model.", ""),
            ("embed_tokens", "token_embedding"),
            ("self_attn", "attention"),
            ("input_layernorm", "attention_norm"),
            ("post_attention_layernorm", "ffn_norm"),
            ("mlp.gate_proj", "feed_forward.w1"),
            ("mlp.down_proj", "feed_forward.w2"),
            ("mlp.up_proj", "feed_forward.w3"),
        ):
            name = name.replace(ours, theirs)
        state[name] = torch.tensor(array)
    return state


def original_config(config: ModelConfig, **changes: Any) -> dict[str, Any]:
    """The original's configuration: all the fields of its ModelConfig."""
    return {
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "num_layers": config.num_layers,
        "num_query_heads": config.num_query_heads,
        "num_kv_heads": config.num_kv_heads,
        "d_ff": config.d_ff,
        "max_seq_len": config.max_seq_len,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "norm_type": "rmsnorm",
        "ff_type": "swiglu",
        "norm_eps": config.norm_eps,
        "bias": config.mlp_bias,
        "rope_base": config.rope_base,
        "tie_embeddings": config.tie_embeddings,
    } | changes


def original_state(config: ModelConfig) -> dict[str, torch.Tensor]:
    """What the original's `model.state_dict()` returns: a tied head stands there too, on the same memory."""
    state = original_names(weights(config))
    return state | ({"lm_head.weight": state["token_embedding.weight"]} if config.tie_embeddings else {})


def wrapped(state: dict[str, torch.Tensor], rank: int = 2) -> dict[str, torch.Tensor]:
    """The same state as its continual learner saves it: below `base_model`, with an adapter on q_proj."""
    result = {}
    for name, tensor in state.items():
        if ".q_proj." in name:
            path, _, kind = name.rpartition(".")
            result[f"base_model.{path}.base_layer.{kind}"] = tensor
            result[f"base_model.{path}.lora.lora_A"] = torch.ones(rank, tensor.shape[-1])
            result[f"base_model.{path}.lora.lora_B"] = torch.ones(tensor.shape[0], rank)
        else:
            result[f"base_model.{name}"] = tensor
    return result


# -- round trips ---------------------------------------------------------------------


@every_config
@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_to_torch_ref_and_back_is_the_same_to_the_bit(tmp_path: Path, config: ModelConfig, name: str) -> None:
    there = tmp_path / "torch" / name
    convert(written(tmp_path / "model", config), there)
    assert sorted(path.name for path in there.parent.iterdir()) == sorted([name, "config.json"])
    convert(there, tmp_path / "back")
    assert_same(arrays_of(tmp_path / "back"), weights(config))
    assert read_model(tmp_path / "back").config == config


@every_config
def test_to_a_model_directory_and_back_is_the_same_to_the_bit(tmp_path: Path, config: ModelConfig) -> None:
    convert(written(tmp_path / "model", config), tmp_path / "again")
    before, after = tree(tmp_path / "model"), tree(tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert before[name] == after[name]


@pytest.mark.parametrize("config", [PLAIN, UNTIED], ids=["tied", "untied biases"])
def test_to_the_original_and_back_is_the_same_to_the_bit(tmp_path: Path, config: ModelConfig) -> None:
    convert(written(tmp_path / "model", config), tmp_path / "model.pt", "original")
    convert(tmp_path / "model.pt", tmp_path / "back")
    assert_same(arrays_of(tmp_path / "back"), weights(config))
    assert read_model(tmp_path / "back").config == config


def test_torch_ref_takes_the_state_dict_as_it_is(tmp_path: Path) -> None:
    convert(written(tmp_path / "model"), tmp_path / "w.pt")
    model = torch_model(PLAIN, {name: np.zeros_like(array) for name, array in weights(PLAIN).items()})
    model.load_state_dict(torch.load(tmp_path / "w.pt", weights_only=True))
    tokens = windows(PLAIN, 2, 30)[0]
    with torch.no_grad():
        theirs = model(torch.tensor(tokens)).numpy()
    ours = ContinualLLM.from_checkpoint(tmp_path / "model")(mx.array(tokens))
    assert_close("logits", ours, theirs, atol=1e-5)


@pytest.mark.parametrize("config", [PLAIN, UNTIED], ids=["tied", "untied biases"])
def test_the_original_gets_what_its_scripts_load(tmp_path: Path, config: ModelConfig) -> None:
    """`ModelConfig(**checkpoint["config"])`, then a strict `load_state_dict(checkpoint["model_state_dict"])`."""
    convert(written(tmp_path / "model", config), tmp_path / "model.pt", "original")
    value = torch.load(tmp_path / "model.pt", weights_only=True)
    assert value["config"] == original_config(config)
    expected = original_state(config)
    assert sorted(value["model_state_dict"]) == sorted(expected)
    for name, tensor in expected.items():
        assert torch.equal(value["model_state_dict"][name], tensor), name
    head, embedding = (value["model_state_dict"][f"{name}.weight"] for name in ("lm_head", "token_embedding"))
    assert (head.data_ptr() == embedding.data_ptr()) is config.tie_embeddings


@pytest.mark.parametrize(("dtype", "stored"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("name", ["model", "w.safetensors", "w.pt"])
def test_precisions_are_rounded_as_torch_rounds(tmp_path: Path, dtype: str, stored: torch.dtype, name: str) -> None:
    record = convert(written(tmp_path / "fp32"), tmp_path / "out" / name, dtype=dtype)
    assert record["dtype"] == str(stored).removeprefix("torch.")
    for key, array in arrays_of(tmp_path / "out" / name).items():
        rounded = torch.tensor(weights(PLAIN)[key]).to(stored).float().numpy()
        np.testing.assert_array_equal(array, rounded, err_msg=key)


def test_the_precision_of_the_source_is_kept(tmp_path: Path) -> None:
    source = written(tmp_path / "bf16", dtype="bfloat16")
    assert convert(source, tmp_path / "again")["dtype"] == "bfloat16"
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_the_help_says_in_which_precision_a_pt_file_comes_out(tmp_path: Path) -> None:
    convert(written(tmp_path / "model"), tmp_path / "half.pt", dtype="bf16")
    assert convert(tmp_path / "half.pt", tmp_path / "again")["dtype"] == "float32"
    help = " ".join(run("convert", "--help").out.split())
    assert "[default: as SRC; fp32 for .pt, .gguf and quantised ones]" in help
    assert help.index("Formats, each with an example") < help.index("one of those above")


@pytest.mark.parametrize("name", ["model", "w.safetensors", "w.pt"])
def test_what_does_not_fit_into_a_precision_is_refused(tmp_path: Path, name: str) -> None:
    arrays = weights(PLAIN)
    arrays["model.layers.1.mlp.up_proj.weight"][3, 4] = 70000.0
    source = modeldir.write_model_directory(tmp_path / "big", PLAIN, arrays, {}, {}, {})
    with pytest.raises(DamagedFileError, match=r"not finite in float16.*|layers\.1\.mlp\.up_proj.*not finite"):
        convert(source, tmp_path / "out" / name, dtype="fp16")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_tokenizer_travels_with_its_model_or_is_given(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model")
    convert(source, tmp_path / "copy")
    before, after = tree(source), tree(tmp_path / "copy")
    assert {name for name in before if "token" in name} == {name for name in after if "token" in name} != set()
    assert all(before[name] == after[name] for name in before if "token" in name)

    convert(source, tmp_path / "bare" / "w.pt")
    assert "no tokenizer.json" in convert(tmp_path / "bare" / "w.pt", tmp_path / "mute")["notes"][0]
    record = convert(tmp_path / "bare" / "w.pt", tmp_path / "speaks", tokenizer=source)
    assert record["notes"] == []
    assert tree(tmp_path / "speaks")["tokenizer.json"] == before["tokenizer.json"]


def test_a_tokenizer_that_is_given_stands_in_for_one_that_is_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older GGUF files do not name their pre-tokeniser."""
    source = write_model(tmp_path / "model")
    convert(source, tmp_path / "w.gguf")

    def unknown(*arguments: object) -> None:
        raise InputError("pre-tokeniser None is not known")

    monkeypatch.setattr("convert.model.tokenizer_files", unknown)
    with pytest.raises(InputError, match="pre-tokeniser None"):
        convert(tmp_path / "w.gguf", tmp_path / "mute")
    convert(tmp_path / "w.gguf", tmp_path / "speaks", tokenizer=source)
    assert tree(tmp_path / "speaks")["tokenizer.json"] == tree(source)["tokenizer.json"]


def test_a_bare_tokenizer_model_is_a_models_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in older Llama checkpoints: every command takes the directory, and what is written has a tokenizer.json."""
    import sentencepiece

    isolate(monkeypatch, tmp_path / "home")
    base = tiny_models.write_hf(tmp_path / "base", tiny_models.weights(vocab=420))
    (base / "tokenizer.json").unlink()
    (base / "tokenizer.model").write_bytes(tiny_models.sentencepiece_model())
    words = "The class of numbers yields a lambda."
    (tmp_path / "notes.txt").write_text(words)
    ids = sentencepiece.SentencePieceProcessor(model_file=str(base / "tokenizer.model")).encode(words)
    for command in (
        ("generate", words, "--max-tokens", "2", "-m", base),
        ("learn", "--text", words, "--steps", "2", "-m", base),
        ("eval", tmp_path / "notes.txt", "-m", base),
        ("convert", base, tmp_path / "copy", "--check"),
        ("convert", base, tmp_path / "w.gguf"),
        ("convert", base, tmp_path / "w.pt"),
        ("convert", tmp_path / "w.pt", tmp_path / "joined", "--tokenizer", base),
        ("convert", tmp_path / "w.gguf", tmp_path / "back"),
        ("export", "main", tmp_path / "fused", "--fuse", "-m", base),
        ("pull", base),
        ("list", "-m", base),
    ):
        assert (done := run(*command)).code == 0, done.err
    for folder in (*(tmp_path / name for name in ("copy", "joined", "back", "fused")), tmp_path / "home/models/base"):
        assert (folder / "tokenizer.json").is_file()
        assert Tokenizer.load(folder).encode(words) == ids
    ours = Tokenizer.load(base)
    ours.save(tmp_path / "saved")  # as `train --init` does
    assert Tokenizer.load(tmp_path / "saved").digest == ours.digest


def test_a_tokenizer_model_that_can_only_be_kept_is_kept(tmp_path: Path) -> None:
    base = tiny_models.write_hf(tmp_path / "base", tiny_models.weights(vocab=420))
    (base / "tokenizer.json").unlink()
    (base / "tokenizer.model").write_bytes(tiny_models.sentencepiece_model(remove_extra_whitespaces=True))
    (note,) = convert(base, tmp_path / "copy")["notes"]
    reason = "no tokenizer.json gives the same ids: it removes extra spaces before it splits a text"
    assert note == f"the tokenizer stays as it is: tokenizer.model: {reason}"
    assert Tokenizer.load(tmp_path / "copy").encode(" a  b ") == Tokenizer.load(base).encode("a b")
    assert convert(base / "model.safetensors", tmp_path / "from weights")["notes"] == [note]
    with pytest.raises(InputError, match=reason):
        convert(base, tmp_path / "w.gguf")
    (base / "tokenizer.model").write_bytes(b"tokens")
    with pytest.raises(DamagedFileError, match=r"tokenizer\.model: no SentencePiece model"):
        convert(base, tmp_path / "other")
    small = tiny_models.write_hf(tmp_path / "small", tiny_models.weights(vocab=400))
    (small / "tokenizer.json").unlink()
    (small / "tokenizer.model").write_bytes(tiny_models.sentencepiece_model(remove_extra_whitespaces=True))
    with pytest.raises(InputError, match="has 420 ids and the model only 400 rows"):
        convert(small, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "copy", "from weights", "small"]


def test_what_a_target_does_not_hold_is_told(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model")
    assert convert(source, tmp_path / "copy")["notes"] == []
    for number, to in enumerate(("torch", "original")):
        notes = convert(source, tmp_path / str(number) / "w.pt", to)["notes"]
        assert notes == ["the tokenizer is left out: this format holds weights alone"]
    assert convert(written(tmp_path / "mute"), tmp_path / "2" / "w.pt")["notes"] == []
    (source / "learner").mkdir()
    (source / "learner" / "learner.sqlite").touch()
    (note,) = convert(source, tmp_path / "again")["notes"]
    assert note == f"its lessons stay there; `minimac-mlx export NAME OUT --fuse -m {source}` takes one along"


def test_a_tokenizer_that_is_given_brings_its_ids(tmp_path: Path) -> None:
    tokens = write_model(tmp_path / "tokens")
    ours = Tokenizer.load(tokens)
    assert ours.eos_id is not None
    bare, config = written(tmp_path / "bare", dataclasses.replace(PLAIN, vocab_size=500)), "config.json"
    convert(bare, tmp_path / "speaks", tokenizer=tokens)
    for name in (config, "generation_config.json"):
        found = json.loads((tmp_path / "speaks" / name).read_text())
        assert (found.get("bos_token_id"), found.get("eos_token_id")) == (ours.bos_id, ours.eos_id)
    said = {**json.loads((bare / config).read_text()), "eos_token_id": 7}
    (bare / config).write_text(json.dumps(said))
    (bare / "minimac.json").unlink()
    convert(bare, tmp_path / "stays", tokenizer=tokens)
    assert json.loads((tmp_path / "stays" / config).read_text())["eos_token_id"] == 7


@pytest.mark.parametrize(
    ("name", "to", "words"),
    [
        ("x.pth", None, "hf writes a folder; files that are written end in .pt, .safetensors, .gguf"),
        ("x.bin", None, "hf writes a folder"),
        ("x.gguf", "hf", "hf writes a folder"),
        ("x.PT", "hf", "hf writes a folder"),
        ("x.pth", "torch", "torch writes a file that ends in .pt or .safetensors"),
        ("x.PT", "gguf-f16", r"gguf-f16 writes a file that ends in .gguf"),
    ],
)
def test_an_ending_of_another_format_is_refused(tmp_path: Path, name: str, to: str | None, words: str) -> None:
    source = written(tmp_path / "model")
    with pytest.raises(InputError, match=words):
        convert(source, tmp_path / "out" / name, to)
    assert not (tmp_path / "out").exists()


def test_endings_in_capitals_are_the_same(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model")
    formats = {"a.GGUF": "gguf-f16", "b/W.Safetensors": "torch", "c/W.PT": "torch", "v0.1": "hf"}
    for name, to in formats.items():
        assert convert(source, tmp_path / name)["format"] == to
        assert read_model(tmp_path / name).config.d_model == read_model(source).config.d_model
    assert (tmp_path / "b" / "W.Safetensors").read_bytes()[8:9] == b"{"


def test_the_config_beside_weights_comes_after_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, value: Any) -> None:
        assert (tmp_path / "out" / "w.pt").stat().st_size > 0
        raise OSError("disk full")

    monkeypatch.setattr(conversion, "write_json", full)
    with pytest.raises(OSError, match="disk full"):
        convert(written(tmp_path / "model"), tmp_path / "out" / "w.pt")
    assert list((tmp_path / "out").iterdir()) == []


# -- the original's files --------------------------------------------------------------


@pytest.mark.parametrize("config", [PLAIN, UNTIED], ids=["tied", "untied biases"])
@pytest.mark.parametrize("form", ["model.pt", "checkpoint.pt", "wrapped", "wrapped, bare"])
def test_all_forms_of_the_original_are_read(tmp_path: Path, config: ModelConfig, form: str) -> None:
    state, path = original_state(config), tmp_path / "model.pt"
    if form == "model.pt":
        torch.save({"model_state_dict": state, "config": original_config(config)}, path)
    elif form == "checkpoint.pt":
        more = {"optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 0.1}]}, "epoch": 3, "loss": 1.5}
        torch.save({"model_state_dict": state, "config": original_config(config), **more}, path)
    elif form == "wrapped":
        torch.save({"state_dict": wrapped(state), "config": original_config(config)}, path)
    else:
        torch.save(wrapped(state), path)
    config_file = tmp_path / "base.json"
    config_file.write_text(json.dumps(original_config(config)))
    model = read_model(path, config_file if form == "wrapped, bare" else None)
    assert_same(dict(model.tensors), weights(config))
    assert model.config == config
    assert ("with an adapter in it (" in model.found) is ("wrapped" in form)
    assert any("adapter inside is left out" in note for note in model.notes) is ("wrapped" in form)


def test_a_bare_state_dict_takes_the_config_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(original_state(PLAIN), path)
    with pytest.raises(InputError, match=r"without a configuration, .*--config FILE"):
        read_model(path)
    (tmp_path / "config.json").write_text(json.dumps(PLAIN.to_hf()))
    assert_same(dict(read_model(path).tensors), weights(PLAIN))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm_type": "layernorm"}, r"norm_type = 'layernorm' \(here it is rmsnorm\)"),
        ({"ff_type": "geglu"}, r"ff_type = 'geglu' \(here it is swiglu\)"),
        ({"ff_type": "gelu", "norm_type": "layernorm"}, "norm_type = 'layernorm'.*; ff_type = 'gelu'"),
        (
            {"use_neuromodulation": True, "use_liquid_lora": True, "liquid_tau_base": 1.0},
            "use_neuromodulation = True; use_liquid_lora = True; liquid_tau_base = 1.0",
        ),
    ],
)
def test_what_this_model_does_not_have_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    values = original_config(PLAIN, **changes)
    torch.save({"model_state_dict": original_state(PLAIN), "config": values}, tmp_path / "model.pt")
    with pytest.raises(InputError, match=words):
        convert(tmp_path / "model.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_liquid_lora_is_named(tmp_path: Path) -> None:
    state = wrapped(original_state(PLAIN))
    state["base_model.layers.0.attention.q_proj.lora.hidden_B"] = torch.zeros(3)
    torch.save({"state_dict": state, "config": original_config(PLAIN)}, tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"no liquid LoRA, .*q_proj\.lora\.hidden_B"):
        convert(tmp_path / "model.pt", tmp_path / "out")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (CONFIGS["12:3 tied llama3"], "rope_scaling"),
        (CONFIGS["4:2 untied linear scaling, heads wider than D/H"], "head_dim = 14.*; rope_scaling"),
        (ModelConfig(61, 32, 2, 4, 2, 48, 64, attention_bias=True), "biases in attention or MLP alone"),
    ],
)
def test_what_the_original_does_not_have_is_named(tmp_path: Path, config: ModelConfig, words: str) -> None:
    with pytest.raises(InputError, match=f"cannot express .*{words}"):
        convert(written(tmp_path / "model", config), tmp_path / "out.pt", "original")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


# -- refusals ------------------------------------------------------------------------


@pytest.mark.parametrize("ours", [True, False], ids=["torch_ref", "original"])
def test_all_tensors_that_do_not_fit_are_listed(tmp_path: Path, ours: bool) -> None:
    state = {name: torch.tensor(a) for name, a in weights(PLAIN).items()} if ours else original_state(PLAIN)
    start, gate = ("model.", "mlp.gate_proj") if ours else ("", "feed_forward.w1")
    del state[f"{start}norm.weight"]
    state[f"{start}layers.0.{gate}.weight"] = torch.zeros(3, 5)
    (tmp_path / "config.json").write_text(json.dumps(PLAIN.to_hf()))
    more = {f"{start}{name}": torch.zeros(1) for name in ("x.weight", "layers.9.y.bias")}
    for added, words in (
        ({}, r"missing: model\.norm\.weight; wrong shape: .*gate_proj\.weight is \[3, 5\], .* says \[48, 32\]"),
        (more, r"unknown.*x\.weight, (model\.)?layers\.9\.y\.bias"),
    ):
        torch.save(state | added, tmp_path / "w.pt")
        with pytest.raises(DamagedFileError, match=words):
            convert(tmp_path / "w.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([1, 2], "holds a list"),
        ({}, "no state dict"),
        (
            {"state_dict": {"a": 1, "model.norm.weight": torch.ones(32)}, "config": {}},
            "not tensors of real numbers: a$",
        ),
        ({"model.norm.weight": torch.ones(32, dtype=torch.int64)}, "not tensors of real numbers: model.norm.weight"),
        ({"state_dict": {"model.norm.weight": torch.ones(32)}, "config": {"d_model": "wide"}}, "d_model = 'wide'"),
        ({"state_dict": {"model.norm.weight": torch.ones(32)}, "config": {"d_model": 32, "bias": 1}}, "bias is 1"),
        ({"state_dict": {"a": torch.ones(1)}, "config": {"d_model": torch.ones(3)}}, "no configuration: d_model = arr"),
        ({"state_dict": {"a": torch.ones(1)}, "config": {"x": [[1]]}}, r"no configuration: x = \[\[1\]\]"),
        (
            {"state_dict": {"model.norm.weight": torch.ones(32)}, "config": {"d_model": 32, "tie_embeddings": 1}},
            "tie_embeddings = 1 must be true or false",
        ),
        ({"lora_config": {}, "state_dict": {}}, "an adapter, no model; `minimac-mlx import NAME w.pt`"),
    ],
)
def test_other_pt_files_are_refused(tmp_path: Path, value: Any, words: str) -> None:
    torch.save(value, tmp_path / "w.pt")
    with pytest.raises((DamagedFileError, InputError), match=words):
        convert(tmp_path / "w.pt", tmp_path / "out")


def test_a_tied_head_must_be_the_embedding(tmp_path: Path) -> None:
    state = original_state(PLAIN) | {"lm_head.weight": torch.zeros(61, 32)}
    torch.save({"model_state_dict": state, "config": original_config(PLAIN)}, tmp_path / "model.pt")
    with pytest.raises(DamagedFileError, match=r"tied, and lm_head\.weight is not the embedding"):
        read_model(tmp_path / "model.pt")


def test_one_weight_under_two_names_is_refused(tmp_path: Path) -> None:
    state = original_state(PLAIN)
    state["layers.0.attention.q_proj.base_layer.weight"] = state["layers.0.attention.q_proj.weight"] + 1
    torch.save({"model_state_dict": state, "config": original_config(PLAIN)}, tmp_path / "model.pt")
    with pytest.raises(DamagedFileError, match=r"another name too: layers\.0\.attention\.q_proj\.base_layer\.weight"):
        read_model(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        (["model", "there"], "there exists already", 2),
        (["model", "out", "--to", "onnx"], "'onnx' is no format to write; there are: hf, .*; gguf-q8_0, ", 2),
        (["model", "out", "--to", "torch"], "torch writes a file that ends in .pt or .safetensors", 2),
        (["model", "w.safetensors", "--to", "original"], "original writes a file that ends in .pt", 2),
        (["model", "m.gguf", "--dtype", "fp16"], "--dtype fp16: gguf-f16 says how", 2),
        (["model", "out", "--config", "model/config.json"], "has its own configuration", 2),
        (["nowhere", "out"], "nowhere: no such file or folder", 2),
        (["model/config.json", "out"], "not known by its name '.json'; read are a model directory", 2),
        (["there", "out"], "no config.json, so no model directory; in it are weights.pt, name one of them", 2),
        (["model", "beside/w.pt"], "config.json is another model's", 2),
        (["model", "out", "--tokenizer", "there"], "there: no tokenizer.json", 2),
        (["model", "out", "--tokenizer", "large"], "the tokenizer has 400 ids and the model only 61 rows", 2),
        (["model", "out.gguf"], "no tokenizer.json, which a GGUF file holds; --tokenizer DIR", 2),
        (["cut/w.safetensors", "out"], "cut off|tensors end at|bytes", 3),
    ],
)  # fmt: skip
def test_refusals_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str, code: int
) -> None:
    isolate(monkeypatch, tmp_path / "home")
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "model")
    (tmp_path / "there").mkdir()
    torch.save({}, tmp_path / "there" / "weights.pt")
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "config.json").write_text("{}")
    tiny_tokenizer().save(tmp_path / "large")
    convert(tmp_path / "model", tmp_path / "cut" / "w.safetensors")
    whole = (tmp_path / "cut" / "w.safetensors").read_bytes()
    (tmp_path / "cut" / "w.safetensors").write_bytes(whole[:-100])
    before = tree(tmp_path)
    done = run("convert", *arguments)
    assert done.code == code
    assert done.err.strip().splitlines()[-1].startswith("error: ")
    assert re.search(words, done.err), done.err
    assert tree(tmp_path) == before


# -- the command -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("out", []),
        ("out", ["--dtype", "fp16"]),
        ("out", ["--dtype", "bf16"]),
        ("new/w.pt", []),
        ("new/w.safetensors", ["--dtype", "fp16"]),
        ("w.pt", ["--to", "original"]),
    ],
)
def test_the_command_says_what_it_found_and_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, options: list[str]
) -> None:
    isolate(monkeypatch, tmp_path / "home")
    source = write_model(tmp_path / "model")
    done = run("convert", source, tmp_path / target, "--check", "--json", *options)
    assert done.code == 0
    assert "model is a model directory in Hugging Face's layout: " in done.err
    record = json.loads(done.out)
    assert record["found"] in done.err
    assert record["target"] == str(tmp_path / target)
    checked = record["check"]
    assert checked["first"] is None
    assert checked["tokens"] == 32
    assert 0 <= checked["difference"] <= checked["at_most"]
    assert (checked["difference"] == 0) is (target == "out" and not options)
    again = run("convert", tmp_path / target, tmp_path / "again", "--tokenizer", source, "--quiet")
    assert (again.code, again.err) == (0, "")
    assert again.out.startswith(f"{tmp_path / 'again'}: hf, {record['parameters']:,} weights as ")


@pytest.mark.parametrize("as_json", [True, False])
def test_a_target_that_computes_something_else_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    """The check must be able to fail: a weight that was changed on the way is found in its module."""
    isolate(monkeypatch, tmp_path / "home")
    honest = state_dict.write_torch

    def spoiled(model: Any, path: Path, dtype: str) -> None:
        arrays = dict(model.tensors)
        arrays["model.layers.1.self_attn.k_proj.weight"] = -arrays["model.layers.1.self_attn.k_proj.weight"]
        honest(dataclasses.replace(model, tensors=arrays.items()), path, dtype)

    monkeypatch.setattr(state_dict, "write_torch", spoiled)
    source = write_model(tmp_path / "model")
    done = run("convert", source, tmp_path / "new" / "w.pt", "--check", *["--json"] * as_json)
    assert done.code == 3
    if as_json:
        assert json.loads(done.out)["check"]["first"] == "model.layers.1.self_attn.k_proj"
    else:
        assert "is allowed; first in model.layers.1.self_attn.k_proj" in done.out


def test_what_is_not_finite_is_far_off() -> None:
    outputs = {"a": np.ones((1, 2, 3)), "logits": np.ones((1, 2, 3))}
    for wrong in (np.nan, np.inf, -np.inf):
        broken = outputs | {"logits": np.array([[[1, 1, 1], [1, wrong, 1]]])}
        for pair in ((outputs, broken), (broken, outputs), (broken, outputs | {"logits": -broken["logits"]})):
            found = check.compare(*pair, "float32")
            assert (found.difference, found.first) == (None, "logits")
            json.dumps(dataclasses.asdict(found), allow_nan=False)  # as --json prints it
    same = outputs | {"logits": np.array([[[1, np.inf, 1], [1, -np.inf, 2]]])}
    found = check.compare(same, same, "float32")
    assert (found.difference, found.at_most, found.first) == (0, 2e-5, None)
    assert check.compare(outputs, outputs | {"logits": np.ones((1, 2, 4))}, "float32").first == "logits"


@every_config
def test_both_traces_name_the_same_modules_in_the_same_order(config: ModelConfig) -> None:
    tokens = check.tokens_for(config)
    ours = mlx_impl.check.trace(config, weights(config).items(), tokens)
    theirs = torch_ref.check.trace(config, weights(config).items(), tokens)
    assert list(ours) == list(theirs)
    assert next(iter(ours)) == "model.layers.0.input_layernorm"
    assert list(ours)[-1] == "logits"
    assert len(ours) == 9 * config.num_layers + (2 if config.tie_embeddings else 3)
    assert check.compare(theirs, ours, "float32").first is None


# -- the original's own figures ----------------------------------------------------------

SEED = os.environ.get("MINIMAC_SEED_CHECKPOINT")


@pytest.mark.skipif(SEED is None, reason="MINIMAC_SEED_CHECKPOINT names no folder of the original's files")
@pytest.mark.parametrize("name", ["model.pt", "continual_model.pt"])
def test_the_original_computed_the_same(tmp_path: Path, name: str) -> None:
    folder = Path(str(SEED))
    convert(folder / name, tmp_path / "model")
    model, expected = ContinualLLM.from_checkpoint(tmp_path / "model"), np.load(folder / "expected.npz")
    assert_close("logits", model(mx.array(expected["input_ids"])), expected["logits"], atol=1e-5)
    greedy = expected["greedy_ids"][0].tolist()
    prompt = next(n for n in range(1, len(greedy)) if expected["input_ids"][0, :n].tolist() != greedy[:n]) - 1
    assert list(generate.decode(model, greedy[:prompt], len(greedy) - prompt, generate.Sampling())) == greedy[prompt:]
