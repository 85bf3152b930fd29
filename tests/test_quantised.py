"""Quantised bases: written as mlx-lm writes them, read packed and unpacked, taught either way, and fused.

Two layers are 64 wide so that every matrix has whole groups; which way a directory is opened is set by the environment,
as a GPU would have it and as a CPU does.
"""

import dataclasses
import json
import re
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from comparing import assert_close
from foreign_models import base_arrays, write_foreign
from lessons import SETTINGS, text, tiny_tokenizer
from terminal import isolate, run

from convert.check import ENGLISH
from mlx_impl import fusing, lora, modeldir, quantised
from mlx_impl.config import Budget, ModelConfig
from mlx_impl.conversion import convert
from mlx_impl.device import keep_quantised
from mlx_impl.errors import DamagedFileError, InputError
from mlx_impl.exchange import export_adapter
from mlx_impl.foreign import open_model
from mlx_impl.fusing import fuse
from mlx_impl.learner import ContinualLearner
from mlx_impl.model import ContinualLLM
from mlx_impl.packing import BITS, GROUP_SIZES, Packing, read_quantization, unpack
from mlx_impl.pull import pull
from mlx_impl.quantised import write_quantised
from mlx_impl.tokenizer import Tokenizer

BUDGET = Budget(steps=4)
PACKED = "MINIMAC_QUANTISED"


@cache
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


def parts(tied: bool = True, d_ff: int = 128, seed: int = 3) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    config = ModelConfig(tokenizer().vocab_size, 64, 2, 4, 2, d_ff, 128, tie_embeddings=tied, rope_base=20000.0)
    rng = np.random.default_rng(seed)
    arrays = {
        name: np.ones(shape, np.float32)
        if len(shape) == 1
        else rng.standard_normal(shape, np.float32) / shape[1] ** 0.5
        for name, shape in modeldir.expected_shapes(config).items()
    }
    return config, arrays


def written(folder: Path, bits: int = 4, dtype: str = "float32", tied: bool = True, **shape: int) -> Path:
    """A quantised model directory with a tokenizer."""
    tokenizer().save(folder / "tokenizer")
    files = {path.name: path.read_bytes() for path in (folder / "tokenizer").iterdir()}
    config, arrays = parts(tied, **shape)
    return write_quantised(folder / "model", config, arrays.items(), files, {}, {"test": True}, Packing(bits), dtype)


def opened(base: Path, **changes: Any) -> ContinualLearner:
    settings = dataclasses.replace(SETTINGS, **changes)
    return ContinualLearner.from_checkpoint(base, settings, base.parent / "lessons")


def some_tokens() -> mx.array:
    return mx.array([tokenizer().encode(text(2))[:40]])


both_ways = pytest.mark.parametrize("way", ["keep", "unpack"])


def is_packed(model: Any) -> bool:
    kinds = {type(module) for _, module in model.named_modules()}
    packed = bool(kinds & {nn.QuantizedLinear, nn.QuantizedEmbedding})
    assert packed != bool(kinds & {nn.Linear, nn.Embedding})
    return packed


