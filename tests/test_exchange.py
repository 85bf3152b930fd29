"""Adapters to and from mlx-lm, PEFT, GGUF and the original: to the bit, as others read them, and files that lie."""

import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import lessons
import mlx.core as mx
import numpy as np
import pytest
import tiny_models
import torch
from safetensors.numpy import load_file, save_file
from terminal import isolate, run, tree

import cli
from convert.adapter import Adapter, to_gguf, to_peft
from mlx_impl import exchange, modeldir
from mlx_impl.config import Budget, ModelConfig
from mlx_impl.errors import DamagedFileError, InputError
from mlx_impl.learner import ContinualLearner
from mlx_impl.store import Store, open_store

FORMATS = exchange.FORMATS
RANK, SCALE = 3, 1.7  # 3 * 1.7 is no whole number, nor is 1.7 a float32


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lessons.tiny_base(tmp_path_factory.mktemp("base"), lessons.tiny_tokenizer())


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isolate(monkeypatch, tmp_path / "home")


@pytest.fixture
def store(base: Path, tmp_path: Path) -> Store:
    return open_store(base, tmp_path / "store")


def shapes(base: Path) -> dict[str, tuple[int, ...]]:
    return modeldir.expected_shapes(ModelConfig.from_hf(json.loads((base / "config.json").read_text())))


def linears(base: Path) -> dict[str, tuple[int, ...]]:
    inside = [(name, shape) for name, shape in shapes(base).items() if name.endswith("_proj.weight")]
    return {name.removesuffix(".weight"): shape for name, shape in inside}


def adapter(base: Path, seed: int = 0) -> dict[str, np.ndarray]:
    """Random halves for every linear layer, lora_b too."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for path, (out, width) in sorted(linears(base).items()):
        arrays[f"{path}.lora_a"] = rng.standard_normal((width, RANK), np.float32) / 4
        arrays[f"{path}.lora_b"] = rng.standard_normal((RANK, out), np.float32) / 4
    return arrays


def mlx_lm_folder(folder: Path, arrays: dict[str, np.ndarray], **changes: Any) -> Path:
    folder.mkdir(parents=True)
    save_file(arrays, folder / "adapters.safetensors")
    keys = ["self_attn.q_proj", "mlp.up_proj"]
    parameters = {"rank": RANK, "scale": SCALE, "dropout": 0.0, "keys": keys, **changes}
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def peft_folder(folder: Path, base: Path, **changes: Any) -> Path:
    """As PEFT writes it, by a loop of its own."""
    folder.mkdir(parents=True)
    tensors = {}
    for name, array in adapter(base).items():
        path, _, half = name.rpartition(".")
        tensors[f"base_model.model.{path}.lora_{half[-1].upper()}.weight"] = np.ascontiguousarray(array.T)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    return folder


def committed(store: Store, domain: str) -> tuple[dict[str, np.ndarray], float]:
    folder = store.files_of(store.require(domain))
    config = json.loads((folder / "adapter_config.json").read_text())
    return load_file(folder / "adapters.safetensors"), config["lora_parameters"]["scale"]


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array, err_msg=name)


# -- round trips -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", FORMATS)
def test_out_and_in_again_is_the_same_to_the_bit(base: Path, store: Store, tmp_path: Path, to: str) -> None:
    arrays = adapter(base)
    first = exchange.import_adapter(store, "first", base, mlx_lm_folder(tmp_path / "given", arrays))
    assert (first.name, first.source, first.figures["imported"]) == ("v0001", "given", "mlx-lm")
    (tmp_path / "out").mkdir()  # an empty folder will do
    record = exchange.export_adapter(store, "first", base, tmp_path / "out", to)
    assert sorted(record["files"]) == sorted(path.name for path in (tmp_path / "out").iterdir())
    exchange.import_adapter(store, "second", base, tmp_path / "out")
    found, scale = committed(store, "second")
    assert_same(found, arrays)
    if to == "gguf":  # its alpha is a float32, which does not reach every scale
        assert abs(scale - SCALE) <= np.spacing(np.float32(SCALE))
    else:
        assert np.float32(scale) == np.float32(SCALE)
    again = exchange.export_adapter(store, "second", base, tmp_path / "again", to)
    assert again["files"] == record["files"]
    if to in ("mlx-lm", "peft"):  # the others have a name in them
        assert tree(tmp_path / "again") == tree(tmp_path / "out")


@pytest.mark.parametrize("rank", [1, 3, 7, 14, 16, 60])
def test_scales_survive(base: Path, rank: int) -> None:
    """PEFT's division gives the scale back to the bit; a float32 alpha in GGUF too, where it came from one."""
    rng = np.random.default_rng(rank)
    for alpha in [2.0 * rank, 16.0, 1.0, *rng.uniform(0.1, 100, 50).astype(np.float32).tolist()]:
        arrays = {"model.layers.0.mlp.up_proj.lora_a": np.ones((4, rank), np.float32)}
        arrays["model.layers.0.mlp.up_proj.lora_b"] = np.ones((rank, 4), np.float32)
        given = Adapter(arrays, alpha / rank)
        config = to_peft(given, "base", {"model.layers.0.mlp.up_proj.weight": (4, 4)})[1]
        assert np.float32(config["lora_alpha"] / rank) == np.float32(alpha / rank)
        stored = np.float32(to_gguf(given, (2, 1))[1])
        assert stored / np.float32(rank) == np.float32(alpha) / np.float32(rank)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 2.0), (True, 6 / 3**0.5)])
