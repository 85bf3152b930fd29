"""Decoding: the cached decoder against the naive one, filters against plain numpy, stop strings against plain search.

Token sequences are compared exactly: cached and full logits are 1e-5 apart, and weights by formula leave no two
candidates that close. Texts come from a scripted model, so that stop strings can be cut into tokens in every way.
"""

import codecs
import pydoc_data.topics
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from comparing import CONFIGS, assert_close, mlx_model, wave, weights, windows
from hypothesis import given
from hypothesis import strategies as st

from mlx_impl import generate
from mlx_impl.config import ModelConfig
from mlx_impl.errors import InputError
from mlx_impl.generate import Sampling, complete, decode, filtered, naive, penalized, sample
from mlx_impl.model import ContinualLLM
from mlx_impl.tokenizer import Tokenizer

every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


class Pieces:
    """A stand-in tokenizer: id i is `pieces[i]`, the last id ends a text."""

    def __init__(self, pieces: Sequence[bytes], bos_id: int | None = None) -> None:
        self.pieces = list(pieces)
        self.vocab_size = len(pieces) + 1
        self.bos_id, self.eos_id = bos_id, len(pieces)
        self.adds_bos = False
        self.eos_ids = [self.eos_id]

    def check_fits(self, vocab_size: int) -> None:
        """As the real one."""
        if self.vocab_size > vocab_size:
            raise InputError(f"{self.vocab_size} ids, {vocab_size} rows")

    def encode(self, text: str) -> list[int]:
        """One id a byte; needs pieces of one byte."""
        return [self.pieces.index(bytes([byte])) for byte in text.encode()]

    def texts(self, ids: Sequence[int]) -> list[str]:
        """What each id adds, and at the end what was left unfinished."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return [*(decoder.decode(self.pieces[id]) for id in ids), decoder.decode(b"", True)]

    def stream(self) -> SimpleNamespace:
        """An object with `add` and `finish`, as the real one."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return SimpleNamespace(add=lambda id: decoder.decode(self.pieces[id]), finish=lambda: decoder.decode(b"", True))


BYTES = Pieces([bytes([byte]) for byte in range(256)])
PROMPT = [7, 7, 7]


class Scripted:
    """A model that says a given sequence after a prompt of three tokens, then `end`, whatever the prompt holds."""

    def __init__(self, script: Sequence[int], end: int, vocab_size: int) -> None:
        self.script, self.end, self.vocab_size = list(script), end, vocab_size

    def make_cache(self, window: int | None = None) -> list[SimpleNamespace]:
        """A counter in place of keys and values."""
        return [SimpleNamespace(offset=0, state=())]

    def hidden(self, tokens: mx.array, cache: list[SimpleNamespace]) -> mx.array:
        """Advances the cache; the hidden states are never looked at."""
        cache[0].offset += tokens.shape[1]
        return tokens

    def __call__(self, tokens: mx.array, cache: list[SimpleNamespace]) -> mx.array:
        """Logits (1, T, V) with one token far ahead at each position."""
        start = cache[0].offset
        cache[0].offset += tokens.shape[1]
        logits = np.zeros((1, tokens.shape[1], self.vocab_size), dtype=np.float32)
        for t in range(tokens.shape[1]):
            at = start + t + 1 - len(PROMPT)
            logits[0, t, self.script[at] if 0 <= at < len(self.script) else self.end] = 50.0
        return mx.array(logits)


def says(text: str) -> Scripted:
    """A model that says `text` byte by byte and ends."""
    return Scripted(list(text.encode()), BYTES.eos_id, 300)


# -- naive and cached ----------------------------------------------------------------

SAMPLINGS = {
    "greedy": Sampling(),
    "greedy, penalty": Sampling(repetition_penalty=1.4),
    "sampled": Sampling(temperature=1.0, seed=3),
    "sampled, filtered": Sampling(temperature=1.3, top_k=20, top_p=0.9, min_p=0.02, seed=4),
    "sampled, filtered, penalty": Sampling(temperature=0.8, top_p=0.8, repetition_penalty=1.2, seed=2**32 - 1),
}


@every_config
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_the_cached_decoder_gives_the_naive_ones_tokens(
    config: ModelConfig, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "PREFILL", 5)  # the prompt of 12 needs three chunks, the last of one token
    model = mlx_model(config, weights(config))
    prompt = windows(config, 1, 11)[0][0].tolist()
    expected = list(naive(model, prompt, 20, sampling))
    assert len(expected) == 20
    assert list(decode(model, prompt, 20, sampling)) == expected
    assert list(decode(model, prompt, 7, sampling)) == expected[:7]