@pytest.mark.parametrize(("bits", "tied"), [(4, True), (4, False), (8, True)])
def test_mlx_lm_opens_what_is_written_and_computes_the_same(
    bits: int, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_lm.utils import load_model

    base = written(tmp_path, bits, tied=tied)
    network, config = load_model(base)
    assert config["quantization"] == {"group_size": 64, "bits": bits, "mode": "affine"} == config["quantization_config"]
    theirs = network(some_tokens())
    for way in ("keep", "unpack"):
        monkeypatch.setenv(PACKED, way)
        model = ContinualLLM.from_checkpoint(base)
        assert is_packed(model) == (way == "keep")
        assert_close(way, model(some_tokens()), theirs, atol=1e-4)


def test_mlx_lm_writes_the_same_bytes(tmp_path: Path) -> None:
    """Its own quantisation of the same model, tensor by tensor."""
    from mlx_lm.utils import load_model, quantize_model

    config, arrays = parts()
    modeldir.write_model_directory(tmp_path / "dense", config, arrays, {}, {}, {})
    network, described = load_model(tmp_path / "dense")
    network, described = quantize_model(network, described, 64, 4)
    ours = mx.load(str(written(tmp_path) / "model.safetensors"))
    theirs = {**base_arrays(network)}
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(ours[name], theirs[name]).item() for name in ours)
    assert described["quantization"] == {"group_size": 64, "bits": 4, "mode": "affine"}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_numpy_unpacks_what_mlx_packed(bits: int, group_size: int, dtype: str) -> None:
    matrix = np.random.default_rng(0).standard_normal((2, 3, 256), np.float32)
    packing = Packing(bits, group_size)
    packed = quantised.pack(matrix, packing, dtype)
    ours = unpack(*(np.array(packed[name]) for name in ("weight", "scales", "biases")), bits)
    assert ours.dtype == np.float32
    assert_close("unpacked", ours, quantised.unpack(packed, packing), atol=1e-6)
    coarse = np.abs(ours - matrix).max()
    assert coarse < 1.1 * np.ptp(matrix, axis=-1).max() / (2**bits - 1)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_quantised_directory_is_read_without_mlx(dtype: str, tmp_path: Path) -> None:
    base = written(tmp_path, dtype=dtype)
    config, quantization = modeldir.read_config(base)
    infos = modeldir.checked_tensors(base, config, quantization)
    dense = dict(modeldir.read_dense(infos, quantization))
    shapes = {name: info.shape for name, info in modeldir.dense_infos(infos, quantization).items()}
    assert shapes == modeldir.expected_shapes(config) == {name: array.shape for name, array in dense.items()}
    unpacked = base_arrays(ContinualLLM.from_checkpoint(base))
    for name, array in dense.items():
        assert_close(name, array, unpacked[name], atol=1e-6)


def test_a_cpu_unpacks_and_the_environment_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PACKED, raising=False)
    assert keep_quantised() == (mx.default_device().type == mx.DeviceType.gpu)
    monkeypatch.setenv(PACKED, "sometimes")
    with pytest.raises(InputError, match="MINIMAC_QUANTISED is 'sometimes'; keep and unpack are known"):
        keep_quantised()


