"""The bench command: how it counts and compares, what it reads of a Mac and predicts for it, and benchmarks, small.

No figure of a machine's speed is tested. What only a Mac prints is read from samples written by hand.
"""

import dataclasses
import importlib
import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from lessons import tiny_base, tiny_tokenizer

import cli
from benchmarks import (
    BENCH,
    bench,
    cases,
    child,
    curves,
    decode,
    footprint,
    harness,
    learn,
    mac,
    parts,
    predictions,
    sides,
    startup,
    tokens,
    train,
)
from benchmarks.harness import OURS, Options, alternate, beside, row, spread
from mlx_impl import chips, decoder, kernels
from mlx_impl.arrays import flatten
from mlx_impl.config import ContinualLearningConfig, ModelConfig
from mlx_impl.device import compute_dtype
from mlx_impl.errors import MiniMacError
from mlx_impl.model import ContinualLLM
from mlx_impl.plots import plot_panels
from mlx_impl.readers import text_document
from mlx_impl.results import bench_text
from mlx_impl.store import Store

PROFILER = """{"SPDisplaysDataType": [{"_name": "Apple M3 Max", "spdisplays_mtlgpufamilysupport": "spdisplays_metal3",
  "sppci_bus": "spdisplays_builtin", "sppci_cores": "30", "sppci_model": "Apple M3 Max"}]}"""
REGISTRY = """+-o AGXAcceleratorG13X  <class AGXAcceleratorG13X, id 0x100000422, registered, matched, active>
    {
      "model" = "Apple M1 Pro"
      "gpu-core-count" = 16
    }"""
