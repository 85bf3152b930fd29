"""Lessons on a tiny base: what they promise about the budget, the base, other domains, undo, failures and files.

The base has random weights and a tokenizer trained here, which is enough: a lesson can always lower the loss on its
text. Kills are in processes of their own, at moments that the lesson itself announces.
"""

import dataclasses
import json
import math
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from lessons import SETTINGS, TEXT, opened, text, tiny_base, tiny_tokenizer

from mlx_impl import adapters, files, lora, session, states
from mlx_impl import lesson as lesson_module
from mlx_impl.arrays import flatten
from mlx_impl.config import LEAST_STEPS, Budget
from mlx_impl.data import Tokens, teaches, tokens_of
from mlx_impl.errors import DamagedFileError, InputError, LockedError, NonFiniteLossError
from mlx_impl.evaluate import evaluate
from mlx_impl.learner import ContinualLearner
from mlx_impl.lesson import Lesson
from mlx_impl.model import ContinualLLM
from mlx_impl.modeldir import expected_shapes, write_model_directory
from mlx_impl.readers import Document, text_document
from mlx_impl.tokenizer import Tokenizer
from mlx_impl.windows import evaluation_windows

STEPS = Budget(steps=3)


def shuffled(words: int) -> str:
    """Paragraphs of English words in no order, so that no passage is in it twice."""
    chosen = np.random.default_rng(0).permutation(TEXT.split())[:words]
    return "".join(word + ("\n\n" if number % 30 == 29 else " ") for number, word in enumerate(chosen))


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"), tokenizer)


def teacher(learner: ContinualLearner) -> lesson_module.Teacher:
    return lesson_module.Teacher(learner.model, learner.config, learner.tokenizer, learner.store, learner._router)


def teach(base: Path, store: Path, number: int, domain: str = "main", budget: Budget = STEPS, **changes: Any) -> Lesson:
    """One lesson by a learner of its own, as the command line gives it."""
    return opened(base, store, **changes).learn_from_text(text(number), domain, budget=budget)


