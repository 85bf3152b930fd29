"""Ways to tell which domain a text belongs to, by accuracy after so many tokens, by cost, and by what an error costs.

Domains are the NAME/train.txt of a folder, `docs` (Python's language reference, near to a domain of Python code) and
`general`, which is nobody's: it and chat questions are the base's. What a store does not have yet is taught first.

  perplexity  loss of the text under every adapter and the base; the base unless an adapter is better by a margin
  hidden      mean hidden state of the base at half its depth, class means with a shared covariance; the base if far
  words       naive Bayes on token counts; the base unless a domain is likelier than text of any kind by a margin
  router      what `--domain auto` does: words and the base's states without a margin, for short prompts words and the
              base's surprise

Margins of the first three are fitted on every other window, for each length; all are scored on the rest.

    python -m benchmarks.routing --data DIR --store DIR [--windows 40] [--prefixes 16 32 64 128]
"""

import argparse
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data import topics
from typing import Any

import mlx_impl  # noqa: F401  before MLX, for the fast BLAS

# isort: split
import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from benchmarks.common import record
from mlx_impl.adapters import read_adapter, read_statistics
from mlx_impl.cache import KVCache
from mlx_impl.config import Budget, ContinualLearningConfig
from mlx_impl.generate import Sampling, decode, prompt_ids
from mlx_impl.hub import default_model
from mlx_impl.learner import ContinualLearner
from mlx_impl.loss import cross_entropy
from mlx_impl.readers import text_document
from mlx_impl.router import Router, count_tokens, evidence, general_frequencies

BASE = "general"
NEAR = "python", "docs"
HELD_BACK = 8
"""Every how many-th topic of the language reference is kept for measuring."""

HIDDEN_WINDOWS, HIDDEN_LENGTH = 32, 64
ROWS = 4
MANY = (1, 10, 100)

CHATS = """What is the capital of France?|How do I boil an egg?|Tell me a joke.|Who wrote Romeo and Juliet?
What is 12 times 8?|Explain photosynthesis to a child.|Write a short poem about the sea.|How far away is the moon?
What should I cook tonight?|Give me three tips for better sleep.|Translate good morning into Spanish.
Why is the sky blue?|What is a healthy breakfast?|Can you recommend a book?|How do I tie a tie?
What is the tallest mountain in the world?|Hello, how are you?|Write an email to my boss asking for a day off.
What does a doctor do?|What is the law of gravity?|How do vaccines work?|What is Python?|How do I learn to program?
What is the difference between a cat and a dog?|List five European countries.|How many days are in a year?
Who was the first person on the moon?|Suggest a name for my new puppy.|What is the boiling point of water?
How can I save money?|Describe a rainbow.|What time is it in Tokyo when it is noon in London?|Are you a robot?
Summarize the story of Cinderella.|What is the meaning of life?|How do airplanes fly?|Thanks, that helps a lot!
What should I pack for a trip to the beach?|Who painted the Mona Lisa?|How do I remove a coffee stain?
Give me a recipe for pancakes.|What are the planets of the solar system?"""

NOTES = {
    "The office key is under the third flower pot.": ["Where is the office key?", "The office key is"],
    "My sister Ingrid moved to Reykjavik in March.": ["Where does Ingrid live?", "When did Ingrid move?"],
    "The wifi password of the workshop is turquoise-badger-42.": ["What is the wifi password?", "The wifi password"],
    "The Kestrel project is due on the ninth of October and Priya leads it.": [
        "Who leads Kestrel?",
        "When is the Kestrel project due?",
    ],
}
"""Lessons of one sentence, each with prompts that ask for it."""

Ids = NDArray[np.int32]
Floats = NDArray[np.float64]