@both_ways
@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3"])
def test_lessons_on_a_quantised_base(kind: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """QLoRA: the base's arrays, packed or not, stay to the bit, and only the adapter has gradients."""
    monkeypatch.setenv(PACKED, way)
    base = written(tmp_path) if kind == "llama" else foreign(tmp_path, kind)
    learner = opened(base)
    assert is_packed(learner.model) == (way == "keep")
    assert (learner.model.head_weight is None) == (way == "keep")
    first = learner.learn_from_text(text(2), budget=BUDGET)
    logits = np.array(learner.model(some_tokens()))
    second = learner.learn_from_text(text(3), budget=BUDGET)
    assert first.after < first.before - 0.001
    assert second.after < second.before - 0.001
    assert second.replayed_tokens > 0
    assert first.trainable_parameters == sum(a.size for a in lora.adapter_arrays(learner.model).values())
    fresh, ours = base_arrays(open_model(base)), base_arrays(learner.model)
    assert fresh.keys() == ours.keys()
    assert all(mx.array_equal(fresh[name], ours[name]).item() for name in fresh)
    cache = learner.model.make_cache()
    tokens = some_tokens()
    pieces = [learner.model(tokens[:, :21], cache), learner.model(tokens[:, 21:], cache)]
    assert_close("cached", mx.concatenate(pieces, axis=1), learner.model(tokens), atol=1e-4)
    learner.undo()
    assert np.array_equal(np.array(learner.model(tokens)), logits)


def foreign(folder: Path, kind: str, **changes: Any) -> Path:
    """A quantised directory of another architecture, as `mlx_lm.convert -q` makes one."""
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    dense = write_foreign(folder / "dense", kind, tokenizer(), hidden_size=64, head_dim=16, **changes)
    network, config = quantize_model(*load_model(dense), 64, 4)
    save_model(folder / "base", network)
    save_config(config, folder / "base" / "config.json")
    tokenizer().save(folder / "base")
    return folder / "base"


def test_an_adapter_learned_on_packed_weights_fits_the_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PACKED, "keep")
    base = written(tmp_path)
    learner = opened(base)
    learner.learn_from_text(text(2), budget=BUDGET)
    expected = np.array(learner.model(some_tokens()))
    monkeypatch.setenv(PACKED, "unpack")
    other = opened(base)
    other.set_adapter("main")
    assert_close("unpacked", other.model(some_tokens()), expected, atol=1e-4)
    lora.fuse(learner.model)  # in memory
    assert_close("fused", learner.model(some_tokens()), expected, atol=1e-4)
    export_adapter(learner.store, "main", base, tmp_path / "peft", "peft")  # shapes of packed layers are known


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_base_and_adapter_become_one_model(kind: str, tmp_path: Path) -> None:
    from mlx_lm.utils import load_model

    base = written(tmp_path, dtype="bfloat16") if kind == "llama" else foreign(tmp_path, kind)
    learner = opened(base, learning_rate=0.02)
    learner.learn_from_text(text(2), budget=BUDGET)
    expected = learner.model(some_tokens())
    record = fuse(learner.store, "main", base, tmp_path / "fused")
    assert "survived_percent" not in record
    assert_close("fused", open_model(tmp_path / "fused")(some_tokens()), expected, atol=1e-4)
    network, config = load_model(tmp_path / "fused")
    assert "quantization" not in config
    assert_close("mlx-lm", network(some_tokens()), expected, atol=1e-4)

    again = fuse(learner.store, "main", base, tmp_path / "again", requantise=True)
    network, config = load_model(tmp_path / "again")
    assert config["quantization"]["bits"] == 4
    assert layout(tmp_path / "again") == layout(base)
    assert_close("again", open_model(tmp_path / "again")(some_tokens()), float32(network)(some_tokens()), atol=1e-4)
    assert again["survived_percent"] == pytest.approx(survived(learner, base, tmp_path / "again"), abs=0.1)
    assert 0 < again["survived_percent"] < 120