POWER = """*** Sampled system activity (Mon Jun  1 12:00:00 2026 -0700) (1003.12ms elapsed) ***

**** Processor usage ****
E-Cluster HW active frequency: 1020 MHz
CPU Power: 1500 mW
GPU Power: 9000 mW
ANE Power: 0 mW
Combined Power (CPU + GPU + ANE): 10500 mW

**** GPU usage ****
GPU HW active residency:  98.00%
GPU Power: 9000 mW
*** Sampled system activity (Mon Jun  1 12:00:01 2026 -0700) (1002.90ms elapsed) ***
CPU Power: 2500 mW
GPU Power: 12000 mW
Combined Power (CPU + GPU + ANE): 14500 mW
GPU Power: 12000 mW
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("bench"), tiny_tokenizer())


def quick(model: Path, **changes: Any) -> Options:
    return Options(**{"model": model, "repetitions": 2, "quick": True, **changes})


# -- counting


def test_sides_take_turns_and_every_other_round_goes_backwards() -> None:
    called: list[str] = []

    def side(name: str) -> harness.Seconds:
        return lambda: called.append(name) or float(len(called))  # type: ignore[func-returns-value]

    values = alternate({"a": side("a"), "b": side("b")}, repetitions=3, warmups=1)
    assert "".join(called) == "abbaabba"
    assert values == {"a": [4.0, 5.0, 8.0], "b": [3.0, 6.0, 7.0]}


def test_ratios_are_those_of_neighbours() -> None:
    """A machine that becomes ten times slower on the way changes no ratio."""
    drift = np.array([1.0, 1.0, 10.0, 10.0, 10.0])
    by_time = beside({OURS: list(2 * drift), "peer": list(3 * drift)}, rates=False)
    assert by_time["times_better"]["peer"]["median"] == pytest.approx(1.5)
    assert by_time["times_better"]["peer"]["quartiles"] == pytest.approx([1.5, 1.5])
    by_rate = beside({OURS: list(2 / drift), "peer": list(3 / drift)}, rates=True)
    assert by_rate["times_better"]["peer"]["median"] == pytest.approx(2 / 3)
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0]) == {"median": 3.0, "quartiles": [2.0, 4.0], "repetitions": 5}


def test_a_row_says_whether_its_goal_is_met() -> None:
    assert row("x", 1.6, "times", 1.6) == {
        "figure": "x",
        "value": 1.6,
        "unit": "times",
        "goal": "at least 1.6",
        "met": True,
    }
    assert row("x", 0.7, "times", 0.6, at_most=True)["met"] is False
    assert (row("x", None, "s", 1.0)["met"], row("x", 1.0, "s")["met"]) == (None, None)


def test_a_peer_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "version", lambda package: None if package == "torch" else "9.9")
    found = harness.peers("mlx-lm", "torch")
    assert found == {"mlx-lm": {"version": "9.9"}, "torch": {"absent": harness.PEERS["torch"]}}


def test_without_torch_the_step_is_still_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "version", lambda package: None)
    case = parts.cases(Options(quick=True), Path())[0]
    before = {name: np.array(array) for name, array in _arrays(case.model)}
    seconds = train.full_step(Options(quick=True, repetitions=1), case)["seconds"]
    assert seconds[OURS]["median"] > 0
    assert seconds["times_better"] == {}
    _assert_holds(case.model, before)


# -- a Mac


def test_cores_of_the_gpu() -> None:
    assert mac.cores_of_profiler(PROFILER) == 30
    assert mac.cores_of_registry(REGISTRY) == 16
    for text in ("", "{}", '{"SPDisplaysDataType": [{}]}', "no JSON", '{"SPDisplaysDataType": [{"sppci_cores": "?"}]}'):
        assert mac.cores_of_profiler(text) is None
    assert mac.cores_of_registry("no such thing") is None


def test_a_mac_is_described_by_what_its_programs_say() -> None:
    said = {mac.PROFILER: PROFILER}
    found = mac.describe(said.get, "darwin", "Apple M3 Max")  # type: ignore[arg-type]
    assert found == {"chip": "Apple M3 Max", "gpu_cores": 30, "bandwidth_gb_s": 300.0}
    fallen_back = mac.describe({mac.REGISTRY: REGISTRY}.get, "darwin", "Apple M1 Pro")  # type: ignore[arg-type]
    assert fallen_back == {"chip": "Apple M1 Pro", "gpu_cores": 16, "bandwidth_gb_s": 200.0}
    unknown = mac.describe(lambda command: None, "darwin", "Apple M9 Max")
    assert unknown == {"chip": "Apple M9 Max", "gpu_cores": None, "bandwidth_gb_s": None}
    assert mac.describe(lambda command: None, "linux") is None


def test_power_is_the_mean_of_the_samples() -> None:
    assert mac.watts_of(POWER) == {"cpu": 2.0, "gpu": 10.5, "together": 12.5}
    assert mac.watts_of("powermetrics must be invoked as the superuser\n") is None


def test_power_is_measured_while_something_runs(tmp_path: Path) -> None:
    meter = tmp_path / "meter.py"
    meter.write_text(f"import sys, time\ntime.sleep(0.2)\nassert sys.argv[1:] == ['5']\nprint({POWER!r})\n")
    done: list[int] = []
    found = mac.watts_while(lambda: done.append(1), command=(sys.executable, str(meter)), platform="darwin")
    assert found == {"cpu": 2.0, "gpu": 10.5, "together": 12.5}
    assert done
    meter.write_text("raise SystemExit('sudo: a password is required')")
    assert mac.watts_while(lambda: None, command=(sys.executable, str(meter)), platform="darwin") is None
    assert mac.watts_while(lambda: None, command=("/no/such/program",), platform="darwin") is None
    assert mac.watts_while(lambda: pytest.fail("is not to run"), platform="linux") is None


def test_what_a_program_prints() -> None:
    assert mac.output([sys.executable, "-c", "print('yes')"]) == "yes\n"
    assert mac.output([sys.executable, "-c", "raise SystemExit(1)"]) is None
    assert mac.output(["/no/such/program"]) is None


# -- predictions


def test_every_chip_from_m1_to_m4_is_there() -> None:
    names = {chip.name for chip in chips.CHIPS}
    assert names == {f"Apple M{n}{k}" for n in range(1, 5) for k in ("", " Pro", " Max", " Ultra")} - {"Apple M4 Ultra"}
    assert chips.find("Apple M1", 8) == chips.find("Apple M1") == chips.Chip("Apple M1", (7, 8), 68.25)


def test_where_the_cores_decide_they_are_asked_for() -> None:
    bandwidths = [getattr(chips.find("Apple M4 Max", cores), "bandwidth", None) for cores in (32, 40, None)]
    assert bandwidths == [410.0, 546.0, None]
    assert chips.find("Intel Core i9") is None


def test_bytes_of_a_token_are_counted_from_the_arrays() -> None:
    config = ModelConfig(500, 64, 2, 4, 2, 96, 128)
    tied = ContinualLLM(config)
    weights = sum(array.size for _, array in _arrays(tied))
    assert chips.bytes_per_token(config) == 2 * weights
    cache = tied.make_cache()
    tied(mx.zeros((1, 10), mx.int32), cache)
    held = 2 * len(cache) * 10 * 2 * 16  # keys and values, layers, tokens, heads, width
    assert chips.bytes_per_token(config, 32, 10, 4) == 4 * (weights + held)
    untied = ModelConfig(500, 64, 2, 4, 2, 96, 128, tie_embeddings=False)
    assert chips.bytes_per_token(untied) == 2 * weights
    assert chips.ceiling(100.0, 2 * weights) == pytest.approx(100e9 / (2 * weights))


def _arrays(model: Any) -> Any:
    return flatten(model.parameters()).items()


def _assert_holds(model: Any, before: dict[str, np.ndarray]) -> None:
    """The very numbers, and no arrays of a compiled function's tracing."""
    assert {name for name, _ in _arrays(model)} == set(before)
    for name, array in _arrays(model):
        assert (np.array(array) == before[name]).all(), name


