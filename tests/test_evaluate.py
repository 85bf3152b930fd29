"""Measures of prediction against computations written again in numpy, on models that are tables of logits.

Such a model knows what it was asked, so the tests see which tokens were measured, in how much context.
"""

import itertools
import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_impl import evaluate as module
from mlx_impl.data import Tokens
from mlx_impl.errors import InputError
from mlx_impl.evaluate import Evaluation, Measuring, document_sums, each, evaluate, predictions, total, within
from mlx_impl.loss import cross_entropy
from mlx_impl.windows import evaluation_windows

V = 11
TABLE = np.random.default_rng(0).normal(size=(V, V)).astype(np.float32)


def table(tokens: mx.array) -> mx.array:
    """A bigram model: logits (B, T, V) depend on the last token alone, so windows do not matter."""
    return mx.array(TABLE)[tokens]


def tokens(count: int, trained: np.ndarray | None = None) -> Tokens:
    return Tokens(np.random.default_rng(1).integers(0, V, count).astype(np.int32), trained, 1, 100)


def naive(ids: np.ndarray, counted: np.ndarray) -> tuple[float, int, int]:
    """Nats, tokens and hits of the bigram model, one token after another, in float64."""
    nats, hits = 0.0, 0
    for i in np.flatnonzero(counted[1:]) + 1:
        logits = TABLE[ids[i - 1]].astype(np.float64)
        nats += math.log(sum(math.exp(x) for x in logits)) - logits[ids[i]]
        hits += int(np.argmax(logits) == ids[i])
    return nats, int(counted[1:].sum()), hits


@pytest.mark.parametrize(
    ("count", "seq_len", "stride", "rows"),
    [(2, 8, 8, 1), (9, 8, 8, 1), (10, 8, 8, 1), (100, 8, 4, 1), (100, 8, 4, 7), (100, 8, 1, 3), (101, 33, 20, 2)],
)
@pytest.mark.parametrize("masked", [False, True])
def test_every_token_counts_once(count: int, seq_len: int, stride: int, rows: int, masked: bool) -> None:
    trained = np.random.default_rng(2).random(count) < 0.5 if masked else None
    if trained is not None:
        trained[-1] = True
    text = tokens(count, trained)
    result = evaluate(table, evaluation_windows(text, seq_len, stride, rows), 77)
    nats, expected, hits = naive(text.ids, np.ones(count, bool) if trained is None else trained)
    assert (result.tokens, result.correct) == (expected, hits)
    assert result.nats == pytest.approx(nats, rel=1e-6)
    assert result.loss == pytest.approx(nats / expected, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(nats / expected), rel=1e-6)
    assert result.accuracy == pytest.approx(hits / expected)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / 77, rel=1e-6)


