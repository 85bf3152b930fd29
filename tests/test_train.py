"""Pretraining: resume to the bit, in a process that was killed and in one that was interrupted; what is kept; refusals.

Tiny models with dropout and accumulation, so that random state and microbatches are part of what must be restored.
Bit-identity has no tolerance.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from pydoc_data import topics
from typing import Any

import mlx.core as mx
import pytest

from mlx_impl import checkpoint, modeldir, recipe, train
from mlx_impl.arrays import flatten
from mlx_impl.config import PRESETS, ModelConfig, TrainConfig
from mlx_impl.errors import DamagedFileError, InputError, LockedError, NonFiniteLossError
from mlx_impl.model import ContinualLLM
from mlx_impl.plots import plot_losses
from mlx_impl.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
TINY = ModelConfig(d_model=32, num_layers=2, num_query_heads=4, num_kv_heads=2, d_ff=64, max_seq_len=64, dropout=0.1)
SHORT = TrainConfig(
    steps=8, batch_size=2, grad_accum=2, seq_len=32, lr=1e-3, eval_every=3, save_every=2, eval_tokens=300
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "reference.txt"
    path.write_text("\n\n".join(topics.topics[name] for name in sorted(topics.topics)[:12]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.train([text.read_text(encoding="utf-8")], 400).save(folder)
    return folder


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIMAC_HOME", str(tmp_path / "home"))


@pytest.fixture
def request_for(text: Path, tokenizer: Path) -> Callable[..., recipe.Request]:
    def build(out: Path, **changes: Any) -> recipe.Request:
        return recipe.Request((text,), out, replace(SHORT, **changes), TINY, tokenizer=tokenizer)

    return build


def weights(folder: Path) -> dict[str, bytes]:
    """Everything that a run leaves, weights, moments and figures, as bytes."""
    state = checkpoint.latest_state(folder / "trainer")
    files = [*state.glob("*.safetensors"), folder / "model.safetensors", folder / "metrics.jsonl"]
    return {path.name: path.read_bytes() for path in files}


class Stop(Exception):
    """Ends a run from its report, as a crash would."""


def stop_after(step: int) -> Callable[[dict[str, Any]], None]:
    def report(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == step:
            raise Stop

    return report


def silent(event: dict[str, Any]) -> None:
    """Report nothing."""


@pytest.mark.parametrize("compiled", [True, False])
def test_a_resumed_run_is_the_run_itself(
    tmp_path: Path, request_for: Callable[..., recipe.Request], monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    monkeypatch.setattr(train, "can_compile", lambda: compiled)
    recipe.start(request_for(tmp_path / "whole"), silent)
    with pytest.raises(Stop):
        recipe.start(request_for(tmp_path / "parts"), stop_after(3))  # between two saved states
    with pytest.raises(Stop):
        recipe.resume(tmp_path / "parts", {}, stop_after(6))
    recipe.resume(tmp_path / "parts", {}, silent)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert sorted(whole) == ["metrics.jsonl", "model.safetensors", "optimizer.safetensors", "parameters.safetensors"]
    assert [name for name in whole if whole[name] != parts[name]] == []


def test_a_new_length_stays_with_the_run(tmp_path: Path, request_for: Callable[..., recipe.Request]) -> None:
    """Asked for when the run was over, it is not asked for again by whoever resumes after a stop."""
    recipe.start(request_for(tmp_path / "run", steps=4), silent)
    with pytest.raises(Stop):
        recipe.resume(tmp_path / "run", {"steps": 8}, stop_after(6))
    assert recipe.resume(tmp_path / "run", {}, silent).step == 8


@pytest.mark.parametrize("before", [{"steps": 1}, {"steps": None, "minutes": 1e-4}])
def test_epochs_take_the_place_of_another_length(
    tmp_path: Path, request_for: Callable[..., recipe.Request], before: dict[str, Any]
) -> None:
    asked = request_for(tmp_path / "run", eval_every=1000, **before)
    assert recipe.start(asked, silent).step < 9
    events: list[dict[str, Any]] = []
    progress = recipe.resume(tmp_path / "run", {"epochs": 0.1}, events.append)
    plan = next(event for event in events if event["event"] == "plan")
    assert progress.step == plan["steps"] > 8


def test_the_plan_of_a_resumed_run_is_what_is_left(tmp_path: Path, request_for: Callable[..., recipe.Request]) -> None:
    recipe.start(request_for(tmp_path / "run", steps=2), silent)
    for steps, left in ((2, False), (3, True)):
        events: list[dict[str, Any]] = []
        recipe.resume(tmp_path / "run", {"steps": steps}, events.append)
        plan = next(event for event in events if event["event"] == "plan")
        assert (plan["predicted_seconds"] > 0) == left


def test_a_step_is_evaluated_once(
    tmp_path: Path, request_for: Callable[..., recipe.Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the last one is not the best, and where a run that is over is resumed."""
    losses = iter([4.0, 5.0])

    class Measured:
        accuracy, tokens = 0.0, 1

        def __init__(self) -> None:
            self.loss = next(losses)

    monkeypatch.setattr(train, "evaluate", lambda *arguments: Measured())
    recipe.start(request_for(tmp_path / "run", steps=4, eval_every=2), silent)
    recipe.resume(tmp_path / "run", {}, silent)
    records = checkpoint.read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records if "heldout_loss" in record] == [2, 4]