def test_bytes_of_packed_weights_are_those_in_memory() -> None:
    config = ModelConfig(512, 64, 2, 4, 2, 128, 128)
    width = compute_dtype().size
    for tied in (True, False):
        model = ContinualLLM(dataclasses.replace(config, tie_embeddings=tied))
        model.set_dtype(compute_dtype())
        assert tokens.bytes_read(model, 10) == chips.bytes_per_token(model.config, 8.0 * width, 10, width)
    dense = tokens.bytes_read(model, 0)
    nn.quantize(model, group_size=64, bits=4)
    assert 0.1 < tokens.bytes_read(model, 0) / dense * width / 4 < 0.2  # 4 bits and the scales of 32, but the norms


def test_the_page_is_what_the_table_says() -> None:
    page = predictions.PAGE.read_text(encoding="utf-8")
    assert page == predictions.page()
    assert predictions.SMOLLM2.num_parameters() == 134_515_008
    assert "Predictions, not measurements" in page
    assert page.count("\n| M") == len(chips.CHIPS) + 1
    speed = 68.25e9 / (2 * 134_515_008 + 2 * 2 * 30 * 3 * 64 * 128)
    assert f"| M1 | 7 or 8 | 68.25 | {speed:,.0f} |" in page


# -- sides and parts


def test_useful_tokens_are_those_that_are_text() -> None:
    documents = [[1] * 5, [2] * 9, [3] * 40, [4] * 70]
    batches = sides.peer_batches(documents, 2, 64, 2, seed=0)
    assert sorted(sides.useful(batch) for batch in batches) == [4 + 8, 39 + 63]  # the last is cut at 64
    assert {batch[0].shape[1] for batch in batches} == {33, 64}


def test_our_steps_go_on_where_they_stopped(model: Path) -> None:
    config = ContinualLearningConfig(batch_size=1, seq_len=16)
    taught = sides.taught_model(model, config)
    ours = sides.OurSteps(taught, config, footprint._text(400, taught.vocab_size))
    assert ours.run(2)[1] == 2 * 16
    assert ours.run(3)[1] == 3 * 16
    assert ours.session.step == 5


def test_a_step_of_ours_and_of_mlx_lm_start_from_the_same_loss(model: Path) -> None:
    config = ContinualLearningConfig(batch_size=1, seq_len=16)
    ids = mx.array([footprint._random(20, 300).tolist()])
    ours, theirs = sides.taught_model(model, config)(ids), sides.peer_model(model, config)(ids)
    assert mx.abs(ours - theirs).max().item() < 1e-4  # type: ignore[operator]


def test_mlx_lm_trains_and_what_comes_between_is_not_counted(model: Path) -> None:
    network = sides.peer_model(model, ContinualLearningConfig())
    batches = sides.peer_batches([footprint._random(30, 300, n).tolist() for n in range(4)], 2, 64, 3, 0)
    seen: list[int] = []
    seconds = sides.train_peer(network, batches, 3, 1e-2, lambda step, taken: seen.append(step))
    assert seen == [1, 2, 3]
    assert len(seconds) == 3
    assert min(seconds) > 0
    assert any(mx.abs(array).max().item() > 0 for name, array in _arrays(network) if name.endswith("lora_b"))