@pytest.mark.parametrize("length", [1, 2, 5, 6])
def test_prompts_about_the_size_of_a_chunk(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "PREFILL", 5)
    config = CONFIGS["1:1 tied"]
    model = mlx_model(config, weights(config))
    prompt = windows(config, 1, 11)[0][0].tolist()[:length]
    assert list(decode(model, prompt, 5, Sampling())) == list(naive(model, prompt, 5, Sampling()))
    assert list(decode(model, prompt, 0, Sampling())) == []


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_a_window_decodes_as_its_mask_says(sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "PREFILL", 7)
    config = CONFIGS["12:3 tied llama3"]
    model = mlx_model(config, weights(config))
    prompt, window = windows(config, 1, 16)[0][0].tolist(), 9
    seen = list(prompt)
    for _ in range(20):
        rows, columns = np.indices((len(seen), len(seen)))
        mask = (columns <= rows) & ((columns < 4) | (rows - columns < window - 4))
        hidden = model.hidden(mx.array([seen]), mask=mx.array(mask))
        seen.append(int(sample(model.head(hidden)[0, -1], sampling, seen, len(seen))))
    assert list(decode(model, prompt, 20, sampling, window=window)) == seen[len(prompt) :]
    assert list(decode(model, prompt, 20, sampling)) != seen[len(prompt) :], "the window has an effect"


def test_the_seed_alone_decides_what_is_drawn() -> None:
    config = CONFIGS["1:1 tied"]
    model = mlx_model(config, weights(config))
    drawn = []
    for global_seed, seed in ((1, 5), (2, 5), (1, 6)):
        mx.random.seed(global_seed)
        drawn.append(list(decode(model, [1, 2], 20, Sampling(temperature=1.0, seed=seed))))
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) > 5


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=5.0, seed=1)], ids=["greedy", "sampled"])
def test_ids_beyond_the_tokenizer_are_never_produced(sampling: Sampling) -> None:
    config = CONFIGS["3:1 untied biases theta 500000"]
    arrays = weights(config)
    arrays["lm_head.weight"][40:] *= 20  # what the tokenizer does not have is what the model likes best
    model = mlx_model(config, arrays)
    assert max(naive(model, [1, 2, 3], 10, sampling)) >= 40
    for decoder in (naive, decode):
        produced = list(decoder(model, [1, 2, 3], 60, sampling, 40))
        assert len(produced) == 60
        assert max(produced) < 40


# -- penalty and filters against numpy -----------------------------------------------

spread_logits = st.lists(st.integers(-160, 160), min_size=2, max_size=40, unique=True)
"""Whole numbers, divided by 16: exact in float32, and no two equal, for ties may fall either way."""


@given(numbers=spread_logits, seen=st.lists(st.integers(0, 45)), penalty=st.floats(0.25, 4.0))
def test_the_penalty(numbers: list[int], seen: list[int], penalty: float) -> None:
    logits = np.array(numbers, dtype=np.float32) / 16
    expected = logits.astype(np.float64)
    for token in set(seen):
        if token < len(expected):  # a prompt may hold ids that are not offered
            expected[token] = expected[token] / penalty if expected[token] > 0 else expected[token] * penalty
    given_logits = mx.array(logits)
    assert_close("logits", penalized(given_logits, seen, penalty), expected, atol=4e-6)  # an ulp of 40
    assert np.array_equal(np.array(given_logits), logits), "the argument is left alone"