def test_a_model_inside_the_folder_that_it_learns_from_is_no_text(
    tmp_path: Path, request_for: Callable[..., recipe.Request], text: Path
) -> None:
    books = tmp_path / "books"
    books.mkdir()
    (books / "a.txt").write_text(text.read_text(encoding="utf-8"), encoding="utf-8")
    recipe.start(replace(request_for(books / "model", steps=2), paths=(books,)), silent)
    assert recipe.resume(books / "model", {"steps": 3}, silent).step == 3


def test_what_a_killed_reader_left_is_swept(tmp_path: Path, request_for: Callable[..., recipe.Request]) -> None:
    left = tmp_path / "home" / "cache" / "tokens" / ".tmp-12345678-tokens-0"
    left.mkdir(parents=True)
    recipe.start(request_for(tmp_path / "run", steps=1), silent)
    assert not left.exists()


def test_dropout_is_part_of_the_state(tmp_path: Path, request_for: Callable[..., recipe.Request]) -> None:
    """The test above would not notice a lost random state without this: dropout must change the result."""
    recipe.start(request_for(tmp_path / "with"), silent)
    dry = replace(request_for(tmp_path / "without"), model=replace(TINY, dropout=0.0))
    recipe.start(dry, silent)
    assert (
        weights(tmp_path / "with")["parameters.safetensors"] != weights(tmp_path / "without")["parameters.safetensors"]
    )


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_stopped_process_can_be_resumed(tmp_path: Path, text: Path, tokenizer: Path, how: signal.Signals) -> None:
    options = [str(text), "--config", str(tmp_path / "tiny.yaml"), "--tokenizer", str(tokenizer), "--quiet"]
    shape = {name: getattr(TINY, name) for name in ("d_model", "num_layers", "num_query_heads", "num_kv_heads", "d_ff")}
    lengths = {"steps": 40, "batch_size": 1, "grad_accum": 2, "seq_len": 32, "save_every": 4, "eval_every": 20}
    (tmp_path / "tiny.yaml").write_text(
        json.dumps({"model": {**shape, "dropout": 0.1}, "train": lengths})
    )  # JSON is YAML
    command = [sys.executable, str(ROOT / "cli.py"), "train"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [*command, *options, "--out", str(tmp_path / "whole")], env=environment, check=True, stdout=subprocess.PIPE
    )

    cut = tmp_path / "cut"
    with subprocess.Popen(
        [*command, *options, "--out", str(cut)], env=environment, stderr=subprocess.PIPE, text=True
    ) as run:
        wait_for(lambda: len(checkpoint.read_metrics(cut / "metrics.jsonl")) >= 6, run)
        run.send_signal(how)
        _, errors = run.communicate(timeout=60)
    done = checkpoint.latest_state(cut / "trainer")
    assert run.returncode == (-signal.SIGKILL if how == signal.SIGKILL else 130)
    assert done.name < "step-00000040"
    assert ("go on with --resume" in errors) == (how != signal.SIGKILL)

    subprocess.run(
        [*command, "--resume", "--out", str(cut), "--quiet"], env=environment, check=True, stdout=subprocess.PIPE
    )
    whole, parts = weights(tmp_path / "whole"), weights(cut)
    assert [name for name in whole if whole[name] != parts[name]] == []
    assert [path.name for path in cut.rglob(".tmp-*")] == []


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    """Until the condition holds; fails when the process ends before."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_directory_holds_the_best_weights_and_the_trainer_the_latest(
    tmp_path: Path, request_for: Callable[..., recipe.Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([5.0, 4.0, 6.0])

    class Measured:
        accuracy, tokens = 0.0, 1

        def __init__(self) -> None:
            self.loss = next(losses)

    monkeypatch.setattr(train, "evaluate", lambda *arguments: Measured())
    seen: dict[int, bytes] = {}

    def report(event: dict[str, Any]) -> None:
        if event["event"] == "saved":
            seen[event["step"]] = weights(tmp_path / "run")["parameters.safetensors"] if event["step"] else b""

    progress = recipe.start(request_for(tmp_path / "run", save_every=3), report)
    assert (progress.best_step, progress.best_loss) == (6, 4.0)
    best = flatten(ContinualLLM.from_checkpoint(tmp_path / "run").parameters())
    latest = mx.load(str(checkpoint.latest_state(tmp_path / "run" / "trainer") / "parameters.safetensors"))
    assert not all(mx.array_equal(best[name], latest[name]) for name in best)
    (tmp_path / "six").mkdir()
    (tmp_path / "six" / "p.safetensors").write_bytes(seen[6])
    sixth = mx.load(str(tmp_path / "six" / "p.safetensors"))
    assert all(mx.array_equal(best[name], sixth[name]) for name in best)


def test_the_result_is_a_model_directory(tmp_path: Path, request_for: Callable[..., recipe.Request]) -> None:
    """Another program opens it, and the weights are those of the last step here, because it was the best."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    recipe.start(request_for(tmp_path / "run", steps=4, eval_every=4), silent)
    modeldir.verify_manifest(tmp_path / "run")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    ids = AutoTokenizer.from_pretrained(tmp_path / "run").encode("The assert statement")
    assert ids == Tokenizer.load(tmp_path / "run").encode("The assert statement")
    ours = ContinualLLM.from_checkpoint(tmp_path / "run")
    import torch

    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits
    assert mx.abs(ours(mx.array([ids])) - mx.array(expected.numpy())).max().item() < 1e-5
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_training_learns(tmp_path: Path, request_for: Callable[..., recipe.Request]) -> None:
    """A few dozen steps bring the loss well below that of a uniform guess, on held-out text too."""
    progress = recipe.start(request_for(tmp_path / "run", steps=60, lr=5e-3, eval_every=60, save_every=60), silent)
    assert progress.best_loss is not None
    assert progress.best_loss < math.log(400) - 0.8