def tree(folder: Path) -> dict[str, str]:
    """Hash of every adapter file below a folder."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.parent != folder]
    return {str(path.relative_to(folder)): files.sha256(path) for path in paths}


def numbers(tree_of_arrays: dict[str, mx.array]) -> dict[str, bytes]:
    """Arrays as bytes, to be compared bit for bit."""
    return {name: np.array(array).tobytes() for name, array in tree_of_arrays.items()}


# -- what a lesson does ----------------------------------------------------------------------------------------------


def test_a_lesson_learns_its_text_and_leaves_the_base_untouched(base: Path, tmp_path: Path) -> None:
    before = tree(base.parent)
    taught = opened(base, tmp_path / "s", learning_rate=1e-2)
    weights = numbers(flatten(taught.model.parameters()))
    prompt = mx.array([taught.tokenizer.encode(text(1)[:100])])
    logits = taught.model(prompt)
    lesson = taught.learn_from_text(text(1), "main", budget=Budget(steps=20))
    assert lesson.after < lesson.before - 0.3
    assert (lesson.domain, lesson.version, lesson.steps, lesson.complete) == ("main", "v0001", 20, True)
    assert not mx.array_equal(taught.model(prompt), logits)
    taught.set_adapter(None)
    assert numbers(flatten(taught.model.parameters())) == weights
    assert mx.array_equal(taught.model(prompt), logits)
    assert tree(base.parent) == before


def test_the_default_adapter_is_on_all_seven_projections(base: Path, tmp_path: Path) -> None:
    lesson = teach(base, tmp_path / "s", 1)
    shapes = [s for n, s in expected_shapes(opened(base, tmp_path / "s").model.config).items() if "_proj" in n]
    assert len(shapes) == 14
    assert lesson.trainable_parameters == sum(14 * (out + into) for out, into in shapes)
    config = json.loads((tmp_path / "s" / "main" / "v0001" / "adapter_config.json").read_text())
    assert config["lora_parameters"]["rank"] == 14
    assert config["lora_parameters"]["scale"] == 28 / 14
    assert len(config["lora_parameters"]["keys"]) == 7


def test_the_figures_of_a_lesson(base: Path, tmp_path: Path) -> None:
    record = teach(base, tmp_path / "s", 1).as_json()
    assert set(record) == {
        "domain", "version", "source", "tokens", "steps", "seconds", "training_seconds", "replayed_tokens",
        "trained_tokens", "not_measured", "seen_percent",
        "trainable_parameters", "batch_size", "complete", "kept", "repeated", "fit", "tokens_per_second",
    }  # fmt: skip
    assert record["trained_tokens"] == 3 * 2 * 32
    assert record["tokens_per_second"] == record["trained_tokens"] / record["training_seconds"]
    assert 0 < record["training_seconds"] < record["seconds"]
    assert record["kept"] == []
    json.dumps(record, allow_nan=False)
    stored = opened(base, tmp_path / "s").store.overview()[0]
    assert {key: stored[key] for key in ("fit", "tokens", "steps")} == {
        k: record[k] for k in ("fit", "tokens", "steps")
    }


def test_a_long_text_is_measured_on_what_was_held_out(base: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    taught = opened(base, tmp_path / "s", seq_len=64)
    seen: list[np.ndarray] = []
    original = session.Windows

    class Watched(original):  # type: ignore[misc, valid-type]
        def __init__(self, tokens: Any, seq_len: int) -> None:
            seen.append(tokens.ids)
            super().__init__(tokens, seq_len)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "Windows", Watched)
        lesson = taught.learn_from_text(shuffled(1500), "main", budget=Budget(steps=40))
    held = taught.store.heldout(taught.store.require("main"))
    assert held is not None
    whole = len(tokens_of([text_document(shuffled(1500), "x")], tokenizer))
    assert 0.05 * whole < len(held.ids) < 0.12 * whole
    assert lesson.measured == "heldout"
    assert lesson.measured_tokens == len(held.ids) - 1
    assert lesson.tokens == len(seen[0])
    assert abs(lesson.tokens + len(held.ids) - whole) < 30  # cut in other places, tokens differ a little
    trained = seen[0].tobytes()
    for start in range(0, len(held.ids) - 30, 15):
        assert held.ids[start : start + 30].tobytes() not in trained


def test_the_figure_after_is_that_of_the_version_on_disk(base: Path, tmp_path: Path) -> None:
    lesson = teach(base, tmp_path / "s", 1, budget=Budget(steps=60))
    again = opened(base, tmp_path / "s")
    short = [Document("x", text(1))]
    for domain, loss in (("main", lesson.after), (None, lesson.before)):
        again.set_adapter(domain)
        measured = again.evaluate(short, 32)
        tokens = tokens_of(short, again.tokenizer)
        rows = evaluation_windows(tokens, 32, 32)
        assert evaluate(again.model, rows).loss == pytest.approx(loss, rel=1e-6)
        assert measured.tokens == lesson.measured_tokens == len(tokens) - 1


@pytest.mark.parametrize(("count", "held"), [(1900, False), (2100, True)])
def test_two_thousand_tokens_decide(base: Path, tmp_path: Path, tokenizer: Tokenizer, count: int, held: bool) -> None:
    words = tokenizer.decode(tokenizer.encode(TEXT)[: count - 1])
    taught = opened(base, tmp_path / "s")
    lesson = taught.learn_from_text(words, budget=Budget(steps=1))
    assert lesson.measured == ("heldout" if held else "fit")
    assert (taught.store.heldout(taught.store.require("main")) is not None) == held


def test_at_most_4096_tokens_are_held_out_and_none_on_request(base: Path, tmp_path: Path) -> None:
    taught = opened(base, tmp_path / "s", seq_len=128)
    documents = [text_document(TEXT[i : i + 60], f"{i}") for i in range(0, 180_000, 60)]  # each with its own end
    taught.learn(documents, "many", "x", Budget(steps=1))
    held = taught.store.heldout(taught.store.require("many"))
    assert held is not None
    assert 3500 < len(held.ids) <= 4096
    taught.config = dataclasses.replace(taught.config, holdout=0.0)
    lesson = taught.learn(documents[:300], "none-held", "x", Budget(steps=1))
    assert lesson.measured == "fit"
    assert taught.store.heldout(taught.store.require("none-held")) is None


@pytest.mark.parametrize("factor", [1, 3, 8])
def test_the_held_out_part_is_not_too_long_where_the_estimate_is_too_low(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: int
) -> None:
    """As where a chat template adds to the text, or a small vocabulary has few letters a token."""
    taught = opened(base, tmp_path / "s")
    monkeypatch.setattr(lesson_module, "estimated_tokens", lambda text: len(text) // (4 * factor) + 1)
    train, kept = teacher(taught)._split([text_document(TEXT[:200_000], "x")])
    assert kept is not None
    assert 2000 < len(kept) <= 4096
    assert len(train) + len(kept) == pytest.approx(
        len(tokens_of([text_document(TEXT[:200_000], "x")], taught.tokenizer)), rel=0.01
    )


def test_bits_are_per_byte_of_what_was_predicted(base: Path, tmp_path: Path) -> None:
    """Without BOS a text's first token is given; with it that one is predicted too, and BOS itself has no bytes."""
    taught = opened(base, tmp_path / "s")
    document = text_document(text(1, 300), "x")
    first = len(taught.tokenizer.token_bytes(taught.tokenizer.encode(document.text)[0]))
    plain = taught.evaluate([document])
    taught.tokenizer.adds_bos = True
    begun = taught.evaluate([document])
    assert (plain.bytes, begun.bytes) == (300 - first, 300)
    assert begun.tokens == plain.tokens + 1
    lesson = taught.learn([document], budget=STEPS)
    assert lesson.tokens == begun.tokens + 1


