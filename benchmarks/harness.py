"""How everything is measured here: warmed up, repeated, our side and its peers in turn, median and quartiles of each.

A machine's speed drifts, by a third and more where others use it too. Sides that take turns drift together: what is
reported of two is the median of the ratios of neighbours, not the ratio of two medians far apart in time.
"""

import importlib.metadata
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import REPETITIONS

OURS = "minimac-mlx"
PEERS = {"mlx-lm": "pip install mlx-lm", "torch": "pip install 'minimac-mlx[torch]'"}
"""What we are compared with, by the name of its package, and how it is got."""


@dataclass(frozen=True)
class Options:
    """What is to be measured, and with how much patience."""

    model: Path | None = None
    """A model directory; None is the default model."""
    data: Path | None = None
    """A folder of NAME/train.txt and NAME/valid.txt; None takes text that Python brings along."""
    repetitions: int = REPETITIONS
    quick: bool = False
    """Small sizes, to see that it works."""
    say: Callable[[str], None] = lambda text: None
    """Takes lines of progress."""
    once: Callable[[str, Callable[[], Any]], Any] = lambda key, measure: measure()
    """What a part of a benchmark measures, under its key: of an interrupted run, what was found then."""


Seconds = Callable[[], float]
"""Does the work once; returns its own measure of it, seconds or work a second."""


def timed(work: Callable[[], Any]) -> Seconds:
    """A side that is measured by the clock; `work` waits for what it computes."""

    def once() -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    return once


def alternate(sides: Mapping[str, Seconds], repetitions: int, warmups: int = 1) -> dict[str, list[float]]:
    """What each side returned, `repetitions` times in turn, after `warmups` rounds that do not count.

    Every other round goes backwards, so that no side always follows the same one.
    """
    values: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(warmups + repetitions):
        for name in list(sides) if number % 2 == 0 else list(sides)[::-1]:
            value = sides[name]()
            if number >= warmups:
                values[name].append(value)
    return values


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and how many there were."""
    low, median, high = np.quantile(np.asarray(values, float), (0.25, 0.5, 0.75)).tolist()
    return {"median": median, "quartiles": [low, high], "repetitions": len(values)}


def beside(values: Mapping[str, Sequence[float]], rates: bool, ours: str = OURS) -> dict[str, Any]:
    """Spread of each side, and for each other side how many times better we are, round by round.

    Of `rates` (tokens a second) more is better, of times (seconds, bytes) less.
    """
    assert len({len(found) for found in values.values()}) == 1, "sides that took turns have as many figures"
    result: dict[str, Any] = {name: spread(found) for name, found in values.items()}
    mine = np.asarray(values[ours], float)
    ratios = {}
    for name, found in values.items():
        if name != ours:
            theirs = np.asarray(found, float)
            ratios[name] = spread((mine / theirs if rates else theirs / mine).tolist())
    return {**result, "times_better": ratios}


def row(
    figure: str, value: float | None, unit: str, goal: float | None = None, at_most: bool = False
) -> dict[str, Any]:
    """A figure by its name, with the goal beside it where there is one; `value` None was not measured."""
    met = None if goal is None or value is None else (value <= goal if at_most else value >= goal)
    shown = None if goal is None else f"{'at most' if at_most else 'at least'} {goal:g}"
    return {"figure": figure, "value": value, "unit": unit, "goal": shown, "met": met}


def peers(*names: str) -> dict[str, Any]:
    """Which of the peers are here, by version; how to get those that are absent."""
    return {name: {"version": found} if (found := version(name)) else {"absent": PEERS[name]} for name in names}


def version(package: str) -> str | None:
    """The installed version of a package, None if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