def test_peft_in_and_out(base: Path, store: Store, tmp_path: Path, rslora: bool, scale: float) -> None:
    source = peft_folder(tmp_path / "theirs", base, use_rslora=rslora)
    exchange.import_adapter(store, "theirs", base, source)
    found, kept = committed(store, "theirs")
    assert_same(found, adapter(base))
    assert kept == scale
    exchange.export_adapter(store, "theirs", base, tmp_path / "ours", "peft")
    assert_same(
        load_file(tmp_path / "ours" / "adapter_model.safetensors"), load_file(source / "adapter_model.safetensors")
    )
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert np.float32(config["lora_alpha"] / config["r"]) == np.float32(scale)
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


def test_half_precision_and_differing_ranks_and_scales(base: Path, store: Store, tmp_path: Path) -> None:
    q, up = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
    rng = np.random.default_rng(5)
    shape = linears(base)
    halves = {
        path: (rng.standard_normal((rank, shape[path][1])), rng.standard_normal((shape[path][0], rank)))
        for path, rank in ((q, 2), (up, 4))
    }
    source = tmp_path / "theirs"
    source.mkdir()
    tensors = {}
    for path, (a, b) in halves.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = a.astype(np.float16)
        tensors[f"base_model.model.{path}.lora_B.weight"] = b.astype(np.float16)
    save_file(tensors, source / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "rank_pattern": {"up_proj": 4}}
    (source / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": {f"^{up}": 12}}))
    exchange.import_adapter(store, "mixed", base, source)
    found, scale = committed(store, "mixed")
    for path, (a, b), theirs in ((q, halves[q], 1.5), (up, halves[up], 3.0)):
        assert found[f"{path}.lora_a"].shape[1] == 4
        product = scale * found[f"{path}.lora_a"] @ found[f"{path}.lora_b"]
        expected = theirs * (b.astype(np.float16).astype(np.float32) @ a.astype(np.float16).astype(np.float32)).T
        np.testing.assert_allclose(product, expected, rtol=1e-5, atol=1e-5)
    exchange.export_adapter(store, "mixed", base, tmp_path / "ours", "peft")
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["target_modules"] == [q, up]  # whole paths, or PEFT would adapt the other layers too


# -- as others read them -----------------------------------------------------------------------------------------

TOKENS = np.arange(40).reshape(2, 20) * 7 % 300


def our_logits(base: Path, store: Store, domain: str) -> np.ndarray:
    learner = ContinualLearner.from_checkpoint(base, lessons.SETTINGS, store.folder)
    learner.set_adapter(domain)
    return np.array(learner.model(mx.array(TOKENS)))


def test_mlx_lm_computes_our_logits(base: Path, store: Store, tmp_path: Path) -> None:
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    exchange.import_adapter(store, "theirs", base, peft_folder(tmp_path / "theirs", base))
    exchange.export_adapter(store, "theirs", base, tmp_path / "out", "mlx-lm")
    model, _ = load_model(base)
    bare = np.array(model(mx.array(TOKENS)))
    model = load_adapters(model, str(tmp_path / "out"))
    model.eval()
    ours = our_logits(base, store, "theirs")
    assert np.abs(bare - ours).max() > 0.1
    np.testing.assert_allclose(np.array(model(mx.array(TOKENS))), ours, atol=1e-4)


@pytest.mark.parametrize("pattern", [False, True])
def test_peft_computes_our_logits(base: Path, store: Store, tmp_path: Path, pattern: bool) -> None:
    """PEFT makes an adapter, we take it in; we write it out again, PEFT reads it: three times the same logits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # under this transformers
        peft = pytest.importorskip("peft")
        from transformers import LlamaForCausalLM

        torch.manual_seed(0)
        options = {"r": 4, "lora_alpha": 7, "use_rslora": True, "target_modules": ["q_proj", "up_proj", "down_proj"]}
        if pattern:
            options |= {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 5}}
        config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options)
        model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(base, dtype=torch.float32), config)
        model.save_pretrained(tmp_path / "theirs")
        with torch.no_grad():
            theirs = model.eval()(torch.tensor(TOKENS)).logits.numpy()
        exchange.import_adapter(store, "theirs", base, tmp_path / "theirs")
        exchange.export_adapter(store, "theirs", base, tmp_path / "ours", "peft")
        fresh = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
        again = peft.PeftModel.from_pretrained(fresh, tmp_path / "ours")
        with torch.no_grad():
            back = again.eval()(torch.tensor(TOKENS)).logits.numpy()
    ours = our_logits(base, store, "theirs")
    assert np.abs(ours).max() > 1
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    np.testing.assert_allclose(back, theirs, atol=1e-4)


def test_what_was_learned_here_is_the_same_in_peft_and_mlx_lm(base: Path, tmp_path: Path) -> None:
    """Logits within 1e-4, greedy text by mlx-lm's own command for it; the bare base would write something else."""
    from mlx_lm import generate, load

    learner = lessons.opened(base, tmp_path / "store")
    learner.learn_from_text(lessons.text(0), budget=Budget(steps=12))
    learner.set_adapter("main")
    ours = np.array(learner.model(mx.array(TOKENS)))
    prompts = [lessons.text(number, 40) for number in range(1, 7)]
    written = [learner.generate(prompt, max_length=16) for prompt in prompts]
    for to in ("peft", "mlx-lm"):
        exchange.export_adapter(learner.store, "main", base, tmp_path / to, to)
    model, tokenizer = load(str(base), adapter_path=str(tmp_path / "mlx-lm"))
    np.testing.assert_allclose(np.array(model(mx.array(TOKENS))), ours, atol=1e-4)
    assert [generate(model, tokenizer, prompt, max_tokens=16) for prompt in prompts] == written
    learner.set_adapter(None)
    assert [learner.generate(prompt, max_length=16) for prompt in prompts] != written
    assert np.abs(np.array(learner.model(mx.array(TOKENS))) - ours).max() > 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # under this transformers
        peft = pytest.importorskip("peft")
        from transformers import LlamaForCausalLM

        bare = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
        theirs = peft.PeftModel.from_pretrained(bare, tmp_path / "peft").eval()
        with torch.no_grad():
            np.testing.assert_allclose(theirs(torch.tensor(TOKENS)).logits.numpy(), ours, atol=1e-4)


def test_gguf_is_what_llama_cpp_asks_for(base: Path, store: Store, tmp_path: Path) -> None:
    arrays = adapter(base)
    exchange.import_adapter(store, "first", base, mlx_lm_folder(tmp_path / "given", arrays, scale=2.0))
    exchange.export_adapter(store, "first", base, tmp_path / "out", "gguf")
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    assert [reader.fields[key].contents() for key in ("general.type", "adapter.type", "general.architecture")] == [
        "adapter",
        "lora",
        "llama",
    ]
    alpha = reader.fields["adapter.lora.alpha"]
    assert (alpha.types, alpha.contents()) == ([gguf.GGUFValueType.FLOAT32], 2.0 * RANK)
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    assert len(tensors) == len(arrays)
    for path, short, heads in (
        ("model.layers.1.self_attn.q_proj", "blk.1.attn_q", 4),
        ("model.layers.1.self_attn.k_proj", "blk.1.attn_k", 2),
        ("model.layers.0.self_attn.v_proj", "blk.0.attn_v", None),
        ("model.layers.0.mlp.down_proj", "blk.0.ffn_down", None),
    ):
        b = arrays[f"{path}.lora_b"].T
        np.testing.assert_array_equal(tensors[f"{short}.weight.lora_a"], arrays[f"{path}.lora_a"].T)
        np.testing.assert_array_equal(tensors[f"{short}.weight.lora_b"], tiny_models.permuted(b, heads) if heads else b)
    assert "ADAPTER ./adapter.gguf" in (tmp_path / "out" / "Modelfile").read_text()


def test_the_original_gets_its_own_names(base: Path, store: Store, tmp_path: Path) -> None:
    arrays = adapter(base)
    exchange.import_adapter(store, "first", base, mlx_lm_folder(tmp_path / "given", arrays))
    exchange.export_adapter(store, "first", base, tmp_path / "out", "original")
    value = torch.load(tmp_path / "out" / "adapter.pt", weights_only=True)
    assert value["adapter_name"] == "first"
    assert value["lora_config"]["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj", "w1", "w2", "w3"]
    assert value["lora_config"]["alpha"] / value["lora_config"]["r"] == SCALE
    for theirs, path in (
        ("layers.1.attention.q_proj", "model.layers.1.self_attn.q_proj"),
        ("layers.0.feed_forward.w1", "model.layers.0.mlp.gate_proj"),
        ("layers.0.feed_forward.w2", "model.layers.0.mlp.down_proj"),
        ("layers.0.feed_forward.w3", "model.layers.0.mlp.up_proj"),
    ):
        np.testing.assert_array_equal(value["state_dict"][f"{theirs}.lora_A"].numpy(), arrays[f"{path}.lora_a"].T)
        np.testing.assert_array_equal(value["state_dict"][f"{theirs}.lora_B"].numpy(), arrays[f"{path}.lora_b"].T)


def test_the_original_projects_own_files(tmp_path: Path) -> None:
    """Its model, adapter and logits: the adapter taken in gives its logits. CONTRIBUTING says where the files go."""
    seed = Path(os.environ.get("MINIMAC_SEED_CHECKPOINT", ""))
    if not (seed / "expected.npz").is_file():
        pytest.skip("MINIMAC_SEED_CHECKPOINT names no folder of the original's files")
    saved = torch.load(seed / "model.pt", weights_only=True)
    c = saved["config"]
    config = ModelConfig(600, 64, 2, 4, 2, 160, 128, norm_eps=c["norm_eps"], rope_base=c["rope_base"])
    from convert.names import rename

    names = rename(saved["model_state_dict"], "original", "hf", "model.pt")
    wanted = modeldir.expected_shapes(config)
    arrays = {names[k]: v.numpy() for k, v in saved["model_state_dict"].items() if names[k] in wanted}
    lessons.tiny_tokenizer().save(tmp_path / "tok")
    contents = {path.name: path.read_bytes() for path in (tmp_path / "tok").iterdir()}
    base = modeldir.write_model_directory(tmp_path / "model", config, arrays, contents, {}, {})
    store = open_store(base)
    exchange.import_adapter(store, "medical", base, seed / "adapter.pt")
    learner = ContinualLearner.from_checkpoint(base)
    expected = np.load(seed / "expected.npz")
    tokens = mx.array(expected["input_ids"])
    np.testing.assert_allclose(np.array(learner.model(tokens)), expected["logits"], atol=1e-5)
    learner.set_adapter("medical")
    np.testing.assert_allclose(np.array(learner.model(tokens)), expected["logits_with_adapter"], atol=1e-5)


# -- the domain that comes of it ---------------------------------------------------------------------------------


def test_an_imported_domain_is_used_taught_and_undone(base: Path, tmp_path: Path) -> None:
    source = peft_folder(tmp_path / "theirs", base)
    options = ("-m", base, "--store", tmp_path / "store")
    done = run("import", "medical", source, *options)
    assert done.code == 0
    assert done.out == "medical v0001: imported theirs from peft, 2,784 parameters, rank 3, scale 2\n"
    assert done.err == "which base it was made for cannot be known from its files; its shapes fit this one\n"
    assert "imported from peft  theirs" in run("list", *options).out
    assert run("generate", "The key", "--domain", "auto", "--max-tokens", "2", *options).code == 0
    named = run("generate", "The key", "--domain", "medical", "--max-tokens", "2", "--json", *options)
    assert json.loads(named.out)["domain"] == "medical"
    taught = run("learn", "--text", lessons.text(0), "--domain", "medical", "--steps", "2", "--json", *options)
    record = json.loads(taught.out)
    assert (record["version"], record["replayed_tokens"]) == ("v0002", 0)
    assert "imported from peft  theirs" in run("log", "medical", *options).out
    assert run("verify", *options).code == 0
    assert run("undo", "medical", *options).out == "undone v0002; medical is at v0001\n"
    again = run("import", "medical", source, *options)
    assert (again.code, again.out) == (2, "")
    assert "medical has lessons already; import under another name" in again.err


def test_export_refuses_what_is_there(base: Path, tmp_path: Path) -> None:
    options = ("-m", base, "--store", tmp_path / "store")
    run("import", "medical", peft_folder(tmp_path / "theirs", base), *options)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    for out in (tmp_path / "full", tmp_path / "full" / "x"):
        done = run("export", "medical", out, "--to", "peft", *options)
        assert (done.code, done.out) == (2, "")
        assert "exists already" in done.err
    assert tree(tmp_path / "full") == {"x": b"mine"}
    assert run("export", "legal", tmp_path / "out", "--to", "peft", *options).code == 2
    done = run("export", "medical", tmp_path / "out", "--to", "gguf", "--json", *options)
    assert json.loads(done.out)["files"] == ["Modelfile", "adapter.gguf"]
    adapters = tmp_path / "store" / "medical" / "v0001" / "adapters.safetensors"
    adapters.write_bytes(adapters.read_bytes()[:-1] + b"\x01")
    assert run("export", "medical", tmp_path / "other", "--to", "peft", *options).code == 3
    assert not (tmp_path / "other").exists()


def test_export_does_not_replace_the_current_folder_nor_a_link(
    base: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange.import_adapter(store, "medical", base, peft_folder(tmp_path / "theirs", base))
    place = tmp_path / "place"
    (place / "empty").mkdir(parents=True)
    (place / "link").symlink_to("empty")
    monkeypatch.chdir(place / "empty")
    for out in (Path(), place / "empty", place / "link"):
        with pytest.raises(InputError, match="is the current folder"):
            exchange.export_adapter(store, "medical", base, out, "peft")
    monkeypatch.chdir(tmp_path)
    exchange.export_adapter(store, "medical", base, place / "link", "peft")
    assert sorted(path.name for path in place.iterdir()) == ["empty", "link"]
    assert (place / "empty" / "adapter_config.json").is_file()
    assert (place / "link").is_symlink()


# -- files that lie ----------------------------------------------------------------------------------------------


def rewritten(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    path = next(folder.glob("*.safetensors"))
    arrays = load_file(path)
    change(arrays)
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)


def changed_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | changes))