def main() -> None:
    """Teach what is missing, measure, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of NAME/train.txt and NAME/valid.txt")
    parser.add_argument("--store", type=Path, required=True, help="where the domains are, or will be taught")
    parser.add_argument("--windows", type=int, default=40, help="texts a domain, at most  [default: 40]")
    parser.add_argument("--forwards", type=int, help="texts a domain to run every adapter on, at most  [default: all]")
    parser.add_argument("--prefixes", type=int, nargs="+", default=[16, 32, 64, 128], help="tokens to decide on")
    parser.add_argument("--rest", type=int, default=64, help="tokens after the longest prefix  [default: 64]")
    parser.add_argument("--steps", type=int, default=16, help="of a lesson that is missing  [default: 16]")
    parser.add_argument("--batch-size", type=int, default=4, help="windows a step  [default: 4]")
    arguments = parser.parse_args()
    config = ContinualLearningConfig(batch_size=arguments.batch_size)
    learner = ContinualLearner.from_checkpoint(default_model(), config, arguments.store)
    texts = {name: _texts(arguments.data, name) for name in _names(arguments.data)}
    domains = [name for name in texts if name != BASE]
    for name in domains:
        if name not in learner.store.domains():
            print(f"teaching {name}", flush=True)
            train = [text_document("\n\n".join(texts[name][0]), name)]
            learner.learn(train, name, name, Budget(steps=arguments.steps))
    length = max(arguments.prefixes) + arguments.rest
    windows = {name: _windows(learner, valid, length, arguments.windows) for name, (_, valid) in texts.items()}
    print({name: len(rows) for name, rows in windows.items()}, flush=True)
    few = {name: rows[:: -(-len(rows) // (arguments.forwards or len(rows)))] for name, rows in windows.items()}
    nats = _all_nats(learner, domains, few, max(arguments.prefixes))
    hidden = _Hidden(learner, {name: texts[name][0] for name in domains})
    router = _Chosen(learner, domains)
    scores: dict[str, Callable[[str, int], Floats]] = {
        "perplexity": lambda name, size: _gains(nats, domains, name, size),
        "hidden": lambda name, size: hidden.scores(windows[name][:, :size]),
        "words": lambda name, size: _words(learner, domains, windows[name][:, :size]),
    }
    table: dict[str, Any] = {}
    for size in arguments.prefixes:
        table[str(size)] = {
            method: _fitted(domains, {name: score(name, size) for name in windows}) for method, score in scores.items()
        }
        table[str(size)]["router"] = _scored(domains, {n: router.of(rows[:, :size]) for n, rows in windows.items()})
        print(size, {method: round(figures["accuracy"], 3) for method, figures in table[str(size)].items()}, flush=True)
    size = 64 if 64 in arguments.prefixes else max(arguments.prefixes)
    routed = {name: router.of(rows[:, :size]) for name, rows in few.items()}
    figures = {
        "model": default_model().name,
        "domains": domains,
        "windows": {name: len(rows) for name, rows in windows.items()},
        "windows_under_every_adapter": {name: len(rows) for name, rows in few.items()},
        "lesson_steps": {name: learner.store.require(name).figures["steps"] for name in domains},
        "lesson_tokens": {name: learner.store.require(name).figures["trained_tokens"] for name in domains},
        "by_prefix": table,
        "rest": _rest(learner, domains, few, nats, routed, size),
        "chats": _chats(learner),
        "notes": _notes(),
        "cost": _cost(learner, domains, windows[domains[0]][0, :size]),
    }
    record("routing", figures)


# -- texts -------------------------------------------------------------------------------------------------------


def _names(data: Path) -> list[str]:
    names = sorted(path.parent.name for path in data.glob("*/train.txt") if (path.parent / "valid.txt").is_file())
    return [*(name for name in names if name != BASE), NEAR[1], BASE]


def _texts(data: Path, name: str) -> tuple[list[str], list[str]]:
    """Documents to learn and to measure on."""
    if name == NEAR[1]:
        texts = [topics.topics[topic] for topic in sorted(topics.topics)]
        kept = range(0, len(texts), HELD_BACK)
        return [text for i, text in enumerate(texts) if i not in kept], [texts[i] for i in kept]
    parts = [(data / name / f"{part}.txt").read_text("utf-8") for part in ("train", "valid")]
    train, valid = ([text for text in re.split(r"\n[ \t]*\n", part) if text.strip()] for part in parts)
    return train, valid


def _windows(learner: ContinualLearner, documents: list[str], length: int, at_most: int) -> Ids:
    """Beginnings of documents (W, length), short ones joined with those that follow, spread over all of them."""
    rows: list[list[int]] = []
    row: list[int] = []
    for document in documents:
        row += learner.tokenizer.encode(document + "\n\n")
        if len(row) >= length:
            rows.append(row[:length])
            row = []
    if len(rows) < at_most:  # long documents give more than their beginnings
        stream = learner.tokenizer.encode("\n\n".join(documents))
        rows = [stream[at : at + length] for at in range(0, len(stream) - length + 1, length)]
    chosen = np.linspace(0, len(rows) - 1, min(at_most, len(rows))).astype(int)
    return np.array([rows[i] for i in chosen], np.int32)


# -- ways to decide ----------------------------------------------------------------------------------------------


def _nats(learner: ContinualLearner, rows: Ids) -> Floats:
    """What each token of rows (W, T) costs under what is attached, as the beginning of a document: (W, T)."""
    eos = learner.tokenizer.eos_id or 0
    begun = np.concatenate([np.full((len(rows), 1), eos, np.int32), rows], axis=1)
    parts = []
    for at in range(0, len(rows), ROWS):
        tokens = mx.array(begun[at : at + ROWS])
        parts.append(np.array(cross_entropy(learner.model(tokens[:, :-1]), tokens[:, 1:]), np.float64))
    return np.concatenate(parts)


def _all_nats(
    learner: ContinualLearner, domains: list[str], windows: dict[str, Ids], longest: int
) -> dict[tuple[str | None, str], Floats]:
    """Costs of every window's prefix under every adapter; of all of it under the base and the window's own."""
    found: dict[tuple[str | None, str], Floats] = {}
    for adapter in [None, *domains]:
        learner.set_adapter(adapter)
        for name, rows in windows.items():
            whole = adapter in (None, name)
            found[adapter, name] = _nats(learner, rows if whole else rows[:, :longest])
        print(f"measured under {adapter or 'the base'}", flush=True)
    learner.set_adapter(None)
    return found


def _gains(nats: dict[tuple[str | None, str], Floats], domains: list[str], name: str, size: int) -> Floats:
    """How much each adapter lowers the cost of the first `size` tokens against the base: (W, domains)."""
    base = nats[None, name][:, :size].sum(1)
    return np.stack([base - nats[domain, name][:, :size].sum(1) for domain in domains], 1)


def _words(learner: ContinualLearner, domains: list[str], rows: Ids) -> Floats:
    """Evidence of the tokens for each domain: (W, domains)."""
    general = general_frequencies(learner.tokenizer)
    known = [read_statistics(learner.store.files_of(learner.store.require(domain))) for domain in domains]
    return np.array([[evidence(one, row, general) for one in known if one is not None] for row in rows.tolist()])


class _Hidden:
    """Class means of the base's pooled hidden states, compared under one covariance (Fisher's discriminant)."""

    def __init__(self, learner: ContinualLearner, texts: dict[str, list[str]]) -> None:
        self._learner = learner
        states = []
        for documents in texts.values():
            stream = learner.tokenizer.encode("\n\n".join(documents))
            starts = np.linspace(0, len(stream) - HIDDEN_LENGTH, HIDDEN_WINDOWS).astype(int)
            states.append(self._pooled(np.array([stream[at : at + HIDDEN_LENGTH] for at in starts], np.int32)))
        self._means = np.stack([state.mean(0) for state in states])  # (domains, D)
        residual = np.concatenate([state - state.mean(0) for state in states])
        covariance = residual.T @ residual / len(residual)
        shrunk = covariance + 0.1 * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
        self._precision = np.linalg.inv(shrunk)

    def _pooled(self, rows: Ids) -> Floats:
        """Mean hidden states (W, D) of rows (W, T) after half of the layers."""
        model: Any = self._learner.model  # one of our own class, of which layers are used
        parts = []
        for at in range(0, len(rows), ROWS):
            x = model.model.embed_tokens(mx.array(rows[at : at + ROWS]))
            mask = KVCache().mask(rows.shape[1])
            for layer in model.layers[: len(model.layers) // 2]:
                x = layer(x, mask)
            parts.append(np.array(x.mean(1), np.float64))
        return np.concatenate(parts)

    def scores(self, rows: Ids) -> Floats:
        """Minus half the squared Mahalanobis distance to each class: (W, domains)."""
        offset = self._pooled(rows)[:, None] - self._means  # (W, domains, D)
        return -0.5 * np.einsum("wcd,de,wce->wc", offset, self._precision, offset)


class _Chosen:
    """The router's decisions on windows, as indices of domains, -1 for the base."""

    def __init__(self, learner: ContinualLearner, domains: list[str]) -> None:
        self._learner = learner
        self._number: dict[str | None, int] = {domain: number for number, domain in enumerate(domains)}
        self._number[None] = -1

    def of(self, rows: Ids) -> NDArray[np.int64]:
        return np.array([self._number[self._learner.route(row).domain] for row in rows.tolist()])


