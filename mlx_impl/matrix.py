"""The forgetting matrix: the loss of every lesson's text after every lesson, and what follows from it.

L[i][j] is the loss of lesson j's held-out text in nats per token after stage i; stage 0 is the base, stage j the model
that has just learned lesson j, stage T the last. The measures need the lower triangle and row 0; forward transfer also
needs the cells L[j-1][j]. A cell that was not measured is None or NaN, here and in what follows from it.

Loss falls when a model learns, so the signs of transfer are turned round: of BWT and FWT (Lopez-Paz & Ranzato 2017,
eq. 3 and 4, there in accuracy) and of plasticity higher is better, of forgetting lower is better.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_impl.errors import InputError

SMALLEST_GAIN = 0.05
"""Nats per token below which a gain is too small to take a share of."""


@dataclass(frozen=True)
class ForgettingMatrix:
    """Losses in nats per token of T lessons' texts: `losses[i][j]` of text j after stage i, T + 1 rows of T.

    Lessons and columns are counted from 0 here, so that column j is learned at stage j + 1. `alone[j]` is the loss of
    text j after the base has learned only that text. Columns that do not count, such as those of text that was taught
    again, have figures of their own but stay out of means, worst ones and BWT; those that are not `fresh`, of text that
    an earlier lesson taught, stay out of FWT. Without these all do count and are. Raises InputError where the numbers
    of rows, columns and names do not fit.
    """

    names: Sequence[str]
    losses: Sequence[Sequence[float | None]]
    alone: Sequence[float | None] | None = None
    counted: Sequence[bool] | None = None
    fresh: Sequence[bool] | None = None

    def __post_init__(self) -> None:
        lessons = len(self.names)
        if not lessons:
            raise InputError("a forgetting matrix needs at least one lesson")
        if len(self.losses) != lessons + 1:
            raise InputError(f"{lessons} lessons need {lessons + 1} rows with the base's, there are {len(self.losses)}")
        for stage, row in enumerate(self.losses):
            if len(row) != lessons:
                raise InputError(f"stage {stage} has losses of {len(row)} texts, there are {lessons} lessons")
        if self.alone is not None and len(self.alone) != lessons:
            raise InputError(f"{len(self.alone)} lessons were learned alone, there are {lessons} lessons")
        for marks, what in ((self.counted, "count or do not"), (self.fresh, "are fresh or are not")):
            if marks is not None and len(marks) != lessons:
                raise InputError(f"{len(marks)} lessons {what}, there are {lessons} lessons")

    @property
    def cells(self) -> NDArray[np.float64]:
        """L (T + 1, T), NaN where nothing finite was measured."""
        return _numbers(self.losses)

    def after(self, lessons: int) -> "ForgettingMatrix":
        """The matrix as it stood after the first `lessons` of them, 1 to T."""
        alone = None if self.alone is None else self.alone[:lessons]
        return replace(
            self,
            names=self.names[:lessons],
            losses=[row[:lessons] for row in self.losses[: lessons + 1]],
            alone=alone,
            counted=None if self.counted is None else self.counted[:lessons],
            fresh=None if self.fresh is None else self.fresh[:lessons],
        )

    @property
    def missing(self) -> list[tuple[int, int]]:
        """(stage, column) of the cells that measures of forgetting need and that are not there."""
        cells = self.cells
        needed = [(stage, j) for j in range(len(self.names)) for stage in (0, *range(j + 1, len(cells)))]
        return sorted(cell for cell in needed if np.isnan(cells[cell]))

    # -- a figure for each lesson ------------------------------------------------------------------------------

    @property
    def gain(self) -> list[float | None]:
        """What each lesson gained on its own text when it was learned: L[0][j] - L[j][j], nats per token."""
        return _optional(self.cells[0] - self._learned)

    @property
    def ppl_forget(self) -> list[float | None]:
        """Rise of each earlier text's perplexity above its best so far, percent; None for the last lesson.

        100 * (exp(L[T][j] - min over j <= l < T of L[l][j]) - 1); negative where the last lesson was the best for it.
        Stages that were not measured are left out of the minimum.
        """
        cells, figures = self.cells, np.full(len(self.names), np.nan)
        for j in range(len(self.names) - 1):
            best = cells[j + 1 : -1, j]
            if not np.isnan(best).all():
                figures[j] = 100 * math.expm1(min(cells[-1, j] - np.nanmin(best), 700.0))  # what exp still can
        return _optional(figures)

    @property
    def gain_lost(self) -> list[float | None]:
        """Share of each earlier lesson's gain that is gone, percent; None for the last, and for gains below 0.05 nats.

        100 * (L[T][j] - L[j][j]) / (L[0][j] - L[j][j]); negative where later lessons helped.
        """
        cells = self.cells
        shares = 100 * _shares(cells[-1] - self._learned, cells[0] - self._learned)
        shares[-1] = np.nan
        return _optional(shares)

    @property
    def plasticity(self) -> list[float | None]:
        """Each lesson's gain relative to that of the same text learned alone, percent.

        100 * (L[0][j] - L[j][j]) / (L[0][j] - alone[j]); None where the latter is below 0.05 nats or unknown.
        """
        base = self.cells[0]
        alone = np.full(len(self.names), np.nan) if self.alone is None else _numbers(self.alone)
        return _optional(100 * _shares(base - self._learned, base - alone))

    # -- a figure for all --------------------------------------------------------------------------------------

    @property
    def backward_transfer(self) -> float | None:
        """BWT, nats per token: mean over j < T of L[j][j] - L[T][j]. Higher is better, below 0 is forgetting."""
        return mean(self._counted(_optional((self._learned - self.cells[-1])[:-1])))

    @property
    def forward_transfer(self) -> float | None:
        """FWT, nats per token: mean over j > 1 of L[0][j] - L[j-1][j]. Higher is better: earlier lessons helped."""
        cells = self.cells
        before = np.array([cells[j, j] for j in range(len(self.names))])  # the stage before lesson j is number j
        fresh = self.fresh or [True] * len(before)
        later = zip(_optional((cells[0] - before)[1:]), fresh[1:], strict=True)
        return mean([gained for gained, new in later if new])

    @property
    def average_perplexity(self) -> float | None:
        """Mean over the texts of exp(L[T][j])."""
        return mean(_optional(np.exp(np.minimum(self.cells[-1], 700))))

    def as_json(self) -> dict[str, Any]:
        """All of it under plain names; percentages end in _percent, None is what is not known."""
        forgotten, lost, plastic = self.ppl_forget, self.gain_lost, self.plasticity
        kept, left = self._counted(forgotten), self._counted(lost)
        return {
            "names": list(self.names),
            "losses": [_optional(row) for row in self.cells],
            "alone": None if self.alone is None else _optional(_numbers(self.alone)),
            "gain": self.gain,
            "ppl_forget_percent": {"each": forgotten, "mean": mean(kept), "worst": largest(kept)},
            "gain_lost_percent": {"each": lost, "mean": mean(left), "worst": largest(left)},
            "plasticity_percent": {"each": plastic, "mean": mean(plastic), "worst": smallest(plastic)},
            "backward_transfer": self.backward_transfer,
            "forward_transfer": self.forward_transfer,
            "average_perplexity": self.average_perplexity,
            "missing": [{"stage": stage, "lesson": self.names[j]} for stage, j in self.missing],
        }

    def _counted(self, figures: list[float | None]) -> list[float | None]:
        """The figures of the columns that count, of the first so many columns."""
        if self.counted is None:
            return figures
        return [figure for figure, counts in zip(figures, self.counted, strict=False) if counts]

    @property
    def _learned(self) -> NDArray[np.float64]:
        """L[j][j] (T,): each text just after its lesson."""
        return np.diagonal(self.cells[1:])


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of what is known; None if nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def largest(values: Sequence[float | None]) -> float | None:
    """The largest of what is known, None if nothing is: the worst of what should be low."""
    return max((value for value in values if value is not None), default=None)


def smallest(values: Sequence[float | None]) -> float | None:
    """The smallest of what is known, None if nothing is: the worst of what should be high."""
    return min((value for value in values if value is not None), default=None)


def _numbers(values: Sequence[Any]) -> NDArray[np.float64]:
    """As an array, NaN for None and for what is not finite."""
    array = np.array(values, dtype=np.float64)  # None becomes NaN
    return np.where(np.isfinite(array), array, np.nan)


def _optional(values: NDArray[np.float64]) -> list[float | None]:
    """As numbers that JSON knows, None for NaN."""
    return [None if math.isnan(value) else float(value) for value in values]


def _shares(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    """part / whole, NaN where the whole is below SMALLEST_GAIN or unknown."""
    enough = whole >= SMALLEST_GAIN  # False for NaN
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=enough)