def test_batches_that_are_measured_stand_for_the_text() -> None:
    """Few long documents among many short ones: what is padded depends on which are drawn."""
    lengths = np.random.default_rng(0).geometric(0.02, 400).clip(2, 500)
    documents = [[1] * int(length) for length in lengths]
    every = sides.all_batches(documents, 4, 512)
    assert sum(len(batch) for batch, _ in every) == 400
    turns = sides.spaced_turns(every, 4, 5)
    assert [len(turn) for turn in turns] == [4] * 5
    chosen = [batch for turn in turns for batch in turn]
    assert sides.useful_share(chosen) == pytest.approx(sides.useful_share(every), abs=0.01)
    means = [np.mean([sides.useful(batch) for batch in batches]) for batches in (every, chosen, *turns)]
    assert means[1] == pytest.approx(means[0], rel=0.05)
    assert max(means[2:]) < 1.5 * min(means[2:])
    assert len(sides.spaced_turns(every[:2], 3, 2)) == 2  # some come twice


def test_operations_are_those_of_the_products() -> None:
    config = ModelConfig(500, 64, 1, 4, 2, 96, 128)
    found = parts.flops(config, 2, 8)
    tokens_, q, kv = 16, 64, 32
    assert found["mlp"] == 3 * 2 * tokens_ * 3 * 64 * 96
    assert found["head and loss"] == 3 * 2 * tokens_ * 64 * 500
    assert found["attention"] == 3 * (2 * tokens_ * 64 * (2 * q + 2 * kv) + 2 * 2 * 2 * 8 * 8 * q)


def test_scores_that_are_not_computed_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "on_cpu", lambda: True)
    assert parts.scored(512) == 0.5625 * 512 * 512
    assert parts.scored(100) == 64 * 64 + 36 * 100
    monkeypatch.setattr(kernels, "on_cpu", lambda: False)
    assert parts.scored(512) == 512 * 512


def test_parts_are_those_of_the_model_and_leave_it_alone() -> None:
    case = parts.cases(Options(quick=True), Path())[0]
    before = {name: np.array(array) for name, array in _arrays(case.model)}
    found = parts.profile(case, 1)
    assert set(found["parts"]) == {"attention", "mlp", "norm", "head and loss", "embedding"}
    assert 0 < found["share_of_matmul_limit"]["median"] < 1
    shares = [part["share_of_time"] for part in found["parts"].values()]
    assert found["rest_share_of_time"] == pytest.approx(1 - sum(shares))
    _assert_holds(case.model, before)
    found = parts.lora_profile(case, 1)
    assert set(found["share_of_step"]) == {"attention", "mlp", "adapters", "norm", "head and loss", "optimizer"}
    assert found["rest_share_of_step"] == pytest.approx(1 - sum(found["share_of_step"].values()))
    _assert_holds(case.model, before)


def test_the_moment_of_the_mark_is_interpolated() -> None:
    assert learn.crossing([(0.0, 4.0), (10.0, 3.0)], 3.25) == pytest.approx(7.5)
    assert learn.crossing([(0.0, 3.0), (10.0, 3.0)], 3.0) == 10.0


def test_mlx_lm_stops_at_the_mark(model: Path) -> None:
    plan = learn.Plan(256, 128, (1e-2,), (1,), 0)
    _, setup = learn.prepared(quick(model), model, plan)
    start = learn.loss(sides.peer_model(model, ContinualLearningConfig()), setup.heldout)
    never = learn.to_reach(setup, 0.0, 1, 1e-2, seed=0)  # the first, so that what is compiled once is in it
    assert not never["reached"]
    easy = learn.to_reach(setup, start - 0.05, 1, 1e-2, seed=0)
    assert easy["reached"]
    assert 0 < easy["seconds"] < never["seconds"]
    assert learn.to_reach(setup, 0.0, 1, 1e-2, seed=0, at_most=0.0)["seconds"] < never["seconds"]
    assert 0 < never["loss"] < start
    assert never["first_steps"]["steps"] >= 1
    assert 0 < never["first_steps"]["seconds"] <= never["seconds"]