def _fitted(domains: list[str], scores: dict[str, Floats]) -> dict[str, Any]:
    """Accuracy where the base wins below a margin, which is the best one on the even windows."""
    every = np.concatenate([score[::2].max(1) for score in scores.values()])
    candidates = np.unique(np.concatenate([[every.min() - 1], (np.sort(every)[1:] + np.sort(every)[:-1]) / 2]))
    decide = lambda score, margin: np.where(score.max(1) > margin, score.argmax(1), -1)  # noqa: E731
    accuracy = [
        _scored(domains, {name: decide(score[::2], margin) for name, score in scores.items()}, 1)["accuracy"]
        for margin in candidates
    ]
    margin = float(candidates[int(np.argmax(accuracy))])
    return {**_scored(domains, {name: decide(score, margin) for name, score in scores.items()}), "margin": margin}


def _scored(domains: list[str], chosen: dict[str, NDArray[np.int64]], every: int = 2) -> dict[str, Any]:
    """Share of right decisions on the odd windows (`every` 1: on all): by text, and the mean over the texts."""
    first = every - 1
    right = {name: domains.index(name) if name != BASE else -1 for name in chosen}
    by_text = {name: float((found[first::every] == right[name]).mean()) for name, found in chosen.items()}
    mistaken = {
        f"{one} for {other}": int((chosen[other][first::every] == domains.index(one)).sum())
        for one, other in (NEAR, NEAR[::-1])
        if one in domains and other in domains
    }
    return {"accuracy": float(np.mean(list(by_text.values()))), "by_text": by_text, "near_pair": mistaken}


