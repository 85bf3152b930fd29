"""Experience replay: what is kept, what is drawn and what comes back, against counts, a ledger and the reference.

The statistical tests have fixed seeds, so they pass or fail always; a p-value below 1e-3 fails, and so does one too
good to be true. A ledger of everything ever offered is the slow, obvious version of what a reservoir must hold.
"""

import hashlib
import json
import math
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import torch_ref.replay
from mlx_impl.config import REPLAY_STRATEGIES
from mlx_impl.errors import DamagedFileError, InputError
from mlx_impl.replay import ReplayBuffer, mix, pack, split_rows, unpack
from mlx_impl.reservoirs import SumTree, window_id

ROOT = Path(__file__).parent.parent
LENGTH = 4


def windows(first: int, count: int, length: int = LENGTH) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (count, length + 1) and mask of windows number `first` and on, all different: token 0 is the number."""
    tokens = np.arange(first, first + count)[:, None] + np.arange(length + 1)  # (count, length + 1)
    return tokens.astype(np.int32), np.ones((count, length), np.float32)


def numbers(buffer: ReplayBuffer) -> list[int]:
    """Numbers of the windows that a buffer holds."""
    return [int(row.window[0]) for row in buffer.rows()]


def filled(strategy: str = "uniform", capacity: int = 50, seed: int = 0, **lessons: int) -> ReplayBuffer:
    """A buffer with so many windows of each source, one lesson each, numbered through."""
    buffer = ReplayBuffer(LENGTH, capacity, strategy, seed)
    first = 0
    for lesson, (source, count) in enumerate(lessons.items(), 1):
        buffer.insert(*windows(first, count), source, lesson)
        first += count
    return buffer


def p_value(statistic: float, degrees: int) -> float:
    """P(chi-square >= statistic), by the normal approximation of Wilson and Hilferty (1931)."""
    spread = 2 / (9 * degrees)
    return math.erfc(((statistic / degrees) ** (1 / 3) - (1 - spread)) / math.sqrt(2 * spread)) / 2


def assert_drawn(counts: Any, expected: Any) -> None:
    """Counts of independent draws fit the expected ones (both (n,), of the same sum)."""
    counts, expected = np.asarray(counts, float), np.asarray(expected, float)
    expected = expected * counts.sum() / expected.sum()
    p = p_value(float(((counts - expected) ** 2 / expected).sum()), len(counts) - 1)
    assert 1e-3 < p < 1 - 1e-3, f"p = {p:.2g}: {counts.tolist()} instead of {expected.round(1).tolist()}"


def p_of_samples(counts: Any, runs: int, kept: int) -> float:
    """How probable it is that `runs` samples of `kept` from n without replacement hold them so often (n,)."""
    counts = np.asarray(counts, float)
    n, share = len(counts), kept / len(counts)
    # One sample's indicators have variance share (1 - share) and sum to a constant: n - 1 degrees of freedom.
    statistic = ((counts - runs * share) ** 2).sum() / (runs * share * (1 - share)) * (n - 1) / n
    return p_value(float(statistic), n - 1)


# -- what is kept --------------------------------------------------------------------


def test_wilson_hilferty_agrees_with_tables() -> None:
    for statistic, degrees, p in ((18.307, 10, 0.05), (63.691, 40, 0.01), (124.342, 100, 0.05), (67.328, 100, 0.995)):
        assert p_value(statistic, degrees) == pytest.approx(p, abs=4e-4)


@pytest.mark.parametrize("strategy", REPLAY_STRATEGIES)
def test_a_source_keeps_a_uniform_sample_of_all_it_ever_offered(strategy: str) -> None:
    """60 windows into a buffer of 40, then another source cuts them to 20, then 40 more come and some come again."""
    runs = 400
    first, other = Counter[int](), Counter[int]()
    for seed in range(runs):
        buffer = filled(strategy, 40, seed, a=60)
        buffer.insert(*windows(60, 30), "b", 2)
        buffer.insert(*windows(100, 40), "a", 3)
        buffer.insert(*windows(0, 60), "a", 4)  # again: neither those kept nor those dropped gain by it
        held = numbers(buffer)
        first.update(number for number in held if not 60 <= number < 100)
        other.update(number for number in held if 60 <= number < 100)
    if strategy == "reservoir":
        assert 1e-3 < p_of_samples([(first + other)[n] for n in [*range(90), *range(100, 140)]], runs, 40) < 1 - 1e-3
    else:
        assert 1e-3 < p_of_samples([first[n] for n in [*range(60), *range(100, 140)]], runs, 20) < 1 - 1e-3
        assert 1e-3 < p_of_samples([other[n] for n in range(60, 90)], runs, 20) < 1 - 1e-3


def test_the_test_of_uniformity_notices_a_bias() -> None:
    """What a reservoir that grew again would show: each of the 10 last windows is kept for sure."""
    random = np.random.default_rng(0)
    counts = Counter(int(n) for _ in range(400) for n in [*random.permutation(90)[:10], *range(90, 100)])
    assert p_of_samples([counts[n] for n in range(100)], 400, 20) < 1e-9


def test_a_reservoir_weighs_windows_by_their_lessons_importance() -> None:
    """A single row is one lesson's with odds importance (Efraimidis and Spirakis), in whatever order they come."""
    counts = Counter[int]()
    for seed in range(600):
        buffer = ReplayBuffer(LENGTH, 1, "uniform", seed)
        order = [(1, 1.0), (2, 4.0), (3, 1.0)]
        for lesson, importance in order[:: 1 if seed % 2 else -1]:
            buffer.insert(*windows(10 * lesson, 10), "a", lesson, importance)
        counts[numbers(buffer)[0] // 10] += 1
    assert_drawn([counts[1], counts[2], counts[3]], [1, 4, 1])


def test_a_full_buffer_is_shared_as_evenly_as_its_sources_allow() -> None:
    buffer = filled(capacity=60, big=100)
    assert buffer.sources == {"big": 60}
    buffer.insert(*windows(100, 10), "small", 2)
    assert buffer.sources == {"big": 50, "small": 10}
    buffer.insert(*windows(200, 100), "late", 3)
    assert buffer.sources == {"big": 25, "small": 10, "late": 25}
    buffer.insert(*windows(300, 5), "small", 4)
    assert sorted(buffer.sources.values()) == [15, 22, 23]
    buffer.insert(*windows(400, 100), "last", 5)
    assert len(buffer) == 60
    assert sorted(buffer.sources.values()) == [15, 15, 15, 15]


def test_a_smaller_capacity_takes_from_the_largest() -> None:
    buffer = filled(capacity=60, big=50, small=10)
    buffer.resize(25)
    assert buffer.sources == {"big": 15, "small": 10}
    buffer.resize(100)
    buffer.insert(*windows(200, 20), "small", 3)
    buffer.insert(*windows(300, 20), "big", 4)
    assert buffer.sources == {"big": 15, "small": 30}, "what has dropped rows cannot grow and stay uniform"


def test_more_sources_than_rows() -> None:
    buffer = ReplayBuffer(LENGTH, 2, "uniform", 0)
    for source in range(5):
        buffer.insert(*windows(source, 1), str(source), source)
        assert str(source) in {row.source for row in buffer.rows()}
    assert len(buffer) == 2


def test_a_duplicate_is_refused_also_within_one_call_and_from_another_source() -> None:
    buffer = ReplayBuffer(LENGTH, 50, "uniform", 0)
    tokens, mask = windows(0, 3)
    assert buffer.insert(tokens[[0, 1, 0, 2, 2]], mask[[0, 1, 0, 2, 2]], "a", 1) == 3
    assert buffer.insert(tokens, mask, "b", 2) == 0
    assert (len(buffer), buffer.refused, buffer.sources) == (3, 5, {"a": 3, "b": 0})
    mask[0, 0] = 0
    assert buffer.insert(tokens, mask, "b", 2) == 1, "the same tokens with other targets are another window"


def test_a_window_that_left_is_forgotten() -> None:
    """Nothing the buffer keeps grows with what it has seen."""
    buffer = filled(capacity=10, a=500)
    index = buffer._index
    assert len(index.rows) == len(index.pools["a"].heap) == len(index.lessons["a", 1].rows) == 10
    assert (index._free, index.lessons["a", 1].tilts._size, len(buffer._windows)) == ([], 10, 10)
    assert buffer.refused == 0
    for source in range(30):
        buffer.insert(*windows(1000 + 10 * source, 10), str(source), 2 + source)
    assert len(index.rows) == sum(len(pool.heap) for pool in index.pools.values()) == 10
    gone = next(n for n in range(500) if n not in numbers(buffer))
    assert buffer.insert(*windows(gone, 1), "new", 99) == 1


def test_several_windows_may_pass_through_one_slot_in_one_call() -> None:
    buffer = filled(capacity=3, a=200)
    for row in buffer.rows():
        assert window_id(row.window) == row.id
        assert unpack(row.window)[0].tolist() == windows(int(row.window[0]), 1)[0][0].tolist()


# -- what is drawn -------------------------------------------------------------------


def test_sources_are_equal_whatever_their_size_and_so_are_their_lessons() -> None:
    buffer = filled(capacity=500, a=5, b=300)
    buffer.insert(*windows(400, 40), "b", 3)
    drawn = Counter(buffer.sample(4000).rows)
    of: dict[tuple[str, int], list[int]] = defaultdict(list)
    for row in buffer.rows():
        of[row.source, row.lesson].append(drawn[row.id])
    assert_drawn([sum(of["a", 1]), sum(of["b", 2]), sum(of["b", 3])], [2, 1, 1])
    assert_drawn(of["a", 1], np.ones(5))
    assert_drawn(of["b", 3], np.ones(40))


@pytest.mark.parametrize("strategy", REPLAY_STRATEGIES)
def test_importance_multiplies_a_lessons_odds(strategy: str) -> None:
    buffer = ReplayBuffer(LENGTH, 100, strategy, 3)
    buffer.insert(*windows(0, 20), "a", 1, 1.0)
    buffer.insert(*windows(50, 20), "a", 2, 3.0)
    sample = buffer.sample(2000)
    counts = Counter(int(tokens[0]) // 50 for tokens in np.array(sample.tokens))
    assert_drawn([counts[0], counts[1]], [1, 3])
    assert np.array(sample.weights).tolist() == [1.0] * 2000, "a wish is not corrected away"


def test_reservoir_draws_anything_ever_offered_alike() -> None:
    """A lesson's share of the draws is its share of all windows offered, weighted; and so it is once rows had to go."""
    counts = Counter[int]()
    for seed in range(300):
        buffer = ReplayBuffer(LENGTH, 60, "reservoir", seed)
        buffer.insert(*windows(0, 100), "a", 1, 1.0)
        buffer.insert(*windows(100, 50), "b", 2, 2.0)
        counts.update(int(t[0]) // 100 for t in np.array(buffer.sample(8).tokens))
    # Both lessons have mass 100. Draws from one buffer share its composition: a wider bound than a multinomial's.
    assert counts[0] / counts.total() == pytest.approx(0.5, abs=0.04)


def test_priorities_tilt_the_odds_and_weights_take_the_tilt_back() -> None:
    buffer = filled("importance", a=6)
    ids = [row.id for row in buffer.rows()]
    losses = np.array([0.1, 0.5, 1.0, 2.0, 4.0, 8.0])
    buffer.update_priorities(ids, losses)
    sample = buffer.sample(6000)
    p = losses**0.6 / (losses**0.6).sum()
    counts = Counter(sample.rows)
    assert_drawn([counts[id] for id in ids], p)
    weights = dict(zip(sample.rows, np.array(sample.weights).tolist(), strict=True))
    np.testing.assert_allclose([weights[id] for id in ids], (6 * p) ** -0.4, rtol=1e-5)
    one = buffer.sample(1)  # what a step of one window draws
    assert np.array(one.weights).tolist() == pytest.approx([weights[one.rows[0]]], rel=1e-6)


def test_with_beta_1_the_weighted_mean_is_that_of_uniform() -> None:
    """Importance sampling estimates what uniform sampling would see: sources balanced, whatever the priorities."""
    buffer = ReplayBuffer(LENGTH, 100, "importance", 0, beta=1.0)
    buffer.insert(*windows(0, 3), "a", 1)
    buffer.insert(*windows(50, 20), "b", 2)
    ids = [row.id for row in buffer.rows()]
    buffer.update_priorities(ids, 0.1 + np.arange(23) % 5)
    sample = buffer.sample(20000)
    from_a = np.array(sample.tokens)[:, 0] < 50
    weights = np.array(sample.weights)
    assert weights[from_a].sum() / weights.sum() == pytest.approx(0.5, abs=0.02)


def test_a_new_row_has_the_highest_priority_so_far() -> None:
    buffer = filled("importance", a=2)
    buffer.update_priorities([row.id for row in buffer.rows()], [7.0, 0.0])
    buffer.insert(*windows(90, 1), "a", 2)
    assert buffer.membership()["priorities"].tolist() == pytest.approx([7.0, 0.0, 7.0], abs=1e-5)


def test_priorities_of_rows_that_left_are_passed_over_and_wrong_ones_refused() -> None:
    buffer = filled("importance", a=2)
    ids = [row.id for row in buffer.rows()]
    buffer.update_priorities([b"gone" * 4, ids[0]], [3.0, 2.0])
    before = buffer.membership()["priorities"].tolist()
    for wrong in (math.nan, math.inf, -1.0):
        with pytest.raises(InputError, match="at least 0"):
            buffer.update_priorities(ids, [1.0, wrong])
    assert buffer.membership()["priorities"].tolist() == before
    assert buffer.membership()["counters"]["highest_priority"] == pytest.approx(2.0, abs=1e-5)


def test_rows_are_found_in_a_text_that_is_cut_elsewhere() -> None:
    """Whatever their length and their mask; half of a row is enough, less is not."""
    text = np.random.default_rng(2).integers(1, 30_000, 1000)
    buffer = ReplayBuffer(length=63, capacity=10, strategy="uniform", seed=0)
    mask = np.ones((4, 63))
    mask[1, ::2] = 0
    mask[2, 40:] = 0
    rows = np.stack([text[at : at + 64] for at in (0, 100, 200, 300)])
    rows[3, [0, 16]] = 30_001  # two of its four n-grams
    buffer.insert(rows, mask, "a", 1)
    few = rows[3].copy()
    few[32] = 30_001
    buffer.insert(few[None], np.ones((1, 63)), "a", 2)
    ids = [row.id for row in buffer.rows(1)]
    assert buffer.within(text) == buffer.within(np.append(5, text)) == set(ids)
    assert buffer.within(text[90:170]) == {ids[1]}
    assert buffer.within(text[::-1]) == buffer.within(text[:10]) == set()
    assert ReplayBuffer(8, 4, "uniform", 0).within(text) == set()


def test_the_lesson_being_learned_is_not_replayed() -> None:
    buffer = filled(a=4, b=4)
    assert {int(t[0]) // 4 for t in np.array(buffer.sample(50, excluding=2).tokens)} == {0}
    assert (buffer.available(), buffer.available(excluding=2)) == (8, 4)
    with pytest.raises(InputError, match="nothing to replay"):
        filled(a=4).sample(1, excluding=1)


def test_a_sum_tree_finds_what_adding_up_finds() -> None:
    random = np.random.default_rng(0)
    tree, values = SumTree(), []
    for _ in range(300):
        action = random.integers(4)
        if action == 0 and values:
            values.pop()
            tree.pop()
        elif action == 1 and values:
            index, value = int(random.integers(len(values))), float(random.random())
            values[index] = tree[index] = value
        else:
            values.append(float(random.random()))
            tree.append(values[-1])
        assert tree.total == pytest.approx(sum(values), abs=1e-9)
        if values:
            x = float(random.random()) * tree.total
            assert tree.find(x) == int(np.searchsorted(np.cumsum(values), x, side="right"))
    assert tree.find(np.nextafter(tree.total, 0)) == len(values) - 1


@pytest.mark.parametrize("strategy", REPLAY_STRATEGIES)
def test_work_does_not_grow_with_the_rows(strategy: str) -> None:
    """Lines of Python run for an insert that evicts and for a sample, at 64 rows a source and at 4096."""

    def lines(rows: int) -> int:
        buffer = filled(strategy, rows, a=rows)
        steps = 0

        def trace(frame: Any, event: str, argument: Any) -> Any:
            nonlocal steps
            steps += event == "line"
            return trace

        batch = windows(10**6, 4)
        previous = sys.gettrace()
        sys.settrace(trace)
        try:
            buffer.insert(*batch, "b", 2)
            buffer.sample(4)
        finally:
            sys.settrace(previous)
        assert buffer.sources["b"] == 4 or strategy == "reservoir"
        return steps

    lines(8)  # what is imported or warned of once is not counted
    assert lines(4096) < 1.6 * lines(64)  # log2 4096 is twice log2 64


# -- windows -------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(0, 2**12 - 1), st.integers(0, 5))
def test_packing_keeps_all_that_is_learned_from(length: int, bits: int, padding: int) -> None:
    tokens = np.array([[bits >> 3 & 1, *(bits * 7919 % 997 + np.arange(length))]], np.int32)
    mask = np.array([[bits >> t & 1 for t in range(length)]], np.float32)
    packed = pack(tokens, mask)[0]
    kept = max((t + 1 for t in range(length) if mask[0, t]), default=-1) + 1
    assert len(packed) == kept
    if kept:
        ids, counts = unpack(packed)
        assert (ids == tokens[0, :kept]).all()
        assert (counts == mask[0, : kept - 1]).all()
    padded = np.pad(tokens, ((0, 0), (0, padding))), np.pad(mask, ((0, 0), (0, padding)))
    assert (pack(*padded)[0] == packed).all(), "padding is no part of a window, nor of its id"


def test_short_windows_come_back_padded_and_unlearned() -> None:
    buffer = ReplayBuffer(8, 10, "uniform", 0)
    tokens, mask = windows(3, 1, 2)
    assert buffer.insert(tokens, mask, "a", 1) == 1
    sample = buffer.sample(1)
    assert np.array(sample.tokens).tolist() == [[*tokens[0].tolist(), 0, 0, 0, 0, 0, 0]]
    assert np.array(sample.mask).tolist() == [[1, 1, 0, 0, 0, 0, 0, 0]]


def test_what_cannot_be_replayed_is_refused_and_changes_nothing() -> None:
    buffer = filled(a=3)
    before = buffer.membership()
    tokens, mask = windows(50, 2)
    for wrong, message in (
        ((tokens, mask * 0.5, "a", 1), "zeros and ones"),
        ((-tokens, mask, "a", 1), "at least 0"),
        ((tokens, mask[:, 1:], "a", 1), r"\(2, 5\) and mask \(2, 3\)"),
        ((*windows(0, 1, 9), "a", 1), "9 targets, the buffer 4"),
        ((tokens, mask, "a", 1, 2.0), "has importance 1.0, not 2.0"),
        ((tokens, mask, "z", 2, 0.0), "importance 0.0 must lie between"),
        ((tokens, mask, "z", 2, math.nan), "importance nan must lie between"),
    ):
        with pytest.raises(InputError, match=message):
            buffer.insert(*wrong)  # type: ignore[arg-type]
    assert buffer.insert(tokens, mask * 0, "a", 1) == 0, "nothing counts in these"
    assert_same_state(buffer.membership(), before)
    for arguments in ((0, 1, "uniform"), (1, 0, "uniform"), (1, 1, "random")):
        with pytest.raises(InputError, match="replay"):
            ReplayBuffer(*arguments, seed=0)


# -- mixed batches -------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [2, 3, 4, 7, 16])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.25, 0.5, 0.7, 0.9])
def test_the_share_of_replayed_rows_is_the_ratio_in_the_long_run(batch_size: int, ratio: float) -> None:
    split = [split_rows(batch_size, ratio, step) for step in range(400)]
    reachable = min(ratio, (batch_size - 1) / batch_size)
    assert {new + old for new, old in split} == {batch_size}
    assert min(new for new, _ in split) >= 1
    replayed = np.cumsum([old for _, old in split])
    assert np.abs(replayed - batch_size * reachable * np.arange(1, 401)).max() <= 0.5 + 1e-9
    assert split == [torch_ref.replay.split_rows(batch_size, ratio, step) for step in range(400)]


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.25, 0.5, 0.7, 0.9])
def test_single_new_rows_are_joined_by_replayed_ones(ratio: float) -> None:
    split = [split_rows(1, ratio, step) for step in range(400)]
    assert {new for new, _ in split} == {1}
    assert {old for _, old in split} <= {0, 1}
    replayed = np.cumsum([old for _, old in split])
    steps = np.arange(1, 401)
    assert np.abs(replayed - min(ratio, 0.5) * (steps + replayed)).max() <= 0.5 + 1e-9
    assert split == [torch_ref.replay.split_rows(1, ratio, step) for step in range(400)]


def test_split_rows_by_example() -> None:
    assert [split_rows(4, 0.5, step) for step in range(2)] == [(2, 2), (2, 2)]
    assert [split_rows(3, 0.5, step) for step in range(4)] == [(1, 2), (2, 1), (1, 2), (2, 1)]
    assert [split_rows(1, 0.5, step) for step in range(2)] == [(1, 1), (1, 1)]
    assert [split_rows(1, 0.25, step) for step in range(6)] == [(1, 0), (1, 1), (1, 0), (1, 0), (1, 1), (1, 0)]
    for wrong in ((0, 0.5), (4, 1.0), (4, -0.1)):
        with pytest.raises(InputError, match="must be at least 1 and"):
            split_rows(*wrong, 0)


def test_a_mixed_batch_has_the_new_rows_first_and_the_replayed_count_as_much() -> None:
    buffer = filled(a=6)
    tokens, mask = windows(100, 2, 2)  # shorter than the buffer's
    batch = mix(tokens, mask, buffer, 3)
    assert batch.tokens.shape == (5, LENGTH + 1)
    assert np.array(batch.tokens)[:2, :3].tolist() == tokens.tolist()
    assert np.array(batch.mask)[:2].tolist() == [[1, 1, 0, 0]] * 2
    assert len(batch.rows) == 3
    weighed = np.array((batch.mask * batch.weights[:, None]).sum(axis=1))
    assert weighed.tolist() == pytest.approx([2, 2, 2, 2, 2]), "each row weighs like one of the new"


def test_new_windows_may_be_longer_than_the_buffers() -> None:
    batch = mix(*windows(100, 1, 9), filled(a=6), 1)
    assert batch.tokens.shape == (2, 10)
    assert np.array(batch.mask).sum(axis=1).tolist() == [9, LENGTH]


def test_with_nothing_to_replay_the_batch_is_all_new() -> None:
    tokens, mask = windows(100, 2)
    for buffer, count in ((filled(), 2), (filled(a=3), 2), (filled(a=3, b=2), 0)):
        batch = mix(tokens, mask, buffer, count, excluding=1)
        assert np.array(batch.tokens).tolist() == tokens.tolist()
        assert (np.array(batch.weights).tolist(), batch.rows) == ([1.0, 1.0], [])


# -- state ---------------------------------------------------------------------------


def assert_same_state(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    assert actual["counters"] == expected["counters"]
    for name in actual.keys() - {"counters"}:
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)


CONTINUE = """
import json, sys
import numpy as np
from mlx_impl.replay import ReplayBuffer

def go_on(buffer):
    seen = []
    for step in range(12):
        tokens = np.arange(5) + np.arange(1000 + 3 * step, 1003 + 3 * step)[:, None]
        sample = buffer.sample(3, excluding=9)
        buffer.update_priorities(sample.rows, np.arange(3) + step / 7)
        buffer.insert(tokens, np.ones((3, 4)), "bc"[step % 2], 9, 2.0)
        seen += [id.hex() for id in sample.rows] + np.array(sample.weights).tolist()
        seen += np.array(sample.tokens).ravel().tolist() + [row.id.hex() for row in buffer.rows()]
    return seen

def main(folder):
    arrays = dict(np.load(folder + "/arrays.npz"))
    counters = json.load(open(folder + "/counters.json"))
    print(json.dumps(go_on(ReplayBuffer.restore({"counters": counters, **arrays}))))
"""


@pytest.mark.parametrize("strategy", REPLAY_STRATEGIES)
def test_a_restored_buffer_goes_on_the_same_in_another_process(strategy: str, tmp_path: Path) -> None:
    buffer = filled(strategy, 30, a=50, b=8)
    sample = buffer.sample(5)
    buffer.update_priorities(sample.rows, [0.3, 1.0, 2.5, 1 / 3, 0.0])
    state = buffer.state()
    (tmp_path / "counters.json").write_text(json.dumps(state.pop("counters"), allow_nan=False))
    np.savez(tmp_path / "arrays.npz", **state)
    code = f"{CONTINUE}\nmain({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    namespace: dict[str, Any] = {}
    exec(CONTINUE, namespace)
    assert json.loads(done.stdout) == namespace["go_on"](buffer)


def test_undo_is_restoring_the_parents_membership() -> None:
    """Windows are stored once under their ids; each version records who was there, and the head moves back."""
    stored: dict[bytes, np.ndarray] = {}
    versions = []
    buffer = ReplayBuffer(LENGTH, 20, "importance", 5)
    for lesson in (1, 2, 3):
        buffer.insert(*windows(100 * lesson, 15), f"source {lesson}", lesson)
        stored |= {row.id: row.window for row in buffer.rows(lesson)}
        versions.append(json.loads(json.dumps(buffer.membership(), default=np.ndarray.tolist)))
        drawn = buffer.sample(4).rows
    assert len(stored) < 45, "windows that were turned away or left at once are not stored"

    def again(version: dict[str, Any]) -> ReplayBuffer:
        arrays = {"ids": np.array(version["ids"], np.uint8), "priorities": np.array(version["priorities"])}
        return ReplayBuffer.restore({"counters": version["counters"], **arrays}, stored.__getitem__)

    assert again(versions[2]).sample(4).rows == drawn
    parent = again(versions[1])
    parent.sample(4)
    assert parent.insert(*windows(300, 15), "source 3", 3) > 0, "learned again"
    assert_same_state(parent.membership(), again(versions[2]).membership())


def test_a_longer_length_keeps_the_rows() -> None:
    buffer = filled(a=5)
    longer = ReplayBuffer.restore(buffer.state(), length=9)
    assert longer.insert(*windows(50, 1, 9), "a", 2) == 1
    assert [row.id for row in longer.rows(1)] == [row.id for row in buffer.rows()]
    with pytest.raises(DamagedFileError, match="9 targets, the buffer 4"):
        ReplayBuffer.restore(longer.state(), length=4)


def test_alpha_and_beta_come_back() -> None:
    buffer = ReplayBuffer(LENGTH, 5, "importance", 0, alpha=0.9, beta=0.7)
    counters = ReplayBuffer.restore(buffer.state()).membership()["counters"]
    assert (counters["alpha"], counters["beta"]) == (0.9, 0.7)


def test_a_damaged_state_is_noticed() -> None:
    for damage, message in (
        (lambda s: s["windows"].__setitem__((1, 2), 999), "is not the one that was stored"),
        (lambda s: s.update(windows=s["windows"][:-1]), "5 rows are recorded, but 4 windows"),
        (lambda s: s.update(ids=s["ids"][:-1]), "5 rows are recorded, but 4 ids and 5 priorities"),
        (lambda s: s.update(ids=s["ids"][[0, 0, 1, 2, 3]]), "but 4 ids"),
        (lambda s: s["counters"]["lessons"][0].__setitem__(3, 4), "4 rows are recorded, but 5 ids"),
    ):
        state = filled(a=5).state()
        damage(state)
        with pytest.raises(DamagedFileError, match=message):
            ReplayBuffer.restore(state)


def test_an_empty_buffer_can_be_saved_too() -> None:
    buffer = filled()
    assert_same_state(ReplayBuffer.restore(buffer.state()).state(), buffer.state())


def test_the_memory_grows_with_the_rows() -> None:
    buffer = ReplayBuffer(LENGTH, 1000, "uniform", 0)
    assert len(buffer._windows) < 1000
    buffer.insert(*windows(0, 700), "a", 1)
    assert 700 <= len(buffer._windows) <= 1000
    assert sorted(numbers(buffer)) == list(range(700))


def test_a_batch_drawn_before_an_insert_keeps_its_windows() -> None:
    """MLX is lazy: the gather may run after the slot has been given to another window."""
    buffer = filled(capacity=4, a=4)
    sample = buffer.sample(8)
    buffer.insert(*windows(100, 50), "b", 2)
    held = {int(tokens[0]) for tokens in np.array(sample.tokens)}
    assert held <= {0, 1, 2, 3}


# -- against the ledger and the reference --------------------------------------------


class Comparison(RuleBasedStateMachine):
    """The same calls to both implementations, beside a ledger of all windows that were ever offered to a reservoir."""

    @initialize(
        strategy=st.sampled_from(REPLAY_STRATEGIES), capacity=st.integers(1, 12), seed=st.integers(0, 2**63 - 1)
    )
    def begin(self, strategy: str, capacity: int, seed: int) -> None:
        self.ours = ReplayBuffer(LENGTH, capacity, strategy, seed)
        self.reference = torch_ref.replay.ReplayBuffer(LENGTH, capacity, strategy, seed)
        self.ledger: dict[str, dict[bytes, float]] = defaultdict(dict)
        self.number, self.switched = 1, False

    def key(self, id: bytes, importance: float) -> float:
        seed = self.reference.seed.to_bytes(8, "little")
        digest = hashlib.blake2b(id, digest_size=8, key=seed).digest()
        return -math.log(((int.from_bytes(digest, "little") >> 12) + 0.5) / 2**52) / importance

    @rule()
    def next_lesson(self) -> None:
        self.number += 1

    @rule(source=st.sampled_from("abc"), picks=st.lists(st.integers(0, 30), min_size=1, max_size=6))
    def insert(self, source: str, picks: list[int]) -> None:
        importance = (1.0, 3.0, 0.25)[self.number % 3]
        pool = "" if self.ours._index.strategy == "reservoir" else source
        for pick in picks:
            tokens, mask = windows(pick, 1, 1 + pick % LENGTH)
            mask[0, 0] = pick % 3 > 0 or pick % LENGTH == 0
            id = window_id(pack(tokens, mask)[0])
            if id not in {row.id for row in self.ours.rows()}:
                self.ledger[pool][id] = self.key(id, importance)
            admitted = self.ours.insert(tokens, mask, source, self.number, importance)
            theirs = self.reference.insert(torch.tensor(tokens), torch.tensor(mask), source, self.number, importance)
            assert admitted == theirs

    @rule(count=st.integers(1, 4), excluding=st.booleans(), late=st.booleans())
    def sample(self, count: int, excluding: bool, late: bool) -> None:
        lesson = self.number if excluding else None
        assert self.ours.available(lesson) == self.reference.available(lesson)
        tokens, mask = windows(90, 2, 3)
        ours = mix(tokens, mask, self.ours, count, lesson)
        theirs = torch_ref.replay.mix(torch.tensor(tokens), torch.tensor(mask), self.reference, count, lesson)
        assert ours.rows == theirs.rows
        assert np.array(ours.tokens).tolist() == theirs.tokens.tolist()
        assert np.array(ours.mask).tolist() == theirs.mask.tolist()
        np.testing.assert_allclose(np.array(ours.weights), theirs.weights.numpy(), rtol=1e-6)
        losses = np.arange(len(ours.rows)) + 0.5 * late
        self.ours.update_priorities(ours.rows, losses)
        self.reference.update_priorities(theirs.rows, torch.tensor(losses))

    @rule(strategy=st.sampled_from(REPLAY_STRATEGIES))
    def use(self, strategy: str) -> None:
        """The ledger goes on with what is held; for all that was turned away the threshold stands."""
        together = "reservoir" in (self.ours._index.strategy, strategy) and self.ours._index.strategy != strategy
        self.ours.use(strategy)
        self.reference.use(strategy)
        if together:
            self.switched = True
            self.ledger.clear()
            for row in self.ours.rows():
                self.ledger["" if strategy == "reservoir" else row.source][row.id] = self.key(row.id, row.importance)
            for name, pool in self.ours._index.pools.items():
                if pool.threshold < math.inf:
                    self.ledger[name][b"turned away"] = pool.threshold

    @rule(swap=st.booleans())
    def restart(self, swap: bool) -> None:
        """A state restores on either side."""
        ours, theirs = self.ours.state(), self.reference.state()
        assert_same_state(ours, theirs)
        self.ours = ReplayBuffer.restore(theirs if swap else ours)
        self.reference = torch_ref.replay.ReplayBuffer.restore(ours if swap else theirs)

    @invariant()
    def same(self) -> None:
        assert_same_state(self.ours.membership(), self.reference.membership())

    @invariant()
    def kept_are_the_smallest_keys_of_all_offered(self) -> None:
        held: dict[str, set[bytes]] = defaultdict(set)
        for row in self.ours.rows():
            held["" if self.ours._index.strategy == "reservoir" else row.source].add(row.id)
            assert window_id(row.window) == row.id
        for pool, offered in self.ledger.items():
            assert held[pool] == set(sorted(offered, key=lambda id: (offered[id], id))[: len(held[pool])])

    @invariant()
    def shares_are_fair(self) -> None:
        """A reservoir that had to drop something is within one row of the largest."""
        pools = self.ours._index.pools
        assert len(self.ours) <= self.ours._index.capacity
        largest = max((len(pool.heap) for pool in pools.values()), default=0)
        for name, pool in pools.items():
            cut = len(self.ledger[name]) > len(pool.heap)
            assert not cut or len(pool.heap) >= largest - 1 or self.switched
            if not cut:
                assert pool.threshold == math.inf


Comparison.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
TestComparison = Comparison.TestCase


@pytest.mark.parametrize("strategy", REPLAY_STRATEGIES)
def test_a_long_run_chooses_the_same_rows_as_the_reference(strategy: str) -> None:
    """Three hundred steps as a learner takes them, lesson after lesson, through a buffer that overflows."""
    random = np.random.default_rng(1)
    ours = ReplayBuffer(LENGTH, 40, strategy, 11)
    reference = torch_ref.replay.ReplayBuffer(LENGTH, 40, strategy, 11)
    for step in range(300):
        lesson = 1 + step // 30
        new, old = split_rows(3, 0.5, step)
        tokens = random.integers(0, 40, (new, LENGTH + 1))
        mask = (random.random((new, LENGTH)) < 0.8).astype(np.float32)
        a = mix(tokens, mask, ours, old, lesson)
        b = torch_ref.replay.mix(torch.tensor(tokens), torch.tensor(mask), reference, old, lesson)
        assert a.rows == b.rows, f"step {step}"
        np.testing.assert_allclose(np.array(a.weights), b.weights.numpy(), rtol=1e-6)
        losses = random.random(len(a.rows)) * 5
        ours.update_priorities(a.rows, losses)
        reference.update_priorities(b.rows, torch.tensor(losses))
        source, importance = "abcd"[lesson % 4], (1.0, 2.0)[lesson % 2]
        admitted = ours.insert(mx.array(tokens), mx.array(mask), source, lesson, importance)
        assert admitted == reference.insert(torch.tensor(tokens), torch.tensor(mask), source, lesson, importance)
    assert_same_state(ours.state(), reference.state())


def test_the_windows_of_both_sides_have_the_same_ids() -> None:
    tokens, mask = windows(0, 6)
    mask[2, 3] = mask[3, 0] = 0
    mask[4] = 0
    for ours, theirs in zip(
        pack(tokens, mask), torch_ref.replay.pack(torch.tensor(tokens), torch.tensor(mask)), strict=True
    ):
        assert ours.tolist() == theirs.tolist()
        assert window_id(ours) == torch_ref.replay.window_id(theirs)
