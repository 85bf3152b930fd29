"""Lesson after lesson in one domain: what replay and EWC do to the learner, and that it all depends on state on disk.

Tiny models and few steps. Comparisons between methods have fixed seeds and steps, so that they come out the same each
time.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from lessons import opened, text, tiny_base, tiny_tokenizer

from mlx_impl import lora, verify
from mlx_impl.adapters import STATE, read_adapter, read_fisher
from mlx_impl.config import Budget
from mlx_impl.errors import DamagedFileError
from mlx_impl.ewc import ewc_penalty
from mlx_impl.lesson import Lesson
from mlx_impl.loss import divergence
from mlx_impl.past import best_version, hold, measured_fisher, recall
from mlx_impl.readers import text_document
from mlx_impl.replay import unpack
from mlx_impl.reservoirs import window_id
from mlx_impl.versions import Version

PLAIN: dict[str, Any] = {"replay_ratio": 0.0, "use_ewc": False}
STEPS = Budget(steps=4)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"), tiny_tokenizer())


def teach(base: Path, store: Path, number: int, budget: Budget = STEPS, **changes: Any) -> Lesson:
    """One lesson by a learner of its own: what it knows of the past comes from the disk."""
    taught = opened(base, store, **changes)
    return taught.learn_from_text(text(number), importance=1.0 + number, budget=budget)


def left_by(base: Path, store: Path) -> dict[str, bytes]:
    """Everything that the head of `main` left, but figures of time: arrays, Fisher, replay membership and windows."""
    lessons = opened(base, store).store
    head = lessons.require("main")
    folder = lessons.files_of(head)
    replay = lessons.replay(head)
    assert replay is not None
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    windows = b"".join(id + replay.windows[id].tobytes() for id in sorted(replay.windows))
    counters = repr(sorted(replay.counters.items())).encode()
    return {**kept, "ids": replay.ids.tobytes(), "windows": windows, "counters": counters}


def test_half_of_each_batch_is_replayed_from_the_second_lesson_on(base: Path, tmp_path: Path) -> None:
    first = teach(base, tmp_path, 0)
    second = teach(base, tmp_path, 1)
    assert first.replayed_tokens == 0
    assert first.trained_tokens == 4 * 2 * 32
    # A window a step each; the last one of a text counts only what no other one does.
    assert 3 * 32 < second.trained_tokens <= 4 * 32
    assert 3 * 32 < second.replayed_tokens <= 4 * 32
    assert teach(base, tmp_path, 2, replay_ratio=0.0).replayed_tokens == 0


def test_the_buffer_holds_what_was_trained_on_and_says_whose_it_is(base: Path, tmp_path: Path) -> None:
    for number in range(3):
        teach(base, tmp_path, number)
    lessons = opened(base, tmp_path).store
    replay = lessons.replay(lessons.require("main"))
    assert replay is not None
    by_lesson = {number: (source, importance, rows) for source, number, importance, rows in replay.counters["lessons"]}
    assert {number: kept[:2] for number, kept in by_lesson.items()} == {n + 1: ("text", 1.0 + n) for n in range(3)}
    assert by_lesson[1][2] == 8  # windows of its four steps, two each
    assert by_lesson[2][2] == by_lesson[3][2] == 4
    assert sorted(replay.windows) == sorted(bytes(id) for id in replay.ids)


def test_a_fisher_comes_with_the_second_lesson_and_accumulates(base: Path, tmp_path: Path) -> None:
    fishers = []
    for number in range(3):
        teach(base, tmp_path, number)
        lessons = opened(base, tmp_path).store
        folder = lessons.files_of(lessons.require("main"))
        fishers.append(read_fisher(folder, read_adapter(folder)[0]))
    assert fishers[0] is None
    assert fishers[1] is not None
    assert fishers[2] is not None
    assert all((array >= 0).all().item() for array in fishers[1].values())
    assert any((array > 0).any().item() for array in fishers[1].values())
    floor = {name: 0.95 * array for name, array in fishers[1].items()}  # what decay leaves of it is in the next
    assert all((fishers[2][name] >= floor[name] - 1e-12).all().item() for name in floor)


def fisher_after(base: Path, store: Path) -> dict[str, mx.array] | None:
    """What the head of `main` knows of all lessons but its own."""
    folder = opened(base, store).store.files_of(head(base, store))
    return read_fisher(folder, read_adapter(folder)[0])


def test_the_fisher_of_a_lesson_that_one_without_ewc_followed_is_made_up_for(base: Path, tmp_path: Path) -> None:
    """The fourth lesson estimates the second's and the third's, on other windows than the third's alone."""
    for number in range(2):
        teach(base, tmp_path, number)
    before = fisher_after(base, tmp_path)
    teach(base, tmp_path, 2, use_ewc=False)
    assert same(fisher_after(base, tmp_path), before)
    learner = opened(base, tmp_path)
    learner.set_adapter("main")
    history = learner.store.history("main")
    past = recall(learner.store, history[-1], learner.model, learner.config, 0, 32)
    assert past.unestimated == [2, 3]
    assert past.fisher is not None
    expected = past.fisher
    for lesson, key in ((2, 1), (3, 0)):
        windows = [row.window for row in past.buffer.rows(lesson)][:4]
        fisher = measured_fisher(learner.model, windows, mx.random.key(key))
        expected = {name: 0.95 * expected[name] + array for name, array in fisher.items()}
    hold(past, learner.model, learner.config, 0)
    assert same(past.fisher, expected)


