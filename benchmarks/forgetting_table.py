"""From sums over documents to the table of forgetting: measures with intervals, as JSON, text and a plot."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_impl.matrix import ForgettingMatrix, mean
from mlx_impl.statistics import Floats, interval, resampled_losses

Cells = dict[str, list[dict[str, Any]]]
"""What was measured of a method, for each order of the texts."""

Counts = Mapping[str, NDArray[np.float64]]
"""Tokens of each document, by text."""

SAMPLES = 2000


def figures_of(
    cells: Cells, base: Mapping[str, list[float]], counts: Counts, titles: Mapping[str, str]
) -> dict[str, Any]:
    """The measures of each method: percentages with intervals over documents, means over orders."""
    alone = cells["domains"][0]["texts"] if "domains" in cells else None
    methods = {}
    for name, measured in cells.items():
        if "stages" in measured[0]:
            figures = _sequence(measured, base, counts, alone)
        else:
            figures = _final(measured[0], base, counts, alone)
        cost = {key: mean([cell["cost"][key] for cell in measured]) for key in measured[0]["cost"]}
        methods[name] = {"title": titles[name], **figures, "cost": cost}
    losses = {name: sum(nats) / counts[name].sum() for name, nats in base.items()}
    documents = {name: int((counts[name] > 0).sum()) for name in counts}
    orders = max(map(len, cells.values()))  # of a method whose figures no order changes one is measured
    return {"base": losses, "documents": documents, "orders": orders, "methods": methods}


def _sequence(
    measured: list[dict[str, Any]], base: Mapping[str, list[float]], counts: Counts, alone: Mapping | None
) -> dict[str, Any]:
    """Measures of texts taught one after another."""
    matrices, worst, average = [], [], []
    for cell in measured:
        order = cell["order"]
        rows = [[_loss(base, name, counts) for name in order]]
        rows += [[_loss(stage, name, counts) for name in order] for stage in cell["stages"]]
        separate = None if alone is None else [_loss(alone, name, counts) for name in order]
        matrices.append(ForgettingMatrix(order, rows, separate))
        forgotten = np.stack([_resampled_forgetting(cell, name, counts) for name in order[:-1]])  # (T - 1, S)
        worst.append(forgotten.max(axis=0))
        average.append(forgotten.mean(axis=0))
    summaries = [matrix.as_json() for matrix in matrices]
    measures = [summary["ppl_forget_percent"] for summary in summaries]
    untaught = [name for name in base if name not in measured[0]["order"]]
    return {
        "ppl_forget_percent": {
            "worst": _interval([m["worst"] for m in measures], worst),
            "mean": _interval([m["mean"] for m in measures], average),
        },
        "gain_lost_percent": _means(summaries, "gain_lost_percent"),
        "plasticity_percent": _means(summaries, "plasticity_percent"),
        "backward_transfer": mean([summary["backward_transfer"] for summary in summaries]),
        "average_perplexity": mean([summary["average_perplexity"] for summary in summaries]),
        "untaught_ppl_percent": {
            name: mean([_rise(cell["stages"][-1], base, name, counts) for cell in measured]) for name in untaught
        },
        "matrices": summaries,
    }


def _final(
    cell: dict[str, Any], base: Mapping[str, list[float]], counts: Counts, alone: Mapping | None
) -> dict[str, Any]:
    """Measures of texts that were not taught one over another."""
    names = cell["order"]
    losses = [_loss(cell["texts"], name, counts) for name in names]
    gains = [_loss(base, name, counts) - loss for name, loss in zip(names, losses, strict=True)]
    figures: dict[str, Any] = {
        "losses": dict(zip(names, losses, strict=True)),
        "gain": dict(zip(names, gains, strict=True)),
        "average_perplexity": mean([math.exp(loss) for loss in losses]),
    }
    if alone is not None:
        own = [_loss(base, name, counts) - _loss(alone, name, counts) for name in names]
        shares = [100 * gain / whole for gain, whole in zip(gains, own, strict=True) if whole >= 0.05]
        figures["plasticity_percent"] = {"mean": mean(shares), "worst": min(shares, default=None)}
    untaught = [name for name in cell["texts"] if name not in names]
    figures["untaught_ppl_percent"] = {name: _rise(cell["texts"], base, name, counts) for name in untaught}
    if "bit_identical" in cell:
        figures["bit_identical"] = cell["bit_identical"]
        forgotten = 0.0 if cell["bit_identical"] else None
        figures["ppl_forget_percent"] = {"worst": {"value": forgotten}, "mean": {"value": forgotten}}
        figures["untaught_ppl_percent"] = {name: 0.0 for name in base if name not in names}
        figures["routed"] = _routing(cell["routed"], names)
    return figures


def _routing(routed: Mapping[str, Any], taught: Sequence[str]) -> dict[str, Any]:
    """How often the right domain was chosen, and what the wrong ones cost on the rest of the windows."""
    texts = {}
    for name, windows in routed.items():
        own = name if name in taught else "none"
        tokens = sum(windows["tokens"])
        named, chosen = sum(windows["named"]) / tokens, sum(windows["routed"]) / tokens
        texts[name] = {
            "accuracy": windows["chosen"].count(own) / len(windows["chosen"]),
            "windows": len(windows["chosen"]),
            "named": named,
            "routed": chosen,
            "ppl_rise_percent": 100 * math.expm1(chosen - named),
        }
    return {
        "accuracy": mean([texts[name]["accuracy"] for name in taught]),
        "ppl_rise_percent": mean([texts[name]["ppl_rise_percent"] for name in taught]),
        "texts": texts,
    }


def _resampled_forgetting(cell: dict[str, Any], name: str, counts: Counts) -> Floats:
    """ppl_forget of a text (S,) on documents drawn with replacement: the same for all methods, others of each text.

    The best stage is that of the whole text, not of each draw.
    """
    learned = cell["order"].index(name)
    sums = [stage[name] for stage in cell["stages"][learned:]]
    seed = sorted(counts).index(name)
    losses = resampled_losses(sums, counts[name], SAMPLES, seed)  # (S, stages from its own on)
    best = int(np.argmin([sum(stage) for stage in sums[:-1]]))
    return 100 * np.expm1(losses[:, -1] - losses[:, best])


def _interval(values: Sequence[float | None], resampled: list[Floats]) -> dict[str, Any]:
    """The mean over orders, with the interval of it."""
    value = mean(values)
    return {"value": None} if value is None else interval(value, np.mean(resampled, axis=0)).as_json()


def _means(summaries: list[dict[str, Any]], measure: str) -> dict[str, float | None]:
    return {which: mean([summary[measure][which] for summary in summaries]) for which in ("mean", "worst")}


def _loss(sums: Mapping[str, list[float]], name: str, counts: Counts) -> float:
    """Nats per token; NaN where a text was not measured at that stage."""
    return sum(sums[name]) / float(counts[name].sum()) if name in sums else math.nan


def _rise(after: Mapping[str, list[float]], before: Mapping[str, list[float]], name: str, counts: Counts) -> float:
    return 100 * math.expm1(_loss(after, name, counts) - _loss(before, name, counts))


# -- for people --------------------------------------------------------------------------------------------------------


def table(figures: Mapping[str, Any]) -> str:
    """A Markdown table, the base and then a method a line; forgetting with its interval, seconds of the steps alone."""
    head = "| method | forgotten, worst % | mean % | gain lost % | plasticity % | ppl | untaught % | tokens | seconds |"
    base = [math.exp(figures["base"][name]) for name in _taught(figures)]
    lines = [head, "|---|" + "---:|" * 8, f"| frozen base | | | | 0 | {mean(base):.2f} | +0.0 | 0 | 0 |"]
    for method in figures["methods"].values():
        forgotten = method.get("ppl_forget_percent", {})
        cost = method["cost"]
        untaught = mean(list(method.get("untaught_ppl_percent", {}).values()))
        cells = [
            method["title"],
            _with_interval(forgotten.get("worst")),
            _with_interval(forgotten.get("mean")),
            _number(method.get("gain_lost_percent", {}).get("mean"), ".0f"),
            _number(method.get("plasticity_percent", {}).get("mean"), ".0f"),
            _number(method["average_perplexity"], ".2f"),
            _number(untaught, "+.1f"),
            f"{cost['new_tokens'] + cost['replayed_tokens']:,.0f}",
            f"{cost['seconds']:,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
        if "routed" in method:
            routed = method["routed"]
            general = mean([t["ppl_rise_percent"] for n, t in routed["texts"].items() if n not in method["losses"]])
            lines.append(
                f"| … routed ({100 * routed['accuracy']:.0f} % right) | {routed['ppl_rise_percent']:+.2f} to named "
                f"| | | | | {_number(general, '+.1f')} | | |"
            )
    return "\n".join(lines)


def _taught(figures: Mapping[str, Any]) -> list[str]:
    """Names of the texts that were taught, of those whose losses under the base are known."""
    one = next(iter(figures["methods"].values()))
    return list(one["losses"] if "losses" in one else one["matrices"][0]["names"])


def _with_interval(value: Mapping[str, Any] | None) -> str:
    if value is None or value["value"] is None:
        return ""
    bounds = f" ({value['low']:.1f} to {value['high']:.1f})" if "low" in value else ""
    return f"{value['value']:.1f}{bounds}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def plot(figures: Mapping[str, Any], path: Path) -> None:
    """What each method forgot, worst and mean with intervals, beside what it learned."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [m for m in figures["methods"].values() if "ppl_forget_percent" in m][::-1]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 0.6 + 0.55 * len(shown)), sharey=True)
    places = np.arange(len(shown))
    for offset, which, colour in ((0.2, "worst", "#b3472f"), (-0.2, "mean", "#e0a890")):
        values = [m["ppl_forget_percent"][which] for m in shown]
        heights = [v["value"] or 0.0 for v in values]
        low = [max(0.0, h - v.get("low", h)) for h, v in zip(heights, values, strict=True)]
        high = [max(0.0, v.get("high", h) - h) for h, v in zip(heights, values, strict=True)]
        left.barh(places + offset, heights, 0.38, color=colour, label=f"{which} text", xerr=[low, high], capsize=2)
    left.set_yticks(places, [m["title"] for m in shown])
    left.axvline(0, color="black", linewidth=0.8)
    left.set_xlabel("perplexity of earlier texts, rise in %")
    left.legend(frameon=False)
    right.barh(places, [m.get("plasticity_percent", {}).get("mean") or 0.0 for m in shown], 0.6, color="#4a7a8c")
    right.axvline(100, color="black", linewidth=0.8, linestyle=":")
    right.set_xlabel("gain on each new text, % of that learned alone")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
