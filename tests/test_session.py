"""What a lesson's steps take from the buffer, and what a change of settings between two lessons means."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lessons import opened, text, tiny_base, tiny_tokenizer

from mlx_impl import kernels, session
from mlx_impl.adapters import read_adapter, read_fisher
from mlx_impl.config import REPLAY_STRATEGIES, Budget, ContinualLearningConfig
from mlx_impl.device import can_compile
from mlx_impl.ewc import fisher_diagonal
from mlx_impl.lesson import Lesson
from mlx_impl.ngrams import ngrams, share
from mlx_impl.past import FISHER_SHARE, WINDOW_PASSES
from mlx_impl.readers import text_document
from mlx_impl.replay import ReplayBuffer, Sample, unpack

STEPS = Budget(steps=6)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"), tiny_tokenizer())


def teach(base: Path, store: Path, number: int, budget: Budget = STEPS, **changes: Any) -> Lesson:
    return opened(base, store, **changes).learn_from_text(text(number), budget=budget)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Sample, int]]:
    """The microbatches of all lessons, each with the number of its new rows."""
    seen: list[tuple[Sample, int]] = []
    batch = session.Session._batch

    def noted(self: session.Session, sample: Sample, new: int) -> Any:
        seen.append((sample, new))
        return batch(self, sample, new)

    monkeypatch.setattr(session.Session, "_batch", noted)
    return seen


def buffer_of(base: Path, store: Path) -> ReplayBuffer:
    lessons = opened(base, store).store
    replay = lessons.replay(lessons.require("main"))
    assert replay is not None
    state = {"counters": replay.counters, "ids": replay.ids, "priorities": replay.priorities}
    return ReplayBuffer.restore(state, replay.windows.__getitem__)


def first_lesson(base: Path, store: Path) -> set[bytes]:
    """Ids of the windows that the first lesson left in the buffer."""
    return {row.id for row in buffer_of(base, store).rows(1)}


def test_a_text_that_is_taught_again_is_not_held_to_what_was_known_of_it(
    base: Path, tmp_path: Path, batches: list[tuple[Sample, int]]
) -> None:
    """Its own windows, from the first time, are not drawn; of the others as many as they are a part of the past."""
    for number in (1, 2):
        teach(base, tmp_path, number, holdout=0.0)
    first = first_lesson(base, tmp_path)
    others = 1 - len(first) / len(buffer_of(base, tmp_path))
    del batches[:]
    again = teach(base, tmp_path, 1, Budget(steps=20), holdout=0.0)
    drawn = [id for sample, _ in batches for id in sample.rows]
    assert len(drawn) == round(20 * others)  # of two rows a step one is drawn from a past that is all another text
    assert first.isdisjoint(drawn)
    assert all(min(of_rows(sample), default=1.0) > 0 for sample, _ in batches)
    assert again.replayed_tokens > 0


def test_a_text_that_was_changed_is_not_held_to_what_was_known_of_it(
    base: Path, tmp_path: Path, batches: list[tuple[Sample, int]]
) -> None:
    """All its windows are cut elsewhere, and a sentence is another one."""
    for number in (1, 2):
        teach(base, tmp_path, number, holdout=0.0)
    first = first_lesson(base, tmp_path)
    del batches[:]
    changed = f"It begins with something new. {text(1)[:500]} Here, too, is something new. {text(1)[500:]}"
    learner = opened(base, tmp_path, holdout=0.0)
    assert learner.learn_from_text(changed, budget=Budget(steps=40)).repeated == [1]
    drawn = [id for sample, _ in batches for id in sample.rows]
    assert len(set(drawn) & first) <= 2 < len(set(drawn))


def test_what_is_held_out_is_not_replayed(base: Path, tmp_path: Path, batches: list[tuple[Sample, int]]) -> None:
    """Of a text that grew, the part that is held out now was taught before: that is told, and it is not drawn."""
    short, grown = text(1, 6000), text(1, 9000)
    opened(base, tmp_path).learn_from_text(short, budget=Budget(epochs=1))
    before = {row.id: unpack(row.window)[0] for row in buffer_of(base, tmp_path).rows()}
    del batches[:]
    learner = opened(base, tmp_path, seed=1)
    lesson = learner.learn_from_text(grown, budget=Budget(steps=30))
    kept = learner.store.heldout(learner.store.require("main"))
    assert kept is not None
    taught = ngrams(np.concatenate(list(before.values())))
    assert lesson.taught_percent == pytest.approx(100 * share(kept.ids, taught), abs=10)
    assert lesson.taught_percent > 5
    there = ngrams(kept.ids)
    drawn = {id for sample, _ in batches for id in sample.rows if id in before}
    assert all(share(before[id], there) < 0.5 for id in drawn)


def test_a_lesson_says_which_ones_it_repeats(base: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        assert teach(base, tmp_path, number, holdout=0.0).repeated == []
    assert teach(base, tmp_path, 1, holdout=0.0, replay_ratio=0.0).repeated == [1]
    both = text(1) + text(2)
    third = opened(base, tmp_path, holdout=0.0).learn_from_text(both, budget=STEPS)
    assert third.repeated == [1, 2, 3]  # though all windows of the second text are cut elsewhere


def test_text_like_the_base_s_is_in_the_shortest_lesson(base: Path, tmp_path: Path) -> None:
    general = [text_document(text(9), "general")]
    steps: list[int] = []
    for count in (1, 40):
        learner = opened(base, tmp_path / str(count), batch_size=1)
        extended = session.Session._extended

        def noted(self: session.Session, sample: Sample, microbatch: int, whole: Any = extended) -> Sample:
            result: Sample = whole(self, sample, microbatch)
            steps.append(len(result.tokens) - len(sample.tokens))
            return result

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(session.Session, "_extended", noted)
            learner.learn([text_document(text(1), "new")], budget=Budget(steps=count), like_base=general)
    assert steps[0] == 1
    assert steps[1:] == [1] + [0] * 18 + [1] + [0] * 18 + [1, 0]  # a twentieth of a batch that it comes on top of


def test_more_than_half_of_one_window_cannot_be_replayed(base: Path, tmp_path: Path) -> None:
    said: list[str] = []
    for number, rows in ((1, 1), (2, 1), (3, 2)):
        learner = opened(base, tmp_path, batch_size=rows, replay_ratio=0.9)
        learner.learn(
            [text_document(text(number), "new")],
            budget=STEPS,
            report=lambda event: said.append(event["text"]) if event["event"] == "note" else None,
        )
    assert said == ["with one window a step at most half are replayed; more than that needs --batch-size 2 or above"]


def of_rows(sample: Sample) -> list[float]:
    """Weights of the replayed rows, the last ones."""
    weights: list[float] = np.array(sample.weights)[len(sample.weights) - len(sample.rows) :].tolist()
    return weights


@pytest.mark.parametrize(("changes", "characters"), [({"batch_size": 4, "replay_ratio": 0.25}, 60), ({}, 1200)])
def test_all_replayed_windows_weigh_as_much_as_the_new_ones(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], characters: int
) -> None:
    """Over a lesson, however few windows the text has to fill a batch with."""
    sums = np.zeros(2)
    step = session.Stepper.step

    def weighed(self: Any, batches: list[tuple[Any, ...]], *rest: Any) -> Any:
        for _, mask, *held in batches:
            sums[:] += float(mask.sum().item()), float(held[1].sum().item()) if held else 0.0
        return step(self, batches, *rest)

    teach(base, tmp_path, 1, **changes)
    monkeypatch.setattr(session.Stepper, "step", weighed)
    opened(base, tmp_path, **changes).learn_from_text(text(2, characters), budget=Budget(steps=12))
    assert sums[1] == pytest.approx(sums[0], rel=0.1)


@pytest.mark.parametrize("before", REPLAY_STRATEGIES)
@pytest.mark.parametrize("now", REPLAY_STRATEGIES)
def test_a_domain_takes_another_strategy(base: Path, tmp_path: Path, before: str, now: str) -> None:
    teach(base, tmp_path, 1, replay_strategy=before)
    teach(base, tmp_path, 2, replay_strategy=now)
    lessons = opened(base, tmp_path).store
    replay = lessons.replay(lessons.require("main"))
    assert replay is not None
    assert replay.counters["strategy"] == lessons.require("main").config["replay_strategy"] == now
    assert len(set(replay.priorities.tolist())) > 1 or now != "importance"


def test_a_lesson_without_ewc_leaves_what_holds_later_ones(base: Path, tmp_path: Path) -> None:
    sums = []
    for number, use in ((1, True), (2, True), (3, False), (4, True)):
        teach(base, tmp_path, number, use_ewc=use)
        lessons = opened(base, tmp_path).store
        folder = lessons.files_of(lessons.require("main"))
        found = read_fisher(folder, read_adapter(folder)[0]) or {}
        sums.append(sum(array.sum().item() for array in found.values()))
    assert sums[0] == 0 < sums[1] == sums[2] < sums[3]


@pytest.mark.parametrize("held", [{"replay_ratio": 0.5, "batch_size": 2}, {"use_ewc": True}, {}])
def test_what_holds_a_lesson_keeps_its_rate_up_for_longer(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: dict[str, Any]
) -> None:
    """A first lesson of so many steps has half of the rate, and so has one that nothing holds."""
    rates: list[float] = []

    def planned(self: session.Session, report: Any) -> None:
        rates.append(self._peak_rate())
        self.seconds = 1.0

    teach(base, tmp_path, 0)
    monkeypatch.setattr(session.Session, "run", planned)
    settings = {"learning_rate": None, "replay_ratio": 0.0, "use_ewc": False, **held}
    for domain in ("another", "main"):
        learner = opened(base, tmp_path, **settings)
        learner.learn_from_text(text(1), domain, budget=Budget(steps=160))
    assert rates == [1e-3, 2e-3 if held else 1e-3]


def test_the_fisher_follows_from_the_text_and_not_from_the_clock(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window costs five forward passes over it; the steps take three over the text and four over what is replayed."""
    used: list[int] = []

    def noted(logits_of: Any, parameters: Any, batches: list[Any], key: Any) -> Any:
        used.append(len(batches))
        return fisher_diagonal(logits_of, parameters, batches, key)

    teach(base, tmp_path, 1, Budget(steps=40), holdout=0.0)
    monkeypatch.setattr("mlx_impl.past.fisher_diagonal", noted)
    monkeypatch.setattr("mlx_impl.session.Session.run", lambda session, report: setattr(session, "seconds", 1.0))
    for epochs in (0.1, 1, 3, 100):
        learner = opened(base, tmp_path, holdout=0.0)
        lesson = learner.learn_from_text(text(2), budget=Budget(seconds=1e9, epochs=epochs))
        learner.undo()
        expected = round(FISHER_SHARE * 7 * epochs * lesson.tokens / (WINDOW_PASSES * 32))
        assert used[-1] == min(8, max(1, expected))
    assert used[0] == 1 < used[1] < used[-1] == 8


