"""Intervals, calibration and variety, on cases small enough to be worked out by hand."""

import itertools
import math

import numpy as np
import pytest

from mlx_impl.errors import InputError
from mlx_impl.statistics import (
    Interval,
    bootstrap,
    distinct,
    expected_calibration_error,
    interval,
    longest_loop,
    reliability,
    repetition,
    resampled_losses,
)

# -- intervals -------------------------------------------------------------------------------------------------------

NATS = np.array([[2.0, 9.0, 4.0], [4.0, 12.0, 5.0]])
TOKENS = np.array([1.0, 3.0, 2.0])


def test_resampled_losses_are_those_of_documents_drawn_again() -> None:
    """All that can be drawn from three documents is known; each condition has the same ones."""
    draws = itertools.combinations_with_replacement(range(3), 3)
    possible = np.array([NATS[:, draw].sum(axis=1) / TOKENS[list(draw)].sum() for draw in map(list, draws)])
    losses = resampled_losses(NATS, TOKENS, 500, seed=1)
    assert losses.shape == (500, 2)
    nearest = np.abs(losses[:, None] - possible[None]).max(axis=2).argmin(axis=1)
    assert np.allclose(losses, possible[nearest])
    assert set(nearest) == set(range(len(possible)))


def test_the_seed_decides() -> None:
    first, again, other = (resampled_losses(NATS, TOKENS, 50, seed) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_what_all_documents_share_is_certain_when_paired() -> None:
    """Documents differ wildly, but each one costs half a nat more in the second condition: the interval is a point."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(10, 100, 40)
    before = tokens * rng.uniform(1, 6, 40)
    found = bootstrap([before, before + 0.5 * tokens], tokens, lambda loss: loss[:, 1] - loss[:, 0])
    assert (found.value, found.low, found.high) == (pytest.approx(0.5),) * 3
    alone = bootstrap(before, tokens, lambda loss: loss[:, 0])
    assert alone.high - alone.low > 0.3


def test_the_interval_is_as_wide_as_theory_says() -> None:
    """Of 400 documents of one token, the mean's standard error is sd / 20."""
    nats = np.random.default_rng(0).normal(3.0, 2.0, 400)
    found = bootstrap(nats, np.ones(400), lambda loss: loss[:, 0], samples=4000, level=0.9)
    error = nats.std() / 20
    assert found.value == pytest.approx(nats.mean())
    assert found.low == pytest.approx(nats.mean() - 1.645 * error, abs=0.15 * error)
    assert found.high == pytest.approx(nats.mean() + 1.645 * error, abs=0.15 * error)
    assert found.as_json() == {"value": found.value, "low": found.low, "high": found.high, "level": 0.9}


def test_documents_without_tokens_have_no_say() -> None:
    padded = resampled_losses(np.insert(NATS, 1, 99.0, axis=1), np.insert(TOKENS, 1, 0), 50)
    assert (padded == resampled_losses(NATS, TOKENS, 50)).all()


def test_resamples_without_a_figure_are_left_out() -> None:
    values = np.array([math.nan, 1.0, 2.0, 3.0, math.nan])
    assert interval(2.0, values, 0.5) == Interval(2.0, 1.5, 2.5, 0.5)
    assert math.isnan(interval(2.0, np.full(3, math.nan)).low)


def test_what_cannot_be_resampled_is_refused() -> None:
    with pytest.raises(InputError, match="at least 2 documents with tokens, there are 1"):
        resampled_losses([1.0, 2.0], [5, 0])
    with pytest.raises(InputError, match="nats of 3 documents and tokens of 2"):
        resampled_losses([1.0, 2.0, 3.0], [5, 1])
    with pytest.raises(InputError, match="level is 95"):
        interval(1.0, np.ones(3), 95)


# -- calibration -----------------------------------------------------------------------------------------------------


def test_calibration_error_by_hand() -> None:
    """Two bins: (0, 0.5] holds 0.2 and 0.4, one right; (0.5, 1] holds 0.6, 0.9 and 0.9, all right."""
    table = reliability([0.2, 0.4, 0.6, 0.9, 0.9], [True, False, True, True, True], bins=2)
    assert table.tolist() == [[2, pytest.approx(0.6), 1], [3, pytest.approx(2.4), 3]]
    assert expected_calibration_error(table) == pytest.approx((abs(1 - 0.6) + abs(3 - 2.4)) / 5)


def test_bins_end_where_they_say() -> None:
    table = reliability([0.0, 0.5, 0.500001, 1.0], [0, 0, 0, 0], bins=2)
    assert table[:, 0].tolist() == [2, 2]


def test_tables_of_parts_add_up() -> None:
    rng = np.random.default_rng(0)
    sure, right = rng.uniform(size=100), rng.uniform(size=100) < 0.5
    parts = reliability(sure[:30], right[:30]) + reliability(sure[30:], right[30:])
    assert np.allclose(parts, reliability(sure, right))
    assert expected_calibration_error(np.zeros((15, 3))) is None


def test_who_is_right_as_often_as_sure_is_calibrated() -> None:
    rng = np.random.default_rng(0)
    sure = rng.uniform(size=50_000)
    calibrated = expected_calibration_error(reliability(sure, rng.uniform(size=50_000) < sure))
    assert calibrated is not None
    assert calibrated < 0.02
    assert expected_calibration_error(reliability(np.ones(10), np.zeros(10))) == 1.0


# -- generated text --------------------------------------------------------------------------------------------------


def test_distinct_n_by_hand() -> None:
    assert distinct([[1, 2, 1, 2, 3]], 1) == 3 / 5
    assert distinct([[1, 2, 1, 2, 3]], 2) == 3 / 4  # 12 21 23 of 12 21 12 23
    assert distinct([[1, 2], [1, 2]], 2) == 1 / 2  # over both texts, none across their border
    assert distinct([[1]], 2) is None


def test_repetition_by_hand() -> None:
    assert repetition([[1, 2, 1, 2, 1, 2]], 2) == pytest.approx(3 / 5)
    assert repetition([[1, 2, 3, 4, 5]], 4) == 0.0
    assert repetition([[1, 2, 1, 2, 1, 2], [1, 2, 3]], 2) == pytest.approx((3 / 5 + 0) / 2)
    assert repetition([[1, 2, 3]], 4) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ([], 0),
        ([7], 0),
        ([1, 2, 3, 4], 0),
        ([1, 1], 1),
        ([5, 1, 1, 1, 1, 6], 3),
        ([1, 2, 1, 2, 1, 2], 4),
        ([1, 2, 1, 3], 0),  # "1" comes again, but not right behind itself
        ([9, 1, 2, 3, 1, 2, 3, 1, 8], 4),  # the third time has begun
        ([1, 2, 3, 1, 2], 0),
    ],
)
def test_the_longest_loop_by_hand(text: list[int], expected: int) -> None:
    assert longest_loop(text) == expected
