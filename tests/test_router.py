"""Which domain a prompt belongs to: word counts, the base's surprise, the base as a candidate, what must not matter."""

import json
import math
from collections import Counter
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from lessons import opened, text, tiny_base, tiny_tokenizer
from terminal import run, write_model

from mlx_impl import lora, router, states
from mlx_impl.adapters import STATE, read_adapter, read_fisher, read_statistics, write_adapter, write_state
from mlx_impl.arrays import flatten
from mlx_impl.config import Budget
from mlx_impl.data import tokens_of
from mlx_impl.errors import DamagedFileError
from mlx_impl.learner import ContinualLearner
from mlx_impl.readers import Document, text_document
from mlx_impl.router import SMOOTHING, count_tokens, evidence, frequencies, general_frequencies
from mlx_impl.tokenizer import Tokenizer

GARDEN = "The flower pot stands in the garden under the old tree, and the gardener waters the flowers. " * 8
COURT = "A judge hears each appeal; counsel argues before judges, whose ruling binds lower courts. " * 8
SUMS = "X=Z*Q;QZ[8]={Y:7};ZX%=9*Y;Q=X^Z;Y=[Q,X,Z,7];Z={Q:Y};X+=8*Q;"
BUDGET = Budget(steps=12)
FAST = {"learning_rate": 0.02, "holdout": 0.0}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"), tokenizer)


@pytest.fixture(scope="module")
def taught(base: Path, tmp_path_factory: pytest.TempPathFactory) -> ContinualLearner:
    """Two domains, for tests that only look."""
    learner = opened(base, tmp_path_factory.mktemp("taught") / "s", **FAST)
    learner.learn_from_text(GARDEN, "garden", budget=BUDGET)
    learner.learn_from_text(COURT, "court", budget=BUDGET)
    learner.set_adapter(None)
    return learner


def files_of(learner: ContinualLearner, domain: str) -> dict[str, bytes]:
    folder = learner.store.files_of(learner.store.require(domain))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def statistics(learner: ContinualLearner, domain: str) -> dict[str, np.ndarray]:
    found = read_statistics(learner.store.files_of(learner.store.require(domain)))
    assert found is not None
    return found


# -- word counts -------------------------------------------------------------------------------------------------


def test_counts_add_up_over_lessons() -> None:
    random = np.random.default_rng(0)
    first, second = (random.integers(0, 50, size, dtype=np.int32) for size in (300, 200))
    added = count_tokens(second, count_tokens(first))
    at_once = count_tokens(np.concatenate([first, second]))
    assert {name: array.tolist() for name, array in added.items()} == {n: a.tolist() for n, a in at_once.items()}
    counted = Counter(first.tolist()) + Counter(second.tolist())
    assert dict(zip(at_once["tokens"].tolist(), at_once["counts"].tolist(), strict=True)) == counted
    assert (np.diff(at_once["tokens"]) > 0).all()


def test_general_frequencies_fall_with_the_id(tokenizer: Tokenizer) -> None:
    general = general_frequencies(tokenizer)
    assert general.shape == (tokenizer.vocab_size,)
    assert general.sum() == pytest.approx(1)
    assert all(general[id] == 0 for id in tokenizer.special_ids)
    merged = [id for id in range(tokenizer.vocab_size) if general[id] > 0 and len(tokenizer.token_bytes(id)) > 1]
    assert len(merged) > 50
    assert (np.diff(general[merged]) < 0).all()


def test_evidence_is_the_log_odds_of_the_tokens(tokenizer: Tokenizer) -> None:
    general = general_frequencies(tokenizer)
    learned, ids = tokenizer.encode(GARDEN), tokenizer.encode("the garden of 77 judges")
    counts = Counter(learned)
    shares = [(counts[id] + SMOOTHING * general[id]) / (len(learned) + SMOOTHING) for id in ids]
    statistics = count_tokens(np.array(learned, np.int32))
    np.testing.assert_allclose(frequencies(statistics, ids, general), shares, rtol=1e-6)
    expected = sum(math.log(share / general[id]) for share, id in zip(shares, ids, strict=True))
    assert evidence(statistics, ids, general) == pytest.approx(expected, rel=1e-6)


def test_frequencies_of_all_tokens_add_up_to_one(tokenizer: Tokenizer) -> None:
    general = general_frequencies(tokenizer)
    statistics = count_tokens(np.array(tokenizer.encode(GARDEN), np.int32))
    assert frequencies(statistics, range(tokenizer.vocab_size), general).sum() == pytest.approx(1)


