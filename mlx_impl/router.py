"""Which domain a prompt belongs to, with the bare base as a candidate. No adapter is read for it and none is asked.

Each version carries the token counts of its domain's lessons and means of the base's states over stretches of them.
A prompt belongs to the domain among whose words (naive Bayes) and states (see `states`) it is likeliest together, if it
is likelier there than in text of any kind. Of a short prompt neither says enough: every "What is" would count for a
domain of questions. There it is words alone, and the base has a say, which knows what it expected anyway.

Both are functions of a domain's own lessons, so adding or forgetting another changes nothing about them and trains
nothing again; only the covariance that all share is put together anew. `benchmarks/routing.py` compares this with other
ways.
"""

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_impl import files, states
from mlx_impl.adapters import STATE, Statistics, read_statistics
from mlx_impl.base import BaseModel
from mlx_impl.errors import DamagedFileError, InputError
from mlx_impl.loss import cross_entropy
from mlx_impl.store import Store
from mlx_impl.tokenizer import Tokenizer
from mlx_impl.versions import Version

Floats = NDArray[np.float64]

PREFIX = 128
"""Tokens of a prompt that are looked at, the first ones."""

DOCUMENT_PREFIX = 64
"""Tokens that a document is routed by before all of it is measured."""

SMOOTHING = 500.0
"""Tokens of general text that are added to a domain's counts, so that a short lesson knows more than its own words."""

WORDS_WEIGHT = 0.25
"""Of the words' evidence where there are states: tokens do not come independently, and it claims too much."""

LEAST_EVIDENCE = 4.0
"""Nats by which words alone must speak for a domain, however long the prompt; taken off their evidence."""

SHORT = 16
"""Tokens below which the base must have been surprised too."""

COPIED = 0.1
"""Share of a short prompt's tokens that are taken to come from the domain's words, where it is about the domain."""

FREQUENT, RARE = 0.1, 0.003
"""Weight of a digit or a punctuation mark, and of another single byte, where the likeliest merged token has 1/3."""


class Routing(NamedTuple):
    """A decision: the domain, or None for the base, and what it rests on, in nats over the tokens looked at.

    `evidence` is how much likelier the prompt is in each domain than in text of any kind. `surprise`, of a short one,
    is how much likelier the best domain makes it to the base itself; None where the base was not asked that.
    """

    domain: str | None
    evidence: dict[str, float]
    surprise: float | None = None


def count_tokens(ids: NDArray[np.int32], before: Statistics | None = None) -> Statistics:
    """The router's statistics of a text's tokens (N,), added to those of the lessons before: `tokens` and `counts`."""
    tokens, counts = np.unique(ids, return_counts=True)
    if before is not None:
        both = np.concatenate([tokens, before["tokens"].astype(tokens.dtype)])
        tokens, where = np.unique(both, return_inverse=True)
        counts = np.bincount(where, np.concatenate([counts, before["counts"]]))
    return {"tokens": tokens.astype(np.float32), "counts": counts.astype(np.float32)}  # exact up to 2**24


def general_frequencies(tokenizer: Tokenizer) -> Floats:
    """How often each token occurs in text of any kind, roughly: (V,), adding up to one; special tokens do not.

    A tokenizer's ids are in the order in which its training text made it merge them, the most frequent first, and
    frequency falls with rank as Zipf (1949) found. Single bytes come before all merges whatever their frequency.
    """
    texts = [tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size)]
    single = np.array([len(text) < 2 for text in texts])
    special = np.isin(np.arange(len(texts)), list(tokenizer.special_ids))
    weights = np.where(single, RARE, 1 / (2.0 + np.cumsum(~single & ~special)))
    weights[[len(text) == 1 and text in b" \n0123456789.,:;!?'\"()-" for text in texts]] = FREQUENT
    weights[special] = 0.0
    return weights / weights.sum()


def frequencies(statistics: Statistics, ids: Sequence[int], general: Floats) -> Floats:
    """How often each of the tokens ids (N,) occurs in a domain: its counts, smoothed by the general ones, (N,)."""
    wanted = np.asarray(ids, np.int64)
    tokens, counts = statistics["tokens"].astype(np.int64), statistics["counts"].astype(np.float64)
    at = np.minimum(np.searchsorted(tokens, wanted), len(tokens) - 1)
    found = np.where(tokens[at] == wanted, counts[at], 0.0)
    return (found + SMOOTHING * general[wanted]) / (counts.sum() + SMOOTHING)


def evidence(statistics: Statistics, ids: Sequence[int], general: Floats) -> float:
    """How much likelier tokens are in a domain than in text of any kind: log-odds of naive Bayes, in nats."""
    return float(np.log(frequencies(statistics, ids, general) / general[np.asarray(ids, np.int64)]).sum())


def surprise(statistics: Statistics, ids: Sequence[int], general: Floats, nats: Floats) -> float:
    """How much likelier tokens become to a model that takes `COPIED` of them from a domain's vocabulary, in nats.

    `nats` (N,) is what they cost the model by itself. Words that it expects, such as those that make a question, weigh
    little against a domain, and nothing for it.
    """
    own, domain = np.log1p(-COPIED) - nats, np.log(COPIED * frequencies(statistics, ids, general))
    return float((np.logaddexp(own, domain) + nats).sum())