@pytest.mark.parametrize(
    ("fastest", "beyond"),
    [(5e-4, []), (2.5e-4, [1.25e-4]), (1e-5, [1.25e-4, 6.25e-5]), (1.0, [2e-3, 4e-3])],
)
def test_tuning_goes_on_where_the_best_is_at_an_edge(fastest: float, beyond: list[float]) -> None:
    """For each number of rows by itself: the one may like lower rates than the other."""
    limits: list[float] = []

    def attempt(rows: int, rate: float, at_most: float) -> dict[str, Any]:
        limits.append(at_most)
        return {"seconds": rows * (10 + abs(math.log(rate / fastest))), "loss": 1.0, "reached": True}

    tried = learn.tuned(learn.Plan(1, 1, learn.RATES, (4, 1), 2), attempt)
    grid = [(rows, rate) for rows in (4, 1) for rate in learn.RATES]
    assert list(tried) == grid + [(rows, rate) for rows in (4, 1) for rate in beyond]
    assert limits[0] == math.inf
    assert limits == sorted(limits, reverse=True), "none is given more time than the best so far needed"


def test_a_setting_that_reaches_the_mark_is_the_best() -> None:
    far = {"seconds": 1.0, "loss": 2.0, "reached": False}
    near = {"seconds": 9.0, "loss": 1.5, "reached": False}
    there = {"seconds": 20.0, "loss": 1.9, "reached": True}
    assert learn.best({(1, 1e-3): far, (1, 2e-3): near, (4, 1e-3): there}) == (4, 1e-3)
    assert learn.best({(1, 1e-3): far, (1, 2e-3): near}) == (1, 2e-3)


def test_every_turn_begins_when_the_one_before_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_lm.generate import generation_stream

    waited: list[Any] = []
    monkeypatch.setattr(mx, "synchronize", lambda stream=None: waited.append(stream))
    cases.settle()
    assert waited == [generation_stream, None]
    case = cases.drawn("tiny", 500)
    prompt = cases.random_prompt(500, 20)
    for turns in (tokens._decoding(case, prompt, 2), cases.prefilling(case, prompt), decode.decoding(case, prompt, 2)):
        for name, turn in turns.items():
            waited.clear()
            assert turn() > 0
            assert waited == [generation_stream, None], name


def test_a_first_prompt_finds_nothing_fused() -> None:
    case = cases.drawn("tiny", 500)
    reader: Any = decoder.opened(case.model)
    reader.fuse()
    cases.prefilling(case, cases.random_prompt(500, 20))[OURS]()
    assert isinstance(case.model, ContinualLLM)
    assert case.model.reader is not reader
    assert case.model.reader._fused == 0


def test_memory_of_decoding_counts_what_is_fused() -> None:
    source = {"preset": "tiny", "vocabulary": 500}
    before, after = (tokens.grown(source, OURS, 16, new) for new in (4, tokens.FUSED))
    model = cases.drawn(**source).model
    names = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    fused = sum(array.nbytes for name, array in _arrays(model) if name.split(".")[-2] in names)
    assert after - before == pytest.approx(fused, rel=0.2)
    assert 0 < tokens.grown(source, "mlx-lm", 16, tokens.FUSED) < fused


def test_a_switch_is_the_learners_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    require = Store.require
    monkeypatch.setattr(Store, "require", lambda self, domain: asked.append(domain) or require(self, domain))  # type: ignore[func-returns-value]
    case = cases.drawn("tiny", 500)
    before = {name: np.array(array) for name, array in _arrays(case.model)}
    found = decode.switching(Options(quick=True), case)
    assert set(found["switching_ms"]) == {"domain_to_domain", "domain_to_base", "base_to_domain"}
    assert all(taken["repetitions"] == decode.SWITCHES for taken in found["switching_ms"].values())
    assert asked.count("other-000") > 2 * decode.SWITCHES
    assert asked.count("other-001") > decode.SWITCHES
    _assert_holds(case.model, before)


def test_both_decoders_take_the_same_prompts() -> None:
    case = cases.drawn("tiny", 500)
    prompt = list(range(20))
    ours, theirs = list(cases.ours(case.model)(prompt, 6)), list(cases.theirs(case.peer)(prompt, 6))
    assert len(ours) == 6
    assert ours == theirs