def test_surprise_is_the_gain_of_a_mixture(tokenizer: Tokenizer) -> None:
    general = general_frequencies(tokenizer)
    statistics = count_tokens(np.array(tokenizer.encode(GARDEN), np.int32))
    ids = tokenizer.encode("garden 7")
    nats = np.linspace(0.1, 9.0, len(ids))
    domain = frequencies(statistics, ids, general)
    mixed = (1 - router.COPIED) * np.exp(-nats) + router.COPIED * domain
    assert router.surprise(statistics, ids, general, nats) == pytest.approx(float((np.log(mixed) + nats).sum()))
    expected = np.zeros(len(ids))  # by a model that is certain of each
    assert router.surprise(statistics, ids, general, expected) < 0


# -- decisions ---------------------------------------------------------------------------------------------------


def test_prompts_go_where_they_belong(taught: ContinualLearner) -> None:
    route = lambda prompt: taught.route(taught.tokenizer.encode(prompt))  # noqa: E731
    assert route("The gardener waters the old tree and the flowers").domain == "garden"
    assert route("Before judges counsel argues each appeal").domain == "court"
    assert taught.choose("auto", taught.tokenizer.encode("The flower pot stands in the garden")) == "garden"
    assert taught.adapter == "garden"
    assert taught.choose(None, taught.tokenizer.encode("A judge hears each appeal; counsel argues")) == "court"
    taught.set_adapter(None)


def test_the_base_answers_what_looks_like_no_domain(taught: ContinualLearner) -> None:
    found = taught.route(taught.tokenizer.encode(SUMS))
    assert found.domain is None
    assert found.evidence.keys() == {"court", "garden"}
    assert found.surprise is None  # and the model was not asked


