"""What was learned and what was kept: the forgetting matrix of each domain, read off the versions that are still there.

Every version of a domain's history is attached in turn and the text held out of each of its lessons is measured under
it, on the same windows, as it was under the bare base. Nothing is written to the store. Lessons from which nothing was
held out have no figures, lessons that were pruned not even a place; both are said. The router is asked about pieces of
the same texts: it decides on their first tokens and is scored on the rest.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_impl import files, lora, plots, statistics
from mlx_impl.adapters import read_adapter
from mlx_impl.data import Ids, Tokens
from mlx_impl.errors import InputError
from mlx_impl.evaluate import document_sums, evaluate, predictions
from mlx_impl.generate import Sampling, decode
from mlx_impl.learner import ContinualLearner
from mlx_impl.matrix import ForgettingMatrix
from mlx_impl.ngrams import TOLD
from mlx_impl.router import DOCUMENT_PREFIX
from mlx_impl.statistics import Floats, Interval
from mlx_impl.store import Store
from mlx_impl.versions import Version
from mlx_impl.windows import Batch, evaluation_windows

Event = dict[str, Any]

INTERVAL_FROM = 5
"""Documents in a held-out text from which an interval over them is worth having."""

PROMPT, CONTINUATION = 32, 64
"""Tokens of held-out text that the model goes on from, and how many it adds."""

SAMPLING = Sampling(temperature=0.7)

SHORTEST_REST = 16
"""Tokens that a piece of text has at least behind those that it is routed by."""


def report(
    learner: ContinualLearner,
    domains: Sequence[str] | None = None,
    tokens: int = 1024,
    tell: Callable[[Event], None] = lambda event: None,
) -> dict[str, Any]:
    """Measure domains, all of them without names, on at most `tokens` tokens of each lesson's held-out text.

    Tells how long it will take once the first measurement is done, and how far it is. The domain that was attached is
    attached again afterwards. Raises InputError where nothing was learned yet or a domain is not there,
    DamagedFileError where a version's files are not as they were written.
    """
    if tokens < 1:
        raise InputError(f"--tokens is {tokens}, at least 1 is needed to measure anything")
    histories = [_history(learner, name, tokens) for name in named(learner.store, domains)]
    before, began = learner.adapter, time.perf_counter()
    try:
        progress = _Progress(tell, histories)
        records = [_measure(learner, history, progress) for history in histories]
        for record, history in zip(records, histories, strict=True):
            record["routing"] = _routing(learner, history)
    finally:
        learner.set_adapter(before)
    return {"tokens_per_text": tokens, "domains": records, "seconds": time.perf_counter() - began}


def named(store: Store, domains: Sequence[str] | None = None) -> list[str]:
    """These domains, each once, or all there are. InputError where nothing was learned yet or one is not there."""
    names = list(dict.fromkeys(domains)) if domains else store.domains()
    if not names:
        raise InputError("nothing learned yet; teach it with `minimac-mlx learn`")
    for name in names:
        store.require(name)
    return names


def write(record: dict[str, Any], folder: Path) -> list[Path]:
    """Write report.json and, where anything was measured, report.png into a folder; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / "report.json", record)
    drawn = [domain for domain in record["domains"] if _measured(domain)]
    if not drawn:
        (folder / "report.png").unlink(missing_ok=True)  # of an earlier report
        return [folder / "report.json"]
    plots.plot_forgetting(drawn, folder / "report.png")
    return [folder / "report.json", folder / "report.png"]


def _measured(record: dict[str, Any]) -> bool:
    """Whether a domain has a figure at all."""
    return any(loss is not None for row in record["matrix"]["losses"] for loss in row)


@dataclass(frozen=True)
class _History:
    """A domain's versions, first to last, and of each the part of its held-out text that is measured."""

    domain: str
    versions: list[Version]
    texts: list[Tokens | None]

    def columns(self, stage: int) -> list[int]:
        """Texts measured at a stage: all under the base, after a lesson those so far and the next one's."""
        last = len(self.texts) if stage == 0 else min(stage + 1, len(self.texts))
        return [j for j in range(last) if self.texts[j] is not None]

    @property
    def prompts(self) -> list[Ids]:
        """Beginnings of the first and the last lesson's held-out text, as far as there are any."""
        there = [text.ids[:PROMPT] for text in self.texts if text is not None]
        return [there[0], there[-1]] if len(there) > 1 else there


