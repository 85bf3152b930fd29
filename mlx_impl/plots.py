"""Pictures of what was measured, as PNG. Matplotlib is imported here and only when a picture is drawn."""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlx_impl import files
from mlx_impl.matrix import ForgettingMatrix
from mlx_impl.ngrams import TOLD

ROW, WIDTH = 0.3, 7.5
"""Inches of a lesson's row and of the whole picture of forgetting."""
NUMBERS_UP_TO = 14
"""Lessons up to which each cell of that picture has its number written in it."""


def plot_losses(records: list[dict[str, Any]], path: Path) -> None:
    """Training and held-out loss over steps, from the records of `metrics.jsonl`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [(r["step"], r["loss"]) for r in records if "loss" in r]
    heldout = [(r["step"], r["heldout_loss"]) for r in records if "heldout_loss" in r]
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if steps:
        axes.plot(*zip(*steps, strict=True), color="#b7c4d6", linewidth=1, label="training, each step")
        axes.plot(*zip(*_smoothed(steps), strict=True), color="#1f4e8c", linewidth=1.8, label="training, smoothed")
    if heldout:
        axes.plot(*zip(*heldout, strict=True), "o-", color="#c8553d", markersize=4, label="held-out text")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if steps or heldout:
        axes.legend(frameon=False)
    with files.atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def plot_forgetting(records: Sequence[dict[str, Any]], path: Path) -> None:
    """A heat map for each domain of a report: what became of each lesson's text after each later lesson.

    Colour and number are ppl_forget after that stage, in percent; the grey cell where a row begins says by how much
    the text's perplexity had then changed from the base's. Lessons that were not measured have no row; those whose
    text a later lesson taught have no colour, which would be that of forgetting.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [sum(loss is not None for loss in record["matrix"]["losses"][0]) for record in records]
    height = ROW * sum(rows) + 0.6 * len(rows) + 0.5
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(records), 1, squeeze=False, height_ratios=rows)[:, 0]
    tables = [_cells(record) for record in records]
    values = [abs(value) for table in tables for row in table if row.counts for value in row.forgotten]
    values = [value for value in values if math.isfinite(value)]
    limit = min(50.0, max([5.0, *values]))  # noise of a percent or two is not to look like forgetting
    for axes, record, table in zip(panels, records, tables, strict=True):
        image = _heat_map(axes, record, table, limit)
    beyond = "both" if max(values, default=0.0) > limit else "neither"
    bar = figure.colorbar(image, ax=list(panels), shrink=min(1.0, 2.5 / height), aspect=15, pad=0.02, extend=beyond)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)
    what = "Perplexity of held-out text after each lesson: % above its best so far (grey: % against the base, at once)"
    figure.suptitle(what, fontsize=9, x=0.01, ha="left")
    with files.atomic_file(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # a name in a script the font lacks
        figure.savefig(temporary, format="png", dpi=150)


def plot_panels(panels: Sequence[tuple[str, str, Sequence[tuple[float, float]]]], path: Path) -> None:
    """Small panels of curves, each (title, unit of y, points), y from zero, x by decades where it spans any.

    Two in a row, in their order.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(WIDTH, 1.9 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, 2, squeeze=False).flatten()
    for axes, (title, unit, points) in zip(grid, panels, strict=False):
        axes.plot(*zip(*points, strict=True), "o-", color="#1f4e8c", markersize=3.5, linewidth=1.4)
        xs, ys = zip(*points, strict=True)
        if min(xs) > 0 and max(xs) >= 10 * min(xs):
            axes.set_xscale("log")
        axes.set_ylim(0, 1.15 * max(ys) or 1.0)
        axes.set_title(title, fontsize=9, loc="left")
        axes.set_ylabel(unit, fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    with files.atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


class _Row(NamedTuple):
    """A lesson's: ppl_forget after each stage from 1 (NaN where there is none), its own column, what it did there."""

    label: str
    forgotten: list[float]
    own: int
    learned: float
    counts: bool


def _cells(record: dict[str, Any]) -> list[_Row]:
    """The rows of a domain's heat map, of the lessons that were measured."""
    losses = record["matrix"]["losses"]
    matrix = ForgettingMatrix(record["matrix"]["names"], losses)
    stages = [matrix.after(stage).ppl_forget for stage in range(1, len(losses))]
    rows = []
    for j, lesson in enumerate(record["lessons"]):
        if losses[0][j] is None:
            continue
        forgotten = [stage[j] if j < len(stage) else None for stage in stages]
        gain = matrix.gain[j]
        learned = math.nan if gain is None else 100 * math.expm1(min(-gain, 700.0))
        source = lesson["source"] if len(lesson["source"]) <= 22 else lesson["source"][:21] + "…"
        known = [math.nan if value is None else value for value in forgotten]
        counts = lesson["taught_percent"] < TOLD
        again = "" if counts else "  (taught again)"
        rows.append(_Row(f"{source}  {lesson['version']}{again}", known, j, learned, counts))
    return rows


def _heat_map(axes: Any, record: dict[str, Any], rows: list[_Row], limit: float) -> Any:
    """Draw one domain; returns the image that the colour bar is made from."""
    colours = [row.forgotten if row.counts else [math.nan] * len(row.forgotten) for row in rows]
    image = axes.imshow(colours, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    stages = len(record["lessons"])
    size = 8 if stages <= 8 else 6
    written = stages <= NUMBERS_UP_TO
    for y, (_, values, own, learned, counts) in enumerate(rows):
        axes.fill([own - 0.5, own + 0.5, own + 0.5, own - 0.5], [y - 0.5, y - 0.5, y + 0.5, y + 0.5], color="#d9d9d9")
        if written and math.isfinite(learned):
            axes.text(own, y, f"{learned:+.0f}", ha="center", va="center", fontsize=size, color="#555555")
        for x, value in enumerate(values):
            if written and math.isfinite(value):
                colour = ("white" if abs(value) > 0.6 * limit else "black") if counts else "#999999"
                axes.text(x, y, f"{value:+.1f}", ha="center", va="center", fontsize=size, color=colour)
    axes.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=7, parse_math=False)
    each = math.ceil(stages / 20)
    names = [lesson["version"] for lesson in record["lessons"]]
    axes.set_xticks(range(0, stages, each), names[::each], fontsize=7, rotation=45 if stages > 10 else 0)
    axes.tick_params(length=0)
    axes.set_xticks([x - 0.5 for x in range(1, stages)], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, len(rows))], minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(record["domain"], fontsize=9, fontweight="bold", loc="left", parse_math=False)
    return image


def _smoothed(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Exponential moving average over about a twentieth of the curve, corrected for its start."""
    span = max(3, len(points) // 20)
    weight = 1 - 2 / (span + 1)
    average, smooth = 0.0, []
    for count, (step, value) in enumerate(points, 1):
        average = weight * average + (1 - weight) * value
        smooth.append((step, average / (1 - weight**count)))
    return smooth