@pytest.mark.parametrize("requantise", [False, True])
def test_what_is_fused_is_spelled_out_for_every_reader(requantise: bool, tmp_path: Path) -> None:
    """mlx-lm reads rope_theta alone, transformers 5 writes rope_parameters alone: theta must not become 10000."""
    from mlx_lm.utils import load_model

    base = written(tmp_path, dtype="float16")
    config = json.loads((base / "config.json").read_text())
    config = {k: v for k, v in config.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype", "head_dim")}
    (base / "config.json").write_text(json.dumps(config))
    (base / "minimac.json").unlink()
    learner = opened(base)
    learner.learn_from_text(text(2), budget=Budget(steps=1))
    fuse(learner.store, "main", base, tmp_path / "fused", requantise)
    network, written_config = load_model(tmp_path / "fused")
    assert written_config["rope_theta"] == 20000.0 == written_config["rope_parameters"]["rope_theta"]
    assert written_config["dtype"] == written_config["torch_dtype"] == ("float16" if requantise else "float32")
    assert ("quantization" in written_config) == requantise
    assert_close("theirs", float32(network)(some_tokens()), open_model(tmp_path / "fused")(some_tokens()), atol=1e-4)


def test_fusing_holds_one_product_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = opened(written(tmp_path))
    learner.learn_from_text(text(2), budget=Budget(steps=1))
    alive: list[weakref.ref] = []
    most = 0

    def counted(a: mx.array, b: mx.array) -> np.ndarray:
        nonlocal most
        product = np.array(a @ b).T
        alive.append(weakref.ref(product))
        most = max(most, sum(ref() is not None for ref in alive))
        return product

    monkeypatch.setattr(fusing, "_delta", counted)
    fuse(learner.store, "main", tmp_path / "model", tmp_path / "fused")
    assert len(alive) == len(lora.lora_layers(learner.model))
    assert most <= 2


def float32(network: nn.Module) -> nn.Module:
    network.set_dtype(mx.float32)
    return network


def layout(base: Path) -> dict[str, tuple]:
    return {name: (array.dtype, array.shape) for name, array in mx.load(str(base / "model.safetensors")).items()}


def survived(learner: ContinualLearner, base: Path, written: Path) -> float:
    """The share by its definition, over unpacked models."""
    before, after = base_arrays(open_model(base)), base_arrays(open_model(written))
    left = whole = 0.0
    for path, layer in lora.lora_layers(learner.model):
        delta = np.array(2.0 * (layer.lora_a @ layer.lora_b).T, np.float64)
        change = np.array(after[f"{path}.weight"]) - np.array(before[f"{path}.weight"])
        left, whole = left + (change * delta).sum(), whole + (delta**2).sum()
    return 100 * left / whole


def test_a_large_change_survives_requantisation_and_a_slight_one_does_not(tmp_path: Path) -> None:
    shares = {}
    for bits in (4, 8):
        base = written(tmp_path / str(bits), bits)
        for name, rate in (("slight", 1e-4), ("much", 0.1)):
            learner = opened(base, learning_rate=rate)
            learner.learn_from_text(text(2), name, budget=Budget(steps=1))
            out = tmp_path / f"{bits}-{name}"
            shares[bits, name] = fuse(learner.store, name, base, out, requantise=True)["survived_percent"]
    assert abs(100 - shares[4, "much"]) < 5
    assert abs(100 - shares[8, "much"]) < 0.5
    assert abs(100 - shares[8, "slight"]) > 20 < abs(100 - shares[4, "slight"])  # less than a step between codes


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isolate(monkeypatch, tmp_path / "home")
    base, options = written(tmp_path), ("-m", tmp_path / "model", "--store", tmp_path / "store", "--quiet")
    assert run("learn", "--text", text(2), "--steps", "2", *options).code == 0
    assert run("eval", "-", "--context", "32", *options, stdin=text(2).encode()).code == 0
    done = run("export", "main", tmp_path / "fused", "--fuse", *options)
    assert (done.code, "main v0001 as model: config.json" in done.out) == (0, True)
    done = run("export", "main", tmp_path / "again", "--fuse", "--requantize", *options)
    assert (done.code, "% of what the adapter changes outlived the quantisation" in done.out) == (0, True)
    done = run("export", "main", tmp_path / "third", "--fuse", "--requantize", "--json", *options)
    share = json.loads(done.out)["survived_percent"]
    assert share == json.loads((tmp_path / "third" / "minimac.json").read_text())["source"]["survived_percent"]
    assert run("export", "main", tmp_path / "fused", "--fuse", *options).code == 2  # is there already
    for wrong in (("--fuse", "--to", "peft"), (), ("--to", "peft", "--requantize")):
        done = run("export", "main", tmp_path / "fourth", *wrong, *options)
        assert (done.code, "--fuse [--requantize]" in done.err) == (2, True)
    done = run("export", "main", tmp_path / "fifth", "--fuse", "--requantize", "-m", tmp_path / "fused", *options[2:])
    assert done.code == 2  # these lessons are another base's
    (tmp_path / "notes.txt").write_text(text(2))
    done = run("train", tmp_path / "notes.txt", "--init", base, "--out", tmp_path / "out")
    assert (done.code, "its weights are quantised and cannot be trained" in done.err) == (2, True)


def dense_model(folder: Path, tied: bool = True) -> Path:
    """What is packed here before it is."""
    config, arrays = parts(tied)
    tokenizer().save(folder / "tokenizer")
    files = {path.name: path.read_bytes() for path in (folder / "tokenizer").iterdir()}
    return modeldir.write_model_directory(folder / "dense", config, arrays, files, {}, {})


def test_convert_packs_and_unpacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed by the command, read by mlx-lm, unpacked by the command: the same logits all the way."""
    from mlx_lm.utils import load_model

    isolate(monkeypatch, tmp_path / "home")
    done = run("convert", dense_model(tmp_path), tmp_path / "packed", "--quantize", "8", "--json", "--quiet")
    assert (done.code, json.loads(done.out)["bits"]) == (0, 8), done.err
    done = run("convert", tmp_path / "packed", tmp_path / "again")
    assert (done.code, "quantised to 8 bits" in done.err) == (0, True)
    expected = ContinualLLM.from_checkpoint(tmp_path / "again")(some_tokens())
    assert_close("packed", load_model(tmp_path / "packed")[0](some_tokens()), expected, atol=1e-4)
    assert_close("dense", ContinualLLM.from_checkpoint(tmp_path / "dense")(some_tokens()), expected, atol=0.3)


@pytest.mark.parametrize(("bits", "dtype"), [("4", "fp32"), ("8", "bf16"), ("4", "fp16")])
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_packed_is_checked_against_the_values_that_it_stands_for(
    bits: str, dtype: str, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last digits; what the packing changed is told beside it, and is what numpy finds."""
    isolate(monkeypatch, tmp_path / "home")
    dense = dense_model(tmp_path, tied)
    done = run("convert", dense, tmp_path / "packed", "--quantize", bits, "--dtype", dtype, "--check", "--json")
    assert done.code == 0, done.err
    checked = json.loads(done.out)["check"]
    assert (checked["first"], checked["tokens"]) == (None, 32)
    assert 0 < checked["difference"] <= checked["at_most"] < 1e-3
    assert checked["quantising"]["on"] == "English"
    tokens = mx.array([tokenizer().encode(ENGLISH)[:32]])
    before, after = (nn.log_softmax(open_model(path)(tokens)) for path in (dense, tmp_path / "packed"))
    expected = (mx.exp(before) * (before - after)).sum(-1).mean().item()
    assert checked["quantising"]["kl"] == pytest.approx(expected, rel=1e-3)
    assert (1e-3 if bits == "4" else 1e-6) < expected < 1
    shown = run("convert", tmp_path / "packed", tmp_path / "again", "--quantize", bits, "--check").out
    assert re.search(r"what quantising itself changed .*: \S+ nats per token, on 32 tokens of English$", shown.strip())


def test_codes_that_stand_for_something_else_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isolate(monkeypatch, tmp_path / "home")
    honest, spoiled = quantised.write_arrays, "model.layers.1.mlp.up_proj.scales"

    def write(path: Path, arrays: dict[str, mx.array]) -> None:
        honest(path, {name: array * 1.01 if name == spoiled else array for name, array in arrays.items()})

    monkeypatch.setattr(quantised, "write_arrays", write)
    done = run("convert", dense_model(tmp_path), tmp_path / "packed", "--quantize", "4", "--check", "--json")
    assert (done.code, json.loads(done.out)["check"]["first"]) == (3, "model.layers.1.mlp.up_proj")


def test_weights_alone_are_checked_on_random_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isolate(monkeypatch, tmp_path / "home")
    convert(dense_model(tmp_path), tmp_path / "w.safetensors")
    done = run("convert", tmp_path / "w.safetensors", tmp_path / "packed", "--quantize", "8", "--check", "--json")
    assert (done.code, json.loads(done.out)["check"]["quantising"]["on"]) == (0, "random ids"), done.err


@pytest.mark.parametrize("name", ["w.gguf", "w.pt"])
def test_only_model_directories_are_packed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isolate(monkeypatch, tmp_path / "home")
    done = run("convert", dense_model(tmp_path), tmp_path / name, "--quantize", "4")
    assert (done.code, (tmp_path / name).exists()) == (2, False)
    assert done.err.startswith("error: --quantize 4: packs model directories")


def test_that_weights_are_unpacked_is_told(tmp_path: Path) -> None:
    base, said = written(tmp_path), list[str]()
    told = "its weights were quantised to 4 bits, and come out unpacked"
    assert convert(base, tmp_path / "dense")["notes"] == [told]
    pull(str(base), tmp_path / "home", said.append)
    assert told in said
    said.clear()
    pull(str(tmp_path / "dense"), tmp_path / "home", said.append)
    assert told not in said
    done = run("convert", base, tmp_path / "again", "--quantize", "8", "--json")
    assert json.loads(done.out)["notes"] == ["its weights were quantised to 4 bits already; what that lost stays lost"]


def test_requantising_needs_a_quantised_base(tmp_path: Path) -> None:
    learner = opened(write_foreign(tmp_path / "base", "qwen2", tokenizer()))
    learner.learn_from_text(text(2), budget=Budget(steps=1))
    with pytest.raises(InputError, match="the base is not quantised; leave --requantize out"):
        fuse(learner.store, "main", tmp_path / "base", tmp_path / "out", requantise=True)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_rows_that_groups_do_not_divide_stay_as_they_are(tmp_path: Path) -> None:
    base = written(tmp_path, d_ff=96)
    arrays = mx.load(str(base / "model.safetensors"))
    assert "model.layers.0.mlp.down_proj.scales" not in arrays
    assert "model.layers.0.mlp.up_proj.scales" in arrays
    assert opened(base).learn_from_text(text(2), budget=BUDGET).steps == 4
    config = ModelConfig(400, 32, 2, 4, 2, 48, 128)
    arrays = {name: np.ones(shape, np.float32) for name, shape in modeldir.expected_shapes(config).items()}
    with pytest.raises(InputError, match="no row is a multiple of 64 long"):
        write_quantised(tmp_path / "none", config, arrays.items(), {}, {}, {}, Packing(4))
    assert not (tmp_path / "none").exists()


def test_tensors_that_do_not_fit_are_not_written(tmp_path: Path) -> None:
    config, arrays = parts()
    name = "model.layers.0.self_attn.q_proj.weight"
    for wrong, message in (
        ({**arrays, name: arrays[name][:3]}, f"wrong shape: {name}"),
        ({n: a for n, a in arrays.items() if n != name}, f"missing: {name}"),
        ({**arrays, "x.weight": arrays[name]}, r"unknown: x\.weight"),
        ({**arrays, name: arrays[name] * np.nan}, "not all values are finite"),
    ):
        with pytest.raises(DamagedFileError, match=message):
            write_quantised(tmp_path / "out", config, wrong.items(), {}, {}, {}, Packing(4))
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"quantization": {"bits": 7, "group_size": 64}}, DamagedFileError, "7 bits in groups of 64; there are"),
        ({"quantization": {"bits": 4, "group_size": 2**40}}, DamagedFileError, "groups of 1099511627776"),
        ({"quantization": {"bits": 8, "group_size": 64}}, DamagedFileError, "wrong shape: model.embed_tokens.weight"),
        ({"quantization": {"bits": 4, "group_size": 32}}, DamagedFileError, r"embed_tokens.scales is \[400, 1\]"),
        ({"quantization": "yes"}, DamagedFileError, "quantization is no object"),
        ({"quantization": {"bits": 4, "group_size": 64, "mode": "nvfp4"}}, InputError, "mode 'nvfp4'; only affine"),
        ({"quantization": None, "quantization_config": {"quant_method": "gptq"}}, InputError, "quantised by 'gptq'"),
        ({"quantization": None, "quantization_config": None}, DamagedFileError, "dtype 'U32'; only F32, F16, BF16"),
    ],
)
def test_settings_that_the_files_do_not_bear_out(
    tmp_path: Path, changes: dict, error: type[Exception], message: str
) -> None:
    base = written(tmp_path)
    (base / "minimac.json").unlink()
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(error, match=message):
        open_model(base)