def counting(taught: ContinualLearner, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the texts that are encoded from now on."""
    encode, lengths = taught.tokenizer.encode, []

    def counted(text: str) -> list[int]:
        lengths.append(len(text))
        return encode(text)

    monkeypatch.setattr(taught.tokenizer, "encode", counted)
    return lengths


def test_of_a_text_too_long_for_the_time_a_part_is_taken_from_all_over_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is encoded depends on the seconds, not on the text; what is taken on the seed."""
    monkeypatch.setattr(lesson_module, "TOKENS_PER_SECOND_AT_MOST", 5_000)
    taught = opened(base, tmp_path / "s")
    lengths = counting(taught, monkeypatch)
    whole = [text_document((TEXT * 60)[:20_000_000], "x")]
    notes: list[str] = []
    lesson = taught.learn(
        whole, budget=Budget(2), report=lambda event: notes.append(event["text"]) if event["event"] == "note" else None
    )
    assert sum(lengths) <= 2 * 5_000 * 4
    assert not lesson.complete
    assert 10_000 < lesson.tokens < 40_000  # of this small vocabulary, estimated as 10,000
    (told,) = [note for note in notes if not note.startswith("compiling")]  # where so much can be done in 2 seconds
    assert re.fullmatch(
        r"the text has about 5,\d{3},\d{3} tokens; about (9,\d{3}|10,000) of them, drawn over all of it, are what "
        r"2 seconds can hold",
        told,
    )


def test_a_text_is_encoded_once_where_steps_are_counted_or_the_time_suffices(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught = opened(base, tmp_path / "s")
    lengths = counting(taught, monkeypatch)
    whole = [text_document(TEXT[:400_000], "x")]
    for budget in (Budget(1, steps=1), Budget(11)):
        assert teacher(taught)._affordable(whole, budget, pytest.fail) is whole
    teacher(taught)._split(whole)
    assert sum(lengths) < 1.1 * 400_000


def test_tokens_that_only_lead_to_others_teach_nothing() -> None:
    ids, flags = np.zeros(3, np.int32), np.array([True, False, False])
    assert not teaches(Tokens(ids, flags, 1, 1))
    assert teaches(Tokens(ids, ~flags, 1, 1))
    assert [teaches(Tokens(ids[:n], None, 1, 1)) for n in (0, 1, 2)] == [False, False, True]


@pytest.mark.parametrize("words", ["a b", "Key: flower pot.", "x" * 300])
def test_every_lesson_takes_a_step(base: Path, tmp_path: Path, words: str) -> None:
    lesson = opened(base, tmp_path / "s", gradient_accumulation_steps=4).learn_from_text(words, budget=Budget(1e-6))
    assert lesson.steps == 1
    assert lesson.after != lesson.before


@pytest.mark.parametrize("words", ["", "a"[:0]])
def test_nothing_to_learn(base: Path, tmp_path: Path, words: str) -> None:
    with pytest.raises(InputError, match="nothing to predict"):
        opened(base, tmp_path / "s").learn([Document("x", words)])
    with pytest.raises(InputError, match="nothing to predict"):
        opened(base, tmp_path / "s").learn([])
    assert not (tmp_path / "s").exists()


def test_a_short_text_is_gone_over_again(base: Path, tmp_path: Path) -> None:
    sentence = "The office key is under the third flower pot."
    assert opened(base, tmp_path / "a").learn_from_text(sentence).steps == LEAST_STEPS
    once = opened(base, tmp_path / "b").learn_from_text(sentence, budget=Budget(epochs=1))
    assert once.steps == 1
    learner = opened(base, tmp_path / "c", batch_size=1)
    windows = math.ceil(len(learner.tokenizer.encode(text(1, 3000))) / 32)
    assert windows > LEAST_STEPS
    assert learner.learn_from_text(text(1, 3000)).steps == windows
    again = learner.learn_from_text(sentence)
    assert again.steps == LEAST_STEPS
    assert again.replayed_tokens > 0


@pytest.mark.parametrize("budget", [{"seconds": 0}, {"epochs": -1}, {"steps": 0}, {"seconds": math.nan}])
def test_a_budget_that_makes_no_sense(budget: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"--{next(iter(budget))}"):
        Budget(**budget)


def test_one_epoch_sees_every_token_once(base: Path, tmp_path: Path) -> None:
    lesson = opened(base, tmp_path / "s", batch_size=1).learn_from_text(text(1, 3000), budget=Budget(600))
    assert lesson.complete
    assert lesson.steps == math.ceil((lesson.tokens - 1) / 32)
    assert lesson.trained_tokens == lesson.tokens - 1
    assert lesson.trained_tokens % 32  # the last window is moved back, and what it repeats is not counted


# -- the budget, by a clock that the test moves ------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, float]]:
    """Time passes only in the model: `forward` seconds a token measured, `step` seconds a token trained."""
    rate = {"now": 0.0, "forward": 0.01, "step": 0.03, "training": 0.0}
    monkeypatch.setattr(lesson_module.time, "perf_counter", lambda: rate["now"])
    call, step, means = ContinualLLM.__call__, session.Stepper.step, states.mean_states

    def forward(self: ContinualLLM, tokens: mx.array, cache: Any = None) -> mx.array:
        rate["now"] += rate["forward"] * tokens.size + rate.pop("cold", 0.0)
        return call(self, tokens, cache)

    def train(self: Any, batches: list, *rest: Any) -> Any:
        rate["step"] *= rate.get("slower", 1.0)
        now = rate["now"] + rate.pop("compiling", 0.0)
        result = step(self, batches, *rest)
        rate["now"] = now + rate["step"] * sum(tokens.size for tokens, *_ in batches)
        rate["training"] += rate["now"] - now
        return result

    def read(model: ContinualLLM, rows: np.ndarray, start: int) -> np.ndarray:
        rate["now"] += rate["forward"] * rows.size / 4
        return means(model, rows, start)

    monkeypatch.setattr(ContinualLLM, "__call__", forward)
    monkeypatch.setattr(session.Stepper, "step", train)
    monkeypatch.setattr(states, "mean_states", read)
    return rate  # type: ignore[return-value]


@pytest.mark.parametrize(
    "hindrance", [{"compiling": 50.0}, {"forward": 0.045}, {"cold": 200.0}], ids=["step", "speed", "start"]
)
def test_where_time_suffices_the_clock_has_no_say(
    base: Path, tmp_path: Path, clock: dict[str, float], hindrance: dict[str, float]
) -> None:
    """Neither a first step that compiles nor a low estimate of the speed changes what a whole pass teaches."""
    found = []
    for run, slowed in enumerate(({}, hindrance)):
        learner = opened(base, tmp_path / str(run), batch_size=1)
        for number in (1, 2):
            clock.update(slowed)
            lesson = learner.learn_from_text(text(number, 3000), budget=Budget(2000))
            assert lesson.complete
        versions = learner.store.versions()
        found.append([(version.files, version.figures["kept"]) for version in versions])
        learner.undo()
        clock.update(slowed)
        learner.learn_from_text(text(2, 3000), budget=Budget(2000))
        assert learner.store.require("main").files == versions[1].files
    assert found[0] == found[1]


@pytest.mark.parametrize("accumulated", [1, 4])
def test_a_short_text_is_gone_over_for_sixteen_steps(base: Path, tmp_path: Path, accumulated: int) -> None:
    learner = opened(base, tmp_path / "s", batch_size=1, gradient_accumulation_steps=accumulated)
    lesson = learner.learn_from_text("The key lies under the third pot.", budget=Budget(600))
    assert (lesson.steps, lesson.complete) == (16, True)


@pytest.mark.parametrize(("seconds", "step"), [(20, 0.01), (20, 0.1), (60, 0.025), (150, 0.1)])
def test_the_time_is_kept_to_a_step_and_three_quarters_of_it_are_steps(
    base: Path, tmp_path: Path, clock: dict[str, float], seconds: float, step: float
) -> None:
    clock["step"] = step
    lesson = opened(base, tmp_path / "s").learn_from_text(text(1, 40_000), budget=Budget(seconds))
    assert not lesson.complete
    longest = step * 33 * lesson.batch_size
    assert seconds - 2 * longest - 0.1 * seconds < lesson.seconds <= seconds + longest
    assert clock["training"] >= 0.75 * lesson.seconds


def test_a_second_lesson_keeps_the_time_too(base: Path, tmp_path: Path, clock: dict[str, float]) -> None:
    taught = opened(base, tmp_path / "s")
    for number in range(4):
        clock["training"] = 0.0
        lesson = taught.learn_from_text(text(number, 10_000), budget=Budget(40))
        assert lesson.seconds <= 40 + 0.03 * 33 * lesson.batch_size
        assert clock["training"] >= 0.75 * lesson.seconds
    assert 1 <= len(lesson.kept) <= 3


def test_a_machine_that_slows_down_shortens_the_second_measurement(
    base: Path, tmp_path: Path, clock: dict[str, float]
) -> None:
    def slow(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            clock["forward"] = 0.05

    lesson = opened(base, tmp_path / "s").learn([text_document(text(1, 30_000), "x")], budget=Budget(60), report=slow)
    assert lesson.seconds < 60 * 1.05
    assert 32 <= lesson.measured_tokens < 300  # of some 600 that were measured before


def test_a_short_lesson_is_not_outlasted_by_its_measuring(base: Path, tmp_path: Path, clock: dict[str, float]) -> None:
    taught = opened(base, tmp_path / "s")
    for number in range(3):
        clock["training"] = 0.0
        lesson = taught.learn_from_text(text(number, 2500), budget=Budget(600))
        assert lesson.complete
        assert lesson.measured == "fit"
        assert clock["training"] >= 0.75 * lesson.seconds


# -- lessons in a row ------------------------------------------------------------------------------------------------


def test_learn_undo_learn_is_learning_once(base: Path, tmp_path: Path) -> None:
    once, again = tmp_path / "once", tmp_path / "again"
    for store in (once, again):
        teach(base, store, 1)
    teach(base, again, 2)
    opened(base, again).undo()
    for store in (once, again):
        teach(base, store, 3)
    heads = [opened(base, store) for store in (once, again)]
    for each in heads:
        each.set_adapter("main")
    first, second = (numbers(lora.adapter_arrays(each.model)) for each in heads)
    assert first == second
    assert tree(once)["main/v0002/adapters.safetensors"] == tree(again)["main/v0003/adapters.safetensors"]


def test_randomness_is_of_seed_domain_and_depth_alone(base: Path, tmp_path: Path) -> None:
    alone, between = tmp_path / "alone", tmp_path / "between"
    for number in (1, 2):
        teach(base, alone, number, lora_dropout=0.1)
    taught = opened(base, between, lora_dropout=0.1)  # one learner for all: its state must not matter either
    for number, domain in ((1, "main"), (5, "other"), (2, "main"), (6, "other")):
        mx.random.seed(number)
        taught.learn_from_text(text(number), domain, budget=STEPS)
    assert {k: v for k, v in tree(between).items() if k.startswith("main")} == tree(alone)
    teach(base, alone, 1, "renamed", lora_dropout=0.1)
    teach(base, alone, 1, "seeded", lora_dropout=0.1, seed=1)
    teach(base, alone, 1, "renamed", lora_dropout=0.1)
    weights = [digest for name, digest in tree(alone).items() if name.endswith("adapters.safetensors")]
    assert len(set(weights)) == len(weights) == 5


def test_a_store_in_the_home_folder_is_found_there(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    ContinualLearner.from_checkpoint(base, store="~/lessons").learn_from_text("some words", budget=Budget(steps=1))
    assert (tmp_path / "lessons" / "learner.sqlite").is_file()


def test_each_lesson_of_a_domain_has_a_seed_of_its_own(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, str, int]] = []
    original = lesson_module._seed
    monkeypatch.setattr(lesson_module, "_seed", lambda *key: asked.append(key) or original(*key))
    for number, domain in ((1, "a"), (2, "a"), (3, "b"), (4, "a")):
        teach(base, tmp_path / "s", number, domain, seed=7)
    opened(base, tmp_path / "s").undo("a")
    teach(base, tmp_path / "s", 5, "a", seed=7)
    assert asked == [(7, "a", 0), (7, "a", 1), (7, "b", 0), (7, "a", 2), (7, "a", 2)]
    assert len({original(*key) for key in asked}) == 4
    assert all(0 <= original(*key) < 2**63 for key in asked)


def test_other_domains_are_untouched(base: Path, tmp_path: Path) -> None:
    teach(base, tmp_path / "s", 1, "a")
    before = tree(tmp_path / "s")
    teach(base, tmp_path / "s", 2, "b")
    teach(base, tmp_path / "s", 3, "b")
    assert {k: v for k, v in tree(tmp_path / "s").items() if k.startswith("a/")} == before


def test_undoing_the_only_lesson_leaves_nothing_and_brings_the_base_back(base: Path, tmp_path: Path) -> None:
    taught = opened(base, tmp_path / "s", learning_rate=1e-2)
    before = taught.generate("The", 12, temperature=0.0)
    taught.learn_from_text(text(1), budget=Budget(steps=30))
    assert taught.generate("The", 12, temperature=0.0) != before
    assert taught.undo() is None
    assert taught.adapter is None
    assert taught.generate("The", 12, temperature=0.0) == before
    assert not (tmp_path / "s").exists()


def test_a_domain_keeps_the_shape_it_has(base: Path, tmp_path: Path) -> None:
    """Asked for another rank, the lesson goes on with the domain's; what it writes says so."""
    teach(base, tmp_path / "s", 1, lora_r=4, lora_alpha=20.0)
    lesson = teach(base, tmp_path / "s", 2)
    written = tmp_path / "s" / "main" / lesson.version
    assert json.loads((written / "adapter_config.json").read_text())["lora_parameters"]["rank"] == 4
    arrays, scale = adapters.read_adapter(written)
    assert scale == 5.0
    assert arrays["model.layers.0.self_attn.q_proj.lora_a"].shape == (32, 4)


def test_what_earlier_lessons_kept(base: Path, tmp_path: Path) -> None:
    taught = opened(base, tmp_path / "s")
    for number in (1, 2):
        taught.learn([text_document(text(number, 12_000), "x")], "main", f"{number}.txt", Budget(steps=40))
    taught.learn_from_text(text(3), "main", budget=Budget(steps=5))  # too short for a held-out part
    lesson = taught.learn([text_document(text(4, 12_000), "x")], "main", "4.txt", Budget(steps=110))
    assert [(k["version"], k["source"]) for k in lesson.kept] == [("v0002", "2.txt"), ("v0001", "1.txt")]
    fourth = taught.store.require("main")
    assert fourth.figures["kept"] == lesson.kept
    for number, state in ((3, "before"), (4, "after")):
        taught.undo("main", number)
        for kept in lesson.kept:
            held = taught.store.heldout(taught.store.history("main")[int(kept["version"][-1]) - 1])
            assert held is not None
            count = kept["tokens"] + 1
            assert 500 < count < 560
            window = Tokens(held.ids[:count], None, 1, 0)
            loss = evaluate(taught.model, evaluation_windows(window, 32, 32)).loss
            assert kept[state] == pytest.approx(loss, rel=1e-5)
    for kept in lesson.kept:
        change = 100 * (math.exp(kept["after"]) / math.exp(kept["before"]) - 1)
        assert kept["ppl_forget_percent"] == pytest.approx(change)


def test_statistics(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taught = opened(base, tmp_path / "s")
    assert taught.get_stats() == {"domains": [], "lessons": 0, "adapter_parameters": 0, "attached": None}
    taught.learn_from_text(text(1), "b", budget=STEPS)
    lesson = taught.learn_from_text(text(2), "a", budget=STEPS)
    taught.learn_from_text(text(3), "a", budget=STEPS)
    parameters = lesson.trainable_parameters
    assert taught.get_stats() == {
        "domains": ["a", "b"],
        "lessons": 3,
        "adapter_parameters": parameters,
        "attached": "a",
    }
    taught.print_stats()
    assert capsys.readouterr().out == f"domains: a, b\nlessons: 3\nadapter parameters: {parameters}\nattached: a\n"


def test_a_learner_without_a_store_keeps_its_lessons_while_it_lives(base: Path, tokenizer: Tokenizer) -> None:
    taught = ContinualLearner(ContinualLLM.from_checkpoint(base), SETTINGS, tokenizer)
    folder = taught.store.folder
    for number, domain in ((1, "a"), (2, "b"), (3, "a")):
        lesson = taught.learn_from_text(text(number), domain, budget=STEPS)
    assert lesson.version == "v0002"
    said = taught.generate("The", 8, temperature=0.0)
    taught.set_adapter("b")
    taught.set_adapter("a")
    assert taught.generate("The", 8, temperature=0.0) == said
    assert folder.is_dir()
    del taught
    assert not folder.exists()


def test_domains_are_chosen_by_name(base: Path, tmp_path: Path) -> None:
    taught = opened(base, tmp_path / "s")
    assert taught.choose() is None
    teach(base, tmp_path / "s", 1)
    assert [taught.choose(), taught.choose("none"), taught.choose("main")] == [None, None, "main"]
    with pytest.raises(InputError, match="there are: main"):
        taught.choose("law")
    assert taught.adapter == "main"


def test_a_source_that_is_no_text(base: Path, tmp_path: Path) -> None:
    lesson = opened(base, tmp_path / "s").learn([Document("x", text(1))], "main", "\udcff.txt", STEPS)
    assert lesson.source == "?.txt"


# -- mlx-lm opens it -------------------------------------------------------------------------------------------------


def test_mlx_lm_opens_the_adapter_as_it_is(base: Path, tmp_path: Path) -> None:
    import mlx_lm

    taught = opened(base, tmp_path / "s", learning_rate=1e-2)
    lesson = taught.learn_from_text(text(1), "main", budget=Budget(steps=30))
    folder = tmp_path / "s" / "main" / lesson.version
    model, their_tokenizer = mlx_lm.load(str(base), adapter_path=str(folder))
    prompt = text(1)[:60]
    ids = taught.tokenizer.encode(prompt)
    assert their_tokenizer.encode(prompt, add_special_tokens=False) == ids
    tokens = mx.array([ids])
    ours, theirs = np.array(taught.model(tokens)), np.array(model(tokens))
    bare = np.array(ContinualLLM.from_checkpoint(base)(tokens))
    assert np.abs(ours - theirs).max() < 1e-5
    assert np.abs(ours - bare).max() > 1e-2  # else an adapter that is not read would pass
    said = mlx_lm.generate(model, their_tokenizer, prompt=ids, max_tokens=24)
    assert len(said) > 10
    assert taught.generate(prompt, 24, temperature=0.0) == said


# -- failures --------------------------------------------------------------------------------------------------------


class Broken(Exception):
    """What a test raises in the middle of a lesson."""


def raising(error: BaseException, when: str) -> Any:
    """A report that raises at an event: begin, before, step or after."""

    def report(event: dict[str, Any]) -> None:
        if when in (event["event"], event.get("when")):
            raise error

    return report


def snapshot(taught: ContinualLearner) -> tuple[Any, ...]:
    """All that a failed lesson must leave as it was."""
    store = taught.store
    tokens = mx.array([taught.tokenizer.encode(text(9)[:80])])
    log = [[v.name for v in store.history(domain)] for domain in store.domains()]
    return taught.adapter, np.array(taught.model(tokens)).tobytes(), store.domains(), log, tree(store.folder)


@pytest.mark.parametrize("when", ["begin", "before", "step", "after"])
@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt])
@pytest.mark.parametrize("domain", ["main", "other", "new"])
def test_a_lesson_that_fails_leaves_everything_as_it_was(
    base: Path, tmp_path: Path, when: str, error: type[BaseException], domain: str
) -> None:
    taught = opened(base, tmp_path / "s", learning_rate=1e-2)
    for number, name in ((1, "other"), (2, "main")):
        taught.learn_from_text(text(number), name, budget=STEPS)
    before = snapshot(taught)
    with pytest.raises(error):
        taught.learn([Document("x", text(3))], domain, "x", STEPS, raising(error(), when))
    assert snapshot(taught) == before
    assert taught.learn_from_text(text(3), domain, budget=STEPS).version == ("v0001" if domain == "new" else "v0002")


@pytest.mark.parametrize("name", ["write_safetensors", "read_adapter"])
def test_a_full_disk_or_a_forbidden_file_leaves_everything_as_it_was(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    taught = opened(base, tmp_path / "s")
    taught.learn_from_text(text(1), "main", budget=STEPS)
    before = snapshot(taught)

    def refuse(*arguments: Any) -> None:
        raise OSError(28, "No space left on device") if name == "write_safetensors" else PermissionError(13, "denied")

    monkeypatch.setattr(*((adapters.modeldir, name) if name == "write_safetensors" else (lesson_module, name)), refuse)
    with pytest.raises(OSError, match=r"No space|denied"):
        taught.learn_from_text(text(2), "main", budget=STEPS)
    monkeypatch.undo()
    assert snapshot(taught) == before


@pytest.mark.parametrize("steps", [1, 5])
def test_a_loss_that_explodes_is_rolled_back(base: Path, tmp_path: Path, steps: int) -> None:
    taught = opened(base, tmp_path / "s")
    taught.learn_from_text(text(1), "main", budget=STEPS)
    before = snapshot(taught)
    taught.config = dataclasses.replace(taught.config, learning_rate=1e30)
    with pytest.raises(NonFiniteLossError, match="nothing was kept, try a lower --lr") as raised:
        taught.learn_from_text(text(2), "main", budget=Budget(steps=steps))
    assert raised.value.exit_code == 1
    assert snapshot(taught) == before


def test_a_base_that_predicts_nan_says_so_before_it_learns(base: Path, tmp_path: Path) -> None:
    taught = opened(base, tmp_path / "s")
    taught.model.update({"model": {"norm": {"weight": mx.full((32,), math.nan)}}})
    with pytest.raises(NonFiniteLossError, match="nan before the lesson"):
        taught.learn_from_text(text(1))
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_adapter(base: Path, tmp_path: Path, damage: str) -> None:
    for number in (1, 2):
        teach(base, tmp_path / "s", number)
    path = tmp_path / "s" / "main" / "v0002" / "adapters.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(content if damage == "flip" else content[:-50])
    taught = opened(base, tmp_path / "s")
    with pytest.raises(DamagedFileError, match="`minimac-mlx undo main` goes back a version"):
        taught.set_adapter("main")
    with pytest.raises(DamagedFileError):
        taught.learn_from_text(text(3), "main", budget=STEPS)
    assert taught.adapter is None
    assert not lora.lora_layers(taught.model)
    taught.undo()
    taught.set_adapter("main")


def test_a_damaged_earlier_version_does_not_end_the_domain(base: Path, tmp_path: Path) -> None:
    """What would be held to it is held to the next version, as after prune, and a note says how to be rid of it."""
    for number in (1, 2, 3):
        teach(base, tmp_path / "s", number)
    path = tmp_path / "s" / "main" / "v0001" / "adapters.safetensors"
    path.unlink()
    taught = opened(base, tmp_path / "s")
    said: list[str] = []
    lesson = taught.learn(
        [text_document(text(4), "four")],
        budget=Budget(steps=20),
        report=lambda event: said.append(event["text"]) if event["event"] == "note" else None,
    )
    assert lesson.version == "v0004"
    assert lesson.replayed_tokens > 0
    advice = "later versions do without it: `minimac-mlx prune --keep N` deletes all but the last N"
    assert said == [f"{path}: missing; {advice}; until then v0002 stands for it"]
    taught.store.prune(2)
    assert list(taught.store.damage(taught.store.require("main"))) == []
    taught.learn_from_text(text(5), "main", budget=STEPS)


def test_a_model_in_memory_is_known_by_its_weights(base: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(base)
    model = ContinualLLM.from_checkpoint(base)
    taught = ContinualLearner(model, SETTINGS, tokenizer)
    taught.learn_from_text(text(1), "main", budget=STEPS)
    taught.save_checkpoint(tmp_path / "saved")
    same = ContinualLearner(ContinualLLM.from_checkpoint(base), SETTINGS, tokenizer)
    same.load_checkpoint(tmp_path / "saved")
    other = ContinualLLM.from_checkpoint(base)
    other.update({"model": {"norm": {"weight": other.model.norm.weight * 1.001}}})
    with pytest.raises(InputError, match="these lessons belong to another base"):
        ContinualLearner(other, SETTINGS, tokenizer).load_checkpoint(tmp_path / "saved")


def test_an_adapter_of_another_shape_leaves_the_bare_base(base: Path, tmp_path: Path) -> None:
    taught = opened(base, tmp_path / "s")
    taught.learn_from_text(text(1), "main", budget=STEPS)
    with pytest.raises(DamagedFileError, match="does not fit"):
        taught._put("main", ({"model.layers.0.self_attn.q_proj.lora_a": mx.zeros((3, 2))}, 1.0))
    assert taught.adapter is None
    assert not lora.lora_layers(taught.model)


def test_another_base_or_tokenizer_is_refused(base: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    teach(base, tmp_path / "s", 1)
    config = ContinualLLM.from_checkpoint(base).config
    arrays = {name: np.zeros(shape, np.float32) for name, shape in expected_shapes(config).items()}
    names = ("tokenizer.json", "tokenizer_config.json")
    contents = {name: (base / name).read_bytes() for name in names}
    other = write_model_directory(tmp_path / "other", config, arrays, contents, {}, {})
    with pytest.raises(InputError, match="belong to another base model"):
        opened(other, tmp_path / "s")


CHILD = """
import os, pathlib, signal, sys
sys.path.insert(0, sys.argv[1])
import test_learner as t
from mlx_impl.adapters import write_adapter

when, base, store = sys.argv[2], pathlib.Path(sys.argv[3]), pathlib.Path(sys.argv[4])
taught = t.opened(base, store)

def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

def report(event):
    if when in (event["event"], event.get("when")):
        if when == "begin":
            print("learning", flush=True)
            sys.stdin.read()
        die()

if when == "writing":
    t.lesson_module.write_adapter = lambda folder, *rest: (write_adapter(folder, *rest), die())
if when == "renamed":
    t.files.fsync = lambda path: die() if path.name == "main" else None
taught.learn([t.Document("x", t.text(2))], "main", "x", t.STEPS, report)
"""


def child(base: Path, store: Path, when: str) -> list[str]:
    return [sys.executable, "-c", CHILD, str(Path(__file__).parent), when, str(base), str(store)]


@pytest.mark.parametrize("when", ["step", "writing", "renamed"])
def test_a_killed_lesson_leaves_everything_as_it_was(base: Path, tmp_path: Path, when: str) -> None:
    store = tmp_path / "s"
    teach(base, store, 1)
    before = snapshot(opened(base, store))
    done = subprocess.run(child(base, store, when), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = [path.name for path in (store / "main").iterdir()]
    assert len(left) == (1 if when == "step" else 2), left
    taught = opened(base, store)
    with taught.store.writing():
        pass
    assert snapshot(taught) == before


def test_a_second_writer_is_told_the_pid(base: Path, tmp_path: Path) -> None:
    store = tmp_path / "s"
    teach(base, store, 1)
    taught = opened(base, store)
    before = snapshot(taught)
    with subprocess.Popen(
        child(base, store, "begin"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout
        assert other.stdout.readline() == "learning\n"
        with pytest.raises(LockedError, match=f"by process {other.pid};"):
            taught.learn_from_text(text(3), "another", budget=STEPS)
        assert snapshot(taught) == before
        other.kill()