def test_a_short_prompt_must_surprise_the_base(taught: ContinualLearner, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = taught.tokenizer.encode("The gardener waters")
    assert len(ids) < router.SHORT
    found = taught.route(ids)
    assert found.domain == "garden"
    assert found.surprise is not None
    assert found.surprise > 0
    monkeypatch.setattr(router.Router, "_nats", lambda self, ids: np.zeros(len(ids)))
    expected = taught.route(ids)
    assert (expected.domain, expected.evidence) == (None, found.evidence)
    assert expected.surprise is not None
    assert expected.surprise < 0
    long = taught.tokenizer.encode(GARDEN)[: router.PREFIX]
    assert taught.route(long) == ("garden", taught.route(long).evidence, None)


def test_the_base_is_asked_as_the_chat_template_would(base: Path, tmp_path: Path) -> None:
    """What a token costs comes from the model with the template's beginning before it, whatever is attached."""
    learner = opened(base, tmp_path / "s")
    learner.learn_from_text(GARDEN, "garden", budget=Budget(steps=2))
    learner.set_adapter(None)
    tokenizer, ids = learner.tokenizer, learner.tokenizer.encode("The flower pot")
    eos = tokenizer.eos_id
    assert eos is not None
    costs = plain_costs(learner, [eos], ids)
    learner.set_adapter("garden")
    statistics = read_statistics(learner.store.files_of(learner.store.require("garden")))
    assert statistics is not None
    expected = router.surprise(statistics, ids, general_frequencies(tokenizer), costs)
    assert learner.route(ids).surprise == pytest.approx(expected, rel=1e-5)
    tokenizer.chat_template = "{{ 'ab' }}{{ messages[0].content }}{{ 'cd' }}"
    begin = tokenizer.encode("ab")
    learner.set_adapter(None)
    costs = plain_costs(learner, begin, ids)
    expected = router.surprise(statistics, ids, general_frequencies(tokenizer), costs)
    assert learner.route(ids).surprise == pytest.approx(expected, rel=1e-5)
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert learner.route(ids).surprise is not None


def plain_costs(learner: ContinualLearner, begin: list[int], ids: list[int]) -> np.ndarray:
    """Nats of each token after `begin`, one forward pass a token."""
    costs = []
    for at, id in enumerate(ids):
        logits = np.array(learner.model(mx.array([begin + ids[:at]])), np.float64)[0, -1]
        costs.append(np.log(np.exp(logits).sum()) - logits[id])
    return np.array(costs)


def test_a_domain_without_statistics_has_to_be_named(taught: ContinualLearner, base: Path, tmp_path: Path) -> None:
    """One that was not learned here is an adapter and nothing else."""
    arrays, scale = read_adapter(taught.store.files_of(taught.store.require("garden")))
    rank = next(array.shape[1] for name, array in arrays.items() if name.endswith("lora_a"))
    shape = lora.LoRAConfig(rank, scale * rank)
    learner = opened(base, tmp_path / "s")
    with learner.store.writing():
        learner.store.commit(
            "brought",
            None,
            lambda folder: write_adapter(folder, arrays, shape, learner.model),
            source="x",
            config={},
            figures={},
            heldout=None,
        )
    ids = learner.tokenizer.encode(GARDEN)
    assert learner.route(ids) == (None, {}, None)
    assert learner.choose("brought", ids) == "brought"


@pytest.mark.parametrize("length", [0, 1, 2, 5])
def test_short_prompts(taught: ContinualLearner, length: int) -> None:
    ids = taught.tokenizer.encode(GARDEN)[:length]
    found = taught.route(ids)
    assert found.domain in (None, "garden")
    if not length:
        assert found == (None, {}, None)


def test_no_prompt_and_no_domain_mean_the_base(taught: ContinualLearner, base: Path, tmp_path: Path) -> None:
    assert taught.choose() is None
    learner = opened(base, tmp_path / "s")
    assert learner.choose("auto", learner.tokenizer.encode(GARDEN)) is None
    assert not (tmp_path / "s").exists()


def test_only_the_first_tokens_count(taught: ContinualLearner) -> None:
    garden = taught.tokenizer.encode(GARDEN)[: router.PREFIX]
    assert taught.route(garden + taught.tokenizer.encode(COURT)) == taught.route(garden)


def test_routing_leaves_model_and_adapter_as_they_were(taught: ContinualLearner) -> None:
    taught.set_adapter(None)
    arrays = dict(flatten(taught.model.parameters()))
    before = {name: np.array(array) for name, array in arrays.items()}
    taught.route(taught.tokenizer.encode(GARDEN))
    assert flatten(taught.model.parameters()).keys() == before.keys()
    taught.set_adapter("court")
    ids = mx.array([taught.tokenizer.encode(COURT)[:40]])
    logits = np.array(taught.model(ids))
    taught.route(taught.tokenizer.encode(GARDEN))
    assert taught.adapter == "court"
    np.testing.assert_array_equal(np.array(taught.model(ids)), logits)
    taught.set_adapter(None)
    after = flatten(taught.model.parameters())
    assert all((np.array(after[name]) == array).all() for name, array in before.items())
    assert after.keys() == before.keys()


def test_statistics_are_read_once(taught: ContinualLearner, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [taught.route([5, 6, 7]), taught.route([8])]
    read: list[str] = []
    monkeypatch.setattr(
        router, "read_statistics", lambda folder: read.append(folder.parent.name) or read_statistics(folder)
    )
    fresh = router.Router(taught.model, taught.tokenizer, taught.store)
    assert [fresh.route([5, 6, 7]), fresh.route([8])] == expected
    assert read == ["court", "garden"]


# -- what a version keeps ----------------------------------------------------------------------------------------


def test_forgetting_one_domain_leaves_routing_as_if_it_had_never_been(base: Path, tmp_path: Path) -> None:
    lessons = {"a": GARDEN, "b": COURT, "c": SUMS * 6}
    with_b, without_b = (opened(base, tmp_path / name, **FAST) for name in ("abc", "ac"))
    for domain, content in lessons.items():
        with_b.learn_from_text(content, domain, budget=Budget(steps=2))
        if domain != "b":
            without_b.learn_from_text(content, domain, budget=Budget(steps=2))
    with_b.route(with_b.tokenizer.encode(COURT))  # what is remembered of it must not matter either
    with_b.forget("b")
    for domain in "ac":
        assert files_of(with_b, domain) == files_of(without_b, domain)
    for prompt in lessons.values():
        ids = with_b.tokenizer.encode(prompt)
        assert with_b.route(ids) == without_b.route(ids)


def test_statistics_go_with_the_lessons_and_undo_takes_them_back(base: Path, tmp_path: Path) -> None:
    learner = opened(base, tmp_path / "s", holdout=0.0)
    learner.learn_from_text(GARDEN, budget=Budget(steps=1))
    first = files_of(learner, "main")[STATE]
    learner.learn_from_text(COURT, budget=Budget(steps=1))
    both = tokens_of([text_document(content, "x") for content in (GARDEN, COURT)], learner.tokenizer).ids
    expected = count_tokens(both)
    kept = statistics(learner, "main")
    assert {name: kept[name].tolist() for name in expected} == {n: a.tolist() for n, a in expected.items()}
    assert kept.keys() == {*expected, states.MEANS, states.BACKGROUND, states.MADE_WITH}
    fisher = read_fisher(learner.store.files_of(learner.store.require("main")), lora.adapter_arrays(learner.model))
    assert fisher is not None
    assert fisher.keys() == lora.adapter_arrays(learner.model).keys()
    of_both = learner.route(learner.tokenizer.encode(COURT)).evidence["main"]
    learner.undo()
    assert files_of(learner, "main")[STATE] == first
    assert learner.route(learner.tokenizer.encode(COURT)).evidence["main"] < of_both


def test_held_out_text_leaves_no_word_in_the_statistics(base: Path, tmp_path: Path) -> None:
    learner = opened(base, tmp_path / "s")
    lesson = learner.learn_from_text(text(1, 9000), budget=Budget(steps=1))
    assert lesson.measured == "heldout"
    assert statistics(learner, "main")["counts"].sum() == lesson.tokens


def test_a_state_file_holds_fisher_and_statistics_apart(tmp_path: Path) -> None:
    adapter = {"x.lora_a": mx.ones((3, 2)), "x.lora_b": mx.ones((2, 3))}
    counts = count_tokens(np.array([4, 4, 7], np.int32))
    write_state(tmp_path, None, counts)
    assert read_fisher(tmp_path, adapter) is None
    write_state(tmp_path, {name: 2 * array for name, array in adapter.items()}, counts)
    fisher, kept = read_fisher(tmp_path, adapter), read_statistics(tmp_path)
    assert fisher is not None
    assert kept is not None
    assert {name: array.tolist() for name, array in fisher.items()} == {n: (2 * a).tolist() for n, a in adapter.items()}
    assert {name: array.tolist() for name, array in kept.items()} == {"tokens": [4, 7], "counts": [2, 1]}
    with pytest.raises(DamagedFileError, match=r"wrong shape: x\.lora_a"):
        read_fisher(tmp_path, adapter | {"x.lora_a": mx.ones((4, 2))})
    with pytest.raises(DamagedFileError, match=r"missing: y\.lora_a"):
        read_fisher(tmp_path, adapter | {"y.lora_a": mx.ones((4, 2))})


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_damaged_statistics_are_named(base: Path, tmp_path: Path, damage: str) -> None:
    learner = opened(base, tmp_path / "s")
    learner.learn_from_text(GARDEN, "garden", budget=Budget(steps=1))
    path = learner.store.files_of(learner.store.require("garden")) / STATE
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(DamagedFileError, match=rf"{STATE}: missing or changed .*forget garden"):
        learner.route([5, 6, 7])


# -- measuring and the command line ------------------------------------------------------------------------------


def test_each_document_is_measured_under_its_own_domain(taught: ContinualLearner) -> None:
    documents = {"garden": GARDEN, "court": COURT, "none": SUMS}
    given = [Document(name, content) for name, content in [*documents.items(), ("empty", "")]]
    measured, chosen = taught.evaluate_routed(given)
    assert chosen == {"garden": 1, "court": 1, "none": 1}
    nats, tokens, size = 0.0, 0, 0
    for domain, content in documents.items():
        taught.choose(domain)
        part = taught.evaluate([text_document(content, "x")])
        nats, tokens, size = nats + part.nats, tokens + part.tokens, size + (part.bytes or 0)
    assert (measured.tokens, measured.bytes) == (tokens, size)
    assert measured.nats == pytest.approx(nats, rel=1e-6)
    assert taught.adapter is None


def test_the_pieces_of_a_document_stay_together(taught: ContinualLearner) -> None:
    _, chosen = taught.evaluate_routed([Document("x", GARDEN, ends=False), Document("x", COURT)])
    assert chosen == {"garden": 1}


def test_commands_route_by_default_and_say_so(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    lesson = ("--steps", "12", "--lr", "0.02", "--quiet")
    assert run("learn", "-m", model, "--domain", "garden", "--text", GARDEN, *lesson).code == 0
    common = ("generate", "-m", model, "--max-tokens", "2", "--json")
    routed = run(*common, "The gardener waters the old tree and the flowers")
    assert (json.loads(routed.out)["domain"], routed.err) == ("garden", "domain garden\n")
    other = run(*common, "12 + 34 = 46")
    assert json.loads(other.out)["domain"] is None
    assert other.err.startswith("the base answers")
    named = run(*common, "12 + 34 = 46", "--domain", "garden")
    assert (json.loads(named.out)["domain"], named.err) == ("garden", "")
    paths = [tmp_path / name for name in ("garden.txt", "sums.txt")]
    for path, content in zip(paths, (GARDEN, SUMS), strict=True):
        path.write_text(content)
    record = json.loads(run("eval", "-m", model, *paths, "--json").out)
    assert (record["domain"], record["domains"]) == ("auto", {"garden": 1, "none": 1})
    assert "domain auto (garden: 1, none: 1)" in run("eval", "-m", model, *paths).out