@pytest.mark.skipif(not can_compile(), reason="mx.compile needs a C++ compiler here")
def test_a_compiled_lesson_is_the_eager_one(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With replay and EWC; a tenth of replay, so that batches are of two sizes. Also as it is written for a GPU."""
    arrays, losses, notes = [], [], []
    on_cpu = kernels.on_cpu
    for least, cpu, store in ((10**9, True, "eager"), (0, True, "compiled"), (0, False, "for a GPU")):
        monkeypatch.setattr(session, "COMPILED", least)
        monkeypatch.setattr(kernels, "on_cpu", on_cpu if cpu else lambda: False)
        kinds: list[str] = []
        for number in (1, 2):
            learner = opened(base, tmp_path / store, replay_ratio=0.1, batch_size=3, holdout=0.0)
            documents = [text_document(text(number), "text")]
            lesson = learner.learn(
                documents, "main", "text", STEPS, report=lambda event, kinds=kinds: kinds.append(event.get("text", ""))
            )
        notes.append(sum("compiling" in kind for kind in kinds))
        losses.append(lesson.after)
        arrays.append(read_adapter(learner.store.files_of(learner.store.require("main")))[0])
    assert notes == [0, 2, 0]
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-4)
    for name, eager in arrays[0].items():
        for compiled in arrays[1:]:
            np.testing.assert_allclose(np.array(compiled[name]), np.array(eager), atol=2e-4, err_msg=name)


@pytest.mark.parametrize(
    ("tokens", "limited", "seconds", "expected"),
    [
        (session.COMPILED, False, 60, True),
        (session.COMPILED - 1, False, 60, False),
        (session.COMPILED, True, session.PATIENT + 9, True),
        (session.COMPILED, True, session.PATIENT - 9, False),
    ],
)
def test_long_lessons_are_compiled_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, tokens: int, limited: bool, seconds: float, expected: bool
) -> None:
    """And of those that time cuts short only the ones with time enough."""
    monkeypatch.setattr(session, "can_compile", lambda: True)
    lesson = session.Session.__new__(session.Session)
    lesson.config, lesson.rows, lesson.total = ContinualLearningConfig(), 1, tokens
    lesson.planned, lesson.deadline = tokens + limited, time.perf_counter() + seconds
    assert lesson._worth_compiling(1) is expected


def test_rows_of_another_length_are_in_the_forecast(base: Path, tmp_path: Path) -> None:
    """A short text whose batches are padded to the windows of an earlier lesson."""
    predicted: dict[str, list[int]] = {"alone": [], "after": []}
    for where, told in predicted.items():
        learner = opened(base, tmp_path / where, batch_size=1)
        if where == "after":
            learner.learn_from_text(text(1), budget=STEPS)
        note = lambda event, told=told: told.append(event.get("predicted_memory", 0))  # noqa: E731
        learner.learn([text_document("The key lies here.", "")], budget=STEPS, report=note)
    alone, after = (max(told) for told in predicted.values())
    assert after > 1.5 * alone