def _history(learner: ContinualLearner, domain: str, tokens: int) -> _History:
    versions = learner.store.history(domain)
    return _History(domain, versions, [_probe(learner, version, tokens) for version in versions])


def _probe(learner: ContinualLearner, version: Version, tokens: int) -> Tokens | None:
    """A lesson's held-out text up to the token that is number `tokens` of those that count; None without one."""
    text = learner.store.probe(version, learner.model.vocab_size)
    if text is None:
        return None
    counted = np.flatnonzero(text.span(1, len(text))[1])[:tokens]
    if not len(counted):
        return None
    end = int(counted[-1]) + 2
    trained = None if text.trained is None else text.trained[:end]
    return Tokens(text.ids[:end], trained, text.n_documents, text.n_bytes)


def _measure(learner: ContinualLearner, history: _History, progress: "_Progress") -> dict[str, Any]:
    """One domain's record: lessons, matrix, intervals and what its text is like."""
    lessons = len(history.versions)
    losses: list[list[float | None]] = [[None] * lessons for _ in range(lessons + 1)]
    documents: list[list[Floats]] = [[] for _ in range(lessons)]  # of each text, nats by document after each stage
    counts: list[Floats] = [np.zeros(0)] * lessons
    generated = {}
    for stage in range(lessons + 1):
        if stage == 0:
            lora.detach(learner.model)
        else:
            version = history.versions[stage - 1]
            lora.attach_arrays(learner.model, *read_adapter(learner.store.files_of(version)))
        learner.model.train(False)
        if stage in (0, lessons):
            generated["base" if stage == 0 else "domain"] = _continuations(learner, history.prompts, progress)
        for j in history.columns(stage):
            text = history.texts[j]
            assert text is not None
            began, length = time.perf_counter(), learner.config.seq_len
            parts = predictions(learner.model, evaluation_windows(text, length, length))
            nats = np.concatenate([part.nats for part in parts])
            losses[stage][j] = float(nats.mean(dtype=np.float64))
            sums, counts[j] = document_sums(nats, text, learner.tokenizer.eos_id)
            if stage > j:
                documents[j].append(sums)
            progress.measured(len(text), time.perf_counter() - began)
    intervals = [_interval(documents[j], counts[j]) for j in range(lessons)]
    taught = [_taught_later(history.versions, j) for j in range(lessons)]
    known = [version.figures.get("heldout", {}).get("taught_percent", 0.0) for version in history.versions]
    names = [version.name for version in history.versions]
    counted, fresh = ([percent < TOLD for percent in each] for each in (taught, known))
    return {
        "domain": history.domain,
        "regime": "domain named",
        "lessons": [
            {
                "version": version.name,
                "source": version.source,
                "measured_tokens": int(counts[j].sum()),
                "documents": int((counts[j] > 0).sum()),
                "taught_percent": taught[j],
                "known_percent": known[j],
                "ppl_forget_interval": found.as_json() if (found := intervals[j]) else None,
            }
            for j, version in enumerate(history.versions)
        ],
        "pruned": history.versions[0].depth - 1,
        "matrix": ForgettingMatrix(names, losses, counted=counted, fresh=fresh).as_json(),
        "generated": generated if history.prompts else None,
    }


def _taught_later(versions: list[Version], j: int) -> float:
    """Percent of a lesson's held-out text that a later one taught, as far as that was measured then."""
    kept = (kept for version in versions[j + 1 :] for kept in version.figures.get("kept", ()))
    return max((k.get("taught_percent", 0.0) for k in kept if k["version"] == versions[j].name), default=0.0)


def _interval(stages: list[Floats], counts: Floats) -> Interval | None:
    """Of a text's ppl_forget, from its nats by document after its own lesson and each later one.

    The best stage is that of the whole text: the best of each resample would be luck, the more the more stages.
    """
    if len(stages) < 2 or (counts > 0).sum() < INTERVAL_FROM:
        return None
    best = int(np.argmin([sums.sum() for sums in stages[:-1]]))
    forgotten = lambda loss: 100 * np.expm1(loss[:, -1] - loss[:, best])  # noqa: E731
    return statistics.bootstrap(np.stack(stages), counts, forgotten)