def same(found: dict[str, mx.array] | None, expected: dict[str, mx.array] | None) -> bool:
    assert found is not None
    assert expected is not None
    return found.keys() == expected.keys() and all((found[n] == expected[n]).all().item() for n in found)


def test_without_both_a_lesson_goes_on_as_any_fine_tuning_would(base: Path, tmp_path: Path) -> None:
    """Off means off, to the bit: strength 0 and no EWC, ratio 0 and an empty past are the same."""
    runs: list[dict[str, Any]] = [PLAIN, {"replay_ratio": 0.0, "ewc_lambda": 0.0}]
    outcomes = []
    for index, changes in enumerate(runs):
        for number in range(2):
            teach(base, tmp_path / str(index), number, **changes)
        outcomes.append(left_by(base, tmp_path / str(index)))
    assert outcomes[0]["adapters.safetensors"] == outcomes[1]["adapters.safetensors"]
    assert b"lora_a" not in outcomes[0][STATE]  # no Fisher beside the router's statistics
    teach(base, tmp_path / "with", 0)
    teach(base, tmp_path / "with", 1)
    assert left_by(base, tmp_path / "with")["adapters.safetensors"] != outcomes[0]["adapters.safetensors"]


def test_a_strong_anchor_holds(base: Path, tmp_path: Path) -> None:
    """The stronger EWC, the nearer the adapter stays to the version before, measured by the Fisher's own distance."""
    distances = []
    for strength in (0.0, 1e2, 1e4):
        store = tmp_path / str(strength)
        teach(base, store, 0, Budget(steps=20), ewc_lambda=strength)
        before, _ = read_adapter(opened(base, store).store.files_of(head(base, store)))
        teach(base, store, 1, Budget(steps=20), ewc_lambda=max(strength, 1e-9), replay_ratio=0.0)
        folder = opened(base, store).store.files_of(head(base, store))
        after, _ = read_adapter(folder)
        fisher = read_fisher(folder, after)
        assert fisher is not None
        distances.append(sum((fisher[n] * (after[n] - before[n]).square()).sum().item() for n in after))
    assert distances[2] < 0.5 * distances[0]
    assert distances[1] < distances[0]


def head(base: Path, store: Path) -> Version:
    return opened(base, store).store.require("main")


def test_replay_keeps_an_earlier_lesson(base: Path, tmp_path: Path) -> None:
    """After the same steps on a second text, the first one's own windows cost less where they were replayed."""
    losses = []
    for changes in ({**PLAIN}, {**PLAIN, "replay_ratio": 0.5}):
        store = tmp_path / str(changes["replay_ratio"])
        long = Budget(steps=60)
        teach(base, store, 0, long, learning_rate=2e-2, **changes)
        teach(base, store, 1, long, learning_rate=2e-2, **changes)
        taught = opened(base, store)
        taught.set_adapter("main")
        losses.append(taught.evaluate([text_document(text(0), "x")]).loss)
    assert losses[1] < losses[0] - 0.02