# -- what it is worth, and what it costs -------------------------------------------------------------------------


def _rest(
    learner: ContinualLearner,
    domains: list[str],
    windows: dict[str, Ids],
    nats: dict[tuple[str | None, str], Floats],
    routed: dict[str, NDArray[np.int64]],
    size: int,
) -> dict[str, Any]:
    """Perplexity of what follows the first `size` tokens: as routed, against the domain by name (general: the base)."""
    found: dict[str, Any] = {}
    for name, rows in windows.items():
        named = nats[None if name == BASE else name, name][:, size:]
        actual = named.copy()
        for window, number in enumerate(routed[name]):
            domain = None if number < 0 else domains[number]
            if domain != (None if name == BASE else name):
                learner.set_adapter(domain)
                actual[window] = _nats(learner, rows[window : window + 1])[0, size:]
        found[name] = {
            "base": float(np.exp(nats[None, name][:, size:].mean())),
            "named": float(np.exp(named.mean())),
            "routed": float(np.exp(actual.mean())),
            "loss_percent": float(100 * np.expm1(actual.mean() - named.mean())),
        }
    learner.set_adapter(None)
    return {
        "prefix": size,
        "by_text": found,
        "mean_loss_percent": float(np.mean([found[name]["loss_percent"] for name in domains])),
    }


