"""Users of the original project move over whole: folders as its scripts write them, made here with torch alone.

With MINIMAC_SEED_CHECKPOINT naming a folder that the original itself wrote, its own logits, tokens and ids are met too.
"""

import json
import os
import pickle
import pkgutil
import random
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lessons
import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from slow_bpe import BYTES
from terminal import Done, isolate, run, tree
from test_tokenizer_formats import END, write_original

import cli
from convert.original import is_checkpoint_folder
from mlx_impl import lora
from mlx_impl.config import Budget, ContinualLearningConfig
from mlx_impl.conversion import convert
from mlx_impl.errors import InputError
from mlx_impl.learner import ContinualLearner
from mlx_impl.moving import move_over, rescaled
from mlx_impl.past import hold, measured_fisher, recall
from mlx_impl.replay import unpack
from mlx_impl.store import open_store
from mlx_impl.tokenizer import Tokenizer

ROWS, WIDTH, HIDDEN, LAYERS, RANK, ALPHA = 300, 32, 48, 2, 3, 7.5
CONFIG = {
    "vocab_size": ROWS,
    "d_model": WIDTH,
    "num_layers": LAYERS,
    "num_query_heads": 4,
    "num_kv_heads": 2,
    "d_ff": HIDDEN,
    "max_seq_len": 64,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "norm_type": "rmsnorm",
    "ff_type": "swiglu",
    "norm_eps": 1e-6,
    "bias": False,
    "rope_base": 10000.0,
    "tie_embeddings": True,
}
LEARNER = {"lora_r": RANK, "lora_alpha": ALPHA, "replay_ratio": 0.5, "use_liquid_lora": True, "liquid_tau_min": 0.1}
NAMES = {  # theirs: (ours, out, in)
    "attention.q_proj": ("self_attn.q_proj", WIDTH, WIDTH),
    "attention.k_proj": ("self_attn.k_proj", WIDTH // 2, WIDTH),
    "attention.v_proj": ("self_attn.v_proj", WIDTH // 2, WIDTH),
    "attention.o_proj": ("self_attn.o_proj", WIDTH, WIDTH),
    "feed_forward.w1": ("mlp.gate_proj", HIDDEN, WIDTH),
    "feed_forward.w3": ("mlp.up_proj", HIDDEN, WIDTH),
    "feed_forward.w2": ("mlp.down_proj", WIDTH, HIDDEN),
}
MERGES = [("h", "e"), ("Ġ", "t"), ("Ġt", "he"), ("a", "n")]
Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isolate(monkeypatch, tmp_path / "home")


def weights() -> Tensors:
    draw = torch.Generator().manual_seed(1)
    state = {"token_embedding.weight": torch.randn(ROWS, WIDTH, generator=draw), "norm.weight": torch.ones(WIDTH)}
    for layer in range(LAYERS):
        for name, (_, out, width) in NAMES.items():
            state[f"layers.{layer}.{name}.weight"] = torch.randn(out, width, generator=draw) / width**0.5
        for norm in ("attention_norm", "ffn_norm"):
            state[f"layers.{layer}.{norm}.weight"] = torch.ones(WIDTH)
    return {**state, "lm_head.weight": state["token_embedding.weight"]}


def adapter(seed: int = 2) -> Tensors:
    draw = torch.Generator().manual_seed(seed)
    state = {}
    for layer in range(LAYERS):
        for name, (_, out, width) in NAMES.items():
            state[f"layers.{layer}.{name}.lora_A"] = torch.randn(RANK, width, generator=draw) / 4
            state[f"layers.{layer}.{name}.lora_B"] = torch.randn(out, RANK, generator=draw) / 8
    return state


def inside(state: Tensors) -> Tensors:
    """An adapter's tensors under the names that they have as parameters of the wrapped model."""
    return {f"base_model.{name.replace('.lora_', '.lora.lora_')}": array for name, array in state.items()}


def wrapped(state: Tensors, with_adapter: Tensors) -> Tensors:
    modules = tuple(f"{name}.weight" for name in NAMES)
    base = {n.replace(".weight", ".base_layer.weight") if n.endswith(modules) else n: a for n, a in state.items()}
    return {**{f"base_model.{name}": array for name, array in base.items()}, **inside(with_adapter)}


def sample(ids: list[int], labels: list[int] | None = None, importance: float = 1.0, domain: str | None = "law") -> Any:
    """An experience as `learn_from_text` makes it: labels are the tokens after."""
    labels = ids[1:] if labels is None else labels
    rows = (ids[:-1], labels) if len(labels) < len(ids) else (ids, labels)
    both = {name: torch.tensor(row, dtype=torch.long) for name, row in zip(("input_ids", "labels"), rows, strict=True)}
    return {**both, "importance": importance, "domain": domain, "metadata": {}}


def row(seed: int, length: int = 30) -> list[int]:
    return random.Random(seed).choices(range(1, 261), k=length)


def buffer(samples: list[Any]) -> dict[str, Any]:
    config = {"max_size": 16, "sampling_strategy": "importance", "importance_decay": 1.0}
    stats = {"added": 2, "replaced": 0}
    return {"buffer": samples, "size": 2, "total_seen": 2, "seen_hashes": ["a"], "stats": stats, "config": config}


def ewc(state: Tensors) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(3)
    fisher = {name: torch.rand(array.shape, generator=draw) for name, array in inside(state).items()}
    fisher = {name: array / array.max() for name, array in fisher.items()}
    settings = {"lambda_ewc": 1000.0, "normalize_fisher": True, "online": False, "gamma": 1.0}
    return {"fisher": fisher, "old_params": inside(state), "task_count": 2, "config": settings}


SAMPLES = [sample(row(1), domain="medical"), sample(row(2)), sample(row(3), importance=2.0), sample(row(4))]


def write_tokenizer(folder: Path) -> Path:
    tokens = [END, *BYTES, *("".join(pair) for pair in MERGES)]
    return write_original(folder, {token: number for number, token in enumerate(tokens)}, MERGES)


def checkpoint(folder: Path) -> Path:
    """What the original's `save_checkpoint` leaves, with its tokenizer beside."""
    folder.mkdir()
    own = {"r": RANK, "alpha": ALPHA, "dropout": 0.0, "merge_weights": False, "target_modules": ["q_proj"]}
    parameters = {name: torch.nn.Parameter(array) for name, array in adapter().items()}
    for name, value in {
        "model.pt": {"state_dict": wrapped(weights(), adapter()), "config": CONFIG},
        "adapter.pt": {"adapter_name": "law", "lora_config": own, "state_dict": parameters},
        "replay_buffer.pt": buffer(SAMPLES),
        "ewc.pt": ewc(adapter()),
        "training_state.pt": {"global_step": 7, "optimizer_state_dict": {"state": {}}},
    }.items():
        torch.save(value, folder / name)
    (folder / "config.json").write_text(json.dumps(LEARNER))
    write_tokenizer(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("theirs") / "my_expert")


@pytest.fixture(scope="module")
def moved(theirs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The model directory and what was said of it; nothing may be taught there."""
    target = tmp_path_factory.mktemp("moved") / "model"
    return target, move_over(theirs, target, "law")


@pytest.fixture
def mine(theirs: Path, tmp_path: Path) -> Path:
    """A copy of the folder, to be changed."""
    return shutil.copytree(theirs, tmp_path / "mine")


def tensors_of(version: Path, name: str) -> dict[str, np.ndarray]:
    return dict(load_file(version / f"{name}.safetensors"))


def by_our_names(state: Tensors) -> dict[str, np.ndarray]:
    """Their adapter tensors as ours, by the table written above."""
    arrays = {}
    for name, array in state.items():
        path, _, half = name.rpartition(".")
        layers, number, module = path.split(".", 2)
        arrays[f"model.{layers}.{number}.{NAMES[module][0]}.{half.lower()}"] = array.detach().numpy().T
    return arrays


# -- what comes over -----------------------------------------------------------------


def test_weights_and_adapter_are_the_same_to_the_bit(moved: tuple[Path, dict[str, Any]]) -> None:
    model, _ = moved
    ours, original = load_file(model / "model.safetensors"), weights()
    assert np.array_equal(ours["model.embed_tokens.weight"], original["token_embedding.weight"])
    for layer in range(LAYERS):
        for name, (our, _, _) in NAMES.items():
            assert np.array_equal(ours[f"model.layers.{layer}.{our}.weight"], original[f"layers.{layer}.{name}.weight"])
    version = model / "learner" / "law" / "v0001"
    arrays, expected = tensors_of(version, "adapters"), by_our_names(adapter())
    assert arrays.keys() == expected.keys()
    assert all(np.array_equal(arrays[name], expected[name]) for name in expected)
    settings = json.loads((version / "adapter_config.json").read_text())
    assert settings["lora_parameters"]["scale"] == ALPHA / RANK
    assert json.loads((model / "config.json").read_text())["eos_token_id"] == 0


def test_each_file_is_told_of(moved: tuple[Path, dict[str, Any]], theirs: Path) -> None:
    _, record = moved
    told = record["files"]
    assert set(told) == {path.name for path in theirs.iterdir()}
    assert told["model.pt"].endswith("model.safetensors; for the adapter in it adapter.pt is read")
    assert told["tokenizer"] == "261 tokens, 39 fewer than the model has rows -> tokenizer.json"
    assert told["adapter.pt"] == "rank 3, scale 2.5, on 14 layers -> the domain's adapter"
    assert told["replay_buffer.pt"] == (
        "4 samples -> 4 windows of at most 64 tokens; sources: law 3 (importance 1, 2), medical 1 (importance 1)"
    )
    assert told["ewc.pt"].startswith("Fisher of 2 consolidations, anchored at the adapter as it is; each tensor scaled")
    assert told["training_state.pt"].startswith("not carried over: counters, and optimizer moments")
    assert told["config.json"].endswith("without a counterpart: use_liquid_lora, liquid_tau_min")
    assert (record["domain"], record["version"], record["replay_windows"]) == ("law", "v0001", 4)
    assert "shifted its labels twice" in record["notes"][0]


def test_the_note_has_the_loss_on_the_next_token_and_on_the_one_after(
    moved: tuple[Path, dict[str, Any]],
) -> None:
    model, record = moved
    learner = ContinualLearner.from_checkpoint(model)
    learner.set_adapter("law")
    nats: dict[int, list[float]] = {1: [], 2: []}
    for ids in (row(seed) for seed in (1, 2, 3, 4)):
        logits = np.array(learner.model(mx.array([ids])))[0].astype(np.float64)
        likely = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        for ahead, losses in nats.items():
            losses += [-likely[at, token] for at, token in enumerate(ids[ahead:])]
    said = f"next costs it {np.mean(nats[1]):.2f} nats, the one after {np.mean(nats[2]):.2f}"
    assert said in record["notes"][0]


def test_samples_are_windows_with_their_importance(moved: tuple[Path, dict[str, Any]]) -> None:
    store = open_store(moved[0])
    replay = store.replay(store.require("law"))
    assert replay is not None
    windows = [unpack(replay.windows[id.tobytes()]) for id in replay.ids]
    assert sorted(tokens.tolist() for tokens, _ in windows) == sorted(row(seed) for seed in (1, 2, 3, 4))
    assert all(mask.all() for _, mask in windows)
    lessons = [["medical", 0, 1.0, 1], ["law", 0, 1.0, 2], ["law", -1, 2.0, 1]]
    assert replay.counters["lessons"] == lessons


def test_the_fisher_has_their_pattern_and_our_size(moved: tuple[Path, dict[str, Any]]) -> None:
    model, _ = moved
    version = open_store(model).require("law")
    state = tensors_of(model / "learner" / "law" / version.name, "state")
    learner = ContinualLearner.from_checkpoint(model)
    learner.set_adapter("law")
    replay = open_store(model).replay(version)
    assert replay is not None
    windows = [replay.windows[id.tobytes()] for id in replay.ids]
    measured = measured_fisher(learner.model, windows, mx.random.key(0))
    pattern = by_our_names(_outside(ewc(adapter())["fisher"]))
    assert pattern.keys() == measured.keys()
    for name, array in measured.items():
        assert state[name].mean() == pytest.approx(float(array.mean().item()), rel=1e-4)
        ratio = state[name] / np.maximum(pattern[name], 1e-12)
        assert ratio.max() == pytest.approx(ratio.min(), rel=1e-4)


def _outside(state: Tensors) -> Tensors:
    return {name.removeprefix("base_model.").replace(".lora.lora_", ".lora_"): array for name, array in state.items()}


def test_a_pattern_of_zeros_is_what_was_measured() -> None:
    measured = {"a": mx.array([[1.0, 3.0]]), "b": mx.array([[2.0, 2.0]])}
    arrays = rescaled({"a": np.zeros((1, 2), np.float32), "b": np.array([[0.0, 1.0]], np.float32)}, measured)
    assert arrays["a"].tolist() == [[1.0, 3.0]]
    assert arrays["b"].tolist() == [[0.0, 4.0]]


def test_the_next_lesson_replays_the_windows_and_is_held_by_the_fisher(
    moved: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    model, _ = moved
    folder = shutil.copytree(model / "learner", tmp_path / "store")
    config = ContinualLearningConfig(seq_len=32, batch_size=2)
    learner = ContinualLearner.from_checkpoint(model, config, folder)
    before = learner.store.require("law")
    learner.set_adapter("law")
    past = recall(learner.store, before, learner.model, config, 1, 32)
    hold(past, learner.model, config, 1)
    state = tensors_of(folder / "law" / "v0001", "state")
    assert past.fisher is not None
    assert all(np.array_equal(np.array(array), state[name]) for name, array in past.fisher.items())
    assert past.penalty is not None
    assert past.penalty(learner.model.trainable_parameters()).item() == 0
    moved_away = {name: array + 0.1 for name, array in lora.adapter_arrays(learner.model).items()}
    expected = learner.config.ewc_lambda * sum(0.5 * 0.01 * state[name].astype(np.float64).sum() for name in moved_away)
    assert past.penalty(moved_away).item() == pytest.approx(expected, rel=1e-3)

    lesson = learner.learn_from_text(lessons.text(1), "law", budget=Budget(steps=8))
    assert lesson.version == "v0002"
    assert lesson.replayed_tokens > 0
    learned = learner.store.replay(learner.store.require("law"))
    assert learned is not None
    taught = {tuple(unpack(window)[0].tolist()) for window in learned.windows.values()}
    assert {tuple(row(seed)) for seed in (1, 2, 3, 4)} < taught
    fisher = tensors_of(folder / "law" / "v0002", "state")
    assert all(np.allclose(fisher[name], state[name]) for name in past.fisher)


def test_a_prompt_like_the_windows_is_routed_there(moved: tuple[Path, dict[str, Any]]) -> None:
    model, _ = moved
    learner = ContinualLearner.from_checkpoint(model)
    assert learner.route(row(1) + row(2)).domain == "law"


def test_undo_removes_the_domain_and_leaves_the_base(theirs: Path, tmp_path: Path) -> None:
    move_over(theirs, tmp_path / "model")
    assert run("undo", "-m", tmp_path / "model").code == 0
    assert not (tmp_path / "model" / "learner").exists()
    assert run("generate", "he", "-m", tmp_path / "model", "--max-tokens", "2", "--quiet").code == 0


# -- samples -------------------------------------------------------------------------


def windows_of(model: Path) -> list[tuple[list[int], list[float]]]:
    store = open_store(model)
    replay = store.replay(store.require("main"))
    assert replay is not None
    unpacked = (unpack(replay.windows[id.tobytes()]) for id in replay.ids)
    return sorted((tokens.tolist(), mask.tolist()) for tokens, mask in unpacked)


@pytest.mark.parametrize(
    ("ids", "labels", "expected"),
    [
        ([5, 6, 7], [6, 7, 8], ([5, 6, 7, 8], [1, 1, 1])),  # the tokens after, as its learner makes them
        ([5, 6, 7], [5, 6, 7], ([5, 6, 7], [1, 1])),  # the tokens themselves
        ([5, 6, 7], [-1, 7, -100], ([5, 6, 7], [0, 1])),  # what does not count is negative
        ([5, 6, 7], [-100, 6, 7], ([5, 6, 7], [1, 1])),
        ([5, 6, 7, 7], [6, 7, -1, -1], ([5, 6, 7], [1, 1])),
        ([5], [6], ([5, 6], [1])),
    ],
)
def test_labels_of_both_kinds(mine: Path, ids: list[int], labels: list[int], expected: Any) -> None:
    torch.save(buffer([sample(ids, labels)]), mine / "replay_buffer.pt")
    move_over(mine, mine.parent / "model")
    assert windows_of(mine.parent / "model") == [expected]


def test_what_cannot_be_replayed_is_counted(mine: Path) -> None:
    long = row(9, 150)
    samples = [
        sample(long, domain=None),
        sample(row(1)),
        sample(row(1)),
        sample([5, 6, 7], [9, 9, 9]),
        sample([5, 6], [-1, -1]),
        sample([], []),
        sample(row(2), importance=0.0),
    ]
    torch.save(buffer(samples), mine / "replay_buffer.pt")
    told = move_over(mine, mine.parent / "model")["files"]["replay_buffer.pt"]
    assert "1 left out: labels that are neither the tokens nor those after them" in told
    assert "2 left out: nothing to predict" in told
    assert "1 left out: importance 0, never drawn there either" in told
    assert "4 windows of at most 64 tokens, 1 there twice; sources: law 1 (importance 1), unknown 3" in told
    parts = [(tokens, mask) for tokens, mask in windows_of(mine.parent / "model") if tokens != row(1)]
    counted = [token for tokens, mask in parts for token, one in zip(tokens[1:], mask, strict=True) if one]
    assert sorted(counted) == sorted(long[1:])


def test_more_samples_than_a_buffer_holds_are_named(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ContinualLearningConfig(replay_buffer_size=3)
    monkeypatch.setattr("mlx_impl.moving.ContinualLearningConfig", lambda: small)
    (mine / "config.json").unlink()
    told = move_over(mine, mine.parent / "model")["files"]["replay_buffer.pt"]
    assert "3 windows of at most 64 tokens, 1 more than a buffer of 3 holds" in told


# -- folders with less in them --------------------------------------------------------


def test_the_adapter_inside_the_weights_is_taken_where_there_is_no_other(mine: Path) -> None:
    for name in ("adapter.pt", "ewc.pt", "replay_buffer.pt"):
        (mine / name).unlink()
    record = move_over(mine, mine.parent / "model")
    assert "the adapter in it: rank 3, scale 2.5, on 14 layers" in record["files"]["model.pt"]
    version = mine.parent / "model" / "learner" / "main" / "v0001"
    arrays, expected = tensors_of(version, "adapters"), by_our_names(adapter())
    assert all(np.array_equal(arrays[name], expected[name]) for name in expected)
    assert not (version / "state.safetensors").exists()
    (mine / "config.json").unlink()
    with pytest.raises(InputError, match=r"without adapter.pt or config.json its alpha is not known"):
        move_over(mine, mine.parent / "other")


def test_weights_alone_make_a_model_without_a_domain(tmp_path: Path) -> None:
    (tmp_path / "final").mkdir()
    torch.save({"model_state_dict": weights(), "config": CONFIG}, tmp_path / "final" / "model.pt")
    with pytest.raises(InputError, match=r"no tokenizer in it .*; --tokenizer DIR names its folder"):
        move_over(tmp_path / "final", tmp_path / "model")
    tokenizer = write_tokenizer(tmp_path / "tokenizers" / "mine")
    done = run("convert", tmp_path / "final", tmp_path / "model", "--tokenizer", tokenizer, "--check", "--json")
    record = json.loads(done.out)
    assert (done.code, record["domain"], record["check"]["first"]) == (0, None, None)
    assert record["files"][str(tokenizer)].startswith("261 tokens")
    assert not (tmp_path / "model" / "learner").exists()
    file = tmp_path / "final" / "model.pt"
    assert run("convert", file, tmp_path / "from-file", "--tokenizer", tokenizer).code == 0
    both = [Tokenizer.load(tmp_path / name) for name in ("model", "from-file")]
    assert both[0].encode("the hen") == both[1].encode("the hen")


def test_a_fisher_without_windows_is_not_carried_over_and_says_so(mine: Path) -> None:
    (mine / "replay_buffer.pt").unlink()
    told = move_over(mine, mine.parent / "model")["files"]["ewc.pt"]
    assert told.endswith("not carried over: its size cannot be measured without replay windows")
    assert not (mine.parent / "model" / "learner" / "main" / "v0001" / "state.safetensors").exists()


def test_windows_without_an_ewc_state_have_a_fisher_of_their_own(mine: Path) -> None:
    (mine / "ewc.pt").unlink()
    move_over(mine, mine.parent / "model")
    state = tensors_of(mine.parent / "model" / "learner" / "main" / "v0001", "state")
    assert sum(float(array.sum()) for name, array in state.items() if not name.startswith("router.")) > 0


def test_an_anchor_elsewhere_is_named(mine: Path) -> None:
    elsewhere = {**ewc(adapter()), "old_params": inside({n: a + 0.25 for n, a in adapter().items()})}
    torch.save(elsewhere, mine / "ewc.pt")
    told = move_over(mine, mine.parent / "model")["files"]["ewc.pt"]
    assert "its anchor is up to 0.25 away from the adapter, here the adapter itself is the anchor" in told


# -- the command ---------------------------------------------------------------------


def test_the_command_and_the_lesson_after_it(theirs: Path, tmp_path: Path) -> None:
    done = run("convert", theirs, tmp_path / "model", "--domain", "law")
    assert done.code == 0
    assert "  adapter.pt: rank 3, scale 2.5, on 14 layers" in done.out
    assert (
        f"domain law v0001: `minimac-mlx learn FILE -m {tmp_path / 'model'} --domain law` goes on from there"
        in done.out
    )
    listed = json.loads(run("list", "-m", tmp_path / "model", "--json").out)
    assert listed["domains"][0]["imported"] == "original"
    taught = run(
        "learn", "--text", lessons.text(2), "--domain", "law", "-m", tmp_path / "model", "--steps", "2", "--json"
    )
    record = json.loads(taught.out.splitlines()[-1])
    assert (taught.code, record["version"], record["replayed_tokens"] > 0) == (0, "v0002", True)
    assert run("verify", "-m", tmp_path / "model").code == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ("out.gguf",),
        ("out.pt",),
        ("out.pt", "--to", "original"),
        ("out", "--quantize", "4"),
        ("out.gguf", "--domain", "law"),
    ],
)
def test_a_checkpoint_folder_becomes_a_model_directory_first(
    theirs: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    done = run("convert", theirs, tmp_path / arguments[0], *arguments[1:])
    assert done.code == 2
    expected = f"error: {theirs}: a checkpoint folder becomes a model directory first; convert that"
    assert done.err.strip().splitlines() == [expected]
    assert list(tmp_path.glob("out*")) == []


def test_a_folder_of_torch_ref_is_no_checkpoint_folder(moved: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    convert(moved[0], tmp_path / "ours" / "model.pt")
    assert not is_checkpoint_folder(tmp_path / "ours")
    done = run("convert", tmp_path / "ours", tmp_path / "out")
    assert (done.code, "found model.pt instead" in done.err) == (2, True)
    assert run("convert", tmp_path / "ours" / "model.pt", tmp_path / "out").code == 0


def test_the_tokenizer_may_be_one_of_ours(mine: Path, moved: tuple[Path, dict[str, Any]]) -> None:
    shutil.rmtree(mine / "tokenizer")
    record = move_over(mine, mine.parent / "model", tokenizer=moved[0])
    assert record["files"][str(moved[0])] == "261 tokens, 39 fewer than the model has rows -> tokenizer.json"
    written = mine.parent / "model"
    assert (written / "tokenizer.json").read_bytes() == (moved[0] / "tokenizer.json").read_bytes()
    assert json.loads((written / "config.json").read_text())["eos_token_id"] == 0
    shutil.copyfile(moved[0] / "tokenizer.json", mine / "tokenizer.json")
    told = move_over(mine, mine.parent / "other", tokenizer=mine)["files"]
    assert told["tokenizer.json"].startswith("261 tokens")


def test_a_domain_only_where_there_is_one(theirs: Path, tmp_path: Path) -> None:
    done = run("convert", theirs / "model.pt", tmp_path / "model", "--domain", "law")
    assert done.code == 2
    assert "only a checkpoint folder of the original becomes one" in done.err
    assert run("convert", theirs, tmp_path / "model", "--domain", "No Domain").code == 2
    (tmp_path / "taken").mkdir()
    refused = run("convert", theirs, tmp_path / "taken")
    assert (refused.code, "exists already" in refused.err) == (2, True)


# -- hostile folders -----------------------------------------------------------------


class Code:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def _saved(name: str, value: Any) -> Callable[[Path], None]:
    return lambda folder: torch.save(value, folder / name)


def _changed(name: str, key: str, change: Callable[[torch.Tensor], Any]) -> Callable[[Path], None]:
    """One tensor of an adapter.pt or of one part of an ewc.pt is another."""

    def save(folder: Path) -> None:
        value = torch.load(folder / name, weights_only=True)
        first = next(iter(value[key]))
        value[key][first] = change(value[key][first].detach().clone())
        torch.save(value, folder / name)

    return save


def _nested(levels: int, width: int) -> Any:
    value: Any = [0]
    for _ in range(levels):
        value = [value] * width
    return value


NAN = float("nan")
HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "code": (_saved("replay_buffer.pt", {"buffer": [Code()]}), "not read as a .pt file of tensors"),
    "plain pickle": (lambda f: (f / "ewc.pt").write_bytes(pickle.dumps({"fisher": {}})), "no .pt file"),
    "NaN in the adapter": (_changed("adapter.pt", "state_dict", lambda a: a * NAN), "values are not finite"),
    "NaN in the fisher": (_changed("ewc.pt", "fisher", lambda a: a * NAN), "values are not finite"),
    "NaN in the anchor": (_changed("ewc.pt", "old_params", lambda a: a * NAN), "values are not finite"),
    "negative fisher": (_changed("ewc.pt", "fisher", lambda a: -a), "values below 0"),
    "shape of the adapter": (_changed("adapter.pt", "state_dict", lambda a: a[:, 1:]), "does not fit the base"),
    "shape of the fisher": (_changed("ewc.pt", "fisher", lambda a: a[:, 1:]), "does not fit the base"),
    "rank of the fisher": (_changed("ewc.pt", "fisher", lambda a: a[:2]), "does not fit the base"),
    "no tensor": (_changed("ewc.pt", "fisher", lambda a: "x"), "not a tensor"),
    "whole numbers": (_changed("ewc.pt", "fisher", lambda a: a.long()), "which are no real numbers"),
    "another model's fisher": (_saved("ewc.pt", {**ewc({}), "fisher": {"a.lora_A": torch.ones(2, 2)}}), "unknown"),
    "weights' fisher": (_saved("ewc.pt", {**ewc({}), "fisher": {"norm.weight": torch.ones(2)}}), "no adapter's"),
    "half of a fisher": (
        _saved("ewc.pt", {**ewc(adapter()), "fisher": dict(list(ewc(adapter())["fisher"].items())[:2])}),
        "26 tensors are not the adapter's",
    ),
    "no ewc": (_saved("ewc.pt", {"fisher": 1}), "no EWC state"),
    "no buffer": (_saved("replay_buffer.pt", {"buffer": {}}), "no replay buffer"),
    "rows": (_saved("replay_buffer.pt", buffer([7])), "no replay buffer"),
    "ids": (_saved("replay_buffer.pt", buffer([sample([1, 2, ROWS])])), f"token ids 1 to {ROWS}"),
    "negative ids": (_saved("replay_buffer.pt", buffer([sample([1, -2, 3])])), "token ids -2"),
    "huge ids": (_saved("replay_buffer.pt", buffer([sample([1, 2**62, 3])])), "token ids 1 to 4611686018427387904"),
    "two lengths": (
        _saved("replay_buffer.pt", buffer([{"input_ids": torch.ones(3).long(), "labels": torch.ones(2).long()}])),
        "row",
    ),
    "matrix": (_saved("replay_buffer.pt", buffer([{"input_ids": torch.ones(2, 2).long()}])), "no row of token ids"),
    "real ids": (_saved("replay_buffer.pt", buffer([{"input_ids": torch.ones(3)}])), "no row of token ids"),
    "no ids": (_saved("replay_buffer.pt", buffer([{}])), "no row of token ids"),
    "NaN importance": (_saved("replay_buffer.pt", buffer([sample(row(1), importance=NAN)])), "importance nan"),
    "importance": (_saved("replay_buffer.pt", buffer([sample(row(1), importance=1e9)])), "importance 1000000000.0"),
    "domain": (_saved("replay_buffer.pt", buffer([{**sample(row(1)), "domain": [1]}])), "its domain is a list"),
    "claims": (
        _saved("replay_buffer.pt", buffer([{"input_ids": torch.ones(1).long().expand(2**40), "labels": 0}])),
        "claims more than the file holds",
    ),
    "many lists": (_saved("replay_buffer.pt", {"buffer": _nested(4, 2000)}), "no replay buffer"),
    "no adapter for a state": (lambda f: _plain(f), "without adapter.pt, the adapter that they belong to"),
    "geglu": (_saved("model.pt", {"model_state_dict": weights(), "config": {**CONFIG, "ff_type": "geglu"}}), "geglu"),
    "liquid": (
        _saved(
            "model.pt",
            {
                "state_dict": {**wrapped(weights(), adapter()), "base_model.x.lora.hidden_B": torch.ones(2)},
                "config": CONFIG,
            },
        ),
        "no liquid LoRA",
    ),
    "tokenizer": (lambda f: (f / "tokenizer" / "merges.json").write_text("{}"), "no list of {pair, token, rank}"),
}


def _plain(folder: Path) -> None:
    """Weights without an adapter in them, and none beside."""
    (folder / "adapter.pt").unlink()
    torch.save({"model_state_dict": weights(), "config": CONFIG}, folder / "model.pt")


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_folders_end_in_one_line_and_nothing_is_written(mine: Path, name: str) -> None:
    change, words = HOSTILE[name]
    change(mine)
    before = tree(mine.parent)
    done: Done = run("convert", mine, mine.parent / "model", "--quiet")
    assert done.code in (2, 3)
    assert any(word in done.err for word in words.split("|"))
    assert done.err.count("\n") == 1
    assert len(done.err) < 600
    assert done.out == ""
    assert tree(mine.parent) == before
    assert not (mine.parent / "model").exists()
    assert not Path("ran").exists()


# -- the page about it ----------------------------------------------------------------

PAGE = (Path(__file__).parent.parent / "docs" / "original.md").read_text(encoding="utf-8")


def rows_of(part: str) -> list[tuple[str, str]]:
    """(there, here) of the rows of a part's table."""
    cells = [line.strip("|").split("|") for line in part.splitlines() if line.startswith("| `")]
    return [(there, here) for there, here in cells]


@pytest.mark.parametrize("part", re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:], ids=lambda part: part.split(":")[0])
def test_the_page_names_options_that_there_are(part: str) -> None:
    named = re.match(r".*`minimac-mlx (\w+)`", part)
    assert named is not None
    command = cli.cli.commands[named[1]]
    options = {option for parameter in command.params for option in parameter.opts}
    rows = rows_of(part.split("\n## ")[0])
    flags = {flag for _, here in rows for flag in re.findall(r"`(--[\w-]+)", here)}
    assert flags
    assert flags <= options
    fields = {name for _, here in rows for name in re.findall(r"`(\w+)` in Python", here)}
    assert all(hasattr(ContinualLearningConfig(), name) for name in fields)


def test_the_page_names_functions_that_there_are() -> None:
    names = re.findall(r"`(mlx_impl\.[\w.]+)`", PAGE)
    assert len(names) > 15
    for name in names:
        assert pkgutil.resolve_name(name) is not None


def test_the_commands_of_the_page_run(theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those in the block, in the folders that it names; those within sentences at least parse."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(theirs, "checkpoints/my_expert")
    shutil.move("checkpoints/my_expert/tokenizer", "data/tokenizers/mine")
    Path("papers").mkdir()
    Path("papers/one.txt").write_text(lessons.text(3))
    for line in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)[0].splitlines():
        assert run(*shlex.split(line)[1:]).code == 0, line
    for line in re.findall(r"`(minimac-mlx \w+ [^`]+)`", PAGE):
        arguments = shlex.split(line)[1:]
        cli.cli.commands[arguments[0]].make_context(arguments[0], arguments[1:])


# -- a folder that the original itself wrote -----------------------------------------

SEED = os.environ.get("MINIMAC_SEED_CHECKPOINT")


@pytest.mark.skipif(not SEED, reason="MINIMAC_SEED_CHECKPOINT names no folder that the original wrote")
def test_its_own_logits_tokens_and_ids(tmp_path: Path) -> None:
    source = Path(str(SEED))
    assert run("convert", source, tmp_path / "model").code == 0
    expected = np.load(source / "expected.npz")
    learner = ContinualLearner.from_checkpoint(tmp_path / "model")
    ids = mx.array(expected["input_ids"].astype(np.int32))
    assert np.abs(np.array(learner.model(ids)) - expected["logits"]).max() < 1e-5
    greedy = expected["greedy_ids"][0].tolist()
    found = greedy[: len(greedy) - 12]
    while len(found) < len(greedy):
        found.append(int(mx.argmax(learner.model(mx.array([found]))[0, -1]).item()))
    assert found == greedy
    learner.set_adapter("main")
    assert np.abs(np.array(learner.model(ids)) - expected["logits_with_adapter"]).max() < 1e-5
    for case in json.loads((source / "tokenizer_expected.json").read_text()):
        assert learner.tokenizer.encode(case["text"]) == case["ids"]
    lesson = learner.learn_from_text(lessons.text(0), budget=Budget(steps=6))
    assert lesson.version == "v0002"
    assert lesson.replayed_tokens > 0