def test_learn_undo_learn_is_learning_once(base: Path, tmp_path: Path) -> None:
    """Undo takes the buffer, the Fisher and the counters back with the adapter."""
    teach(base, tmp_path / "once", 0)
    teach(base, tmp_path / "once", 1)
    teach(base, tmp_path / "twice", 0)
    teach(base, tmp_path / "twice", 2)
    opened(base, tmp_path / "twice").undo()
    teach(base, tmp_path / "twice", 1)
    assert left_by(base, tmp_path / "once") == left_by(base, tmp_path / "twice")


def test_other_domains_do_not_enter(base: Path, tmp_path: Path) -> None:
    for number in range(2):
        teach(base, tmp_path / "alone", number)
        opened(base, tmp_path / "beside").learn_from_text(text(5 + number), "other", budget=STEPS)
        teach(base, tmp_path / "beside", number)
    assert left_by(base, tmp_path / "alone") == left_by(base, tmp_path / "beside")


@pytest.mark.parametrize("strategy", ["importance", "reservoir"])
def test_other_strategies_run_from_lesson_to_lesson(base: Path, tmp_path: Path, strategy: str) -> None:
    for number in range(3):
        lesson = teach(base, tmp_path, number, replay_strategy=strategy)
    assert lesson.replayed_tokens > 0
    replay = opened(base, tmp_path).store.replay(head(base, tmp_path))
    assert replay is not None
    assert (len(np.unique(replay.priorities)) > 2) == (strategy == "importance")  # refreshed only where they are used


def test_a_batch_of_one_row_still_learns_the_new_text(base: Path, tmp_path: Path) -> None:
    teach(base, tmp_path, 0, batch_size=1)
    lesson = teach(base, tmp_path, 1, batch_size=1)
    assert 3 * 32 < lesson.trained_tokens <= 4 * 32
    assert 3 * 32 < lesson.replayed_tokens <= 4 * 32


def test_odd_batches_alternate_over_microbatches_too(base: Path, tmp_path: Path) -> None:
    """Three rows, half replayed: one and two by turns, whether a step has one microbatch or two."""
    odd = {"batch_size": 3, "gradient_accumulation_steps": 2}
    teach(base, tmp_path, 0, **odd)
    lesson = teach(base, tmp_path, 1, **odd)
    assert 10 * 32 < lesson.replayed_tokens <= 12 * 32  # of 4 * 2 * 3 rows
    assert 10 * 32 < lesson.trained_tokens <= 12 * 32


def test_the_same_text_again_is_neither_stored_twice_nor_replayed(base: Path, tmp_path: Path) -> None:
    many = Budget(steps=40)  # all windows of the text, several times
    teach(base, tmp_path, 0, many)
    before = opened(base, tmp_path).store.replay(head(base, tmp_path))
    taught = opened(base, tmp_path)
    lesson = taught.learn_from_text(text(0), importance=1.0, budget=many)
    after = taught.store.replay(head(base, tmp_path))
    assert before is not None
    assert after is not None
    assert lesson.replayed_tokens == 0
    assert sorted(before.windows) == sorted(after.windows)
    assert lora.num_parameters(lora.adapter_arrays(taught.model)) == lesson.trainable_parameters
    assert mx.isfinite(mx.array(lesson.after)).item()


def windows_on_disk(store: Path, tokens: list[bytes]) -> int:
    """How many of some windows, as they are stored, stand in the database's bytes."""
    content = (store / "learner.sqlite").read_bytes()
    return sum(window in content for window in tokens)


def stored(base: Path, store: Path, domain: str) -> list[bytes]:
    lessons = opened(base, store).store
    replay = lessons.replay(lessons.require(domain))
    assert replay is not None
    return [window.astype("<i4").tobytes() for window in replay.windows.values()]


def test_forget_erases_what_would_have_been_replayed(base: Path, tmp_path: Path) -> None:
    for number, domain in enumerate(("a", "b", "a")):
        opened(base, tmp_path).learn_from_text(text(number), domain, budget=STEPS)
    erased, kept = stored(base, tmp_path, "b"), stored(base, tmp_path, "a")
    assert windows_on_disk(tmp_path, erased) == len(erased) > 0
    opened(base, tmp_path).forget("b")
    assert windows_on_disk(tmp_path, erased) == 0
    assert windows_on_disk(tmp_path, kept) == len(kept)
    with opened(base, tmp_path).store.database.connected() as db:
        assert db.execute("SELECT DISTINCT domain FROM windows").fetchall() == [("a",)]