def _continuations(learner: ContinualLearner, prompts: list[Ids], progress: "_Progress") -> dict[str, Any]:
    """How varied the text is that follows the prompts; of a fixed length, on which the measures depend."""
    texts = []
    for prompt in prompts:
        began = time.perf_counter()
        ids = decode(learner.model, prompt.tolist(), CONTINUATION, SAMPLING, learner.tokenizer.vocab_size)
        texts.append(list(ids))
        progress.continued(time.perf_counter() - began)
    return {
        "continuations": len(texts),
        "tokens": CONTINUATION,
        "distinct_1": statistics.distinct(texts, 1),
        "distinct_2": statistics.distinct(texts, 2),
        "repetition_4": statistics.repetition(texts, 4),
        "longest_loop": max(map(statistics.longest_loop, texts), default=None),
        "texts": [learner.tokenizer.decode(text) for text in texts],
    }


def _routing(learner: ContinualLearner, history: _History) -> dict[str, Any] | None:
    """What the router takes a domain's texts for, and what its mistakes cost; None where all are short.

    `oracle_gap` is the loss of the rest of each piece under the domain it was routed to, less that under the domain it
    is from, nats per token over all pieces. Above 0 the name is worth something.
    """
    pieces = [piece for text in history.texts if text is not None for piece in _pieces(text, learner.config.seq_len)]
    if not pieces:
        return None
    learner.set_adapter(None)
    chosen = [learner.route(tokens[0, :DOCUMENT_PREFIX].tolist()).domain for tokens, _ in pieces]
    gap = 0.0
    for domain in set(chosen) - {history.domain}:
        wrong = [piece for piece, taken_for in zip(pieces, chosen, strict=True) if taken_for == domain]
        for name, sign in ((domain, 1), (history.domain, -1)):
            learner.set_adapter(name)
            gap += sign * evaluate(learner.model, wrong).nats
    counts = {name or "none": chosen.count(name) for name in sorted(set(chosen), key=str)}
    return {
        "pieces": len(pieces),
        "routed_by_tokens": DOCUMENT_PREFIX,
        "chosen": counts,
        "accuracy": chosen.count(history.domain) / len(pieces),
        "oracle_gap": gap / sum(float(mask.sum()) for _, mask in pieces),
    }


def _pieces(text: Tokens, length: int) -> list[Batch]:
    """A text cut into windows of `length` targets, of which those behind the routed tokens count."""
    pieces = []
    for start in range(0, len(text) - DOCUMENT_PREFIX - SHORTEST_REST, length):
        ids, trained = text.span(start, min(start + length + 1, len(text)))
        mask = trained[1:].astype(np.float32)
        mask[: DOCUMENT_PREFIX - 1] = 0
        if mask.any():
            pieces.append((ids[None], mask[None]))
    return pieces


class _Progress:
    """Tells how long all of it will take, once one measurement is done, and then how much is left."""

    def __init__(self, tell: Callable[[Event], None], histories: list[_History]) -> None:
        self.tell = tell
        cells = [
            len(text)
            for history in histories
            for stage in range(len(history.versions) + 1)
            for j in history.columns(stage)
            if (text := history.texts[j]) is not None
        ]
        self.cells, self.tokens = len(cells), sum(cells)
        self.continuations = sum(2 * len(history.prompts) for history in histories)
        self.done = self.tokens_done = self.continued_done = 0
        self.seconds = self.continued_seconds = 0.0

    def continued(self, seconds: float) -> None:
        """A continuation was generated."""
        self.continued_done += 1
        self.continued_seconds += seconds

    def measured(self, tokens: int, seconds: float) -> None:
        """A text of so many tokens was measured."""
        self.done += 1
        self.tokens_done += tokens
        self.seconds += seconds
        left = (self.tokens - self.tokens_done) * self.seconds / self.tokens_done
        left += (self.continuations - self.continued_done) * self.continued_seconds / self.continued_done
        if self.done == 1:
            taken = self.seconds + self.continued_seconds
            text = f"{self.cells} measurements and {self.continuations} continuations: about {taken + left:.0f} s"
            self.tell({"event": "note", "text": text})
        self.tell({"event": "measuring", "done": self.done, "total": self.cells, "eta_seconds": left})