def cut(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])


def huge_header(folder: Path) -> None:
    next(folder.glob("*.safetensors")).write_bytes((2**62).to_bytes(8, "little") + b"{}")


def shaped(folder: Path, shape: list[int], size: int) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(size)
    next(folder.glob("*.safetensors")).write_bytes(content)


Q = "base_model.model.model.layers.0.self_attn.q_proj"
K = "base_model.model.model.layers.1.self_attn.k_proj"


def two_wrong(arrays: dict[str, np.ndarray]) -> None:
    del arrays[f"{K}.lora_A.weight"]
    arrays[f"{Q}.lora_B.weight"] = np.ones((31, RANK), np.float32)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, ["cut off"]),
        (huge_header, ["header of 4,611,686,018,427,387,904 bytes"]),
        (lambda f: shaped(f, [1] * 100, 4), ["tensor x: shape [1, 1, ", "make no sense"]),
        (lambda f: shaped(f, [0, 2**62, 2**62], 0), ["tensor x: shape [0, 46", "make no sense"]),
        (
            lambda f: rewritten(f, lambda t: t.update({f"{Q[17:]}.lora_A.weight": t[f"{Q}.lora_A.weight"]})),
            ["there under another name too: "],
        ),
        (
            lambda f: changed_config(f, lora_alpha=1e-30, alpha_pattern={"up_proj": 1e30}),
            ["mlp.up_proj.lora_b", "not finite"],
        ),
        (lambda f: rewritten(f, two_wrong), ["self_attn.q_proj: [32, 3] and [3, 31]", "k_proj lacks its first half"]),
        (lambda f: rewritten(f, lambda t: t[f"{Q}.lora_A.weight"].fill(np.nan)), ["q_proj: 96 values are not finite"]),
        (lambda f: rewritten(f, lambda t: t.update({"x.weight": np.ones(2, np.float32)})), ["x.weight"]),
        (lambda f: rewritten(f, lambda t: t.clear()), ["it holds no tensors"]),
        (lambda f: changed_config(f, r=4), ["r is 4", "tensors have rank 3"]),
        (lambda f: changed_config(f, r=True), ["r is True"]),
        (lambda f: changed_config(f, lora_alpha="inf"), ["lora_alpha is 'inf', a number was expected"]),
        (lambda f: changed_config(f, lora_alpha=float("inf")), ["lora_alpha is inf"]),
        (lambda f: changed_config(f, lora_alpha=10**400), ["lora_alpha is 1000"]),
        (lambda f: changed_config(f, lora_alpha=None), ["lora_alpha is None"]),
        (lambda f: changed_config(f, rank_pattern=[3]), ["rank_pattern is a list"]),
        (lambda f: (f / "adapter_config.json").write_text("{"), ["not valid JSON"]),
    ],
)
def test_a_damaged_peft_folder_is_one_clear_error(
    base: Path, tmp_path: Path, damage: Callable[[Path], Any], words: list[str]
) -> None:
    source = peft_folder(tmp_path / "theirs", base)
    damage(source)
    done = run("import", "medical", source, "-m", base, "--store", tmp_path / "store")
    assert (done.code, done.out) == (3, "")
    assert done.err.count("\n") == 1
    for word in words:
        assert word in done.err
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_dora": True}, "use_dora (DoRA rescales"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"bias": "all", "modules_to_save": ["lm_head"]}, "modules_to_save (it replaces whole modules); bias"),
        ({"init_lora_weights": "pissa_niter_4"}, "the base's own weights were changed"),
        ({"rank_pattern": {"(a+)+b": 3}}, "regular expressions is not supported"),
        ({"auto_map": {"x": "y.py"}}, "it names code to be run"),
    ],
)
def test_what_is_more_than_lora_is_refused_with_the_reason(
    base: Path, store: Store, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError) as refused:
        exchange.import_adapter(store, "medical", base, peft_folder(tmp_path / "theirs", base, **change))
    assert words in str(refused.value)