def execute(base: Path, folder: Path, *statements: str) -> None:
    with opened(base, folder).store.database.connected() as db, db:
        for statement in statements:
            db.execute(statement)


def test_prune_drops_the_windows_that_only_pruned_versions_had(base: Path, tmp_path: Path) -> None:
    """A lesson that was undone leaves its windows to undo --to, and none to anybody once it is pruned."""
    teach(base, tmp_path, 0)
    teach(base, tmp_path, 1)
    undone = stored(base, tmp_path, "main")
    opened(base, tmp_path).undo()
    remaining = stored(base, tmp_path, "main")
    only = [window for window in undone if window not in remaining]
    assert windows_on_disk(tmp_path, only) == len(only) > 0
    lessons = opened(base, tmp_path).store
    with lessons.writing():
        lessons.prune(1)
    assert windows_on_disk(tmp_path, only) == 0
    assert windows_on_disk(tmp_path, remaining) == len(remaining)
    assert teach(base, tmp_path, 1).replayed_tokens > 0


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        ("DELETE FROM windows WHERE id = (SELECT min(id) FROM windows)", "buffer lacks window [0-9a-f]{32}"),
        (
            "UPDATE windows SET tokens = zeroblob(length(tokens))",
            "window [0-9a-f]{32} of its replay buffer has changed",
        ),
        ("UPDATE replay SET counters = '{}'", "buffer has changed"),
        ("UPDATE replay SET ids = 'abc'", "its replay buffer: "),
    ],
)
def test_a_damaged_buffer_is_found_and_refused_with_advice(
    base: Path, tmp_path: Path, damage: str, problem: str
) -> None:
    teach(base, tmp_path, 0)
    execute(base, tmp_path, damage)
    found = verify.verify(base, tmp_path).problems
    assert len(found) == 1
    wanted = rf"main v0001: .*{problem}.*; .*minimac-mlx forget main"
    assert re.search(wanted, found[0])
    with pytest.raises(DamagedFileError, match=wanted):
        teach(base, tmp_path, 1)
    assert head(base, tmp_path).name == "v0001"


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        ("UPDATE replay SET counters = '{}'", "'length'"),
        ("UPDATE replay SET counters = json_set(counters, '$.length', 3000000000)", "windows of 3000000000 tokens"),
        ("UPDATE replay SET counters = json_set(counters, '$.lessons', 7)", "'int' object is not iterable"),
        ("UPDATE replay SET priorities = x''", "rows are recorded"),
    ],
)
def test_a_buffer_that_somebody_made_up_is_refused(base: Path, tmp_path: Path, damage: str, problem: str) -> None:
    """Its digests are right: whoever gives the store away can compute them."""
    teach(base, tmp_path, 0)
    execute(base, tmp_path, damage, "UPDATE versions SET rows = NULL, sha256 = NULL")
    with pytest.raises(DamagedFileError, match=f"its replay buffer cannot be what a lesson left: .*{problem}"):
        teach(base, tmp_path, 1)
    assert head(base, tmp_path).name == "v0001"


def test_tokens_that_the_model_does_not_have_never_reach_it(base: Path, tmp_path: Path) -> None:
    """Windows are known by hashes of themselves, and held-out text may have come with its digest."""
    teach(base, tmp_path, 0)
    lessons = opened(base, tmp_path).store
    found = lessons.replay(head(base, tmp_path))
    assert found is not None
    window = next(iter(found.windows.values())).copy()
    window[1] = 2**30
    old, new = found.ids[0].tobytes(), window_id(window)
    ids = found.ids.tobytes().replace(old, new)
    with lessons.database.connected() as db, db:
        db.execute("UPDATE versions SET rows = NULL, sha256 = NULL")
        db.execute("UPDATE windows SET id = ?, tokens = ? WHERE id = ?", (new, window.tobytes(), old))
        db.execute("UPDATE replay SET ids = ?", (ids,))
        db.execute("INSERT INTO heldout VALUES ('main', 1, ?, NULL, 1, 1)", (window.tobytes(),))
    with pytest.raises(DamagedFileError, match="tokens that the model does not have"):
        teach(base, tmp_path, 1)
    with pytest.raises(DamagedFileError, match="its held-out text has tokens that the model does not have"):
        lessons.probe(head(base, tmp_path), 100)