def expected_probabilities(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """What may be drawn, with which probability, from the definitions in float64; and which tokens are borderline."""
    p = np.exp(logits.astype(np.float64) / sampling.temperature)
    p /= p.sum()
    ranked = list(np.argsort(-p))
    allowed = np.ones(len(p), dtype=bool)
    borderline = np.zeros(len(p), dtype=bool)
    if sampling.top_k:
        allowed[ranked[sampling.top_k :]] = False
        p = np.where(allowed, p, 0.0)
        p /= p.sum()
    for place, token in enumerate(ranked):
        likelier = p[ranked[:place]].sum()
        if sampling.top_p < 1 and likelier >= sampling.top_p:
            allowed[token] = False
        if p[token] < sampling.min_p * p.max():
            allowed[token] = False
        # float32 sums may fall on the other side of a bound this close.
        borderline[token] |= sampling.top_p < 1 and place > 0 and abs(likelier - sampling.top_p) < 1e-5
        borderline[token] |= abs(p[token] - sampling.min_p * p.max()) < 1e-6 and place > 0
    return np.where(allowed, p, 0.0), borderline


@given(
    numbers=spread_logits,
    temperature=st.floats(0.25, 4.0),
    top_k=st.integers(0, 45),
    top_p=st.floats(0.01, 1.0),
    min_p=st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
)
def test_the_filters(numbers: list[int], temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = np.array(numbers, dtype=np.float32) / 16
    actual = np.exp(np.array(filtered(mx.array(logits), sampling)))
    expected, borderline = expected_probabilities(logits, sampling)
    assert actual[np.argmax(logits)] > 0, "the likeliest token always passes"
    assert_close("probabilities", actual[~borderline], expected[~borderline], atol=2e-6)


@given(numbers=spread_logits, seed=st.integers(0, 2**32 - 1))
def test_filters_that_leave_one_token_are_greedy(numbers: list[int], seed: int) -> None:
    logits = mx.array(numbers, mx.float32)
    for one in (
        Sampling(1e-40, seed=seed),
        Sampling(0.7, top_k=1, seed=seed),
        Sampling(0.7, top_p=1e-6, seed=seed),
        Sampling(0.7, top_p=1e-46, seed=seed),
        Sampling(0.7, min_p=1.0, seed=seed),
    ):
        assert sample(logits, one, (), 3).item() == np.argmax(numbers)


def test_tokens_are_drawn_as_often_as_the_distribution_says() -> None:
    sampling, draws = Sampling(temperature=0.8, top_k=6, seed=11), 4000
    logits = mx.array(2 * wave((10,), 1.0))
    p = np.exp(np.array(filtered(logits, sampling)))
    drawn = [sample(logits, sampling, (), position) for position in range(draws)]
    frequency = np.bincount(np.array(mx.stack(drawn)), minlength=10) / draws
    assert (p > 0).sum() == 6
    # Four standard deviations of a binomial share; none at all where the probability is 0.
    assert (np.abs(frequency - p) <= 4 * np.sqrt(p * (1 - p) / draws)).all(), (frequency, p)


# -- text ----------------------------------------------------------------------------


def completed(model: Any, tokenizer: Any, **options: Any) -> tuple[generate.Completion, list[str]]:
    """A completion of the scripted prompt and what was streamed meanwhile."""
    streamed: list[str] = []
    result = complete(model, tokenizer, PROMPT, on_text=streamed.append, **options)
    assert "".join(streamed) == result.text
    assert "" not in streamed
    return result, streamed


def test_a_text_ends_at_the_end_token() -> None:
    result, _ = completed(says("na\u00efve \u20ac"), BYTES, max_tokens=100)
    assert (result.text, result.finish) == ("na\u00efve \u20ac", "stop")
    assert (result.prompt_tokens, len(result.tokens)) == (3, len("na\u00efve \u20ac".encode()) + 1)
    assert result.tokens[-1] == BYTES.eos_id


def test_a_text_ends_at_its_length() -> None:
    result, _ = completed(says("abcdef"), BYTES, max_tokens=4)
    assert (result.text, result.finish, len(result.tokens)) == ("abcd", "length", 4)
    result, _ = completed(says("abcdef"), BYTES, max_tokens=0)
    assert (result.text, result.finish, result.tokens) == ("", "length", [])


def test_characters_are_streamed_whole() -> None:
    _, streamed = completed(says("\u20ac\u00e9\U0001f600"), BYTES, max_tokens=100)
    assert streamed == ["\u20ac", "\u00e9", "\U0001f600"]
    cut, _ = completed(says("a\u20ac"), BYTES, max_tokens=3)
    assert cut.text == "a\ufffd"


def test_text_is_held_back_only_while_it_may_become_a_stop_string() -> None:
    result, streamed = completed(says("a<b<|c<|end|>d"), BYTES, max_tokens=100, stop=["<|end|>"])
    assert (result.text, result.finish) == ("a<b<|c", "stop")
    assert streamed == ["a", "<b", "<|c"]


def test_what_was_held_back_is_sent_when_the_text_ends() -> None:
    result, _ = completed(says("abc<|en"), BYTES, max_tokens=100, stop=["<|end|>"])
    assert (result.text, result.finish) == ("abc<|en", "stop")
    result, _ = completed(says("abc<|en"), BYTES, max_tokens=5, stop=["<|end|>"])
    assert (result.text, result.finish) == ("abc<|", "length")


ALPHABET = Pieces([b"a", b"b", b"ab", b"ba", b"abab", b"\n", b"\xc3", b"\xa9", b"a\xc3", "\u00e9b".encode(), b"bb\n"])


@given(
    ids=st.lists(st.integers(0, ALPHABET.vocab_size - 2), max_size=14),
    stop=st.lists(st.text("ab\n\u00e9\ufffd", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_never_leak_however_they_are_cut(ids: list[int], stop: list[str]) -> None:
    expected, finish, used = "", "stop", len(ids) + 1
    for number, text in enumerate(ALPHABET.texts(ids)):
        expected += text
        found = [expected.find(s) for s in stop if s in expected]
        if found:
            expected, used = expected[: min(found)], min(number + 1, len(ids) + 1)
            break
    result, _ = completed(Scripted(ids, ALPHABET.eos_id, 20), ALPHABET, max_tokens=50, stop=stop)
    assert (result.text, result.finish, len(result.tokens)) == (expected, finish, used)


def test_a_real_tokenizer_and_a_real_model() -> None:
    topics = list(pydoc_data.topics.topics.values())
    tokenizer = Tokenizer.train(topics[:10], vocab_size=400)
    config = ModelConfig(tokenizer.vocab_size + 30, 32, 2, 4, 2, 48)
    model = mlx_model(config, weights(config))
    streamed: list[str] = []
    sampling = Sampling(temperature=1.0, seed=5)
    result = complete(model, tokenizer, topics[0][:60], 40, sampling, on_text=streamed.append)
    assert result.tokens
    assert max(result.tokens) < tokenizer.vocab_size
    assert result.text == "".join(streamed) == tokenizer.decode(result.tokens, skip_special=True)
    assert model.generate(topics[0][:60], tokenizer, 40, temperature=1.0, seed=5) == result.text


# -- what is refused -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"temperature": -0.1, "top_k": -1}, r"temperature = -0\.1 .*; top_k = -1"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"top_p": 0.0}, r"top_p = 0\.0 must lie in \(0, 1\]"),
        ({"min_p": 1.5}, r"min_p = 1\.5"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty = 0\.0"),
        ({"seed": -1}, "seed = -1"),
        ({"seed": 2**32}, "seed = 4294967296"),
    ],
    ids=str,
)
def test_sampling_refuses_nonsense(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        Sampling(**wrong)


def test_prompts_that_cannot_be_continued() -> None:
    model = says("abc")
    tokenizer = Pieces([b"a"])
    tokenizer.eos_id, tokenizer.eos_ids = None, []
    with pytest.raises(InputError, match="no token to start from"):
        complete(model, tokenizer, "")
    with pytest.raises(InputError, match="stop string must not be empty"):
        complete(model, BYTES, PROMPT, stop=["x", ""])
    with pytest.raises(InputError, match=r"prompt ids \[-1, 300\] are outside the model's 0 to 299"):
        complete(model, BYTES, [1, 300, -1])
    with pytest.raises(InputError, match="257 ids, 200 rows"):
        complete(Scripted([], 0, 200), BYTES, PROMPT)


def test_an_empty_prompt_starts_from_the_begin_or_end_token() -> None:
    config = CONFIGS["1:1 tied"]
    model: ContinualLLM = mlx_model(config, weights(config))
    pieces = [bytes([65 + i]) for i in range(20)]
    for tokenizer, start in ((Pieces(pieces, bos_id=3), 3), (Pieces(pieces), 20)):
        result = complete(model, tokenizer, "", max_tokens=5)
        assert result.prompt_tokens == 1
        assert result.tokens == list(naive(model, [start], len(result.tokens), Sampling(), 21))


def test_a_text_is_begun_with_bos_and_ids_are_taken_as_they_are() -> None:
    tokenizer = Pieces([bytes([byte]) for byte in range(256)], bos_id=1)
    assert generate.prompt_ids(tokenizer, "hi") == [*b"hi"]
    tokenizer.adds_bos = True
    assert generate.prompt_ids(tokenizer, "hi") == [1, *b"hi"]
    prompts: list[str | list[int]] = ["hi", "", [*b"hi"], [1, *b"hi"]]
    counts = [complete(says("abc"), tokenizer, prompt, max_tokens=1).prompt_tokens for prompt in prompts]
    assert counts == [3, 1, 2, 3]


@every_config
@pytest.mark.parametrize("shared", [1, 9])
def test_a_cache_cut_back_to_a_common_beginning_gives_the_same_tokens(config: ModelConfig, shared: int) -> None:
    model = mlx_model(config, weights(config))
    first, second = ([(7 * i + step) % config.vocab_size for i in range(12)] for step in (1, 3))
    second[:shared] = first[:shared]
    cache = model.make_cache()
    list(decode(model, first, 5, Sampling(), cache=cache))
    assert all(layer.is_trimmable() for layer in cache)
    for layer in cache:
        layer.trim(layer.offset - shared)
    assert list(decode(model, second, 6, Sampling(), cache=cache)) == list(naive(model, second, 6, Sampling()))
    assert cache[0].offset == len(second) + 5


def test_a_rotating_cache_cannot_be_cut_back_once_it_has_dropped_a_token() -> None:
    config = next(iter(CONFIGS.values()))
    model = mlx_model(config, weights(config))
    cache = model.make_cache(16)
    list(decode(model, list(range(5, 15)), 6, Sampling(), cache=cache))
    assert all(layer.is_trimmable() for layer in cache)
    list(decode(model, list(range(5, 25)), 6, Sampling(), cache=cache))
    assert not any(layer.is_trimmable() for layer in cache)
