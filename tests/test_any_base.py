"""Bases of other architectures: everything that is done with a Llama is done with each of a dozen, by the same code.

The models are mlx-lm's own classes with random weights. What is learned on them is also given back to mlx-lm, which has
to compute the same logits with it.
"""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from comparing import assert_close
from foreign_models import base_arrays, write_foreign
from lessons import SETTINGS, text, tiny_base, tiny_tokenizer
from terminal import isolate, run, tree

from mlx_impl import foreigndir, lora
from mlx_impl.adapters import read_adapter, read_fisher
from mlx_impl.arrays import flatten
from mlx_impl.base import linear_paths
from mlx_impl.config import LORA_TARGETS, Budget
from mlx_impl.errors import DamagedFileError, InputError
from mlx_impl.exchange import export_adapter, import_adapter
from mlx_impl.foreign import TESTED, ForeignLLM, open_model
from mlx_impl.fusing import fuse
from mlx_impl.generate import Sampling, complete, decode, naive
from mlx_impl.learner import ContinualLearner
from mlx_impl.lesson import Lesson
from mlx_impl.loss import cross_entropy, next_token_loss
from mlx_impl.model import ContinualLLM
from mlx_impl.readers import text_document
from mlx_impl.store import open_store
from mlx_impl.tokenizer import Tokenizer

BUDGET = Budget(steps=4)
WHOLE = {"gemma2", "cohere"}
"""Their logits are capped or scaled, and so more than a matrix product."""


@cache
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


def opened(base: Path, **changes: object) -> ContinualLearner:
    return ContinualLearner.from_checkpoint(base, dataclasses.replace(SETTINGS, **changes), base / "learner")


class Taught(NamedTuple):
    """A model that had two lessons in one domain, and what it said in between."""

    kind: str
    base: Path
    learner: ContinualLearner
    lessons: list[Lesson]
    first_logits: np.ndarray

    @property
    def tokens(self) -> mx.array:
        return mx.array([tokenizer().encode(text(2))[:40]])


@pytest.fixture(scope="module", params=TESTED)
def taught(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Taught]:
    base = write_foreign(tmp_path_factory.mktemp(request.param) / "base", request.param, tokenizer())
    learner = opened(base)
    first = learner.learn_from_text(text(2), budget=BUDGET)
    result = Taught(request.param, base, learner, [first], np.zeros(0))
    logits = np.array(learner.model(result.tokens))
    second = learner.learn_from_text(text(3), budget=BUDGET)
    yield result._replace(lessons=[first, second], first_logits=logits)
    shutil.rmtree(base)


def test_two_lessons_are_learned_with_replay_and_ewc(taught: Taught) -> None:
    learner, (first, second) = taught.learner, taught.lessons
    assert isinstance(learner.model, ForeignLLM)
    assert first.after < first.before
    assert second.after < second.before
    assert (first.replayed_tokens, second.replayed_tokens > 0) == (0, True)
    folder = learner.store.files_of(learner.store.require("main"))
    fisher = read_fisher(folder, read_adapter(folder)[0])
    assert fisher is not None
    assert max(array.max().item() for array in fisher.values()) > 0


def test_the_base_stays_as_it_is_to_the_bit(taught: Taught) -> None:
    fresh = base_arrays(open_model(taught.base))
    ours = base_arrays(taught.learner.model)
    assert fresh.keys() == ours.keys()
    assert all(mx.array_equal(fresh[name], ours[name]).item() for name in fresh)
    adapted = {path for path, _ in lora.lora_layers(taught.learner.model)}
    assert adapted == set(linear_paths(open_model(taught.base), LORA_TARGETS))