def test_short_lessons_are_not_padded_to_long_windows(base: Path, tmp_path: Path) -> None:
    """A sentence costs a sentence, also when it is replayed; batches hold no new window twice."""
    words = "The cat sat on the mat."
    for expected in ((1, 0), (2, 1)):
        taught = opened(base, tmp_path, batch_size=4)
        lesson = taught.learn_from_text(words, budget=Budget(steps=1))
        words = "The mat sat on the cat."
        replay = taught.store.replay(head(base, tmp_path))
        assert replay is not None
        assert replay.counters["length"] == lesson.tokens - 1 < 32
        assert (lesson.batch_size, lesson.replayed_tokens // (lesson.tokens - 1)) == expected


def measured(history: list[Version], changes: dict[int, dict[int, float]]) -> list[Version]:
    """Versions whose figures say by how many nats each changed the held-out parts of earlier ones."""
    named = lambda at, by: {"version": history[at].name, "before": 1.0, "after": 1.0 + by}  # noqa: E731
    kept = [[named(at, by) for at, by in changes.get(index, {}).items()] for index in range(len(history))]
    return [dataclasses.replace(version, figures={"kept": kept[index]}) for index, version in enumerate(history)]


def test_a_lesson_is_held_to_the_version_that_knew_it_best(base: Path, tmp_path: Path) -> None:
    for number in range(4):
        teach(base, tmp_path, number)
    history = opened(base, tmp_path).store.history("main")
    assert [best_version(measured(history, {}), lesson) for lesson in (1, 2, 4)] == [0, 1, 3]  # nobody measured
    forgotten_then_learned = measured(history, {1: {0: 0.2}, 2: {0: -0.1, 1: -0.3}, 3: {0: -0.2, 1: 0.4}})
    assert [best_version(forgotten_then_learned, lesson) for lesson in (1, 2, 3)] == [3, 2, 2]
    pruned = forgotten_then_learned[2:]
    assert [best_version(pruned, lesson) for lesson in (1, 2, 3, 4)] == [0, 0, 0, 1]


def test_a_text_taught_again_is_held_to_the_version_that_was_taught_it_again(base: Path, tmp_path: Path) -> None:
    """Nothing is held out of a short text, so that nobody measured that the second version knows it better."""
    for number in (0, 1, 0, 2):
        teach(base, tmp_path, number, holdout=0.0)
    history = opened(base, tmp_path).store.history("main")
    assert [version.figures["repeated"] for version in history] == [[], [], [1], []]
    assert [best_version(history, lesson) for lesson in (1, 2, 4)] == [2, 1, 3]
    assert best_version(history[:2], 1) == 0


def test_teachers_are_the_versions_as_they_were(base: Path, tmp_path: Path) -> None:
    for number in range(3):
        teach(base, tmp_path, number)
    learner = opened(base, tmp_path)
    history = learner.store.history("main")
    learner.set_adapter("main")
    past = recall(learner.store, history[-1], learner.model, learner.config, 0, 32)
    assert past.teacher is not None
    for number, version in enumerate(history, 1):
        arrays, _ = read_adapter(learner.store.files_of(version))
        given = past.teacher(number)
        assert all((given[name] == arrays[name]).all().item() for name in arrays)
    assert any((past.teacher(1)[name] != array).any().item() for name, array in past.teacher(3).items())


def test_the_fisher_says_what_the_adapter_changed(base: Path, tmp_path: Path) -> None:
    """Without the adapter, the penalty is the divergence that this makes on the windows of the lesson."""
    teach(base, tmp_path, 0, Budget(steps=30))
    learner = opened(base, tmp_path)
    learner.set_adapter("main")
    replay = learner.store.replay(learner.store.require("main"))
    assert replay is not None
    windows = list(replay.windows.values())[:3]
    here = lora.adapter_arrays(learner.model)
    fisher = measured_fisher(learner.model, windows, mx.random.key(0))
    total, count = 0.0, 0
    for tokens, mask in map(unpack, windows):
        adapted = learner.model(mx.array(tokens)[None, :-1])
        with lora.bare(learner.model):
            bare = learner.model(mx.array(tokens)[None, :-1])
        total += (divergence(bare, adapted) * mx.array(mask)).sum().item()
        count += mask.sum()
    gone = {name: mx.zeros_like(array) if name.endswith("lora_b") else array for name, array in here.items()}
    assert total / count > 1e-3
    assert ewc_penalty(gone, here, fisher, 1.0).item() == pytest.approx(total / count, rel=1e-4)
