"""Means of the base's states: what they are, how they are kept, how they tell domains apart, when there are none."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from lessons import opened, text, tiny_base, tiny_tokenizer

from mlx_impl import router, states
from mlx_impl.adapters import read_statistics
from mlx_impl.cache import KVCache
from mlx_impl.config import Budget
from mlx_impl.learner import ContinualLearner
from mlx_impl.model import ContinualLLM, ModelConfig
from mlx_impl.tokenizer import Tokenizer

CONFIG = ModelConfig(50, 16, 8, 4, 2, 24, 128)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"), tokenizer)


def kept(learner: ContinualLearner, domain: str) -> dict[str, np.ndarray]:
    found = read_statistics(learner.store.files_of(learner.store.require(domain)))
    assert found is not None
    return found


# -- means -------------------------------------------------------------------------------------------------------


def test_means_are_those_of_the_states_a_quarter_of_the_way_up() -> None:
    model = ContinualLLM(CONFIG)
    rows = np.random.default_rng(0).integers(1, 50, (states.ROWS + 3, 12), dtype=np.int32)
    found = states.mean_states(model, rows, 7)
    x = model.model.embed_tokens(mx.array(np.concatenate([np.full((len(rows), 1), 7, np.int32), rows], axis=1)))
    for layer in model.layers[:2]:
        x = layer(x, KVCache().mask(13))
    np.testing.assert_allclose(found, np.array(x[:, 1:].mean(axis=1)), atol=1e-5)
    assert found.shape == (states.ROWS + 3, 16)


def test_the_model_is_left_as_it_was_even_after_an_error() -> None:
    model = ContinualLLM(CONFIG)
    before = list(model.layers)
    states.mean_states(model, np.ones((1, 4), np.int32), 0)
    with pytest.raises(ValueError, match="dimension"):
        states.mean_states(model, np.ones((1, 4, 2), np.int32), 0)
    assert all(one is other for one, other in zip(before, model.layers, strict=True))


def test_stretches_are_spread_over_the_text() -> None:
    ids = np.arange(1000, dtype=np.int32)
    rows = states.stretches(ids, 5)
    assert rows.shape == (5, states.STRETCH)
    assert rows[0, 0] == 0
    assert rows[-1, -1] == 999
    assert (np.diff(rows, axis=1) == 1).all()
    assert states.stretches(ids[:130], 5).shape == (2, states.STRETCH)
    assert states.stretches(ids[:9], 5).tolist() == [list(range(9))]


def test_what_a_domain_keeps_is_bounded_and_shares_out_by_text() -> None:
    old, new = np.zeros((states.MOST, 3), np.float32), np.ones((states.PER_LESSON, 3), np.float32)
    assert len(states.merged(old[:10], new, 0.5)) == 10 + states.PER_LESSON
    for share, wanted in ((0.25, states.MOST // 4), (0.001, 1), (0.99, states.PER_LESSON)):
        both = states.merged(old, new, share)
        assert (len(both), both[:, 0].sum()) == (states.MOST, wanted)


# -- telling apart -----------------------------------------------------------------------------------------------


def test_the_discriminant_is_that_of_gaussians_with_one_covariance() -> None:
    random = np.random.default_rng(1)
    wide = random.standard_normal((6, 6))
    centres = {"a": 3 * random.standard_normal(6), "b": 3 * random.standard_normal(6)}
    draw = lambda centre, count: centre + random.standard_normal((count, 6)) @ wide  # noqa: E731
    ground = draw(np.zeros(6), 4000).astype(np.float32)
    found = states.Discriminant({name: draw(c, 4000).astype(np.float32) for name, c in centres.items()}, ground)
    covariance = wide.T @ wide
    covariance += np.trace(covariance) / 6 * np.eye(6)
    x = draw(np.zeros(6), 1)[0]
    distance = lambda centre: (x - centre) @ np.linalg.solve(covariance, x - centre)  # noqa: E731
    whole, half = found.evidence(x, states.STRETCH), found.evidence(x, states.STRETCH // 2)
    for name, centre in centres.items():
        assert whole[name] == pytest.approx((distance(np.zeros(6)) - distance(centre)) / 2, rel=0.15, abs=0.15)
        assert half[name] == pytest.approx(whole[name] / 2)
        near = found.evidence(centre, states.STRETCH)
        assert max(near, key=near.__getitem__) == name
        assert near[name] > 0
    assert max(found.evidence(np.zeros(6), states.STRETCH).values()) < 0


def test_few_means_of_many_dimensions_are_enough_to_be_defined() -> None:
    one = np.eye(1, 40, dtype=np.float32)
    found = states.Discriminant({"a": one}, np.zeros((1, 40), np.float32))
    assert np.isfinite(list(found.evidence(one[0], 64).values())).all()
    assert found.evidence(one[0], 64)["a"] > 0


# -- in a lesson -------------------------------------------------------------------------------------------------


def test_a_lesson_keeps_means_of_its_text_under_the_bare_base(base: Path, tmp_path: Path) -> None:
    learner = opened(base, tmp_path / "s", holdout=0.0)
    learner.learn_from_text(text(1), "a", budget=Budget(steps=4))
    learner.learn_from_text(text(2), "a", budget=Budget(steps=4))
    found = kept(learner, "a")
    bare = opened(base, tmp_path / "other")
    start = states.first_token(bare.tokenizer)
    lessons = [np.array([*bare.tokenizer.encode(text(n)), start], np.int32) for n in (1, 2)]  # a document ends with it
    expected = [states.mean_states(bare.model, states.stretches(ids, states.PER_LESSON), start) for ids in lessons]
    np.testing.assert_allclose(found[states.MEANS], np.concatenate(expected), atol=1e-5)
    np.testing.assert_allclose(found[states.BACKGROUND], states.background(bare.model, bare.tokenizer), atol=1e-5)


def test_the_base_speaks_for_itself_once_a_store(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    original = states.background
    monkeypatch.setattr(states, "background", lambda *all_: made.append(1) or original(*all_))
    learner = opened(base, tmp_path / "s", holdout=0.0)
    for domain in "aba":
        learner.learn_from_text(text(1), domain, budget=Budget(steps=1))
    assert made == [1]
    a, b = (kept(learner, domain)[states.BACKGROUND] for domain in "ab")
    np.testing.assert_array_equal(a, b)


def test_how_much_is_read_depends_on_the_text_and_not_on_the_clock(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step's work is three forward passes; a twentieth of it pays for stretches, a tenth for the base's own text."""
    monkeypatch.setattr("mlx_impl.session.Session.run", lambda session, report: setattr(session, "seconds", 1.0))
    content = text(1, 2000)
    counts, backgrounds = [], []
    for passes in (0.1, 1, 3, 100):
        learner = opened(base, tmp_path / str(passes), holdout=0.0)
        learner.learn_from_text(content, budget=Budget(seconds=1e9, epochs=passes))
        counts.append(len(kept(learner, "main").get(states.MEANS, ())))
        backgrounds.append(states.BACKGROUND in kept(learner, "main"))
        tokens = len(learner.tokenizer.encode(content)) + 1  # the document's end is one
        affordable = 0.05 * 3 * passes * tokens / (states.STRETCH / 4)
        assert counts[-1] == int(min(affordable, states.PER_LESSON, tokens // states.STRETCH))
        assert backgrounds[-1] == (2 * affordable > states.PRICE)
    assert backgrounds == [False, False, True, True]


def test_without_time_for_states_words_speak_alone_for_a_domain(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = opened(base, tmp_path / "s", holdout=0.0)
    with monkeypatch.context() as hurry:
        hurry.setattr("mlx_impl.lesson.STATES_SHARE", 0.0)
        learner.learn_from_text(text(1), "hurried", budget=Budget(seconds=20, epochs=0.1))
    learner.learn_from_text(text(2), "calm", budget=Budget(steps=1))
    assert states.MEANS not in kept(learner, "hurried")
    assert states.MEANS in kept(learner, "calm")
    ids = learner.tokenizer.encode(text(2))[: router.PREFIX]
    general = router.general_frequencies(learner.tokenizer)
    words = {domain: router.evidence(kept(learner, domain), ids, general) for domain in ("calm", "hurried")}
    found = learner.route(ids).evidence
    assert found["hurried"] == pytest.approx(words["hurried"] - router.LEAST_EVIDENCE)
    assert found["calm"] != pytest.approx(words["calm"] - router.LEAST_EVIDENCE)
    learner.learn_from_text(text(1), "hurried", budget=Budget(steps=1))  # from now on both have them
    assert states.MEANS in kept(learner, "hurried")
    assert learner.route(ids).evidence["hurried"] != pytest.approx(found["hurried"])


def test_states_and_words_are_added(base: Path, tmp_path: Path) -> None:
    learner = opened(base, tmp_path / "s", holdout=0.0)
    for number, domain in enumerate("ab", 1):
        learner.learn_from_text(text(number), domain, budget=Budget(steps=1))
    ids = learner.tokenizer.encode(text(2))[:100]
    general = router.general_frequencies(learner.tokenizer)
    parts = {domain: kept(learner, domain) for domain in "ab"}
    means = {domain: part[states.MEANS] for domain, part in parts.items()}
    discriminant = states.Discriminant(means, parts["a"][states.BACKGROUND])
    learner.set_adapter(None)
    mean = states.mean_states(learner.model, np.array([ids], np.int32), states.first_token(learner.tokenizer))[0]
    by_states = discriminant.evidence(mean, 100)
    expected = {d: router.WORDS_WEIGHT * router.evidence(parts[d], ids, general) + by_states[d] for d in "ab"}
    learner.set_adapter("a")  # the base is asked, whatever is attached
    assert learner.route(ids).evidence == pytest.approx(expected, rel=1e-4)