@pytest.mark.parametrize("scale", ["inf", float("nan"), None, True, 10**50])
def test_a_scale_that_is_no_number(base: Path, store: Store, tmp_path: Path, scale: Any) -> None:
    source = mlx_lm_folder(tmp_path / "given", adapter(base), scale=scale)
    with pytest.raises(DamagedFileError, match="scale is"):
        exchange.import_adapter(store, "medical", base, source)


def test_a_rank_beyond_sense_is_refused_before_anything_is_padded(base: Path, store: Store, tmp_path: Path) -> None:
    arrays = adapter(base)
    path = "model.layers.0.self_attn.q_proj"
    arrays[f"{path}.lora_a"], arrays[f"{path}.lora_b"] = np.ones((32, 500), "f4"), np.ones((500, 32), "f4")
    with pytest.raises(DamagedFileError, match="rank 500, 1 to 32 make sense"):
        exchange.import_adapter(store, "medical", base, mlx_lm_folder(tmp_path / "given", arrays))


def test_the_command_offers_the_formats_that_there_are(base: Path, store: Store, tmp_path: Path) -> None:
    (to,) = (option for option in cli.cli.commands["export"].params if option.name == "to")
    assert tuple(to.type.choices) == FORMATS
    with pytest.raises(InputError, match="'zip' is no format"):
        exchange.export_adapter(store, "medical", base, tmp_path / "out", "zip")


