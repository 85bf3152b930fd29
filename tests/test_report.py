"""The report against losses measured again one by one, on a tiny model that has had a few lessons.

And answers to prompts, which `eval --answers` counts.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from lessons import SETTINGS, opened, text, tiny_base, tiny_tokenizer
from terminal import run

from mlx_impl import answers, lora, report, results
from mlx_impl.adapters import read_adapter
from mlx_impl.config import Budget
from mlx_impl.errors import InputError
from mlx_impl.evaluate import evaluate
from mlx_impl.learner import ContinualLearner
from mlx_impl.matrix import ForgettingMatrix
from mlx_impl.plots import plot_forgetting
from mlx_impl.readers import Document, Exchange, text_document
from mlx_impl.router import Router, Routing
from mlx_impl.windows import evaluation_windows

TOKENS = 150


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"), tiny_tokenizer())


FEW = Budget(steps=4)


def teach(
    learner: ContinualLearner, number: int, domain: str = "main", characters: int = 6000, budget: Budget = FEW
) -> None:
    paragraphs = text(number, characters).split("\n\n")
    documents = [text_document(part, f"{number}.{i}") for i, part in enumerate(paragraphs)]
    learner.learn(documents, domain, f"text {number}", budget)


@pytest.fixture(scope="module")
def store(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three lessons in main, the second too short to hold anything out, and one in other."""
    folder = tmp_path_factory.mktemp("lessons") / "store"
    learner = opened(base, folder)
    teach(learner, 1)
    teach(learner, 2, characters=600)
    teach(learner, 3)
    teach(learner, 4, "other")
    return folder


@pytest.fixture(scope="module")
def events() -> list[dict[str, Any]]:
    return []


@pytest.fixture(scope="module")
def record(base: Path, store: Path, events: list[dict[str, Any]]) -> dict[str, Any]:
    return report.report(opened(base, store), tokens=TOKENS, tell=events.append)


def test_each_cell_is_the_loss_of_a_text_under_a_version(base: Path, store: Path, record: dict[str, Any]) -> None:
    learner = opened(base, store)
    main, other = record["domains"]
    assert [main["domain"], other["domain"]] == ["main", "other"]
    for domain in (main, other):
        history = learner.store.history(domain["domain"])
        for stage, row in enumerate(domain["matrix"]["losses"]):
            if stage == 0:
                lora.detach(learner.model)
            else:
                lora.attach_arrays(learner.model, *read_adapter(learner.store.files_of(history[stage - 1])))
            learner.model.train(False)
            for version, loss in zip(history, row, strict=True):
                kept = learner.store.heldout(version)
                if kept is None or 0 < stage < version.depth - 1:  # a text is measured from the stage before its own
                    assert loss is None
                    continue
                ids = kept.ids[: TOKENS + 1]
                tokens = report.Tokens(ids, None, 1, 0)
                length = SETTINGS.seq_len
                expected = evaluate(learner.model, evaluation_windows(tokens, length, length))
                assert loss == pytest.approx(expected.loss, rel=1e-6)
                assert expected.tokens == TOKENS


def test_a_lesson_without_held_out_text_is_a_stage_without_figures(record: dict[str, Any]) -> None:
    main = record["domains"][0]
    assert [lesson["measured_tokens"] for lesson in main["lessons"]] == [TOKENS, 0, TOKENS]
    assert [row[1] for row in main["matrix"]["losses"]] == [None] * 4
    losses = main["matrix"]["losses"]
    forgotten = main["matrix"]["ppl_forget_percent"]["each"]
    assert forgotten == [pytest.approx(100 * math.expm1(losses[3][0] - min(losses[1][0], losses[2][0]))), None, None]
    assert {hole["lesson"] for hole in main["matrix"]["missing"]} == {"v0002"}
    assert "nothing was held out of v0002: not measured" in results.report_text(record)


def test_intervals_stand_where_there_are_documents_to_resample(record: dict[str, Any]) -> None:
    first, short, last = record["domains"][0]["lessons"]
    assert short["ppl_forget_interval"] is last["ppl_forget_interval"] is None
    found = first["ppl_forget_interval"]
    if first["documents"] < report.INTERVAL_FROM:
        assert found is None
    else:
        value = record["domains"][0]["matrix"]["ppl_forget_percent"]["each"][0]
        assert found["value"] == pytest.approx(value, abs=1e-4)
        assert found["low"] <= value <= found["high"]