def test_the_reference_computes_where_its_tokens_are() -> None:
    """MPS has no float64, and nobody here has MPS: a device without any memory shows what is made elsewhere."""
    import torch

    from torch_ref.model import ContinualLLM as Reference

    reference = Reference(ModelConfig(500, 64, 2, 4, 2, 96, 128)).to("meta")
    logits = reference(torch.zeros((2, 7), dtype=torch.int64, device="meta"))
    assert (logits.device.type, tuple(logits.shape)) == ("meta", (2, 7, 500))


def test_the_references_moments_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    import torch_ref.train
    from torch_ref.model import ContinualLLM as Reference

    config = ModelConfig(60, 32, 1, 2, 2, 48, 64)
    settings: dict[str, Any] = {"weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}
    batch = torch.arange(2 * 9).reshape(2, 9), torch.ones(2, 8)
    torch.manual_seed(0)
    one, two = Reference(config), Reference(config)
    two.load_state_dict(one.state_dict())
    expected = torch_ref.train.train_steps(one, [[batch]] * 3, [1e-2] * 3, max_grad_norm=1.0, **settings)
    optimizer = torch_ref.train.AdamW(list(two.parameters()), 0.0, **settings)
    step = partial(torch_ref.train.train_steps, two, [[batch]], [1e-2], max_grad_norm=1.0, **settings)
    assert [step(optimizer=optimizer)[0] for _ in range(3)] == expected
    side = train.torch_step(ContinualLLM(config), np.zeros((1, 9), np.int64), "cpu")
    monkeypatch.setattr(torch_ref.train, "AdamW", None)  # a step that made its own would fail
    assert side() > 0


# -- processes


def test_a_function_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "asked.py").write_text(
        "import os\nfrom benchmarks import child\n"
        "def tell(number):\n"
        "    print('noise')\n"
        "    return [2 * number, os.getpid(), child.resident(), child.peak_resident()]\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    tell = importlib.import_module("asked").tell
    twice, process, resident, peak = child.call(tell, number=21)
    assert twice == 42
    assert process != os.getpid()
    assert 1e6 < resident <= peak
    with pytest.raises(MiniMacError, match=r"asked\.tell ended with code 1 in its process"):
        child.call(tell, letter="a")


def test_memory_is_looked_at_over_the_steps() -> None:
    assert len(footprint.lesson_memory(50)) == footprint.SAMPLES
    assert len(footprint.pretraining_memory(50)) == footprint.SAMPLES


def test_a_peak_that_cannot_begin_anew_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    side = {"mlx_peak": 4, "process_growth": 10}
    monkeypatch.setattr(child, "call", lambda function, **given: side)
    assert footprint.peaks(Path(), quick=True)["process_growth"] == 1.0
    monkeypatch.setattr(child, "reset_peak", lambda: False)
    side = {**footprint._watched(lambda: None), "mlx_peak": 4}
    assert side["process_growth"] is None
    assert footprint.peaks(Path(), quick=True)["process_growth"] is None


def test_mlx_lms_command_runs_with_our_blas(tmp_path: Path) -> None:
    (tmp_path / "mlx_lm").mkdir()
    (tmp_path / "mlx_lm" / "__init__.py").touch()
    (tmp_path / "mlx_lm" / "__main__.py").write_text("import sys; print('mlx_impl' in sys.modules, sys.argv[1:])")
    path = os.pathsep.join([str(tmp_path), str(startup.ROOT)])
    command = [sys.executable, "-c", startup.MLX_LM, "generate", "--x"]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "True ['generate', '--x']\n"


def test_seconds_of_a_program() -> None:
    waits = [sys.executable, "-c", "import time; print('x', flush=True); time.sleep(0.5)"]
    assert startup.seconds_of(waits) < startup.seconds_of(waits, to_the_end=True)
    with pytest.raises(MiniMacError, match="ended with code 3: why"):
        startup.seconds_of([sys.executable, "-c", "import sys; print('why', file=sys.stderr); sys.exit(3)"])


# -- the command


def test_every_name_is_a_benchmark() -> None:
    for name in BENCH:
        assert callable(importlib.import_module(f"benchmarks.{name}").measure)


def run(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return int(ended.value.code or 0)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process what has one of its own: starting that takes seconds."""
    monkeypatch.setattr(child, "call", lambda function, **given: json.loads(json.dumps(function(**given))))


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("name", ["tokens", "route"])
def test_the_command_writes_json_and_a_table(
    name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "folder"
    arguments = ["bench", name, "--quick", "--repetitions", "2", "-m", str(model), "--out", str(out)]
    assert run(arguments) == 0
    printed = capsys.readouterr().out
    (written,) = out.iterdir()
    assert written.name == f"bench_{name}_quick.json"
    record = json.loads(written.read_text(encoding="utf-8"))
    assert {"benchmark", "date", "command", "commit", "machine", "mac", "quick", "model", "figures"} <= set(record)
    assert {"chip", "cores", "memory_bytes", "system", "dtype", "packages"} <= set(record["machine"])
    assert record["quick"] is True
    for figure in record["figures"]:
        assert set(figure) == {"figure", "value", "unit", "goal", "met"}
        assert math.isfinite(figure["value"])
        assert figure["figure"].split()[0] in printed
    assert str(written) in " ".join(printed.split())
    assert "say nothing but that it works" in printed
    assert max(map(len, printed.splitlines()[1:-1])) <= 100


class Interrupted:
    """A benchmark of two parts, whose second one fails at first."""

    def __init__(self) -> None:
        self.measured: list[str] = []
        self.fails = True

    def measure(self, options: Options) -> dict[str, Any]:
        return {"figures": [], "parts": [options.once(name, partial(self.part, name)) for name in ("one", "two")]}

    def part(self, name: str) -> dict[str, Any]:
        self.measured.append(name)
        if name == "two" and self.fails:
            raise ValueError("no more")
        return {"of": name, "seconds": (math.nan, 1.0)}


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Interrupted:
    module = Interrupted()
    monkeypatch.setattr(bench, "BENCH", ("interrupted",))
    monkeypatch.setitem(sys.modules, "benchmarks.interrupted", module)
    return module


def test_what_was_interrupted_goes_on(
    interrupted: Interrupted, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="no more"):
        bench.run("interrupted", quick(model), tmp_path)
    interrupted.fails = False
    commits = iter(["at the start", "at the end"])
    monkeypatch.setattr(bench, "commit", partial(next, commits))
    record = bench.run("interrupted", quick(model), tmp_path)
    assert interrupted.measured == ["one", "two", "one", "two"], "another commit measures anew"
    assert record["commit"] == "at the start"
    (tmp_path / "bench_interrupted_quick.json").unlink()

    monkeypatch.setattr(bench, "commit", lambda: "another")
    interrupted.fails = True
    with pytest.raises(ValueError, match="no more"):
        bench.run("interrupted", quick(model), tmp_path)
    interrupted.fails = False
    interrupted.measured.clear()
    record = bench.run("interrupted", quick(model), tmp_path)
    assert interrupted.measured == ["two"]
    assert record["resumed"] == 1
    assert record["parts"] == [{"of": name, "seconds": [None, 1.0]} for name in ("one", "two")]
    assert not (tmp_path / "work" / "interrupted").exists()
    assert bench.run("interrupted", quick(model), tmp_path)["resumed"] == 0, "what is finished is measured anew"


@pytest.mark.usefixtures("interrupted")
def test_one_that_fails_does_not_end_all(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mlx_impl.commands.machine.BENCH", ("interrupted", "route"))
    out = tmp_path / "out"
    arguments = ["bench", "all", "--quick", "--repetitions", "1", "-m", str(model), "--out", str(out), "--json"]
    assert run(arguments) == 1
    printed = capsys.readouterr()
    record = json.loads(printed.out)
    assert record["failed"] == {"interrupted": "ValueError: no more"}
    assert [one["benchmark"] for one in record["benchmarks"]] == ["bench_route"]
    assert (out / "bench_route_quick.json").is_file()
    assert "failed: interrupted: ValueError: no more" in printed.err


@pytest.mark.usefixtures("in_process")
def test_the_record_of_tokens_has_spreads_of_both_sides(model: Path, tmp_path: Path) -> None:
    record = bench.run("tokens", quick(model), tmp_path)
    decoding = record["models"]["tiny"]["decode_16"]["tokens_per_second"]
    for side in (OURS, "mlx-lm"):
        low, high = decoding[side]["quartiles"]
        assert 0 < low <= decoding[side]["median"] <= high
        assert decoding[side]["repetitions"] == 2
    assert record["peers"]["mlx-lm"]["version"]
    assert record["models"]["tiny"]["watts"] is None or sys.platform == "darwin"
    goals = {figure["figure"]: figure["goal"] for figure in record["figures"]}
    assert goals["decode, model, 16 tokens of context, against mlx-lm"] == "at least 1.6"
    assert goals["decode, tiny, 16 tokens of context, against mlx-lm"] == "at least 1.5"
    assert goals["switching the domain, tiny"] == "at most 5"
    assert goals["primitives of a token, tiny, of mlx-lm's"] == "at most 0.75"
    assert goals["prefill, tiny, 32 tokens, against mlx-lm"] == "at least 1.1"


@pytest.mark.usefixtures("in_process")
def test_curves_are_drawn(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.curves.REPETITIONS", 1)
    record = bench.run("curves", quick(model, repetitions=1), tmp_path)
    assert [Path(path).name for path in record["written"]] == ["bench_curves_quick.json", "bench_curves_quick.png"]
    assert Path(record["written"][1]).read_bytes().startswith(b"\x89PNG")
    for name, curve in record["curves"].items():
        assert len(curve) == 2 + (name == curves.LESSON)
        assert all(point["bytes"] >= 0 and min(point.values()) >= 0 for point in curve.values())
    assert set(record["curves"]["first lesson by domains"]) == {"1", "3"}
    assert record["figures"][0]["figure"] == "lesson by lessons before: s at 3 against 2"
    assert record["figures"][1]["figure"] == "first lesson by domains: s at 3 against 1"


def test_a_lesson_that_is_measured_again_is_taken_back(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taught: list[int] = []

    def noted(learner: Any, texts: Any, domain: str) -> float:
        seconds = taught_now(learner, texts, domain)
        taught.append(len(learner.store.history(domain)))
        return seconds

    taught_now = curves._taught
    monkeypatch.setattr(curves, "_taught", noted)
    monkeypatch.setattr(curves, "REPETITIONS", 3)
    curves.lessons_of_one_domain(str(model), (1, 3))
    assert taught == [1, 1, 1, 1, 2, 3, 3, 3]  # the first warms up


def test_lora_on_documents_of_unlike_length(model: Path) -> None:
    documents = [text_document("a few words " * (1 + 3 * n), str(n)) for n in range(12)]
    found = train.lora_on(quick(model), model, documents)
    assert [found["useful_tokens_per_second"][side]["repetitions"] for side in (OURS, "mlx-lm")] == [2, 2]
    assert 0 < found["mlx_lm_useful_share"]["measured"] <= 1
    assert 0 < found["mlx_lm_useful_share"]["all"] < 1
    assert found["mlx_lm_first_steps"]["shapes"] > 1


def test_absent_peers_and_missed_goals_are_told() -> None:
    record = {
        "benchmark": "bench_train",
        "model": "m",
        "machine": {"chip": "Apple M3", "dtype": "bfloat16"},
        "quick": False,
        "peers": {"mlx-lm": {"version": "1"}, "torch": {"absent": "pip install torch"}},
        "figures": [
            row("slow thing", 0.5, "times", 2.0),
            row("not measured", None, "s"),
            row("good", 3.0, "times", 2.0),
        ],
        "written": ["a.json"],
    }
    told = bench_text(record)
    assert "train: m on Apple M3, bfloat16\n" in told
    assert "0.5 times at least 2: not met" in told
    assert "3 times at least 2: met" in told
    assert "not compared with torch (pip install torch)" in told
    assert "- s" in told


def test_a_folder_of_results_is_a_table(tmp_path: Path) -> None:
    figures = [row("slow thing", 0.5, "times", 2.0), row("none", None, "s")]
    for name in ("bench_train.json", "bench_train_quick.json"):
        (tmp_path / name).write_text(json.dumps({"figures": figures}))
    head, _, *lines = bench.table(tmp_path).splitlines()
    assert head == "| figure | measured | goal | |"
    assert lines == ["| slow thing | 0.5 times | at least 2 | not met |", "| none |  |  |  |"]
    assert bench.table(tmp_path, goals=True).splitlines()[2:] == lines[:1]


def test_panels_of_one_point_and_of_many(tmp_path: Path) -> None:
    panels = [("a", "s", [(1.0, 2.0), (100.0, 3.0)]), ("b", "GB", [(5.0, 0.0)]), ("c", "ms", [(1.0, 1.0)])]
    plot_panels(panels, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
