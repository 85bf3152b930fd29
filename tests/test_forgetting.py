"""The benchmark of forgetting in its quick form: real lessons in invented languages, and the order that comes out."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import forgetting, languages
from benchmarks.forgetting_table import figures_of, plot, table
from mlx_impl.learner import ContinualLearner

METHODS = ["domains", "lora", "full", "replay+ewc", "joint"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("forgetting")


@pytest.fixture(scope="module")
def methods(work: Path) -> dict[str, Any]:
    return forgetting.quick(work, 0, METHODS)["methods"]


def worst(method: dict[str, Any]) -> float:
    return method["ppl_forget_percent"]["worst"]["value"]


def test_domains_forget_nothing(methods: dict[str, Any]) -> None:
    assert methods["domains"]["bit_identical"] is True
    assert worst(methods["domains"]) == 0
    assert all(gain > 0.1 for gain in methods["domains"]["gain"].values())


def test_the_order_of_the_methods(methods: dict[str, Any]) -> None:
    assert worst(methods["full"]) > worst(methods["lora"]) > 20
    assert worst(methods["replay+ewc"]) < worst(methods["lora"]) / 5
    lost = {name: methods[name]["gain_lost_percent"]["mean"] for name in ("lora", "replay+ewc")}
    assert lost["lora"] > 20
    assert lost["replay+ewc"] < lost["lora"] / 3
    assert methods["replay+ewc"]["plasticity_percent"]["mean"] > 95
    assert methods["joint"]["average_perplexity"] < methods["lora"]["average_perplexity"]


def test_intervals_hold_the_figure_and_are_not_empty(methods: dict[str, Any]) -> None:
    for name in ("lora", "full", "replay+ewc"):
        for which in ("worst", "mean"):
            figure = methods[name]["ppl_forget_percent"][which]
            assert figure["low"] < figure["value"] < figure["high"]


def test_the_router_finds_the_languages(methods: dict[str, Any]) -> None:
    assert methods["domains"]["routed"]["accuracy"] > 0.9
    assert abs(methods["domains"]["routed"]["ppl_rise_percent"]) < 2


def test_what_was_measured_is_not_measured_again(
    methods: dict[str, Any], work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **named: Any) -> None:
        raise AssertionError("taught again")

    monkeypatch.setattr(ContinualLearner, "learn", fail)
    monkeypatch.setattr(forgetting.Experiment, "_train_all", fail)
    assert forgetting.quick(work, 0, METHODS)["methods"] == methods


@pytest.mark.parametrize("method", ["lora", "replay", "tokens+ewc+distill"])
def test_the_first_lesson_is_that_of_each_method(
    methods: dict[str, Any], work: Path, tmp_path: Path, method: str
) -> None:
    folder = next(work.glob("*/first")).parent
    experiment = forgetting.quick_experiment(work, 0)
    name = languages.NAMES[0]
    given = ContinualLearner.from_checkpoint(experiment.model, store=folder / "first" / name).store.require("main")
    learner = ContinualLearner.from_checkpoint(experiment.model, experiment.settings(method), tmp_path / "store")
    learner.learn(experiment.texts.train[name], "main", name, forgetting.WITHOUT_CLOCK)
    assert learner.store.require("main").files == given.files


def test_table_and_plot(methods: dict[str, Any], tmp_path: Path) -> None:
    lines = table({"base": dict.fromkeys(languages.NAMES, 2.0), "methods": methods}).splitlines()
    assert len(lines) == 2 + len(METHODS) + 2  # with one for the base and one for routing
    assert "| 7.39 |" in lines[2]
    assert len({line.count("|") for line in lines}) == 1
    plot({"methods": methods}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_languages_are_texts_of_their_own(tmp_path: Path) -> None:
    folder = languages.write_texts(tmp_path, 0, documents=16)
    texts = {name: (folder / name / "train.txt").read_text() for name in (*languages.NAMES, "general")}
    assert all(text.count("\n\n") == 15 for text in texts.values())

    def words(name: str) -> set[str]:
        return set(texts[name].lower().replace(".", " ").split())

    assert len(words("alpha") & words("beta")) > 10
    assert len(words("alpha") - words("beta")) > 5
    assert (
        languages.write_texts(tmp_path / "again", 0, documents=16).joinpath("beta/train.txt").read_text()
        == texts["beta"]
    )


def test_figures_by_hand() -> None:
    """Two texts of two documents with ten tokens each, learned one after the other."""
    counts = {"a": np.array([10.0, 10.0]), "b": np.array([10.0, 10.0]), "general": np.array([10.0, 10.0])}
    base = {"a": [30.0, 30.0], "b": [20.0, 20.0], "general": [40.0, 40.0]}
    first = {"a": [20.0, 20.0]}
    second = {"a": [22.0, 22.0], "b": [15.0, 15.0], "general": [41.0, 41.0]}
    cost = {"steps": 2, "new_tokens": 40, "replayed_tokens": 0, "seconds": 1.0}
    sequence = {"order": ["a", "b"], "stages": [first, second], "cost": cost}
    routed = {
        "a": {"chosen": ["a", "b"], "named": [10.0, 10.0], "routed": [10.0, 12.0], "tokens": [5, 5]},
        "b": {"chosen": ["b"], "named": [7.5], "routed": [7.5], "tokens": [5]},
        "general": {"chosen": ["none"], "named": [20.0], "routed": [20.0], "tokens": [5]},
    }
    domains = {
        "order": ["a", "b"],
        "texts": {"a": [20.0, 20.0], "b": [14.0, 14.0]},
        "bit_identical": True,
        "routed": routed,
        "cost": cost,
    }
    cells = {"lora": [sequence], "domains": [domains]}
    figures = figures_of(cells, base, counts, {"lora": "LoRA", "domains": "domains"})
    lora = figures["methods"]["lora"]
    assert figures["base"] == {"a": 3.0, "b": 2.0, "general": 4.0}
    assert lora["ppl_forget_percent"]["worst"]["value"] == pytest.approx(100 * math.expm1(0.2))
    assert lora["ppl_forget_percent"]["mean"]["low"] == pytest.approx(100 * math.expm1(0.2))  # both documents alike
    assert lora["gain_lost_percent"]["mean"] == pytest.approx(20)
    assert lora["plasticity_percent"]["mean"] == pytest.approx((100 + 500 / 6) / 2)
    assert lora["untaught_ppl_percent"]["general"] == pytest.approx(100 * math.expm1(0.1))
    routing = figures["methods"]["domains"]["routed"]
    assert routing["accuracy"] == pytest.approx(0.75)
    assert routing["texts"]["a"]["ppl_rise_percent"] == pytest.approx(100 * math.expm1(0.2))
    assert routing["ppl_rise_percent"] == pytest.approx(50 * math.expm1(0.2))

    other = {**sequence, "order": ["b", "a"], "stages": [{"b": [15.0, 15.0]}, {**second, "general": [40.0, 40.0]}]}
    figures = figures_of({"domains": [domains], "lora": [sequence, other]}, base, counts, {"lora": "", "domains": ""})
    assert figures["orders"] == 2
    both = figures["methods"]["lora"]["untaught_ppl_percent"]["general"]
    assert both == pytest.approx(50 * math.expm1(0.1))


def test_documents_of_each_text_are_drawn_by_themselves() -> None:
    """Two texts forgotten alike: where one's worst documents are drawn, the other's need not be."""
    counts = {name: np.full(8, 10.0) for name in "abc"}
    learned, forgotten = [10.0] * 8, list(np.linspace(10.0, 14.0, 8))
    stages = [{"a": learned}, {"a": learned, "b": learned}, {"a": forgotten, "b": forgotten, "c": learned}]
    cost = {"steps": 1, "new_tokens": 1, "replayed_tokens": 0, "seconds": 1.0}
    cells = {name: [{"order": list("abc"), "stages": stages, "cost": cost}] for name in ("lora", "ewc")}
    base = {name: [30.0] * 8 for name in "abc"}
    figures = figures_of(cells, base, counts, {"lora": "", "ewc": ""})["methods"]
    worst, average = (figures["lora"]["ppl_forget_percent"][which] for which in ("worst", "mean"))
    assert worst["value"] == pytest.approx(average["value"])
    assert worst["low"] > average["low"] + 0.5  # of the same documents in both, the worst would be the mean
    assert figures["ewc"] == {**figures["lora"], "title": ""}  # all methods on the same documents