def test_init_goes_on_from_a_model(tmp_path: Path, request_for: Callable[..., recipe.Request]) -> None:
    recipe.start(request_for(tmp_path / "first", steps=30, lr=5e-3, eval_every=30, save_every=30), silent)
    first = ContinualLLM.from_checkpoint(tmp_path / "first")
    onward = replace(request_for(tmp_path / "second", steps=1, eval_every=1), init=tmp_path / "first", tokenizer=None)
    recipe.start(onward, silent)
    fresh = recipe.start(request_for(tmp_path / "fresh", steps=1, eval_every=1), silent)
    records = checkpoint.read_metrics(tmp_path / "second" / "metrics.jsonl")
    assert records[0]["loss"] < (fresh.loss or 0) - 0.3
    second = ContinualLLM.from_checkpoint(tmp_path / "second")
    assert second.config == first.config


def test_a_loss_that_explodes_keeps_the_last_good_state(
    tmp_path: Path, request_for: Callable[..., recipe.Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = train.Stepper.step

    def poisoned(self: Any, batches: Any, rate: float) -> Any:
        result = real(self, batches, rate)
        self.count = getattr(self, "count", 0) + 1
        return replace(result, loss_sum=mx.array(math.nan)) if self.count == 5 else result

    monkeypatch.setattr(train.Stepper, "step", poisoned)
    with pytest.raises(NonFiniteLossError, match=r"step 5: the loss is nan .* state of step 4 is kept"):
        recipe.start(request_for(tmp_path / "run"), silent)
    assert checkpoint.latest_state(tmp_path / "run" / "trainer").name == "step-00000004"
    monkeypatch.setattr(train.Stepper, "step", real)
    assert recipe.resume(tmp_path / "run", {}, silent).step == 8


def test_a_minute_is_a_minute_of_steps(tmp_path: Path, request_for: Callable[..., recipe.Request]) -> None:
    """A run limited by the clock ends soon after it, with a learning rate that has come down."""
    events: list[dict[str, Any]] = []
    progress = recipe.start(request_for(tmp_path / "run", steps=None, minutes=1 / 60, eval_every=10_000), events.append)
    steps = [event for event in events if event["event"] == "step"]
    assert steps
    assert all(event["steps"] is None for event in steps)  # the clock ends it: a number would be passed, or not reached
    records = [r for r in checkpoint.read_metrics(tmp_path / "run" / "metrics.jsonl") if "lr" in r]
    assert progress.seconds >= 1
    assert records[-1]["lr"] < max(r["lr"] for r in records)


def test_the_plan_comes_before_the_first_step(tmp_path: Path, request_for: Callable[..., recipe.Request]) -> None:
    events: list[dict[str, Any]] = []
    recipe.start(request_for(tmp_path / "run"), events.append)
    kinds = [event["event"] for event in events]
    plan = events[kinds.index("plan")]
    assert kinds.index("plan") < kinds.index("step")
    model = ContinualLLM.from_checkpoint(tmp_path / "run")
    assert (
        plan["parameters"] == model.config.num_parameters() == sum(a.size for a in flatten(model.parameters()).values())
    )
    assert plan["tokens_per_parameter"] == pytest.approx(plan["tokens"] / plan["parameters"])
    assert plan["steps"] == 8
    assert plan["predicted_memory"] > 16 * plan["parameters"]
    assert plan["predicted_seconds"] > 0


def test_an_epoch_sees_every_window(tmp_path: Path, request_for: Callable[..., recipe.Request]) -> None:
    progress = recipe.start(request_for(tmp_path / "run", steps=None, epochs=1.0, eval_every=1000), silent)
    state = checkpoint.read_state(checkpoint.latest_state(tmp_path / "run" / "trainer"))
    windows = state["cursor"]["windows"]
    assert progress.step == math.ceil(windows / 4)


# -- what is refused ---------------------------------------------------------------------------------------------


def test_output_directories_in_use_are_refused(tmp_path: Path, request_for: Callable[..., recipe.Request]) -> None:
    lessons, other, run = tmp_path / "lessons", tmp_path / "other", tmp_path / "run"
    (lessons / "learner").mkdir(parents=True)
    (lessons / "learner" / "learner.sqlite").touch()
    with pytest.raises(InputError, match="holds lessons"):
        recipe.start(request_for(lessons), silent)
    other.mkdir()
    (other / "precious.txt").write_text("x")
    with pytest.raises(InputError, match="exists already"):
        recipe.start(request_for(other), silent)
    recipe.start(request_for(run, steps=1), silent)
    with pytest.raises(InputError, match="--resume"):
        recipe.start(request_for(run), silent)
    with pytest.raises(InputError, match="no training to resume"):
        recipe.resume(other, {}, silent)
    (run / "trainer" / "run.json").unlink()  # as after a kill before the first state is whole
    with pytest.raises(InputError, match="cut off before its first step; remove it"):
        recipe.start(request_for(run), silent)
    with pytest.raises(InputError, match="no training to resume"):
        recipe.resume(run, {}, silent)
    assert [path.name for path in other.iterdir()] == ["precious.txt"]


def test_a_run_of_another_process_is_left_alone(tmp_path: Path, request_for: Callable[..., recipe.Request]) -> None:
    from mlx_impl.files import locked

    recipe.start(request_for(tmp_path / "run", steps=1), silent)
    with (
        locked(tmp_path / "run" / ".lock", "it"),
        pytest.raises(LockedError, match=f"process {os.getpid()}"),
    ):
        recipe.resume(tmp_path / "run", {}, silent)


def test_nothing_is_written_for_bad_input(tmp_path: Path, request_for: Callable[..., recipe.Request]) -> None:
    out = tmp_path / "run"
    with pytest.raises(InputError, match="nowhere"):
        recipe.start(replace(request_for(out), paths=(tmp_path / "nowhere.txt",)), silent)
    with pytest.raises(InputError, match="seq-len 4096 is longer"):
        recipe.start(request_for(out, seq_len=4096), silent)
    assert not out.exists()


def test_a_run_whose_model_has_learned_is_not_resumed(
    tmp_path: Path, request_for: Callable[..., recipe.Request]
) -> None:
    """The lessons belong to these weights."""
    run = tmp_path / "run"
    recipe.start(request_for(run, steps=1), silent)
    (run / "learner").mkdir()
    (run / "learner" / "learner.sqlite").touch()
    before = (run / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="holds lessons"):
        recipe.resume(run, {"steps": 3}, silent)
    assert (run / "model.safetensors").read_bytes() == before


def test_a_directory_taken_meanwhile_is_left_alone(
    tmp_path: Path, request_for: Callable[..., recipe.Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the first look at the directory and the lock, another process may have trained into it."""
    real = recipe._data

    def slow(*arguments: Any) -> Any:
        monkeypatch.setattr(recipe, "_data", real)
        recipe.start(request_for(tmp_path / "run", steps=2), silent)
        return real(*arguments)

    monkeypatch.setattr(recipe, "_data", slow)
    with pytest.raises(InputError, match="holds a training run"):
        recipe.start(request_for(tmp_path / "run"), silent)
    assert weights(tmp_path / "run")
    modeldir.verify_manifest(tmp_path / "run")


def test_a_heldout_loss_that_explodes_names_the_step(
    tmp_path: Path, request_for: Callable[..., recipe.Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Measured:
        accuracy, tokens, loss = 0.0, 1, math.nan

    monkeypatch.setattr(train, "evaluate", lambda *arguments: Measured())
    with pytest.raises(NonFiniteLossError, match="step 3: the held-out loss is nan; the state of step 2 is kept"):
        recipe.start(request_for(tmp_path / "run"), silent)


def test_steps_take_the_place_of_minutes(tmp_path: Path, request_for: Callable[..., recipe.Request]) -> None:
    recipe.start(request_for(tmp_path / "run", steps=None, minutes=1e-6), silent)
    assert recipe.resume(tmp_path / "run", {"steps": 4}, silent).step == 4


def test_resume_refuses_other_settings_and_damaged_states(
    tmp_path: Path, request_for: Callable[..., recipe.Request]
) -> None:
    run = tmp_path / "run"
    recipe.start(request_for(run, steps=2), silent)
    with pytest.raises(InputError, match="trained with other lr"):
        recipe.resume(run, {"lr": 1.0}, silent)
    assert recipe.resume(run, {"steps": 3}, silent).step == 3  # longer is fine
    moments = checkpoint.latest_state(run / "trainer") / "optimizer.safetensors"
    content = bytearray(moments.read_bytes())
    content[-1] ^= 1
    moments.write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"optimizer\.safetensors"):
        recipe.resume(run, {}, silent)


@pytest.mark.parametrize(
    "content", ["{}", '{"paths": 1, "eval_data": null, "train": {}}', '{"train": [], "paths": []}']
)
def test_a_damaged_request_is_named(tmp_path: Path, request_for: Callable[..., recipe.Request], content: str) -> None:
    recipe.start(request_for(tmp_path / "run", steps=1), silent)
    (tmp_path / "run" / "trainer" / "run.json").write_text(content)
    with pytest.raises(DamagedFileError, match=r"run\.json: not the request of a training run"):
        recipe.resume(tmp_path / "run", {}, silent)


def test_held_out_text_in_which_nothing_counts(
    tmp_path: Path, request_for: Callable[..., recipe.Request], text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named, it is refused before anything is written; where it is the text's end, nothing is held out."""
    asked = request_for(tmp_path / "run", loss_on="completion", steps=1, eval_tokens=64)
    row = {"prompt": text.read_text(encoding="utf-8")[:20_000], "completion": "So be it."}
    (tmp_path / "eval.jsonl").write_text(json.dumps(row))
    with pytest.raises(InputError, match=r"--eval-data .*none of its first 64 tokens counts"):
        recipe.start(replace(asked, eval_data=tmp_path / "eval.jsonl"), silent)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(recipe.data, "teaches", lambda tokens: False)
    events: list[dict[str, Any]] = []
    assert recipe.start(asked, events.append).best_loss is None
    assert any("nothing of the text's end counts" in event.get("text", "") for event in events)


def test_changed_text_is_refused(tmp_path: Path, request_for: Callable[..., recipe.Request], text: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text(text.read_text(encoding="utf-8"), encoding="utf-8")
    recipe.start(replace(request_for(tmp_path / "run", steps=1), paths=(mine,)), silent)
    mine.write_text("Something else. " * 5000, encoding="utf-8")
    with pytest.raises(InputError, match="cannot resume in other data"):
        recipe.resume(tmp_path / "run", {"steps": 5}, silent)


# -- configuration files and plots -------------------------------------------------------------------------------


def test_yaml_configurations(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model:\ntrain: {lr: 0.001}\n")
    assert recipe.read_config(str(path)) == (PRESETS["medium"], {"lr": 0.001})
    path.write_text("model: {preset: small, num_layers: 3}\ntrain: {lr: 0.001, steps: 7}\n")
    model, settings = recipe.read_config(str(path))
    assert (model.num_layers, model.d_model, settings) == (3, 512, {"lr": 0.001, "steps": 7})
    path.write_text("model: {d_model: 96, num_query_heads: 6, num_kv_heads: 2}\n")
    assert recipe.read_config(str(path))[0].head_dim == 16
    assert recipe.read_config("medium")[0].num_parameters() == 127_224_576


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: {layers: 3}", r"layers \(unknown\); known keys are vocab_size"),
        ("train: {lr: fast}", r"lr \('fast' is not a float\)"),
        ("optimizer: {lr: 1}", r"optimizer \(unknown\); known keys are model, train"),
        ("model: {preset: huge}", "preset 'huge' is unknown"),
        ("model: [1]", "mappings"),
        ("- 1", "mappings"),
        ("model: {num_layers: 0}", "num_layers = 0"),
        ("model: {dropout: true}", r"dropout \(True is not a float\)"),
        ("a: {\n\t", "no valid YAML"),
        ("train: {steps: 2024-99-99}", "no valid YAML"),
        ("train: {steps: 1, epochs: 2}", "epochs and steps exclude each other"),
        ("model: {vocab_size: 320}", "vocab_size come from the tokenizer"),
    ],
)
def test_wrong_yaml_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as raised:
        recipe.read_config(str(path))
    assert "\n" not in str(raised.value)


def test_plots_of_little(tmp_path: Path) -> None:
    """One step, or none, still gives a picture."""
    for number, records in enumerate(([], [{"step": 1, "loss": 2.0}], [{"step": 1, "heldout_loss": 2.0}])):
        plot_losses(records, tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").read_bytes().startswith(b"\x89PNG")