def test_what_is_no_adapter(base: Path, store: Store, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source, words in ((tmp_path / "empty", "no adapter that is known"), (tmp_path / "missing", "no such file")):
        with pytest.raises(InputError, match=words):
            exchange.import_adapter(store, "medical", base, source)
    torch.save({"model_state_dict": {}}, tmp_path / "model.pt")
    with pytest.raises(DamagedFileError, match="has a state_dict and a lora_config"):
        exchange.import_adapter(store, "medical", base, tmp_path / "model.pt")
    writer = gguf.GGUFWriter(tmp_path / "array.gguf", "llama")
    writer.add_array("general.type", [1, 2])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="no LoRA adapter for a Llama model"):
        exchange.import_adapter(store, "medical", base, tmp_path / "array.gguf")
    whole = tiny_models.write_gguf(tmp_path / "model.gguf")
    with pytest.raises(InputError, match="no LoRA adapter for a Llama model"):
        exchange.import_adapter(store, "medical", base, whole)
    with pytest.raises(InputError, match="cannot name a domain"):
        exchange.import_adapter(store, "none", base, tmp_path / "model.pt")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("evil"),))


def test_a_pt_file_runs_no_code_and_claims_no_more_than_it_holds(
    base: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lora = {"r": 3, "alpha": 6.0}
    name = "layers.0.attention.q_proj.lora_A"
    itself: list[Any] = []
    itself.append(itself)
    once = torch.zeros(100, 100)
    for value, words in (
        ({"lora_config": {"r": 3, "alpha": itself}, "state_dict": {}}, "alpha is a list"),
        ({"lora_config": lora, "state_dict": {name: torch.zeros(3, 32, device="meta")}}, "without values"),
        ({"lora_config": lora, "state_dict": {f"{name}{n}": once for n in range(9)}}, "claims more than"),
        (Evil(), "not read as a .pt file of tensors"),
        ({"lora_config": lora, "state_dict": {name: torch.zeros(1).expand(10**6, 10**6)}}, "claims more than"),
        ({"lora_config": lora, "state_dict": {name: "x"}}, "not a tensor"),
        ({"lora_config": lora, "state_dict": {name: torch.zeros(3, 32)}}, "lacks its second half"),
        ({"lora_config": lora, "state_dict": {"nonsense.lora_A": torch.zeros(3, 32)}}, "unknown tensors"),
        ({"lora_config": {"r": 0, "alpha": 6.0}, "state_dict": {}}, "r is 0"),
        ({"lora_config": {"r": 3, "alpha": 10**600}, "state_dict": {}}, r"alpha is 1000\d+\.\.\."),
        ({"lora_config": lora, "state_dict": {"a\n\x1b[2J": torch.zeros(3)}}, "unknown tensors .*: a\ufffd\ufffd"),
        (bytearray(2), "makes a __builtin__ bytearray"),
    ):
        torch.save(value, tmp_path / "adapter.pt")
        with pytest.raises(DamagedFileError, match=words):
            exchange.import_adapter(store, "medical", base, tmp_path / "adapter.pt")
    assert not Path("evil").exists()
    endless: tuple[Any, ...] = ()
    for _ in range(60):  # as a key, its hash takes as many steps as 2**60
        endless = (endless, endless)
    key = pickle.dumps(endless, 2)[2:-1]
    for pickled, words in (
        (b"\x80\x02}" + key + b"K\x01s.", "a tuple of 1,"),
        (b"\x80\x02}(" + key + b"\x85K\x01u.", "a tuple of 1,"),
        (b"\x80\x02t.", r"no \.pt file"),
    ):
        with zipfile.ZipFile(tmp_path / "adapter.pt", "w") as archive:
            archive.writestr("adapter/data.pkl", pickled)
        with pytest.raises(DamagedFileError, match=words):
            exchange.import_adapter(store, "medical", base, tmp_path / "adapter.pt")
    torch.save(lora, tmp_path / "adapter.pt")
    content = bytearray((tmp_path / "adapter.pt").read_bytes())
    content[content.find(b"PK\x01\x02") + 6] = 99  # the version of zip that is needed
    for damaged in (bytes(content), b"PK nothing"):
        (tmp_path / "adapter.pt").write_bytes(damaged)
        with pytest.raises(DamagedFileError, match=r"no \.pt file"):
            exchange.import_adapter(store, "medical", base, tmp_path / "adapter.pt")