class Watched:
    """Stands for a layer and notes that it was gone through."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.calls = layer, 0

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        self.calls += 1
        return self.layer(*inputs, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)


def test_the_layers_are_those_that_the_network_goes_through(taught: Taught) -> None:
    layers: Any = taught.learner.model.layers
    expected, last = np.array(taught.learner.model(taught.tokens)), layers[-1]
    layers[-1] = watched = Watched(last)
    try:
        assert np.array_equal(np.array(taught.learner.model(taught.tokens)), expected)
    finally:
        layers[-1] = last
    assert watched.calls == 1


def test_cached_logits_are_those_of_the_whole_text(taught: Taught) -> None:
    model, tokens = taught.learner.model, taught.tokens
    cache = model.make_cache()
    parts = [model(tokens[:, :21], cache), *(model(tokens[:, at : at + 1], cache) for at in range(21, 40))]
    assert_close(taught.kind, mx.concatenate(parts, axis=1), model(tokens), atol=1e-5)
    assert_close("head of hidden", model.head(model.hidden(tokens)), model(tokens), atol=1e-5)


def test_it_generates_and_measures_under_what_it_learned(taught: Taught) -> None:
    learner, prompt = taught.learner, tokenizer().encode("The value of")
    sampling = Sampling(temperature=1.0, seed=3)
    expected = list(naive(learner.model, prompt, 8, sampling, tokenizer().vocab_size))
    assert list(decode(learner.model, prompt, 8, sampling, tokenizer().vocab_size)) == expected
    assert isinstance(learner.generate("The value of", 4), str)
    documents = [text_document(text(2)[:600], "first")]
    with_lessons = learner.evaluate(documents).loss
    learner.set_adapter(None)
    assert learner.evaluate(documents).loss > with_lessons
    learner.set_adapter("main")


def test_the_loss_is_that_of_the_whole_logits(taught: Taught) -> None:
    model, tokens = taught.learner.model, taught.tokens
    assert (model.head_weight is None) == (taught.kind in WHOLE)
    total, count = next_token_loss(model, tokens, mx.ones((1, 39)))
    expected = cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]).sum()
    assert_close(taught.kind, total, expected, of_largest=1e-6)
    assert count.item() == 39


def test_mlx_lm_computes_the_same_with_the_adapter(taught: Taught) -> None:
    from mlx_lm.utils import load_adapters, load_model

    network, _ = load_model(taught.base)
    folder = taught.learner.store.files_of(taught.learner.store.require("main"))
    network = load_adapters(network, str(folder))
    assert_close(taught.kind, taught.learner.model(taught.tokens), network(taught.tokens), atol=1e-5)


def test_undo_gives_the_first_version_to_the_bit(taught: Taught) -> None:
    learner = taught.learner
    learner.undo()
    assert np.array_equal(np.array(learner.model(taught.tokens)), taught.first_logits)
    learner.undo(to=2)
    assert not np.array_equal(np.array(learner.model(taught.tokens)), taught.first_logits)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with two versions of `main`; tests copy it or leave it as it is."""
    base = write_foreign(tmp_path_factory.mktemp("qwen") / "base", "qwen2", tokenizer())
    opened(base).learn_from_text(text(2), budget=BUDGET)
    return base


