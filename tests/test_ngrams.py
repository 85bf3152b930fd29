"""Finding one text in another by n-grams of tokens."""

import numpy as np
import pytest

from mlx_impl.ngrams import LENGTH, ngrams, share, shares


def test_a_share_counts_ngrams_that_stand_anywhere_in_the_other_text() -> None:
    rng = np.random.default_rng(0)
    text, other = rng.integers(0, 50_000, 10 * LENGTH, dtype=np.int32), rng.integers(0, 50_000, 500, dtype=np.int32)
    assert share(text, ngrams(other)) == 0
    assert share(text, ngrams(text)) == 1
    inside = np.concatenate([other[:77], text[: 3 * LENGTH], other[77:]])
    assert share(text, ngrams(inside)) == pytest.approx(0.3)
    assert share(text[:5], ngrams(text)) == share(text, ngrams(text[:5])) == 0
    assert share(np.sort(text), ngrams(text)) == 0  # the same tokens in another order


def test_shares_are_those_of_a_search() -> None:
    """Rows of every length, against looking for each of their n-grams at every place."""
    rng = np.random.default_rng(3)
    text = rng.integers(0, 50_000, 400)
    places = {tuple(text[at : at + LENGTH]) for at in range(len(text) - LENGTH + 1)}
    rows = np.stack([text[at : at + 100] for at in range(0, 80, 8)])
    rows[rng.random(rows.shape) < 0.02] += 1
    lengths = np.arange(10, 110, 10)
    expected = []
    for row, length in zip(rows, lengths, strict=True):
        starts = range(0, length - LENGTH + 1, LENGTH)
        found = [tuple(row[at : at + LENGTH]) in places for at in starts]
        expected.append(sum(found) / len(found) if found else 0.0)
    assert shares(rows, lengths, ngrams(text)).tolist() == expected
    assert 0 < np.mean(expected) < 1
    assert shares(rows, lengths, ngrams(text[:5])).tolist() == [0.0] * 10