def test_files_that_the_settings_do_not_bear_out(tmp_path: Path) -> None:
    base = written(tmp_path)
    (base / "minimac.json").unlink()
    arrays = dict(mx.load(str(base / "model.safetensors")))
    name = "model.layers.0.self_attn.q_proj"
    for wrong, message in (
        ({n: a for n, a in arrays.items() if n != f"{name}.biases"}, rf"missing: {name}\.biases"),
        ({n: a for n, a in arrays.items() if n != f"{name}.scales"}, rf"unknown: {name}\.biases"),
        (
            {**arrays, f"{name}.weight": arrays[f"{name}.weight"].astype(mx.float32)},
            "is stored as float32, not as uint32",
        ),
        (
            {**arrays, f"{name}.scales": arrays[f"{name}.scales"].astype(mx.uint32)},
            "stored as uint32, not as float32 or",
        ),
        ({**arrays, f"{name}.scales": arrays[f"{name}.scales"] * mx.inf}, "not all values are finite"),
    ):
        mx.eval(wrong)
        mx.save_safetensors(str(base / "model.safetensors"), wrong)
        with pytest.raises(DamagedFileError, match=message):
            open_model(base)


def test_stacked_experts_are_fused_and_their_scales_must_fit(tmp_path: Path) -> None:
    """A mixture keeps the matrices of all experts in one tensor, packed along the last axis."""
    from mlx_lm.utils import load_model

    base = foreign(tmp_path, "qwen3_moe", moe_intermediate_size=64)
    assert mx.load(str(base / "model.safetensors"))["model.layers.0.mlp.switch_mlp.up_proj.weight"].ndim == 3
    learner = opened(base, learning_rate=0.02)
    learner.learn_from_text(text(2), budget=BUDGET)
    expected = learner.model(some_tokens())
    fuse(learner.store, "main", base, tmp_path / "fused")
    assert_close("fused", load_model(tmp_path / "fused")[0](some_tokens()), expected, atol=1e-4)
    fuse(learner.store, "main", base, tmp_path / "again", requantise=True)
    assert layout(tmp_path / "again") == layout(base)

    quantization = read_quantization(json.loads((base / "config.json").read_text()), "config.json")
    arrays = dict(mx.load(str(base / "model.safetensors")))
    name = "model.layers.0.mlp.switch_mlp.up_proj"
    for wrong in (
        {**arrays, f"{name}.scales": arrays[f"{name}.scales"][0]},
        {n: a for n, a in arrays.items() if n != f"{name}.biases"},
        {**arrays, f"{name}.weight": arrays[f"{name}.weight"].reshape(-1)},
    ):
        mx.eval(wrong)
        mx.save_safetensors(str(base / "model.safetensors"), wrong)
        infos = modeldir.validate_safetensors(base / "model.safetensors", integers=True)
        with pytest.raises(DamagedFileError, match=rf"{name}\.weight \[.*\] of 4 bits in groups of 64 has scales"):
            modeldir.dense_infos(infos, quantization)


def test_layers_may_be_packed_each_in_its_own_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As mlx-lm's mixed recipes write them: more bits for some layers, named in config.json."""
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    config, arrays = parts()
    modeldir.write_model_directory(tmp_path / "dense", config, arrays, {}, {}, {})
    mixed = lambda path, module: {"bits": 8 if "down_proj" in path else 4, "group_size": 32}  # noqa: E731
    network, described = quantize_model(*load_model(tmp_path / "dense"), 64, 4, quant_predicate=mixed)
    save_model(tmp_path / "mixed", network)
    save_config(described, tmp_path / "mixed" / "config.json")
    for way in ("keep", "unpack"):
        monkeypatch.setenv(PACKED, way)
        model = ContinualLLM.from_checkpoint(tmp_path / "mixed")
        assert_close(way, model(some_tokens()), network(some_tokens()), atol=1e-4)
