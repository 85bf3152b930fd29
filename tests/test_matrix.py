"""Measures of forgetting against figures worked out by hand.

Three lessons; losses are logarithms, so that perplexities are round: 8 is a text's perplexity under the base.
"""

import json
import math
from dataclasses import replace

import pytest

from mlx_impl.errors import InputError
from mlx_impl.matrix import ForgettingMatrix, largest, mean, smallest

LOG = math.log
NAN = float("nan")

# Perplexities. Text a: 8, learned to 4, 2 after b, 5 after c. Text b: 8 (7 after a), learned to 4, 6 after c.
MATRIX = ForgettingMatrix(
    ["a", "b", "c"],
    [
        [LOG(8), LOG(8), LOG(8)],
        [LOG(4), LOG(7), None],
        [LOG(2), LOG(4), LOG(16)],
        [LOG(5), LOG(6), LOG(2)],
    ],
    alone=[LOG(2), LOG(8), None],
)


def test_forgetting_is_measured_from_the_best_so_far() -> None:
    a, b, c = MATRIX.ppl_forget
    assert a == pytest.approx(150)  # 5 over 2, not over the 4 it was learned to
    assert b == pytest.approx(50)
    assert c is None


def test_the_last_stage_is_no_candidate_for_the_best() -> None:
    better = replace(MATRIX, losses=[*MATRIX.losses[:3], [LOG(1), LOG(2), LOG(2)]])
    assert better.ppl_forget == [pytest.approx(-50), pytest.approx(-50), None]


def test_the_share_of_a_gain_that_is_lost() -> None:
    a, b, c = MATRIX.gain_lost
    assert a == pytest.approx(100 * LOG(5 / 4) / LOG(2))
    assert b == pytest.approx(100 * LOG(6 / 4) / LOG(2))
    assert c is None
    assert MATRIX.gain == [pytest.approx(LOG(2)), pytest.approx(LOG(2)), pytest.approx(LOG(4))]


@pytest.mark.parametrize(("gain", "known"), [(0.0501, True), (0.0499, False), (0.0, False), (-1.0, False)])
def test_of_a_small_gain_no_share_is_taken(gain: float, known: bool) -> None:
    matrix = ForgettingMatrix(["a", "b"], [[3.0, 3.0], [3.0 - gain, 3.0], [3.0, 2.0]])
    assert (matrix.gain_lost[0] is not None) == known
    assert matrix.ppl_forget[0] == pytest.approx(100 * math.expm1(gain))
    if known:
        assert matrix.gain_lost[0] == pytest.approx(100)


def test_columns_that_do_not_count_stay_out_of_the_whole() -> None:
    """Text a was taught again: what became of it says nothing of forgetting."""
    one = replace(MATRIX, counted=[False, True, True])
    assert one.ppl_forget == MATRIX.ppl_forget
    assert one.backward_transfer == pytest.approx(LOG(4 / 6))
    record = one.as_json()
    assert record["ppl_forget_percent"]["each"][0] == pytest.approx(150)
    assert record["ppl_forget_percent"]["mean"] == record["ppl_forget_percent"]["worst"] == pytest.approx(50)
    assert record["gain_lost_percent"]["worst"] == pytest.approx(100 * LOG(6 / 4) / LOG(2))
    assert one.after(2).counted == [False, True]
    none = replace(MATRIX, counted=[False] * 3)
    assert none.as_json()["ppl_forget_percent"] == {"each": MATRIX.ppl_forget, "mean": None, "worst": None}
    assert none.backward_transfer is None
    with pytest.raises(InputError, match="2 lessons count or do not, there are 3"):
        replace(MATRIX, counted=[True, True])


def test_transfer_is_higher_where_it_is_better() -> None:
    assert MATRIX.backward_transfer == pytest.approx((LOG(4 / 5) + LOG(4 / 6)) / 2)  # forgetting: below 0
    assert MATRIX.forward_transfer == pytest.approx((LOG(8 / 7) + LOG(8 / 16)) / 2)
    for fresh, expected in (([False, True, False], LOG(8 / 7)), ([True, False, True], LOG(8 / 16))):
        assert replace(MATRIX, fresh=fresh).forward_transfer == pytest.approx(
            expected
        )  # the first lesson is in neither
    assert replace(MATRIX, fresh=[True, False, False]).forward_transfer is None
    assert replace(MATRIX, fresh=[False, True, True]).after(2).fresh == [False, True]
    with pytest.raises(InputError, match="2 lessons are fresh or are not, there are 3"):
        replace(MATRIX, fresh=[True, True])