@pytest.mark.parametrize("stride", [1, 5, 16])
def test_each_token_has_the_context_that_its_window_allows(stride: int) -> None:
    """A model whose certainty is the number of tokens it sees: the loss tells how much context each token had."""

    def counting(rows: mx.array) -> mx.array:
        seen = mx.arange(1, rows.shape[1] + 1)[None, :, None] * mx.ones((rows.shape[0], 1, 1))
        return mx.concatenate([seen, mx.zeros((*rows.shape, 1))], axis=-1)

    text = Tokens(np.zeros(60, np.int32), None, 1, 0)
    result = evaluate(counting, evaluation_windows(text, 16, stride))
    expected = 0.0
    for target in range(1, 60):
        moves = 0 if target <= 16 else -(-(target - 16) // stride)
        start = min(16 + moves * stride, 59) - 16
        expected += math.log1p(math.exp(-(target - start)))
    assert result.nats == pytest.approx(expected, rel=1e-4)


def test_a_batch_is_measured_like_its_rows() -> None:
    text = tokens(100)
    one, many = (evaluate(table, evaluation_windows(text, 8, 4, rows)) for rows in (1, 8))
    assert (one.tokens, one.correct) == (many.tokens, many.correct)
    assert one.nats == pytest.approx(many.nats, rel=1e-6)


def test_confidence_is_the_probability_of_the_first_choice() -> None:
    text = tokens(200)
    result = evaluate(table, evaluation_windows(text, 8, 4, 3))
    bins = np.zeros((15, 3))
    for last, following in itertools.pairwise(text.ids):
        logits = TABLE[last].astype(np.float64)
        sure = math.exp(logits.max()) / sum(math.exp(x) for x in logits)
        bins[math.ceil(sure * 15) - 1] += (1, sure, logits.argmax() == following)
    assert result.reliability == pytest.approx(bins, abs=1e-4)
    expected = sum(abs(right - sure) for _, sure, right in bins) / 199
    assert result.calibration_error == pytest.approx(expected, abs=1e-6)


def test_a_model_of_nan_is_measured_as_nan() -> None:
    result = evaluate(lambda rows: table(rows) * math.nan, evaluation_windows(tokens(20), 8, 8))
    assert math.isnan(result.loss)


def test_each_prediction_costs_what_the_loss_says() -> None:
    text = tokens(60)
    found = np.concatenate([part.nats for part in predictions(table, evaluation_windows(text, 16, 16))])
    expected = cross_entropy(table(mx.array(text.ids[:-1])), mx.array(text.ids[1:]))
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("masked", [False, True])
def test_nats_are_summed_by_document(masked: bool) -> None:
    """Three documents that end with 0, the second without anything that counts where there is a mask."""
    ids = np.array([5, 6, 0, 7, 0, 8, 9, 0], np.int32)
    trained = np.array([0, 1, 1, 0, 0, 1, 0, 1], bool) if masked else None
    text = Tokens(ids, trained, 3, 100)
    nats = np.array([1.0, 2.0, 4.0, 8.0] if masked else [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0])
    sums, counts = document_sums(nats, text, eos_id=0)
    assert sums.tolist() == ([3, 0, 12] if masked else [3, 12, 112])
    assert counts.tolist() == ([2, 0, 2] if masked else [2, 2, 3])
    sums, counts = document_sums(nats[:3], text, eos_id=0)  # measured as far as a cap allowed
    assert sums.tolist() == ([3, 0, 4] if masked else [3, 4])
    assert document_sums(nats, text, None)[0].tolist() == [nats.sum()]


def test_windows_in_which_nothing_counts_are_not_computed() -> None:
    trained = np.zeros(100, bool)
    trained[50] = True
    calls = []

    def watched(rows: mx.array) -> mx.array:
        calls.append(rows.shape)
        return table(rows)

    assert evaluate(watched, evaluation_windows(tokens(100, trained), 8, 8)).tokens == 1
    assert calls == [(1, 8)]
    with pytest.raises(InputError, match="nothing to measure"):
        evaluate(table, evaluation_windows(tokens(100, np.zeros(100, bool)), 8, 8))


def test_figures_that_no_number_holds_are_null_in_json() -> None:
    far = Evaluation(nats=8000.0, tokens=10, correct=0)
    assert far.perplexity == math.inf
    assert far.as_json() == {
        "tokens": 10,
        "loss": 800.0,
        "perplexity": None,
        "bits_per_byte": None,
        "accuracy": 0.0,
        "calibration_error": None,
    }


def test_16_bit_logits_are_summed_in_float32() -> None:
    text = tokens(3000)
    half = evaluate(lambda rows: table(rows).astype(mx.float16), evaluation_windows(text, 512, 512))
    full = evaluate(table, evaluation_windows(text, 512, 512))
    assert half.loss == pytest.approx(full.loss, rel=1e-3)  # what rounding the logits costs; the sum is exact


# -- time ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still; the number in the list is the time."""
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


def slow(clock: list[float], seconds: list[float], calls: list[int] | None = None) -> module.Logits:
    """The bigram model, each call of which takes the next of these seconds, the last for ever."""
    left = itertools.chain(seconds, itertools.repeat(seconds[-1]))

    def model(rows: mx.array) -> mx.array:
        clock[0] += next(left)
        if calls is not None:
            calls.append(rows.shape[1])
        return table(rows)

    return model


@pytest.mark.parametrize(("allowed", "expected"), [(0.0, 1), (1.9, 1), (2.0, 2), (4.5, 4), (1000.0, 5)])
def test_no_window_is_begun_that_is_not_expected_to_fit(clock: list[float], allowed: float, expected: int) -> None:
    windows = evaluation_windows(tokens(41), 8, 8)
    assert len(list(within(allowed, each(slow(clock, [1.0]), windows)))) == expected


def test_what_is_measured_after_is_what_was_measured_before(clock: list[float]) -> None:
    own, other = tokens(100), tokens(57)
    measuring = Measuring(slow(clock, [5.0, 1.0]), 64)
    first = measuring.before(own, 1000, 1000)
    second = measuring.before(other, 1000, 1000)
    assert (first.tokens, second.tokens) == (99, 56)
    assert measuring.seconds == 7.0
    assert measuring.speed == 64.0  # not that of the slow first window
    (before, after), (other_before, other_after) = measuring.after(1000)
    assert (before.nats, other_before.nats) == (first.nats, second.nats)
    assert (after.nats, after.tokens, other_after.nats) == (before.nats, 99, other_before.nats)


def test_at_most_so_many_tokens_but_a_window(clock: list[float]) -> None:
    calls: list[int] = []
    measuring = Measuring(slow(clock, [1.0], calls), 128)
    assert measuring.before(tokens(1000), 300, 1000).tokens == 384  # ends on a window
    assert measuring.before(tokens(1000), 90, 1000).tokens == 90  # a window cut to what is allowed
    assert measuring.before(tokens(1000), -5, 1000).tokens == module.SMALLEST_WINDOW
    assert measuring.before(tokens(20), 1, 1000).tokens == 19
    assert calls == [128, 128, 128, 90, 64, 19]


def test_a_slower_second_measurement_is_compared_with_its_part_of_the_first(clock: list[float]) -> None:
    own, other = tokens(1000), tokens(500)
    measuring = Measuring(slow(clock, [1.0] * 8 + [3.0]), 100)
    whole = measuring.before(own, 500, 1000)
    measuring.before(other, 300, 1000)
    pairs = measuring.after(8.0)  # what was done in 8 seconds before; now two windows of 3 seconds fit
    assert len(pairs) == 1
    before, after = pairs[0]
    assert before.tokens == after.tokens == 200
    assert before.nats == after.nats < whole.nats


def test_the_first_text_is_measured_whatever_the_time(clock: list[float]) -> None:
    measuring = Measuring(slow(clock, [1.0]), 50)
    measuring.before(tokens(500), 500, 0.0)
    measuring.before(tokens(500), 500, 10.0)
    pairs = measuring.after(0.0)
    assert [(before.tokens, after.tokens) for before, after in pairs] == [(50, 50)]


def test_sums_are_sums() -> None:
    parts = [Evaluation(1.0, 2, 1, None, 0.5), Evaluation(3.0, 5, 2, None, 0.25)]
    assert total(parts) == Evaluation(4.0, 7, 3, None, 0.75)
