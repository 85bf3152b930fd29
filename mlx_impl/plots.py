"""Pictures of what was measured, as PNG. Matplotlib is imported here and only when a picture is drawn."""

from pathlib import Path
from typing import Any

from mlx_impl import files


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


def _smoothed(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Exponential moving average over about a twentieth of the curve, corrected for its start."""
    span = max(3, len(points) // 20)
    weight = 1 - 2 / (span + 1)
    average, smooth = 0.0, []
    for count, (step, value) in enumerate(points, 1):
        average = weight * average + (1 - weight) * value
        smooth.append((step, average / (1 - weight**count)))
    return smooth