def _chats(learner: ContinualLearner) -> dict[str, Any]:
    """How many chat questions the base keeps, and how far the others' answers move: KL on the base's own answers.

    Nats per token, over answers sampled from the base; those that the base keeps have none.
    """
    tokenizer, divergences, taken = learner.tokenizer, [], {}
    questions = re.split(r"[|\n]", CHATS)
    for question in questions:
        domain = learner.route(prompt_ids(tokenizer, question)).domain
        divergences.append(0.0)
        if domain is not None:
            taken[question] = domain
            prompt = tokenizer.encode_chat([{"role": "user", "content": question}])
            learner.set_adapter(None)
            answer = list(decode(learner.model, prompt, 32, Sampling(temperature=1.0)))
            tokens = mx.array([[*prompt, *answer]])
            base = learner.model(tokens[:, :-1])[0, len(prompt) - 1 :]
            learner.set_adapter(domain)
            other = learner.model(tokens[:, :-1])[0, len(prompt) - 1 :]
            base, other = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (base, other))
            divergences[-1] = float((mx.exp(base) * (base - other)).sum(-1).mean().item())  # type: ignore[arg-type]
            learner.set_adapter(None)
    return {
        "questions": len(questions),
        "kept_by_base": len(questions) - len(taken),
        "taken": taken,
        "mean_kl": float(np.mean(divergences)),
    }


def _notes() -> dict[str, Any]:
    """Lessons of a sentence, each alone in a store: prompts about it that reach it, chat questions that do not."""
    questions = re.split(r"[|\n]", CHATS)
    reached: dict[str, bool] = {}
    kept = []
    for note, prompts in NOTES.items():
        with tempfile.TemporaryDirectory() as store:
            learner = ContinualLearner.from_checkpoint(default_model(), store=Path(store) / "store")
            learner.learn_from_text(note)
            route = lambda prompt, of=learner: of.route(prompt_ids(of.tokenizer, prompt)).domain  # noqa: E731
            reached |= {prompt: route(prompt) == "main" for prompt in prompts}
            kept.append(sum(route(question) is None for question in questions) / len(questions))
    return {"reached": reached, "share_reached": float(np.mean(list(reached.values()))), "chats_kept": kept}


def _cost(learner: ContinualLearner, domains: list[str], prompt: Ids) -> dict[str, Any]:
    """Milliseconds a decision for a prompt, by number of domains; what is not run that often is multiplied up."""
    ids = prompt.tolist()
    head = learner.store.require(domains[0])
    folder = learner.store.files_of(head)
    statistics = read_statistics(folder) or count_tokens(prompt)
    general = general_frequencies(learner.tokenizer)
    seconds = {
        "read_statistics": _timed(lambda: Router(learner.model, learner.tokenizer, learner.store)._of(head)),
        "evidence": _timed(lambda: evidence(statistics, ids, general)),
        "forward": _timed(lambda: _nats(learner, prompt[None])),
        "read_adapter": _timed(lambda: read_adapter(learner.store.files_of(head))),
        "attach": _timed(lambda: learner.set_adapter(domains[0])),
        "general_frequencies": _timed(lambda: general_frequencies(learner.tokenizer)),
        "route_these_domains": _timed(lambda: learner.route(ids)),
    }
    learner.set_adapter(None)
    once = seconds["read_statistics"] + seconds["evidence"]
    totals = {
        str(count): {
            "perplexity": 1e3 * (count * (seconds["attach"] + seconds["forward"]) + seconds["forward"]),
            "hidden": 1e3 * seconds["forward"] / 2,
            "words_first_time": 1e3 * (count * once + seconds["general_frequencies"]),
            "words_again": 1e3 * count * seconds["evidence"],
            "router_short_prompt_again": 1e3 * (count * seconds["evidence"] + seconds["forward"]),
        }
        for count in MANY
    }
    state = sum((folder / name).stat().st_size for name in head.files if name.startswith("state"))
    parts = {name: 1e3 * value for name, value in seconds.items()}
    return {"tokens": len(ids), "state_bytes": state, "measured_ms": parts, "by_domains_ms": totals}


def _timed(call: Callable[[], Any], calls: Sequence[int] = range(7)) -> float:
    """Median seconds of a call, after one that is not counted."""
    call()
    seconds = []
    for _ in calls:
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds))


if __name__ == "__main__":
    main()