class Router:
    """Decides for the domains of a store. `model` is the bare base, and what it is asked is asked of that."""

    def __init__(self, model: BaseModel, tokenizer: Tokenizer, store: Store) -> None:
        self._model, self._tokenizer, self._store = model, tokenizer, store
        self._general: Floats | None = None
        self._statistics: dict[tuple[str, str], Statistics | None] = {}  # by domain and the file's hash
        self._discriminant: tuple[tuple[int, ...], states.Discriminant] | None = None  # with whose statistics these are

    def route(self, prompt: Sequence[int]) -> Routing:
        """The domain of a prompt's token ids, by its first `PREFIX`; DamagedFileError for a damaged version.

        A domain without statistics, which was not learned here, is not chosen: it has to be named.
        """
        ids = [id for id in prompt[:PREFIX] if id not in self._tokenizer.special_ids]
        if not ids:
            return Routing(None, {})
        heads = [self._store.require(domain) for domain in self._store.domains()]
        known = {head.domain: found for head in heads if (found := self._of(head)) is not None}
        if not known:
            return Routing(None, {})
        if self._general is None:
            self._general = general_frequencies(self._tokenizer)
        words = {domain: evidence(statistics, ids, self._general) for domain, statistics in known.items()}
        scores = {domain: score - LEAST_EVIDENCE for domain, score in words.items()}
        if len(ids) >= SHORT and (discriminant := self._discriminant_of(known)) is not None:
            mean = states.mean_states(self._model, np.array([ids], np.int32), states.first_token(self._tokenizer))[0]
            for domain, added in discriminant.evidence(mean, len(ids)).items():
                scores[domain] = WORDS_WEIGHT * words[domain] + added
        best = max(scores, key=scores.__getitem__)
        if scores[best] <= 0:
            return Routing(None, scores)
        if len(ids) >= SHORT:
            return Routing(best, scores)
        surprised = surprise(known[best], ids, self._general, self._nats(ids))
        return Routing(best if surprised > 0 else None, scores, surprised)

    def background(self) -> states.Floats | None:
        """What versions carry of the base's own text, as it would be made here and now: the same, where there is any.

        None where none is readable.
        """
        how = states.made_with()
        for domain in self._store.domains():
            with contextlib.suppress(DamagedFileError):
                found = self._of(self._store.require(domain)) or {}
                if states.BACKGROUND in found and np.array_equal(found.get(states.MADE_WITH, ()), how):
                    return found[states.BACKGROUND]
        return None

    def _discriminant_of(self, known: dict[str, Statistics]) -> states.Discriminant | None:
        """Between those of the domains that have states, which those from elsewhere do not; None where none has.

        Nor without the base's own text, which short lessons do not bring along.
        """
        means = {domain: one[states.MEANS] for domain, one in known.items() if states.MEANS in one}
        background = next((one[states.BACKGROUND] for one in known.values() if states.BACKGROUND in one), None)
        if not means or background is None:
            return None
        key = (id(background), *map(id, means.values()))
        if self._discriminant is None or self._discriminant[0] != key:
            self._discriminant = key, states.Discriminant(means, background)
        return self._discriminant[1]

    def _nats(self, ids: Sequence[int]) -> Floats:
        """What each token (N,) of a short prompt costs the base, as a user's message where it knows such."""
        begin = _opening(self._tokenizer)
        tokens = mx.array([[*begin, *ids]])
        costs = cross_entropy(self._model(tokens[:, :-1]), tokens[:, 1:])[0, len(begin) - 1 :]
        return np.array(costs, np.float64)

    def _of(self, version: Version) -> Statistics | None:
        """A version's statistics, from its folder once. Its adapter, which is far larger, is not read for this."""
        digest = version.files.get(STATE)
        if digest is None:
            return None
        key = version.domain, digest
        if key not in self._statistics:
            folder = self._store.paths(version)[0]
            if not (folder / STATE).is_file() or files.sha256(folder / STATE) != digest:
                raise DamagedFileError(
                    f"{folder / STATE}: missing or changed since it was learned; {self._store.way_out(version)}"
                )
            self._statistics[key] = read_statistics(folder)
        return self._statistics[key]


def _opening(tokenizer: Tokenizer) -> list[int]:
    """What stands before a user's first word: the chat template's beginning, or the end of another document."""
    if tokenizer.has_chat_template:
        try:
            one, other = (tokenizer.encode_chat([{"role": "user", "content": letter}]) for letter in "ab")
            same = [a == b for a, b in zip(one, other, strict=False)]
            if common := one[: [*same, False].index(False)]:
                return common
        except InputError:
            pass  # a template that cannot be rendered must not keep a plain prompt from being continued
    first = tokenizer.eos_id if tokenizer.eos_id is not None else tokenizer.bos_id
    return [first if first is not None else 0]
