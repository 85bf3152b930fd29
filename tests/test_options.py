"""Options of a lesson that keep what the base could do, and the original's names for batches and checkpoints."""

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from click.testing import CliRunner
from lessons import opened, text, tiny_base, tiny_tokenizer

import cli
from mlx_impl import kernels, lora, session
from mlx_impl.arrays import flatten
from mlx_impl.config import REPLAY_TARGETS, Budget, ContinualLearningConfig, ModelConfig
from mlx_impl.errors import InputError, LockedError
from mlx_impl.learner import ContinualLearner
from mlx_impl.loss import divergence, held_loss_of, loss_of
from mlx_impl.memory import lesson_bytes, pretraining_bytes
from mlx_impl.model import ContinualLLM
from mlx_impl.readers import text_document
from mlx_impl.replay import Sample, extend
from mlx_impl.router import Routing
from mlx_impl.tokenizer import Tokenizer
from mlx_impl.windows import Windows

STEPS = Budget(steps=4)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"), tiny_tokenizer())


def changed(learner: ContinualLearner) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in lora.adapter_arrays(learner.model).items()}


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


# -- distillation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 512])
def test_divergence_and_its_gradient(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(kernels, "ROWS", rows)
    monkeypatch.setattr(kernels, "LOGITS", 20 * rows)
    key = iter(mx.random.split(mx.random.key(0), 3))
    ours, theirs, weight = (mx.random.normal(shape, key=next(key)) for shape in ((2, 3, 8), (2, 3, 8), (20, 8)))
    mask = mx.array([[1.0, 0, 2], [1, 1, 0]])

    def direct(hidden: mx.array) -> mx.array:
        def logp(states: mx.array) -> mx.array:
            logits = states @ weight.T
            return logits - mx.logsumexp(logits, axis=-1, keepdims=True)

        p = mx.exp(logp(theirs))
        return ((p * (logp(theirs) - logp(hidden))).sum(axis=-1) * mask).sum()

    def fast(hidden: mx.array) -> mx.array:
        return kernels.summed_divergence(hidden, theirs, weight, mask)

    assert fast(ours).item() == pytest.approx(direct(ours).item(), rel=1e-5)
    np.testing.assert_allclose(np.array(mx.grad(fast)(ours)), np.array(mx.grad(direct)(ours)), rtol=1e-4, atol=1e-5)
    assert fast(theirs).item() == pytest.approx(0, abs=1e-6)
    assert mx.abs(mx.grad(fast)(theirs)).max().item() < 1e-6


@pytest.mark.parametrize("learned", [1, 2, 3], ids=["rows apart", "one row both", "all rows"])
@pytest.mark.parametrize("matrix", [True, False], ids=["head", "logits"])
def test_a_held_loss_is_the_loss_of_the_first_rows_and_the_divergence_of_the_last(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learned: int, matrix: bool
) -> None:
    model = opened(base, tmp_path / "s").model
    lora.attach(model, lora.LoRAConfig(4), mx.random.key(1))
    tokens = mx.random.randint(0, model.vocab_size, (3, 9), key=mx.random.key(2))
    mask, parameters = mx.ones((learned, 8)), model.trainable_parameters()
    teacher, held = mx.random.normal((2, 8, 32), key=mx.random.key(3)), mx.array([[0.5] * 8, [0, 2] * 4])
    plain, count = loss_of(model)(parameters, tokens[:learned], mask)
    ours = model(tokens[1:, :-1])
    expected = plain + (divergence(ours, model.head(teacher)) * held).sum()
    if not matrix:
        monkeypatch.setattr(type(model), "head_weight", None)
    found, same_count = held_loss_of(model)(parameters, tokens, mask, teacher, held)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert count.item() == same_count.item() == 8 * learned
    alone, _ = held_loss_of(model)(parameters, tokens[:learned], mask)
    assert alone.item() == plain.item()


def test_bare_gives_the_base_and_then_the_same_adapter(base: Path, tmp_path: Path) -> None:
    learner = opened(base, tmp_path / "s")
    tokens = mx.arange(12)[None]
    before = learner.model(tokens)
    learner.learn_from_text(text(1), budget=STEPS)
    adapted, arrays = learner.model(tokens), changed(learner)
    with contextlib.suppress(KeyError), lora.bare(learner.model):
        assert mx.array_equal(learner.model(tokens), before).item()
        raise KeyError
    assert mx.array_equal(learner.model(tokens), adapted).item()
    assert same(changed(learner), arrays)


def divergence_from_base(learner: ContinualLearner, tokens: mx.array) -> float:
    """Mean KL(base || model) over the positions of tokens (B, T)."""
    with lora.bare(learner.model):
        teacher = learner.model.hidden(tokens)
    hidden, mask = learner.model.hidden(tokens), mx.ones(tokens.shape)
    return kernels.summed_divergence(hidden, teacher, learner.model.head_weight, mask).item() / tokens.size


def test_distilled_lessons_stay_nearer_to_the_base_on_its_own_text(base: Path, tmp_path: Path) -> None:
    far = {}
    general = [text_document(text(9, 4000), "general")]
    for weight in (0.0, 5.0):
        learner = opened(base, tmp_path / str(weight), distill_weight=weight, base_ratio=0.5, learning_rate=1e-2)
        learner.learn([text_document(text(1), "new")], budget=Budget(steps=12), like_base=general)
        windows = Windows(learner_tokens(learner, general), 32).batch(range(8))[0]
        far[weight] = divergence_from_base(learner, mx.array(windows))
    assert far[5.0] < 0.7 * far[0.0]


def learner_tokens(learner: ContinualLearner, documents: list):
    from mlx_impl.data import tokens_of

    return tokens_of(documents, learner.tokenizer)


@pytest.mark.parametrize("changes", [{"distill_weight": 1.0, "replay_targets": "tokens"}, {"replay_targets": "tokens"}])
def test_teachers_change_a_second_lesson_and_no_first(base: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    arrays = []
    for settings in ({}, changes):
        learner = opened(base, tmp_path / str(len(arrays)), **settings)
        learner.learn_from_text(text(1), budget=STEPS)
        first = changed(learner)
        learner.learn_from_text(text(2), budget=STEPS)
        arrays.append((first, changed(learner)))
    assert same(arrays[0][0], arrays[1][0])
    assert not same(arrays[0][1], arrays[1][1])


@pytest.mark.parametrize("targets", REPLAY_TARGETS)
@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_rows_and_their_teachers(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, targets: str, strength: float
) -> None:
    """New, replayed and base-like rows: what the loss is given of each, without dropout, and the windows they are."""
    seen: list[tuple[mx.array, ...]] = []

    def spied(model: ContinualLLM) -> Callable:
        loss = held_loss_of(model)
        return lambda parameters, *batch: (seen.append(batch), loss(parameters, *batch))[1]

    learner = opened(
        base, tmp_path / "s", distill_weight=strength, base_ratio=0.5, replay_targets=targets, replay_weight=3.0
    )
    for layer in learner.model.layers:
        layer._dropout = nn.Dropout(0.5)
    learner.learn_from_text(text(1), budget=STEPS)
    before = lora.adapter_arrays(learner.model)
    monkeypatch.setattr(session, "held_loss_of", spied)
    learner.learn([text_document(text(2), "new")], budget=STEPS, like_base=[text_document(text(9, 4000), "general")])
    assert len(seen) == STEPS.steps
    windows = {name: known_windows(learner, content) for name, content in enumerate((text(2), text(1), text(9, 4000)))}
    for tokens, mask, *teaching in seen:
        kinds = [next(kind for kind, known in windows.items() if row in known) for row in tokens.tolist()]
        predicted = targets == "predictions"
        assert kinds == ([0, 2, 1] if predicted else [0, 1, 2])
        assert len(mask) == (2 if predicted else 3)
        taught = [kind for kind in kinds if (kind == 1 and predicted) or (kind > 0 and strength)]
        assert bool(teaching) == bool(taught)
        if teaching:
            states, held = teaching
            assert len(states) == len(held) == len(taught)
            factors = [3.0 if kind == 1 and predicted else strength for kind in taught]
            np.testing.assert_allclose(np.array(held.max(axis=1)), factors, rtol=1e-5)
            for kind, row, found in zip(taught, tokens[-len(taught) :], states, strict=True):
                lora.detach(learner.model)
                if kind == 1 and predicted:
                    lora.attach_arrays(learner.model, before, 2.0)
                learner.model.train(False)
                expected = learner.model.hidden(row[None, :-1])[0]
                np.testing.assert_allclose(np.array(found), np.array(expected), atol=1e-5)


@pytest.mark.parametrize(
    ("batch_size", "ratio", "each"), [(1, 0.5, 1.0), (1, 0.25, 3.0), (4, 0.25, 3.0), (4, 0.75, 1 / 3)]
)
def test_all_replayed_windows_together_weigh_what_the_new_ones_do(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int, ratio: float, each: float
) -> None:
    weights: list[float] = []

    def spied(model: ContinualLLM) -> Callable:
        loss = held_loss_of(model)

        def noted(parameters: Any, *batch: mx.array) -> tuple[mx.array, mx.array]:
            if len(batch) == 4:
                weights.extend(np.array(batch[3].max(axis=1)).tolist())
            return loss(parameters, *batch)

        return noted

    learner = opened(base, tmp_path / "s", batch_size=batch_size, replay_ratio=ratio, seq_len=16)
    learner.learn_from_text(text(1), budget=STEPS)
    monkeypatch.setattr(session, "held_loss_of", spied)
    learner.learn_from_text(text(2), budget=Budget(steps=6))
    assert np.median(weights) == pytest.approx(each, rel=1e-2)  # beside a window that is not full they weigh less


def test_a_second_pass_cuts_elsewhere_and_only_the_first_is_kept_for_replay(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []

    def spied(model: ContinualLLM) -> Callable:
        loss = held_loss_of(model)
        return lambda parameters, *batch: (seen.extend(batch[0].tolist()), loss(parameters, *batch))[1]

    learner = opened(base, tmp_path / "s", batch_size=1, seq_len=16, holdout=0.0)
    windows = known_windows(learner, text(1))
    monkeypatch.setattr(session, "held_loss_of", spied)
    learner.learn_from_text(text(1), budget=Budget(steps=2 * len(windows)))
    assert sorted(seen[: len(windows)]) == sorted(windows)
    assert not any(row in windows for row in seen[len(windows) :])
    stored = learner.store.replay(learner.store.require("main"))
    assert stored is not None
    assert len(stored.windows) == len(windows)


def known_windows(learner: ContinualLearner, content: str) -> list[list[int]]:
    windows = Windows(learner_tokens(learner, [text_document(content, "x")]), learner.config.seq_len)
    rows: list[list[int]] = windows.batch(range(len(windows)))[0].tolist()
    return rows


def test_predictions_keep_what_tokens_overwrite(base: Path, tmp_path: Path) -> None:
    """After a second lesson the first one's predictions, on text like its own, are nearer to what they were."""
    moved = {}
    for targets in REPLAY_TARGETS:
        settings = {"replay_targets": targets, "learning_rate": 2e-2, "holdout": 0.0, "use_ewc": False}
        learner = opened(base, tmp_path / targets, **settings)
        learner.learn_from_text(text(1, 2500), budget=Budget(steps=20))
        ids = mx.array([learner.tokenizer.encode(text(1, 5000)[2500:])[:200][i : i + 32] for i in range(0, 160, 32)])
        before = learner.model(ids)
        learner.learn_from_text(text(2, 2500), budget=Budget(steps=20))
        moved[targets] = divergence(learner.model(ids), before).mean().item()
    assert moved["predictions"] < 0.75 * moved["tokens"]


# -- text like the base's ----------------------------------------------------------------------------------------------


def test_extend_puts_rows_behind() -> None:
    sample = Sample(mx.ones((2, 4), mx.int32), mx.ones((2, 3)), mx.array([1.0, 0.5]), [b"x"])
    longer = extend(sample, np.full((1, 6), 7), np.ones((1, 5)))
    assert longer.tokens.tolist() == [[1, 1, 1, 1, 0, 0]] * 2 + [[7] * 6]
    assert longer.mask.tolist() == [[1, 1, 1, 0, 0]] * 2 + [[1] * 5]
    assert longer.weights.tolist() == [1.0, 0.5, 1.0]
    assert longer.rows == [b"x"]


def test_base_text_keeps_the_loss_on_it_and_is_not_remembered(base: Path, tmp_path: Path) -> None:
    general = [text_document(text(9, 4000), "general")]
    losses = {}
    for like_base in ([], general):
        learner = opened(base, tmp_path / str(len(like_base)), base_ratio=0.5, learning_rate=1e-2)
        lesson = learner.learn([text_document(text(1), "new")], budget=Budget(steps=30), like_base=like_base)
        losses[len(like_base)] = learner.evaluate(general).loss
        stored = learner.store.replay(learner.store.require("main"))
        assert stored is not None
        assert lesson.replayed_tokens == 0
        trained = learner_tokens(learner, [text_document(text(1), "new")]).ids.tolist()
        for window in stored.windows.values():
            assert set(np.where(window < 0, -1 - window, window)) <= set(trained)
    assert losses[1] < losses[0] - 0.05


def test_text_sampled_from_the_base_is_its_own_and_repeatable(base: Path, tmp_path: Path) -> None:
    learner = opened(base, tmp_path / "s")
    plain = learner.sampled_from_base(3, 20)
    assert len(plain) == len({document.text for document in plain}) == 3
    learner.learn_from_text(text(1), budget=STEPS)
    assert learner.sampled_from_base(3, 20) == plain
    assert opened(base, tmp_path / "other", seed=1).sampled_from_base(3, 20) != plain


def test_samples_follow_the_models_distribution(base: Path, tmp_path: Path) -> None:
    learner = opened(base, tmp_path / "s")
    first = [row[0] for row in sampled(learner, 2000)]
    logits = learner.model(mx.array([[learner.tokenizer.eos_id]]))[0, -1, : learner.tokenizer.vocab_size]
    expected = 2000 * np.array(mx.softmax(logits))
    common = expected >= 20
    counts = np.bincount(first, minlength=len(expected))
    chi_square = ((counts - expected)[common] ** 2 / expected[common]).sum()
    freedom = common.sum()
    assert freedom > 5
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def sampled(learner: ContinualLearner, rows: int) -> list[list[int]]:
    from mlx_impl.generate import sampled_rows

    assert learner.tokenizer.eos_id is not None
    return sampled_rows(
        learner.model, learner.tokenizer.eos_id, rows, 1, mx.random.key(0), learner.tokenizer.vocab_size
    )


# -- the command -------------------------------------------------------------------------------------------------------


def test_probe_and_base_data_on_the_command_line(base: Path, tmp_path: Path) -> None:
    (tmp_path / "general.txt").write_text(text(9, 4000))
    where = ["-m", str(base), "--store", str(tmp_path / "s"), "--steps", "2"]
    options = ["--base-data", str(tmp_path / "general.txt"), "--distill", "0.5", "--probe", "What is in it?"]
    done = CliRunner().invoke(cli.cli, ["learn", "--text", text(1), *where, *options, "--json"])
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record["probe"]["prompt"] == "What is in it?"
    assert {"before", "after"} < set(record["probe"])
    assert json.loads(done.stderr.splitlines()[0])["predicted_memory"] > 0
    done = CliRunner().invoke(cli.cli, ["learn", "--text", text(2), *where, "--base-data", "self", "--probe", "So?"])
    assert done.exit_code == 0, done.output
    assert "before:" in done.stdout
    assert "after:" in done.stdout


def test_an_answer_is_routed_by_the_prompt_and_not_by_its_template(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = opened(base, tmp_path / "s")
    plain, template, routed = learner.tokenizer.encode("What is it?"), [3] * 20, []
    monkeypatch.setattr(Tokenizer, "has_chat_template", True)
    monkeypatch.setattr(Tokenizer, "encode_chat", lambda self, turns: template + self.encode(turns[0]["content"]))
    monkeypatch.setattr(learner, "route", lambda ids: (routed.append(ids), Routing(None, {}))[1])
    learner.answer("What is it?", max_tokens=1)
    assert routed == [plain]


def test_base_data_that_is_not_there(base: Path, tmp_path: Path) -> None:
    where = ["-m", str(base), "--store", str(tmp_path / "s")]
    done = CliRunner().invoke(cli.cli, ["learn", "--text", text(1), *where, "--base-data", "nowhere.txt"])
    assert isinstance(done.exception, InputError)
    assert "nowhere.txt" in str(done.exception)
    assert not (tmp_path / "s" / "learner.sqlite").exists()


# -- memory ------------------------------------------------------------------------------------------------------------


def test_predicted_memory_of_a_lesson_is_about_what_it_takes(base: Path, tmp_path: Path) -> None:
    config = ModelConfig(500, 64, 3, 4, 2, 160, 256)
    from mlx_impl.model import ContinualLLM
    from mlx_impl.optim import AdamW, Stepper

    model = ContinualLLM(config)
    mx.eval(model.parameters())
    lora.attach(model, lora.LoRAConfig(4), mx.random.key(0))
    parameters = model.trainable_parameters()
    stepper = Stepper(parameters, AdamW(1e-3), loss_of(model), 1.0, compiled=False)
    batch = mx.zeros((4, 129), mx.int32), mx.ones((4, 128))
    stepper.step([batch], 1e-3).read()
    mx.clear_cache()
    others = mx.get_active_memory() - sum(a.nbytes for a in flatten(model.parameters()).values())
    mx.reset_peak_memory()
    stepper.step([batch], 1e-3).read()
    adapter = lora.num_parameters(lora.adapter_arrays(model))
    predicted = lesson_bytes(config, 4 * config.num_parameters(), adapter, 4, 128)
    assert 0.5 < predicted / (mx.get_peak_memory() - others) < 2


def test_memory_grows_with_what_it_depends_on() -> None:
    config = ModelConfig(500, 64, 3, 4, 2, 160, 256)
    base = 4 * config.num_parameters()
    four = lesson_bytes(config, base, 1000, 4, 128)
    assert four > lesson_bytes(config, base, 1000, 2, 128) > lesson_bytes(config, base, 1000, 2, 64)
    assert lesson_bytes(config, base, 2000, 4, 128) > four == lesson_bytes(config, 0, 1000, 4, 128) + base
    assert pretraining_bytes(config, 4, 128, True, False) > pretraining_bytes(config, 4, 128, True, True)
    assert four < pretraining_bytes(config, 4, 128, False, False)


def test_a_lesson_on_smollm2_is_predicted_below_four_gigabytes() -> None:
    smollm2 = ModelConfig(49152, 576, 30, 9, 3, 1536, 8192, tie_embeddings=True)
    defaults = ContinualLearningConfig()
    weights = 4 * smollm2.num_parameters()
    assert lesson_bytes(smollm2, weights, 4_900_000, defaults.batch_size, defaults.seq_len) < 4e9


# -- the original's names ----------------------------------------------------------------------------------------------


def test_a_batch_of_texts_is_one_lesson(base: Path, tmp_path: Path) -> None:
    learner = opened(base, tmp_path / "s")
    lesson = learner.learn_from_batch([text(1, 400), text(2, 400)], "notes", budget=STEPS)
    assert (lesson.domain, lesson.version, lesson.source) == ("notes", "v0001", "batch")
    one = learner_tokens(learner, [text_document(text(n, 400), "") for n in (1, 2)])
    assert lesson.tokens == len(one)
    with pytest.raises(InputError):
        learner.learn_from_batch([], "notes")


def test_a_checkpoint_is_gone_on_with(base: Path, tmp_path: Path) -> None:
    learner = opened(base, tmp_path / "s")
    with pytest.raises(InputError, match="nothing was learned"):
        learner.save_checkpoint(tmp_path / "saved")
    learner.learn_from_text(text(1), budget=STEPS)
    saved = learner.save_checkpoint(tmp_path / "saved")
    arrays = changed(learner)
    learner.learn_from_text(text(2), budget=STEPS)
    twice = changed(learner)
    assert not same(arrays, twice)

    learner.load_checkpoint(saved)
    assert learner.adapter is None
    learner.set_adapter("main")
    assert same(changed(learner), arrays)
    learner.learn_from_text(text(2), budget=STEPS)
    assert same(changed(learner), twice)
    assert len(opened(base, tmp_path / "s").store.history("main")) == 2
    with pytest.raises(InputError, match="exists already"):
        learner.save_checkpoint(saved)
    with pytest.raises(InputError, match="no such folder"):
        learner.load_checkpoint(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no lessons in it"):
        learner.load_checkpoint(tmp_path / "empty")
    with pytest.raises(InputError, match="lies in"):
        learner.save_checkpoint(saved / "backup")
    assert learner.store.folder == saved
    assert len(learner.store.history("main")) == 2
    assert not (saved / "backup").exists()


def test_no_checkpoint_is_taken_while_a_lesson_is_learned(base: Path, tmp_path: Path) -> None:
    learner = opened(base, tmp_path / "s")
    learner.learn_from_text(text(1), budget=STEPS)
    with learner.store.writing(), pytest.raises(LockedError):
        opened(base, tmp_path / "s").save_checkpoint(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_checkpoint_of_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    learner = opened(base, tmp_path / "s")
    learner.learn_from_text(text(1), budget=STEPS)
    saved = learner.save_checkpoint(tmp_path / "saved")
    other = ContinualLearner(learner.model, learner.config, learner.tokenizer)
    with pytest.raises(InputError, match="base"):
        other.load_checkpoint(saved)
    assert other.store.domains() == []