def test_it_says_how_long_it_takes_and_how_far_it_is(record: dict[str, Any], events: list[dict[str, Any]]) -> None:
    notes = [event["text"] for event in events if event["event"] == "note"]
    cells = sum(loss is not None for domain in record["domains"] for row in domain["matrix"]["losses"] for loss in row)
    assert len(notes) == 1
    assert notes[0].startswith(f"{cells} measurements and 6 continuations: about ")
    steps = [(event["done"], event["total"]) for event in events if event["event"] == "measuring"]
    assert steps == [(done, cells) for done in range(1, cells + 1)]
    assert events[-1]["eta_seconds"] == 0.0


def test_what_was_attached_is_attached_again(base: Path, store: Path) -> None:
    learner = opened(base, store)
    learner.set_adapter("other")
    prompt = mx.array([[1, 2, 3, 4]])
    before = np.array(learner.model(prompt))
    record = report.report(learner, ["main", "main"], 64)
    assert [domain["domain"] for domain in record["domains"]] == ["main"]  # once is enough
    assert learner.adapter == "other"
    assert (np.array(learner.model(prompt)) == before).all()


def test_generated_text_is_measured_beside_the_base_s(record: dict[str, Any]) -> None:
    generated = record["domains"][0]["generated"]
    assert generated["base"]["continuations"] == generated["domain"]["continuations"] == 2
    assert generated["base"]["texts"] != generated["domain"]["texts"]
    for measured in generated.values():
        assert 0 < measured["distinct_1"] <= 1
        assert 0 <= measured["repetition_4"] < 1


