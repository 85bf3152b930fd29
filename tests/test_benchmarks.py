"""The benchmarks of facts and lessons, small: what they ask, how they count, and that they go on where they stopped."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tokenizers
from lessons import tiny_base, tiny_tokenizer

from benchmarks import facts, lessons, settings, texts
from benchmarks.invented import RELATIONS, chats, invent, passages, probes, summary
from benchmarks.resume import Work, digest_of, lesson_settings
from mlx_impl.config import Budget, ContinualLearningConfig, ModelConfig
from mlx_impl.errors import InputError
from mlx_impl.generate import Sampling, naive
from mlx_impl.learner import ContinualLearner
from mlx_impl.model import ContinualLLM
from mlx_impl.modeldir import expected_shapes, write_model_directory
from mlx_impl.readers import Document

CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def reading_base(folder: Path, count: int) -> Path:
    """A tiny model directory with a chat template and a byte-level tokenizer that has seen the first `count` facts.

    Byte-level, because a sentence there begins with the same token at the start of a text and after a line end.
    """
    known = invent(count, 0)
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|end|>"], initial_alphabet=sorted(alphabet), show_progress=False
    )
    library.train_from_iterator([d.text for d in [*passages(known, 0), *chats(known, 0)]], trainer)
    contents = {
        "tokenizer.json": library.to_str().encode(),
        "tokenizer_config.json": json.dumps({"eos_token": "<|end|>", "chat_template": CHAT}).encode(),
    }
    config = ModelConfig(library.get_vocab_size(), 64, 2, 4, 2, 96, 256, eos_token_id=0)
    rng = np.random.default_rng(3)
    arrays = {
        name: np.ones(shape, np.float32)
        if len(shape) == 1
        else rng.standard_normal(shape, np.float32) / shape[1] ** 0.5
        for name, shape in expected_shapes(config).items()
    }
    return write_model_directory(folder / "model", config, arrays, contents, {"eos_token_id": 0}, {})


def stop_learning(monkeypatch: pytest.MonkeyPatch, after: int = 0) -> None:
    """From now on only the first `after` lessons are given; the next one fails."""
    learn, given = ContinualLearner.learn, []

    def limited(*args: Any, **kwargs: Any) -> Any:
        given.append(args)
        if len(given) > after:
            raise KeyboardInterrupt
        return learn(*args, **kwargs)

    monkeypatch.setattr(ContinualLearner, "learn", limited)


# -- invented facts


@pytest.mark.parametrize("relation", RELATIONS, ids=lambda r: r.statements[0])
def test_every_relation_has_what_is_asked_of_it(relation: Any) -> None:
    ways = [*relation.statements, *relation.unseen, relation.answer]
    assert len(relation.statements) == 6
    assert all(way.count("{x}") == way.count("{y}") == 1 for way in ways)
    assert sum(way.endswith(" {y}.") for way in relation.statements[1:]) >= 2
    assert all(way.endswith(" {y}.") for way in relation.unseen)
    assert not {*relation.unseen, relation.question} & {*relation.statements, relation.answer, *relation.questions}
    assert all("{x}" in asked and "{y}" not in asked for asked in (*relation.questions, relation.question))
    assert relation.values == () or len(set(relation.values)) == 24


def test_probes_ask_for_what_was_taught_and_unseen_ones_in_other_words() -> None:
    known = invent(50, 0)
    taught = "\n".join(document.text for document in passages(known, 0))
    asked = probes(known)
    for kind in ("trained", "unseen"):
        for fact, probe in zip(known, asked[kind], strict=True):
            assert (f"{probe.prompt} {probe.answer}." in taught) == (kind == "trained")
            assert fact.thing in probe.prompt
            assert probe.answer == fact.value
            assert f"{probe.prompt} {probe.answer}." not in summary(known)
    trained_on = {document.content.prompt for document in chats(known, 0)}  # type: ignore[union-attr]
    assert not trained_on & {probe.prompt for probe in asked["chat"]}
    assert len(trained_on) == 100


def test_no_value_gives_another_fact_away() -> None:
    known = invent(100, 1)
    assert len({fact.thing for fact in known}) == 100
    for relation in RELATIONS:
        values = [fact.value for fact in known if fact.relation is relation]
        assert len(values) == len(set(values)) == 10


def test_each_passage_says_every_fact_once_and_all_of_them_everything() -> None:
    known = invent(7, 0)
    documents = passages(known, 0)
    said = [document.text.split("\n") for document in documents]
    for lines in said:
        assert [sum(line in fact.statements() for line in lines) for fact in known] == [1] * 7
    assert sorted(line for lines in said for line in lines) == sorted(
        line for fact in known for line in fact.statements()
    )


def test_seed_decides_the_facts() -> None:
    assert invent(5, 0) == invent(5, 0)
    assert not {fact.thing for fact in invent(5, 0)} & {fact.thing for fact in invent(5, 1)}


# -- counting and answering


@pytest.mark.parametrize(
    ("reply", "answer", "right"),
    [
        (" Bodar.\nThe", "Bodar", True),
        ("Bodar", "Bodar", True),
        (" Bodarin. The", "Bodar", False),
        (" the Bodar", "Bodar", False),
        (" bodar.", "Bodar", False),
        (" light blue, as", "light blue", True),
        (" light green", "light blue", False),
        ("", "Bodar", False),
    ],
)
def test_a_cloze_is_right_only_if_it_begins_with_the_answer(reply: str, answer: str, right: bool) -> None:
    assert facts.begins_with(reply, answer) is right


@pytest.mark.parametrize(
    ("reply", "right"),
    [("It is called Bodar.", True), ("BODAR!", True), ("Bodarin", False), ("It is (Bodar)", True), ("", False)],
)
def test_a_chat_answer_is_right_if_the_value_is_a_word_of_it(reply: str, right: bool) -> None:
    assert facts.mentions(reply, "Bodar") is right


@pytest.mark.parametrize("shared", [0, facts.WORTH_KEEPING + 6])
def test_greedy_replies_are_those_of_the_naive_decoder(shared: int, tmp_path: Path) -> None:
    base = tiny_base(tmp_path, tiny_tokenizer())
    model = ContinualLLM.from_checkpoint(base)
    rng = np.random.default_rng(0)
    beginning = rng.integers(5, 300, shared).tolist()
    prompts = [beginning + rng.integers(5, 300, length).tolist() for length in (5, 9, 5, 1, 7)]
    replies = facts.greedy(model, prompts, 6, 300)
    assert replies == [list(naive(model, prompt, 6, Sampling(), 300)) for prompt in prompts]
    assert len({tuple(reply) for reply in replies}) > 1


# -- settings and resuming


def test_settings_come_from_name_and_value() -> None:
    base = ContinualLearningConfig(holdout=0.0)
    changed = lesson_settings(["learning_rate=3e-4", "use_ewc=false"], base)
    assert (changed.learning_rate, changed.use_ewc, changed.holdout) == (3e-4, False, 0.0)
    with pytest.raises(InputError, match="learning_rate: NAME=VALUE is expected"):
        lesson_settings(["learning_rate"], base)
    with pytest.raises(InputError, match="lr \\(unknown\\)"):
        lesson_settings(["lr=1"], base)


def test_settings_are_set_beside_a_plain_lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same run and on the same tokens; the ratio is that of the two gains."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(settings, "record", lambda name, figures, module: found.update(figures, name=name))
    base = reading_base(tmp_path, 4)
    asked = ["--tokens", "512", "--rows", "1", "--rates", "default", "--set", "seq_len=32", "--plain"]
    settings.main([*asked, "--model", str(base), "--work", str(tmp_path / "work"), "--name", "mine"])
    (ours,), plain = found["settings"].values(), found["plain"]
    assert (found["name"], plain["changes"]) == ("mine", settings.PLAIN)
    assert (ours["steps"], plain["steps"]) == (16, 4)
    assert ours["tokens"] == plain["tokens"]
    assert ours["gain"] == pytest.approx(found["base"] - ours["loss"])
    assert found["times_plain"] == {"1 windows, default": ours["gain"] / plain["gain"]}
    assert ours["loss"] != plain["loss"]


def test_work_is_done_once_under_the_same_settings(tmp_path: Path) -> None:
    assert Work(tmp_path, {"a": 1}).once("x", lambda: [1.5]) == [1.5]
    assert Work(tmp_path, {"a": 1}).once("x", lambda: [2.5]) == [1.5]
    assert Work(tmp_path, {"a": 2}).once("x", lambda: [2.5]) == [2.5]


def test_kept_work_goes_on_in_another_folder(tmp_path: Path) -> None:
    kept = tmp_path / "cells" / "kept.json"
    here = Work(tmp_path / "here", {"a": 1}, kept)
    for key in ("x", "y"):
        here.once(key, lambda: 1.5)
    here.keep(["x", "never measured"])
    there = Work(tmp_path / "there", {"a": 1}, kept)
    assert ("x" in there, "y" in there) == (True, False)
    assert there.once("x", lambda: 2.5) == 1.5
    there.keep(["x"])
    assert kept.read_text() == json.dumps({"settings": digest_of({"a": 1}), "figures": {"x": 1.5}}, indent=2) + "\n"
    assert "x" not in Work(tmp_path / "there", {"a": 2}, kept)  # other settings


def test_lesson_texts_share_no_document_and_are_as_long_as_asked() -> None:
    tokenizer = tiny_tokenizer()
    groups = texts.lesson_texts(texts.library_sources(), tokenizer, 4, 1000)
    assert [label for label, _ in groups] == ["topics 1", "code 2", "topics 3", "code 4"]
    names = [document.name for _, documents in groups for document in documents]
    assert len(names) == len(set(names))
    for _, documents in groups:
        sizes = [len(tokenizer.encode(document.text)) + 1 for document in documents]
        assert sum(sizes[:-1]) < 1000 <= sum(sizes)


def test_a_folder_of_texts_is_cut_at_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "law").mkdir()
    (tmp_path / "law" / "train.txt").write_text("one\nline\n\ntwo\n \n\nthree\n")
    found = texts.folder_sources(tmp_path)
    assert [document.text for document in found["law"]] == ["one\nline", "two", "three"]
    with pytest.raises(InputError, match="law is too short: it ends in lesson 1 of 2 with 500 tokens each"):
        texts.lesson_texts(found, tiny_tokenizer(), 2, 500)
    with pytest.raises(InputError, match=r"no NAME/train\.txt"):
        texts.folder_sources(tmp_path / "law")


# -- the two benchmarks


def test_facts_are_recalled_after_the_lesson_and_not_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = reading_base(tmp_path, 4)
    config = ContinualLearningConfig(
        seq_len=12, batch_size=8, holdout=0.0, lora_r=32, lora_alpha=64.0, learning_rate=1e-2
    )
    plan = facts.Plan(facts=4, tokens=120 * 8 * 12, other_steps=1, config=config)
    figures = facts.measure(model, tmp_path / "work", plan)

    stages, lesson_figures = figures["stages"], figures["lessons"]
    assert stages["before"]["trained"] == {"right": 0, "of": 4, "percent": 0.0}
    assert stages["facts, after"]["trained"]["right"] >= 3
    assert lesson_figures["facts-chat"]["tokens"] > lesson_figures["facts"]["tokens"]
    assert lesson_figures["facts-chat"]["fit"]["after"] < lesson_figures["facts-chat"]["fit"]["before"] / 2
    assert figures["unchanged_by_other_domains"]
    assert all(set(found) == {"trained", "unseen", "chat"} for found in stages.values())
    assert list(stages) == [
        "before",
        "in the prompt",
        "facts, after",
        "facts-chat, after",
        "facts, after other domains",
        "facts-chat, after other domains",
        "facts, after another lesson in it",
        "facts-chat, after another lesson in it",
    ]
    assert figures["facts_in_prompt"] == 4
    assert figures["lessons"]["facts"]["trained_tokens"] <= plan.tokens
    for stage in stages:
        assert stage in facts.table(figures)

    stop_learning(monkeypatch)
    assert facts.measure(model, tmp_path / "work", plan) == figures


def test_what_goes_into_the_prompt_is_put_before_each_probe(tmp_path: Path) -> None:
    learner = ContinualLearner.from_checkpoint(reading_base(tmp_path, 2))
    prompts: list[list[int]] = []

    class Listening:
        """Only tells what it was given."""

        def make_cache(self) -> list[Any]:
            return []

        def hidden(self, rows: mx.array, cache: Any) -> mx.array:
            prompts.extend(rows.tolist())  # type: ignore[arg-type]
            return mx.zeros((*rows.shape, 1))

        def head(self, hidden: mx.array) -> mx.array:
            return mx.zeros((len(hidden), learner.tokenizer.vocab_size))

    asked = {kind: items[:1] for kind, items in probes(invent(2, 0)).items()}
    facts.answers(Listening(), learner.tokenizer, asked, "Told before.")  # type: ignore[arg-type]
    given = [learner.tokenizer.decode(prompt) for prompt in prompts if len(prompt) > 1]
    trained, unseen, chat = (items[0].prompt for items in asked.values())
    assert given == [f"Told before.\n{trained}", f"Told before.\n{unseen}", f"user: Told before.\n\n{chat}\nassistant:"]


def test_lessons_are_measured_and_go_on_where_they_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_base(tmp_path, tiny_tokenizer())
    config = ContinualLearningConfig(seq_len=64, batch_size=4, holdout=0.2, learning_rate=1e-2)
    plan = lessons.Plan(lessons=3, steps=4, rates=(1e-3, 1e-2), tuned_on=1, config=config)
    sources = texts.library_sources()
    with monkeypatch.context() as patched:
        stop_learning(patched, after=2)
        with pytest.raises(KeyboardInterrupt):
            lessons.measure(model, tmp_path / "work", plan, sources)
    (work,) = (tmp_path / "work").iterdir()
    kept = {path: path.read_bytes() for path in (work / "store" / "lessons").rglob("adapters.safetensors")}
    assert len(kept) == 2
    figures = lessons.measure(model, tmp_path / "work", plan, sources)
    assert all(path.read_bytes() == content for path, content in kept.items())

    for who in ("minimac", "mlx_lm"):
        found = figures[who]
        assert found["matrix"]["missing"] == []
        assert len(found["seconds"]) == 3
        assert all(gain > 0.05 for gain in found["matrix"]["gain"])  # each lesson taught its own text
        assert found["first_lesson"]["loss"] == found["matrix"]["losses"][-1][0]
        assert found["first_lesson"]["joint"] == figures["joint"]["losses"][0]
    assert figures["minimac"]["matrix"]["losses"][0] == figures["mlx_lm"]["matrix"]["losses"][0] == figures["base"]
    assert all(loss < before for loss, before in zip(figures["joint"]["losses"], figures["base"], strict=True))
    assert figures["minimac"]["replayed_tokens"] > 0 == figures["mlx_lm"]["replayed_tokens"]
    new, a_step = figures["minimac"]["new_tokens"], 4 * 64
    assert abs(figures["joint"]["steps"] * a_step - new) <= a_step / 2
    tuning = figures["mlx_lm"]["tuning"]
    assert figures["mlx_lm"]["learning_rate"] == float(min(tuning, key=tuning.__getitem__))
    assert [lesson["label"] for lesson in figures["lessons"]] == ["topics 1", "code 2", "topics 3"]
    assert len(lessons.table(figures).splitlines()) == 4

    stop_learning(monkeypatch)
    monkeypatch.setattr("benchmarks.peer.train_lesson", None)
    assert lessons.measure(model, tmp_path / "work", plan, sources) == figures


def test_the_peers_adapter_means_the_same_on_our_model(tmp_path: Path) -> None:
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    from benchmarks import peer

    model = tiny_base(tmp_path, tiny_tokenizer())
    plan = lessons.Plan(lessons=1, config=ContinualLearningConfig(seq_len=64, batch_size=2, holdout=0.2))
    run = lessons.Run(model, tmp_path / "work", plan, texts.library_sources())
    target = tmp_path / "adapter"
    done = peer.train_lesson(model, run.texts[0].trained, None, target, 2, 1e-2, plan.config)
    assert done["trained_tokens"] == 2 * 2 * 64
    theirs, _ = load_model(model)
    linear_to_lora_layers(theirs, len(theirs.layers), peer.parameters(theirs, plan.config))
    theirs.load_weights(str(target / peer.ADAPTER), strict=False)
    tokens = mx.array([run.texts[0].heldout.ids[:50].tolist()])
    bare = run.learner.model(tokens)
    run.attach(target)
    ours = run.learner.model(tokens)
    assert mx.abs(ours - bare).max().item() > 0.01  # type: ignore[operator]
    assert mx.abs(ours - theirs(tokens)).max().item() < 1e-4  # type: ignore[operator]
    run.attach(None)
    assert mx.array_equal(run.learner.model(tokens), bare)


def test_a_lesson_is_taught_once(tmp_path: Path) -> None:
    from benchmarks.resume import taught

    learner = ContinualLearner.from_checkpoint(
        tiny_base(tmp_path, tiny_tokenizer()), ContinualLearningConfig(seq_len=32), tmp_path / "store"
    )
    text = [Document("a", "A sentence that is learned, and then another one. " * 5)]
    learner.learn(text, "main", "a", Budget(steps=1))
    first = taught(learner, "main", 1, [], "a", 1)
    assert first["steps"] == 1
    assert len(learner.store.history("main")) == 1
    taught(learner, "main", 2, text, "a", 2)
    assert [version.figures["steps"] for version in learner.store.history("main")] == [1, 2]


def test_the_quick_command_prints_json_and_records_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_base(tmp_path, tiny_tokenizer())
    monkeypatch.setattr(lessons, "record", None)
    options = ["--quick", "--lessons", "1", "--set", "seq_len=32", "--set", "batch_size=2"]
    monkeypatch.setattr("sys.argv", ["lessons", "--model", str(model), "--work", str(tmp_path / "work"), *options])
    lessons.main()
    captured = capsys.readouterr()
    figures = json.loads(captured.out)
    assert figures["plan"]["config"]["seq_len"] == 32
    assert figures["minimac"]["seconds_slope"] is None  # one lesson has none
    assert figures["minimac"]["matrix"]["ppl_forget_percent"]["mean"] is None
    assert captured.err.startswith(f"state in {tmp_path / 'work'}")
    assert "about" in captured.err.splitlines()[0]
    assert lessons.table(figures) in captured.err