@pytest.mark.parametrize("kind", ["gemma2", "phi3"])
def test_the_commands_work(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isolate(monkeypatch, tmp_path / "home")
    base = write_foreign(tmp_path / "base", kind, tokenizer())
    (tmp_path / "notes.txt").write_text(text(4, 4500))
    before, options = tree(base), ("-m", base, "--store", tmp_path / "store", "--json", "--quiet")
    lesson = run("learn", tmp_path / "notes.txt", "--steps", "6", *options)
    assert lesson.code == 0, lesson.err
    heldout = json.loads(lesson.out)["heldout"]
    assert heldout["after"] < heldout["before"]
    for command in (
        ("generate", "The value", "--max-tokens", "4"),
        ("eval", tmp_path / "notes.txt", "--context", "32"),
        ("chat", "--max-tokens", "4", "--domain", "main"),
        ("verify",),
        ("undo",),
    ):
        done = run(*command, *options, stdin=b"What is a value?\nAnd a list?\n")
        assert (done.code, done.out != "") == (0, True), done.err
    assert tree(base) == before


@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
def test_convert_packs_other_architectures_as_mlx_lm_does(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_lm.utils import load_model, quantize_model

    isolate(monkeypatch, tmp_path / "home")
    wide = {"hidden_size": 64, "head_dim": 16}
    base, target = write_foreign(tmp_path / "base", kind, tokenizer(), **wide), tmp_path / "new" / "packed"
    done = run("convert", base, target, "--quantize", "4", "--json")
    assert (done.code, json.loads(done.out)["bits"]) == (0, 4), done.err
    assert done.err == f"{base} is a model directory of another architecture, {kind}\n"
    network, config = load_model(base)
    network, config = quantize_model(network, config, 64, 4)
    theirs, ours = flatten(network.parameters()), mx.load(str(target / "model.safetensors"))
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(ours[name], theirs[name]).item() for name in ours)
    assert json.loads((target / "config.json").read_text())["quantization"] == config["quantization"]
    assert (target / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    opened(target).learn_from_text(text(2), budget=BUDGET)
    half = run("convert", base, tmp_path / "half", "--quantize", "8", "--dtype", "bf16", "--json", "--quiet")
    assert (json.loads(half.out)["dtype"], half.err) == ("bfloat16", "")


def test_what_cannot_be_done_with_other_architectures_says_what_can(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    isolate(monkeypatch, tmp_path / "home")
    before = tree(qwen)
    whole = f"error: {qwen}: model_type is 'qwen2', only 'llama' is read here; if mlx-lm knows it, learn, generate, "
    whole += f"chat and eval take it as it is (-m {qwen}), and `convert --quantize 4` packs it\n"
    out = tmp_path / "out"
    for arguments in (("pull", qwen), ("convert", qwen, out), ("convert", qwen, f"{out}.gguf")):
        assert (done := run(*arguments)).code == 2
        assert done.err == whole
    narrow = write_foreign(tmp_path / "narrow", "qwen2", tokenizer(), intermediate_size=48)
    for options, words in (
        ((), "nothing to quantise: no row is a multiple of 64 long"),
        (("--check",), "--check, --tokenizer and --config are for Llamas, this is a qwen2"),
        (("--tokenizer", narrow), "--check, --tokenizer and --config are for Llamas, this is a qwen2"),
    ):
        done = run("convert", narrow, out, "--quantize", "4", *options)
        assert (done.code, done.err.splitlines()[-1].endswith(words), done.out) == (2, True, "")
    packed = tmp_path / "packed"
    base = write_foreign(tmp_path / "base", "qwen2", tokenizer(), hidden_size=64, head_dim=16)
    assert run("convert", base, packed, "--quantize", "4").code == 0
    assert "exists already" in run("convert", base, packed, "--quantize", "4").err
    assert "its weights are quantised already" in run("convert", packed, out, "--quantize", "8").err
    assert not out.exists()
    assert tree(qwen) == before


def test_the_readme_names_what_is_tested() -> None:
    told = (Path(__file__).parent.parent / "README.md").read_text()
    assert all(f"`{kind}`" in told for kind in TESTED)


def test_a_llama_is_our_own(tmp_path: Path) -> None:
    assert isinstance(open_model(tiny_base(tmp_path, tokenizer())), ContinualLLM)


def test_targets_by_name(qwen: Path, tmp_path: Path) -> None:
    model = open_model(qwen)
    names = {path.rpartition(".")[2] for path in linear_paths(model, ["q_proj", "v_proj"])}
    assert names == {"q_proj", "v_proj"}
    with pytest.raises(InputError, match=r"no linear layer called lm_head, wq; it has down_proj, gate_proj"):
        linear_paths(model, ["wq", "q_proj", "lm_head"])
    fused = open_model(write_foreign(tmp_path / "phi3", "phi3", tokenizer()))
    names = {path.rpartition(".")[2] for path in linear_paths(fused, LORA_TARGETS)}
    assert names == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    with pytest.raises(InputError, match=r"called q_proj; it has down_proj, gate_up_proj, o_proj, qkv_proj"):
        linear_paths(fused, ["q_proj"])
    learner = opened(tmp_path / "phi3", lora_target_modules=("qkv_proj",))
    learner.learn_from_text(text(2), budget=Budget(steps=1))
    assert {path.rpartition(".")[2] for path, _ in lora.lora_layers(learner.model)} == {"qkv_proj"}


@pytest.mark.parametrize("bits", [None, 4])
def test_what_chooses_the_experts_is_adapted_only_by_name(bits: int | None, tmp_path: Path) -> None:
    base = write_foreign(tmp_path / "base", "qwen3_moe", tokenizer(), hidden_size=64, head_dim=16)
    if bits is not None:
        from mlx_lm.utils import load_model, quantize_model, save_config, save_model

        network, config = quantize_model(*load_model(base), 64, bits)
        save_model(base, network)
        save_config(config, base / "config.json")
    model = open_model(base)
    names = {path.rpartition(".")[2] for path in linear_paths(model, LORA_TARGETS)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert linear_paths(model, ["gate"]) == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]


def test_an_mlx_lm_that_finds_its_classes_otherwise_is_not_every_model_s_fault(
    qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_lm import utils

    monkeypatch.delattr(utils, "_get_classes")
    with pytest.raises(AttributeError, match="_get_classes"):
        open_model(qwen)


def test_shapes_come_from_the_many_names_in_config(tmp_path: Path, qwen: Path) -> None:
    gpt2 = open_model(write_foreign(tmp_path / "gpt2", "gpt2", tokenizer())).config
    assert dataclasses.astuple(gpt2) == (tokenizer().vocab_size, 32, 2, 4, 128, 128)
    assert dataclasses.astuple(open_model(qwen).config) == (tokenizer().vocab_size, 32, 2, 4, 64, 128)


def test_a_window_bounds_the_cache_where_the_architecture_has_none_of_its_own(qwen: Path, tmp_path: Path) -> None:
    model = open_model(qwen)
    assert len(list(decode(model, list(range(30)), 12, Sampling(), window=16))) == 12
    with pytest.raises(InputError, match="window = 4 must be larger than 4"):
        model.make_cache(4)
    gemma = open_model(write_foreign(tmp_path / "gemma", "gemma3_text", tokenizer()))
    with pytest.raises(InputError, match="--window: this architecture has windows of its own"):
        gemma.make_cache(16)
    long = [id % 300 for id in range(60)]  # beyond its window of 16
    assert list(decode(gemma, long, 8, Sampling())) == list(naive(gemma, long, 8, Sampling()))


def test_predictions_are_held_without_a_head_that_is_a_matrix(tmp_path: Path) -> None:
    learner = opened(write_foreign(tmp_path / "gemma2", "gemma2", tokenizer()), distill_weight=1.0)
    assert learner.model.head_weight is None
    learner.learn_from_text(text(2), budget=BUDGET)
    lesson = learner.learn_from_text(text(3), budget=BUDGET)
    assert lesson.replayed_tokens > 0
    assert lesson.after < lesson.before


# -- adapters and models out of it -------------------------------------------------------------------------------------


def test_adapters_move_to_mlx_lm_and_peft_and_back(qwen: Path, tmp_path: Path) -> None:
    learner = opened(qwen)
    expected, scale = read_adapter(learner.store.files_of(learner.store.require("main")))
    for format in ("mlx-lm", "peft"):
        export_adapter(learner.store, "main", qwen, tmp_path / format, format)
        store = open_store(qwen, tmp_path / f"{format}-store")
        version = import_adapter(store, "theirs", qwen, tmp_path / format)
        arrays, theirs = read_adapter(store.files_of(version))
        assert (theirs, arrays.keys()) == (scale, expected.keys())
        assert all(mx.array_equal(arrays[name], expected[name]).item() for name in arrays)
    for format in ("gguf", "original"):
        with pytest.raises(InputError, match=f"{format} is for Llama models alone"):
            export_adapter(learner.store, "main", qwen, tmp_path / "out", format)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"\.gguf adapters are for Llama models alone"):
        import_adapter(open_store(qwen, tmp_path / "other"), "theirs", qwen, tmp_path / "a.gguf")


@pytest.mark.parametrize("kind", ["gpt2", "qwen3_moe", "phi3"])
def test_an_adapter_of_mlx_lm_comes_back_under_the_networks_own_names(kind: str, tmp_path: Path) -> None:
    base = write_foreign(tmp_path / "base", kind, tokenizer())
    learner = opened(base)
    learner.learn_from_text(text(2), budget=BUDGET)
    export_adapter(learner.store, "main", base, tmp_path / "theirs", "mlx-lm")
    version = import_adapter(learner.store, "again", base, tmp_path / "theirs")
    before, after = (learner.store.files_of(learner.store.require(name)) for name in ("main", "again"))
    assert json.loads((after / "adapter_config.json").read_text()) == json.loads(
        (before / "adapter_config.json").read_text()
    )
    ours, theirs = read_adapter(before), read_adapter(learner.store.files_of(version))
    assert (theirs[1], theirs[0].keys()) == (ours[1], ours[0].keys())
    assert all(mx.array_equal(theirs[0][name], ours[0][name]).item() for name in ours[0])
    other = opened(base)
    other.set_adapter("again")
    tokens = mx.array([tokenizer().encode(text(2))[:40]])
    learner.set_adapter("main")
    assert mx.array_equal(other.model(tokens), learner.model(tokens)).item()


def test_an_adapter_on_what_is_no_linear_layer_is_refused_before_it_is_a_domain(tmp_path: Path) -> None:
    """A mixture's experts are matrices in its files, and one stack of them in its network."""
    base = write_foreign(tmp_path / "base", "qwen3_moe", tokenizer())
    arrays = dict(mx.load(str(base / "model.safetensors")))
    stacks = {name: array for name, array in arrays.items() if ".switch_mlp." in name}
    for name, array in stacks.items():  # as the hub has them
        for expert in range(len(array)):
            arrays[name.replace("switch_mlp", f"experts.{expert}")] = mx.contiguous(array[expert])
        del arrays[name]
    mx.eval(arrays)
    mx.save_safetensors(str(base / "model.safetensors"), arrays)
    open_model(base)
    path = "model.layers.0.mlp.experts.0.up_proj"
    rows, width = arrays[f"{path}.weight"].shape
    (tmp_path / "peft").mkdir()
    names = {"A": mx.ones((3, width)), "B": mx.ones((rows, 3))}
    tensors = {f"base_model.model.{path}.lora_{half}.weight": array for half, array in names.items()}
    mx.save_safetensors(str(tmp_path / "peft" / "adapter_model.safetensors"), tensors)
    settings = {"peft_type": "LORA", "r": 3, "lora_alpha": 6}
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(settings))
    store = open_store(base, tmp_path / "store")
    with pytest.raises(DamagedFileError, match=rf"{path} is no linear layer of it"):
        import_adapter(store, "theirs", base, tmp_path / "peft")
    assert store.head("theirs") is None


def test_learned_positions_end(tmp_path: Path) -> None:
    """GPT-2 has an embedding for each of 128 positions; behind the table MLX would read whatever lies there."""
    model = open_model(write_foreign(tmp_path / "gpt2", "gpt2", tokenizer()))
    tokens = mx.zeros((1, 100), mx.int32)
    cache = model.make_cache()
    mx.eval(model(tokens, cache))
    with pytest.raises(InputError, match="130 tokens, and the model has learned 128 positions"):
        model(tokens[:, :30], cache)
    long, short = (complete(model, tokenizer(), [5] * 120, max_tokens=most).tokens for most in (50, 8))
    assert long == short
    with pytest.raises(InputError, match="the prompt has 128 tokens, and the model can read 127; shorten it"):
        complete(model, tokenizer(), [5] * 128)


def test_base_and_adapter_become_one_model(qwen: Path, tmp_path: Path) -> None:
    learner = opened(qwen)
    learner.set_adapter("main")
    record = fuse(learner.store, "main", qwen, tmp_path / "fused")
    assert record["files"] == sorted(path.name for path in (tmp_path / "fused").iterdir())
    tokens = mx.array([tokenizer().encode(text(5))[:40]])
    assert_close("fused", open_model(tmp_path / "fused")(tokens), learner.model(tokens), atol=1e-5)
    base = write_foreign(tmp_path / "gpt2", "gpt2", tokenizer())
    weights = base / "model.safetensors"
    named_by_hub = {name.removeprefix("model."): array for name, array in mx.load(str(weights)).items()}
    named_by_hub |= {n: a.T for n, a in named_by_hub.items() if ".c_" in n and a.ndim == 2}
    mx.eval(named_by_hub)
    mx.save_safetensors(str(weights), {name: mx.contiguous(array) for name, array in named_by_hub.items()})
    gpt2 = opened(base)
    gpt2.learn_from_text(text(2), budget=BUDGET)
    with pytest.raises(InputError, match=r"model\.h\..*\.weight .* is not in the files"):
        fuse(gpt2.store, "main", base, tmp_path / "out")
    with pytest.raises(InputError, match="a gpt2 names its layers otherwise than peft does; export --to mlx-lm works"):
        export_adapter(gpt2.store, "main", base, tmp_path / "out", "peft")
    assert export_adapter(gpt2.store, "main", base, tmp_path / "folder", "mlx-lm")["rank"] == 14
    assert not (tmp_path / "out").exists()


# -- what is refused ---------------------------------------------------------------------------------------------------


def changed(base: Path, folder: Path, **changes: object) -> Path:
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("learner"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model_type": "nonsense"}, InputError, r"config\.json: model_type is 'nonsense', which neither .* knows"),
        ({"model_type": "switch_layers"}, InputError, "model_type is 'switch_layers', which neither"),
        ({"model_type": "olmo"}, InputError, "model_type is 'olmo', which neither"),
        ({"model_type": "../x"}, DamagedFileError, r"model_type is '\.\./x', a name was expected"),
        ({"model_type": ["qwen2"]}, DamagedFileError, "a name was expected"),
        ({"architectures": ["Qwen2", {}]}, DamagedFileError, "architectures is .*, a list of names was expected"),
        ({"auto_map": {"a": "b"}}, InputError, "auto_map names code to be run"),
        ({"model_file": "x.py"}, InputError, "model_file names code to be run"),
        ({"num_hidden_layers": 10**6}, DamagedFileError, "num_hidden_layers = 1000000 is more than any model has"),
        ({"vocab_size": 2**40}, DamagedFileError, "vocab_size = 1099511627776 is more"),
        ({"text_config": {"n_layers": 2000}}, DamagedFileError, r"text_config\.n_layers = 2000 is more"),
        ({"hidden_size": 48}, DamagedFileError, "mlx-lm cannot open it as qwen2: ValueError"),
        ({"n_layer": 1025}, DamagedFileError, "n_layer = 1025 is more than any model has"),
        ({"n_blocks": 10**6}, DamagedFileError, "n_blocks = 1000000 is more than any model has"),
        ({"num_blocks": 10**6}, DamagedFileError, "num_blocks = 1000000 is more than any model has"),
        ({"num_hidden_layers": 3}, DamagedFileError, "mlx-lm cannot open it as qwen2: ValueError: Missing"),
        ({"num_attention_heads": "4"}, DamagedFileError, "mlx-lm cannot open it as qwen2: TypeError"),
        ({"num_attention_heads": 0}, DamagedFileError, "mlx-lm cannot open it as qwen2: ZeroDivisionError"),
    ],
)
def test_what_cannot_be_opened_is_named(
    qwen: Path, tmp_path: Path, changes: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        open_model(changed(qwen, tmp_path / "base", **changes))


def test_not_every_size_that_is_called_after_layers_counts_them() -> None:
    """gemma3n's and lfm2's."""
    config = {"model_type": "x", "vocab_size_per_layer_input": 262144, "block_dim": 2048, "block_size": 4096}
    foreigndir.check_config(config, "config.json")


def test_weights_are_checked_before_mlx_lm_maps_them(qwen: Path, tmp_path: Path) -> None:
    base = changed(qwen, tmp_path / "base")
    weights = base / "model.safetensors"
    shutil.copyfile(weights, base / "model-extra.safetensors")
    with pytest.raises(InputError, match=r"model-extra\.safetensors would be read too"):
        open_model(base)
    (base / "model-extra.safetensors").unlink()
    content = weights.read_bytes()
    weights.write_bytes(content[:-4])
    with pytest.raises(DamagedFileError, match="cut off"):
        open_model(base)
    arrays = dict(mx.load(str(qwen / "model.safetensors")))
    arrays["model.norm.weight"] = mx.full((32,), float("nan"))
    mx.save_safetensors(str(weights), arrays)
    with pytest.raises(DamagedFileError, match=r"not all values are finite in model\.norm\.weight"):
        open_model(base)


def test_recurrent_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'mamba' keeps more than keys and values .*ArraysCache.* not supported"):
        open_model(write_foreign(tmp_path / "mamba", "mamba", tokenizer()))


def test_pretraining_stays_with_llama(qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isolate(monkeypatch, tmp_path / "home")
    (tmp_path / "notes.txt").write_text(text(4, 6000))
    done = run("train", tmp_path / "notes.txt", "--init", qwen, "--out", tmp_path / "out", "--steps", "1")
    assert done.code == 2
    assert "model_type is 'qwen2'; train is for llama, learn for others" in done.err