def test_the_price_of_routing_is_that_of_its_mistakes(base: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A router that takes every second piece for the other domain's, and pieces measured one by one."""
    learner = opened(base, store, seq_len=100)
    said: list[str] = []

    def route(self: Any, prompt: Any) -> Any:
        assert len(prompt) == report.DOCUMENT_PREFIX
        said.append("other" if len(said) % 2 else "main")
        return Routing(said[-1], {})

    monkeypatch.setattr(Router, "route", route)
    (domain,) = report.report(learner, ["main"], 400)["domains"]
    gap, tokens = 0.0, 0
    texts = [kept for version in learner.store.history("main") if (kept := learner.store.heldout(version)) is not None]
    number = 0
    for kept in texts:
        ids = kept.ids[:401]
        for start in range(0, len(ids) - report.DOCUMENT_PREFIX - report.SHORTEST_REST, 100):
            piece = mx.array(ids[None, start : start + 101])
            losses = []
            for name in (said[number], "main"):
                learner.set_adapter(name)
                losses.append(float(_nats(learner.model(piece[:, :-1]), piece[:, 1:])[0, 63:].sum()))
            gap += losses[0] - losses[1]
            tokens += piece.shape[1] - 64
            number += 1
    assert number == len(said) >= 4
    routing = domain["routing"]
    assert routing["pieces"] == number
    assert routing["chosen"] == {"main": said.count("main"), "other": said.count("other")}
    assert routing["accuracy"] == said.count("main") / number
    assert routing["oracle_gap"] == pytest.approx(gap / tokens, rel=1e-3)


def _nats(logits: mx.array, targets: mx.array) -> mx.array:
    return mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


def test_pruned_lessons_are_counted_and_have_no_place(base: Path, tmp_path: Path) -> None:
    learner = opened(base, tmp_path / "store")
    for number in (1, 2, 3):
        teach(learner, number)
    with learner.store.writing():
        learner.store.prune(2)
    (domain,) = report.report(learner, tokens=64)["domains"]
    assert domain["pruned"] == 1
    assert domain["matrix"]["names"] == ["v0002", "v0003"]
    assert domain["matrix"]["missing"] == []
    assert "1 older lesson pruned: not measured" in results.report_text({"domains": [domain], "tokens_per_text": 64})


def test_a_store_without_lessons_or_without_the_domain_says_so(base: Path, store: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing learned yet"):
        report.report(opened(base, tmp_path / "none"))
    with pytest.raises(InputError, match="no domain called 'third'"):
        report.report(opened(base, store), ["third"])
    with pytest.raises(InputError, match="--tokens is 0"):
        report.report(opened(base, store), tokens=0)


def test_an_interval_does_not_take_luck_for_forgetting() -> None:
    """Twenty stages that differ by noise alone: about the best of them nobody may be sure in three of four cases."""
    above = 0
    random = np.random.default_rng(0)
    for _ in range(60):
        counts = random.integers(20, 120, 8).astype(float)
        found = report._interval([counts * (3 + random.normal(0, 0.02, 8)) for _ in range(20)], counts)
        assert found is not None
        above += found.low > 0
    assert above < 60 / 2  # 31 % with the best stage of the whole text, 72 % with that of each resample


def test_text_that_an_earlier_lesson_taught_is_no_transfer(base: Path, tmp_path: Path) -> None:
    learner = opened(base, tmp_path / "store")
    held = learner.config.holdout
    learner.config = dataclasses.replace(learner.config, holdout=0.0)
    teach(learner, 1, budget=Budget(seconds=600))
    learner.config = dataclasses.replace(learner.config, holdout=held)
    teach(learner, 1)
    teach(learner, 3)
    record = report.report(learner, tokens=64)
    (domain,) = record["domains"]
    assert [lesson["known_percent"] >= 5 for lesson in domain["lessons"]] == [False, True, False]
    losses = domain["matrix"]["losses"]
    assert domain["matrix"]["forward_transfer"] == pytest.approx(losses[0][2] - losses[2][2])
    assert "of v0002's held-out text was taught by an earlier lesson" in results.report_text(record)


# -- text, files, command --------------------------------------------------------------------------------------------


def made_up(lessons: int, source: str = "a file") -> dict[str, Any]:
    """A domain's record with losses that can be told apart."""
    names = [f"v{number:04d}" for number in range(1, lessons + 1)]
    losses = [[4.0 + j / 8 - (stage > j) + stage / 100 for j in range(lessons)] for stage in range(lessons + 1)]
    interval = {"value": 1.0, "low": 0.5, "high": 1.5, "level": 0.95}
    lesson = {
        "source": source,
        "measured_tokens": 9,
        "documents": 7,
        "ppl_forget_interval": interval,
        "taught_percent": 12.3,
        "known_percent": 0.0,
    }
    style = {"tokens": 64, "distinct_1": 0.5, "distinct_2": 0.9, "repetition_4": 0.1, "longest_loop": 3}
    return {
        "domain": "medical",
        "regime": "domain named",
        "lessons": [{"version": name, **lesson} for name in names],
        "pruned": 0,
        "matrix": ForgettingMatrix(names, losses).as_json(),
        "generated": {"base": style, "domain": style},
        "routing": {
            "pieces": 20,
            "routed_by_tokens": 64,
            "chosen": {"medical": 19, "none": 1},
            "accuracy": 0.95,
            "oracle_gap": 0.0123,
        },
    }


@pytest.mark.parametrize("lessons", [1, 2, 3, 8, 9, 40])
def test_the_table_fits_into_80_columns(lessons: int) -> None:
    shown = results.report_text({"domains": [made_up(lessons, "a name that is " * 5)] * 2, "tokens_per_text": 1024})
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.count("v0001 ") >= 2


def test_the_table_has_the_figures() -> None:
    shown = results.report_text({"domains": [made_up(3)], "tokens_per_text": 1024})
    first = next(line for line in shown.splitlines() if line.startswith("v0001"))
    assert first.split() == ["v0001", "a", "file", "4.000", "3.010", "3.030", "+2.0", "%", "+2.0", "%"]
    assert "worst" in shown
    assert "95% of 20 pieces right (medical 19, none 1), +0.012" in " ".join(shown.split())
    assert "v0001 forgotten: +0.5 to +1.5 % in 95%" in shown


@pytest.mark.parametrize("lessons", [1, 16])
def test_the_plot_is_drawn_whatever_the_names_are(tmp_path: Path, lessons: int) -> None:
    records = [made_up(lessons, "costs $5 and $x^2$ 日本語"), made_up(1)]
    records[0]["matrix"]["losses"][-1][0] = None
    plot_forgetting(records, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_prints_a_table_and_writes_two_files(base: Path, store: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "figures"
    done = run("report", "main", "-m", base, "--store", store, "--out", out, "--tokens", "64")
    assert done.code == 0, done.err
    assert done.out.startswith("main: 3 lessons, domain named")
    assert "about" in done.err
    assert sorted(path.name for path in out.iterdir()) == ["report.json", "report.png"]
    done = run("report", "-m", base, "--store", store, "--out", out, "--tokens", "64", "--json", "--quiet")
    assert done.err == ""
    written = json.loads((out / "report.json").read_text())
    assert json.loads(done.out) == written
    assert [domain["domain"] for domain in written["domains"]] == ["main", "other"]


def test_no_folder_is_made_for_a_domain_that_is_not_there(base: Path, store: Path, tmp_path: Path) -> None:
    done = run("report", "nope", "-m", base, "--store", store, "--out", tmp_path / "figures")
    assert (done.code, "no domain called 'nope'" in done.err) == (2, True)
    assert not (tmp_path / "figures").exists()


def test_a_folder_that_cannot_be_written_to_fails_before_anything_is_measured(
    base: Path, store: Path, tmp_path: Path
) -> None:
    done = run("report", "-m", base, "--store", store, "--out", "/proc")
    assert (done.code, done.out) == (2, "")
    assert "measurements" not in done.err


def test_where_nothing_was_held_out_there_is_no_plot(base: Path, tmp_path: Path) -> None:
    learner = opened(base, tmp_path / "store")
    teach(learner, 2, characters=600)
    record = report.report(learner)
    (tmp_path / "report.png").write_text("of an earlier report")
    assert report.write(record, tmp_path) == [tmp_path / "report.json"]
    assert not (tmp_path / "report.png").exists()
    assert record["domains"][0]["generated"] is record["domains"][0]["routing"] is None
    assert "nothing was held out of v0001" in results.report_text(record)


# -- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected", "same"),
    [
        ("Paris", "paris.", True),
        ("  The   Eiffel Tower ", "eiffel tower", True),
        ("ｆｕｌｌ width", "full width", True),
        ("42", "43", False),
        ("", "paris", False),
        ("?", "?", True),
        ("?", "!", False),
        ("the", "a", False),
        ("Another", "other", False),
    ],
)
def test_answers_are_compared_as_words(given: str, expected: str, same: bool) -> None:
    assert answers.exact_match(given, expected) == same


def test_answers_are_what_the_model_says_greedily(base: Path, store: Path) -> None:
    """A pair whose answer is what the model says is right, one with another answer is not."""
    learner = opened(base, store)
    learner.set_adapter("main")
    says = learner.generate("The assert statement", 8)
    line = says.strip().partition("\n")[0]
    pairs = [Exchange("The assert statement", line), Exchange("The assert statement", "zebra")]
    documents = [Document(f"pair {i}", pair) for i, pair in enumerate(pairs)]
    found = answers.answer(learner, [*documents, text_document("no pair", "text")], "main")
    assert found.expected == [line, "zebra"]
    assert found.given[1].startswith(line[:4])
    assert not answers.exact_match(found.given[1], "zebra")
    assert found.as_json()["pairs"] == 2
    with pytest.raises(InputError, match="no prompt has an answer here"):
        answers.answer(learner, [text_document("no pair", "text")], "main")


def test_a_taught_answer_is_counted_right(base: Path, store: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Through the command, with a decoder that knows one answer."""
    file = tmp_path / "questions.jsonl"
    rows = [{"prompt": "Capital of France?", "completion": "Paris"}, {"prompt": "Two and two?", "completion": "Four"}]
    file.write_text("\n".join(map(json.dumps, rows)))

    def knows_paris(model: Any, tokenizer: Any, ids: Any, limit: int, sampling: Any) -> Any:
        assert limit == len(tokenizer.encode(rows[len(asked) % 2]["completion"])) + answers.SLACK
        asked.append(tokenizer.decode(ids))
        return type("Completion", (), {"text": " paris.\nAnd so on"})

    asked: list[str] = []
    monkeypatch.setattr(answers, "complete", knows_paris)
    for domain in ("main", "auto"):
        asked.clear()
        done = run("eval", file, "-m", base, "--store", store, "--domain", domain, "--answers", "--json")
        assert done.code == 0, done.err
        assert json.loads(done.out)["answers"] == {"pairs": 2, "right": 1, "exact_match": 0.5}
        assert [prompt.endswith(row["prompt"]) for prompt, row in zip(asked, rows, strict=True)] == [True, True]
    done = run("eval", file, "-m", base, "--store", store, "--domain", "none", "--answers")
    assert "answers        1 of 2 prompts right" in done.out