def test_plasticity_is_the_gain_over_that_of_the_text_alone() -> None:
    assert MATRIX.plasticity == [pytest.approx(50), None, None]  # b alone gained nothing, c was not learned alone
    assert replace(MATRIX, alone=None).plasticity == [None] * 3
    assert replace(MATRIX, alone=None).as_json()["alone"] is None


def test_average_perplexity_is_that_after_the_last_lesson() -> None:
    assert MATRIX.average_perplexity == pytest.approx((5 + 6 + 2) / 3)


def test_the_matrix_as_it_stood_earlier() -> None:
    earlier = MATRIX.after(2)
    assert earlier.names == ["a", "b"]
    assert earlier.ppl_forget == [pytest.approx(-50), None]
    assert earlier.plasticity == [pytest.approx(50), None]
    assert MATRIX.after(3) == MATRIX


def test_one_lesson_forgets_nothing() -> None:
    one = ForgettingMatrix(["only"], [[LOG(8)], [LOG(4)]], [LOG(4)])
    record = one.as_json()
    nothing = {"each": [None], "mean": None, "worst": None}
    assert record["ppl_forget_percent"] == record["gain_lost_percent"] == nothing
    assert record["plasticity_percent"] == {"each": [100.0], "mean": 100.0, "worst": 100.0}
    assert record["backward_transfer"] is record["forward_transfer"] is None
    assert record["gain"] == [pytest.approx(LOG(2))]
    assert record["missing"] == []


@pytest.mark.parametrize("hole", [None, NAN, math.inf])
def test_what_was_not_measured_is_null_and_said(hole: float | None) -> None:
    full = [list(row) for row in MATRIX.losses]
    full[3][1] = hole
    about = pytest.approx(150)
    record = replace(MATRIX, losses=full).as_json()
    assert record["ppl_forget_percent"] == {"each": [about, None, None], "mean": about, "worst": about}
    assert record["gain_lost_percent"]["each"][1] is None
    assert record["backward_transfer"] == pytest.approx(LOG(4 / 5))
    assert record["average_perplexity"] == pytest.approx(3.5)
    assert record["missing"] == [{"stage": 3, "lesson": "b"}]  # the upper triangle is not missed
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_a_stage_that_is_gone_is_left_out_of_the_best() -> None:
    pruned = replace(MATRIX, losses=[*MATRIX.losses[:2], [None] * 3, MATRIX.losses[3]])
    assert pruned.ppl_forget == [pytest.approx(25), None, None]
    assert pruned.missing == [(2, 0), (2, 1)]


def test_a_loss_beyond_what_exp_holds_is_still_a_number() -> None:
    record = ForgettingMatrix(["a", "b"], [[3.0, 3.0], [2.0, 3.0], [5000.0, 1.0]]).as_json()
    assert math.isfinite(record["ppl_forget_percent"]["worst"])
    assert math.isfinite(record["average_perplexity"])


def test_means_and_worst() -> None:
    record = MATRIX.as_json()
    assert record["ppl_forget_percent"]["mean"] == pytest.approx(100)
    assert record["ppl_forget_percent"]["worst"] == pytest.approx(150)
    assert record["gain_lost_percent"]["worst"] == max(record["gain_lost_percent"]["each"][:2])
    assert record["losses"][1][2] is None
    assert (mean([1, None, 4]), largest([1, None, 4]), smallest([1, None, 4])) == (2.5, 4, 1)
    assert (mean([None]), largest([]), smallest([None])) == (None, None, None)


@pytest.mark.parametrize(
    ("names", "losses", "alone", "message"),
    [
        ([], [[]], None, "at least one lesson"),
        (["a"], [[1.0]], None, "1 lessons need 2 rows with the base's, there are 1"),
        (["a"], [[1.0], [1.0, 2.0]], None, "stage 1 has losses of 2 texts, there are 1 lessons"),
        (["a"], [[1.0], [1.0]], [1.0, 2.0], "2 lessons were learned alone, there are 1 lessons"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(names: list, losses: list, alone: list | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ForgettingMatrix(names, losses, alone)
