"""One lesson: documents are divided, measured, trained on within a budget of time, measured again and committed.

Everything random in a lesson is a function of the seed, the domain and the number of lessons before it. The base's
arrays are never written to; whatever is raised, the domain's versions are as before.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_impl import data, lora, states
from mlx_impl.adapters import Statistics, read_adapter, read_statistics, write_adapter, write_state
from mlx_impl.arrays import flatten
from mlx_impl.base import BaseModel
from mlx_impl.config import Budget, ContinualLearningConfig
from mlx_impl.errors import InputError, NonFiniteLossError
from mlx_impl.evaluate import Evaluation, Measuring
from mlx_impl.holdout import estimated_tokens, sample_documents, split_holdout
from mlx_impl.memory import lesson_bytes
from mlx_impl.ngrams import Numbers, ngrams, share
from mlx_impl.past import Past, hold, recall
from mlx_impl.readers import Document
from mlx_impl.router import Router, count_tokens
from mlx_impl.session import BACKWARD, Session
from mlx_impl.store import Store
from mlx_impl.tokenizer import Tokenizer
from mlx_impl.turns import as_answers
from mlx_impl.versions import HeldOut, Version

HELD_OUT_FROM = 2000
"""Tokens from which a lesson holds a part out; a smaller one is measured on its own text and says so."""

TOKENS_PER_SECOND_AT_MOST = 10_000
"""Faster than a lesson trains, but for tiny models and large machines; what a budget of time takes of a longer text."""

HELD_OUT_AT_MOST = 4096
MEASURING_SHARE = 0.05
"""Share of the time that measuring may take before the steps, and again after them."""

STATES_SHARE, BACKGROUND_SHARE = 0.05, 0.1
"""Shares of the steps' work that states may add, and the base's own text, which no domain may have brought yet."""

ROOM = 0.5
"""Share of the time that a lesson's steps may be expected to take for the clock to have no say in it."""

MEASURED_TOKENS = 0.3
"""Tokens measured before, and again after, for each that is trained on: a short lesson is not outlasted by them."""

KEPT_TOKENS = 512
"""Tokens of each earlier lesson's held-out part on which the domain's forgetting is measured."""

Event = dict[str, Any]
Adapter = tuple[lora.Arrays, float]
"""Arrays and scale."""


@dataclass
class Lesson:
    """What one `learn` did. Losses are in nats per token; `measured` says on which text: heldout, or fit on its own.

    `tokens` are those to train on, of a sample where the text was too long for the time; it is `complete` without one.
    `kept` is what happened to the domain's earlier lessons, latest first, as far as the time sufficed to measure them;
    `not_measured` counts those that have a held-out part and for which it did not. `seen_percent` is the part of the
    text that the steps came to, once at least, whether or not its tokens count. `repeated` are the numbers of the
    lessons whose text it taught again, `taught_percent` the share of its held-out part that they taught.
    """

    domain: str
    version: str
    source: str
    tokens: int
    steps: int
    seconds: float
    training_seconds: float
    trained_tokens: int
    replayed_tokens: int
    trainable_parameters: int
    measured: str
    measured_tokens: int
    before: float
    after: float
    batch_size: int
    complete: bool
    kept: list[dict[str, Any]] = field(default_factory=list)
    repeated: list[int] = field(default_factory=list)
    taught_percent: float = 0.0
    not_measured: int = 0
    seen_percent: float = 100.0

    def as_json(self) -> dict[str, Any]:
        """What `learn --json` prints."""
        record = asdict(self)
        before, after = record.pop("before"), record.pop("after")
        taught, measured = record.pop("taught_percent"), record.pop("measured")
        record[measured] = {
            "before": before,
            "after": after,
            "tokens": record.pop("measured_tokens"),
            **({"taught_percent": taught} if measured == "heldout" else {}),
        }
        return {**record, "tokens_per_second": self.trained_tokens / self.training_seconds}


@dataclass
class Teacher:
    """Gives lessons on one base into one store; the adapter of the last one stays attached to the model."""

    model: BaseModel
    config: ContinualLearningConfig
    tokenizer: Tokenizer
    store: Store
    router: Router

    def teach(
        self,
        documents: list[Document],
        domain: str,
        source: str,
        importance: float,
        budget: Budget,
        started: float,
        report: Callable[[Event], None],
        like_base: Sequence[Document],
    ) -> tuple[Lesson, Adapter]:
        """Teach documents, as `ContinualLearner.learn` says; also returns the adapter that it ends with.

        `started` is when the budget's time began, by time.perf_counter. The store is locked for writing by the caller.
        """
        note = lambda text: report({"event": "note", "text": text})  # noqa: E731
        taken = self._affordable(documents, budget, report)
        train, heldout = self._split(taken)
        if heldout is None and self.config.holdout not in (0, ContinualLearningConfig.holdout):
            note(f"--holdout takes nothing from a text of less than {HELD_OUT_FROM:,} tokens")
        probe = heldout if heldout is not None else train
        history = self.store.history(domain)
        parent = history[-1] if history else None
        depth = parent.depth if parent else 0  # not the history's length: early versions may have been pruned
        seed = _seed(self.config.seed, domain, depth)
        shape = self._attach(parent, mx.random.key(seed))
        if shape.rank != self.config.lora_r:
            note(f"{domain} keeps its rank of {shape.rank}")
        length = min(self.config.seq_len, len(train) - 1)
        past = recall(self.store, parent, self.model, self.config, seed, length, note)
        past.source, past.importance = source, importance
        past.recognise(train, heldout, self.config.seq_len)
        if self.config.batch_size == 1 and self.config.replay_ratio > 0.5 and past.replayable:
            note("with one window a step at most half are replayed; more than that needs --batch-size 2 or above")
        report(
            {
                "event": "begin",
                "tokens": len(train),
                "heldout": len(heldout) if heldout is not None else 0,
                "predicted_memory": self._predicted_memory(len(train), past, bool(like_base)),
            }
        )

        measuring = Measuring(self.model, self.config.seq_len)
        patience = self._patience(measuring, probe, self._work(train, budget, past), budget)
        first, earlier = self._measure(measuring, probe, history, len(train), budget, patience)
        check_finite(first, "before the lesson: the base model is damaged, or its domain is; see undo")
        report({"event": "measured", "when": "before", "loss": first.loss, "tokens": first.tokens})

        work = min(patience * measuring.speed, self._work(train, budget, past))
        statistics = self._statistics(train, parent, work)
        hold(past, self.model, self.config, seed, work)
        end = started + budget.seconds
        general = None
        if like_base:
            general = data.tokens_of(self._affordable(list(like_base), budget, report), self.tokenizer)
        deadline, speed = end - measuring.seconds, measuring.speed if patience < math.inf else math.inf
        session = Session(self.model, self.config, train, past, seed % 2**32, budget, deadline, speed, general)
        session.run(report)

        left = end - time.perf_counter() if patience < math.inf else math.inf
        (first, last), *rest = measuring.after(max(left, measuring.seconds))
        for measured in (last, *(now for _, now in rest)):
            check_finite(measured, "after the lesson: nothing was kept, try a lower --lr")
        report({"event": "measured", "when": "after", "loss": last.loss, "tokens": last.tokens})
        arrays = lora.adapter_arrays(self.model)
        taught = ngrams(train.ids) if rest else ngrams(train.ids[:0])
        lesson = Lesson(
            domain=domain,
            version="",
            source=source,
            tokens=len(train),
            steps=session.step,
            seconds=time.perf_counter() - started,
            training_seconds=session.seconds,
            trained_tokens=session.tokens,
            replayed_tokens=session.replayed,
            trainable_parameters=lora.num_parameters(arrays),
            measured="fit" if heldout is None else "heldout",
            measured_tokens=last.tokens,
            before=first.loss,
            after=last.loss,
            batch_size=session.rows,
            complete=session.complete and taken is documents,
            kept=[self._kept(version, taught, *pair) for version, pair in zip(earlier, rest, strict=False)],
            repeated=past.repeated,
            taught_percent=100 * past.known,
            not_measured=sum("heldout" in version.figures for version in history) - len(rest),
            seen_percent=100 * session.seen * _size(taken) / _size(documents),
        )

        def write(folder: Path) -> None:
            write_adapter(folder, arrays, shape, self.model)
            write_state(folder, past.fisher, statistics, past.left)

        lesson.version = self._commit(lesson, parent, write, heldout, past).name
        lesson.seconds = time.perf_counter() - started
        return lesson, (arrays, shape.scale)

    def _work(self, train: data.Tokens, budget: Budget, past: Past) -> float:
        """That of the steps that are asked for, in tokens of a forward pass; inf where they are counted.

        A replayed token goes through its teacher, too.
        """
        if budget.steps is not None:
            return math.inf
        ratio = self.config.replay_ratio * past.replayable
        ratio = min(ratio, 0.5) if self.config.batch_size == 1 else ratio  # see replay.split_rows
        for_one = BACKWARD + (BACKWARD + 1) * ratio / (1 - ratio)
        return for_one * self._passes(len(train), budget) * len(train)

    def _patience(self, measuring: Measuring, probe: data.Tokens, work: float, budget: Budget) -> float:
        """The seconds that the lesson's parts are shares of: the budget's or, where that is ample for `work`, no end.

        Without an end nothing depends on the clock, unless the steps turn out to take more than twice as long.
        """
        if budget.steps is not None:
            return math.inf
        ample = work / (ROOM * budget.seconds)  # tokens a second
        return math.inf if measuring.pace(probe, ample) >= ample else budget.seconds

    def _passes(self, tokens: int, budget: Budget) -> float:
        """Passes over so many tokens, if the time suffices."""
        return budget.passes(math.ceil(tokens / self.config.seq_len) / self.config.gradient_accumulation_steps)

    def _statistics(self, train: data.Tokens, parent: Version | None, tokens: float) -> Statistics:
        """What the router will know of the domain after this lesson: no states if the lesson's `tokens` are too few.

        A function of this domain's lessons alone: what others brought along may be forgotten with them.
        """
        before = (read_statistics(self.store.files_of(parent)) if parent else None) or {}
        statistics = {**before, **count_tokens(train.ids, before or None)}
        start = states.first_token(self.tokenizer)
        affordable = STATES_SHARE * tokens / states.TOKENS_OF_ONE  # stretches
        if affordable < 1:
            return statistics
        background = before.get(states.BACKGROUND)
        with lora.bare(self.model):
            if background is None and BACKGROUND_SHARE * tokens > states.PRICE * states.TOKENS_OF_ONE:
                background = self.router.background()  # the same for all; that others have it must not decide
                if background is None:
                    background = states.background(self.model, self.tokenizer)
            rows = states.stretches(train.ids, int(min(affordable, states.PER_LESSON)))
            means = states.mean_states(self.model, rows, start)
        if states.MEANS in before:
            share = len(train) / float(statistics["counts"].sum())
            means = states.merged(before[states.MEANS], means, share)
        statistics[states.MEANS] = means
        if background is None:
            return statistics
        how = before.get(states.MADE_WITH, states.made_with())
        return {**statistics, states.BACKGROUND: background, states.MADE_WITH: how}

    def _predicted_memory(self, tokens: int, past: Past, like_base: bool) -> int:
        """Bytes at the peak of the lesson's steps, if the time allows whole batches."""
        c = self.config
        replayed = past.replayable > 0 and c.replay_ratio > 0
        rows = c.batch_size + (replayed and c.batch_size == 1)  # see replay.split_rows
        if like_base and c.base_ratio > 0:
            rows += max(1, math.ceil(min(c.batch_size * c.base_ratio, c.batch_size - 1)))
        length = past.buffer.length if replayed else min(c.seq_len, tokens - 1)  # replayed ones may be longer
        adapter = lora.num_parameters(lora.adapter_arrays(self.model))
        weights = flatten(self.model.parameters()).items()
        base = sum(array.nbytes for name, array in weights if not name.endswith((".lora_a", ".lora_b")))
        return lesson_bytes(self.model.config, base, adapter, rows, length)

    def _attach(self, parent: Version | None, key: mx.array) -> lora.LoRAConfig:
        """Attach the adapter as the lesson begins, a fresh one or its parent's; a domain keeps the shape it has."""
        c = self.config
        shape = lora.LoRAConfig(c.lora_r, c.lora_alpha, c.lora_dropout, tuple(c.lora_target_modules))
        if parent is None:
            lora.attach(self.model, shape, key)
        else:
            arrays, scale = read_adapter(self.store.files_of(parent))
            lora.attach_arrays(self.model, arrays, scale, shape.dropout)
            rank = next(array.shape[1] for name, array in arrays.items() if name.endswith("lora_a"))
            shape = replace(shape, rank=rank, alpha=scale * rank)
        self.model.train(False)
        return shape

    def _measure(
        self,
        measuring: Measuring,
        probe: data.Tokens,
        history: list[Version],
        tokens: int,
        budget: Budget,
        patience: float,
    ) -> tuple[Evaluation, list[Version]]:
        """Measure the lesson's own probe, then those of earlier lessons, latest first; returns the one and the others.

        The probe is measured on a window at least and, where `patience` allows, one earlier lesson on a short one.
        """
        c = self.config
        asked = self._passes(tokens, budget) * tokens
        seconds = MEASURING_SHARE * patience
        if budget.steps is not None:
            asked = budget.steps * c.batch_size * c.gradient_accumulation_steps * c.seq_len
        at_most = MEASURED_TOKENS * asked
        share = 2 / 3 if history else 1.0
        first = measuring.before(probe, max(c.seq_len, share * at_most), share * seconds)
        left = at_most - first.tokens
        earlier: list[Version] = []
        for version in reversed(history):
            if measuring.seconds + c.seq_len / measuring.speed > seconds or (earlier and left <= 0):
                break
            text = self.store.probe(version, self.model.vocab_size)
            if text is not None:
                left -= measuring.before(text, min(KEPT_TOKENS, left), seconds - measuring.seconds).tokens
                earlier.append(version)
        return first, earlier

    def _kept(self, version: Version, taught: Numbers, before: Evaluation, after: Evaluation) -> dict[str, Any]:
        """How the loss on an earlier lesson's held-out part changed; the percentage is that of its perplexity.

        A user may teach a text again, alone or in a folder with others: how much of what was held out then was among
        what was trained on now, of which `taught` are the n-grams, is told, too.
        """
        kept = self.store.heldout(version)
        change = min(after.loss - before.loss, 700.0)  # what exp still can
        return {
            "version": version.name,
            "source": version.source,
            "before": before.loss,
            "after": after.loss,
            "tokens": after.tokens,
            "ppl_forget_percent": 100 * math.expm1(change),
            "taught_percent": 100 * share(kept.ids, taught) if kept is not None else 0.0,
        }

    def _affordable(self, documents: list[Document], budget: Budget, report: Callable[[Event], None]) -> list[Document]:
        """The documents themselves, or a sample of them where these are far more than the time allows to train on."""
        most = round(TOKENS_PER_SECOND_AT_MOST * max(1.0, budget.seconds))
        there = sum(estimated_tokens(document.text) for document in documents)
        if budget.steps is not None or there <= most:
            return documents
        # The same for each lesson on this text in the same time, so that none trains on what another holds out.
        taken = sample_documents(documents, most, self.config.seed)
        count = sum(estimated_tokens(document.text) for document in taken)
        text = f"the text has about {there:,} tokens; about {count:,} of them, drawn over all of it, are what"
        report({"event": "note", "text": f"{text} {budget.seconds:g} seconds can hold"})
        return taken

    def _split(self, documents: list[Document]) -> tuple[data.Tokens, data.Tokens | None]:
        """Training and held-out tokens; the latter None where the text is too short or nothing is to be held out."""
        loss_on = self.config.loss_on
        if self.config.answer_share > 0 and loss_on == "all":
            loss_on = "completion"  # who learns made-up questions learns to ask them
        tokens_of = lambda chosen: data.tokens_of(chosen, self.tokenizer, loss_on)  # noqa: E731
        if self.config.holdout > 0 and self._is_long(documents):
            size = HELD_OUT_AT_MOST
            while True:
                train, held = split_holdout(documents, self.config.holdout, size, estimated_tokens, self.config.seed)
                kept = tokens_of(held)
                if len(kept) <= HELD_OUT_AT_MOST:
                    break
                estimate = sum(estimated_tokens(document.text) for document in held)  # was too low for this text
                size = int(0.95 * estimate * HELD_OUT_AT_MOST / len(kept))
            rest = tokens_of(self._phrased(train))
            if data.teaches(kept) and data.teaches(rest):
                return rest, kept
        everything = tokens_of(self._phrased(documents))
        if not data.teaches(everything):
            raise InputError(
                f"nothing to predict in this text: it has {len(everything)} tokens, of which the first is given, and "
                f"--loss-on {self.config.loss_on} says which of the others count"
            )
        return everything, None

    def _phrased(self, documents: list[Document]) -> list[Document]:
        """The documents as they are trained on: a part of their plain text as answers, if that is wanted."""
        share = self.config.answer_share
        if share == 0:
            return documents
        if not self.tokenizer.has_chat_template:
            raise InputError("--answer-share: the model has no chat template that an answer could stand in")
        return as_answers(documents, share, lambda word: len(self.tokenizer.encode(f" {word}")))

    def _is_long(self, documents: list[Document]) -> bool:
        """Whether the documents have `HELD_OUT_FROM` tokens; only where it is in doubt are they encoded."""
        if sum(len(document.text) for document in documents) >= 16 * HELD_OUT_FROM:
            return True
        return len(data.tokens_of(documents, self.tokenizer, self.config.loss_on)) >= HELD_OUT_FROM

    def _commit(
        self,
        lesson: Lesson,
        parent: Version | None,
        write: Callable[[Path], None],
        heldout: data.Tokens | None,
        past: Past,
    ) -> Version:
        kept = None
        if heldout is not None:
            kept = HeldOut(heldout.ids, heldout.trained, heldout.n_documents, heldout.n_bytes)
        figures = {k: v for k, v in lesson.as_json().items() if k not in ("version", "domain", "source")}
        return self.store.commit(
            lesson.domain,
            parent,
            write,
            source=lesson.source,
            config=asdict(self.config),
            figures=figures,
            heldout=kept,
            replay=past.record(),
        )


def _size(documents: list[Document]) -> int:
    """Characters of documents."""
    return sum(len(document.text) for document in documents)


def check_finite(measured: Evaluation, what: str) -> None:
    """Raise NonFiniteLossError for a loss that is no number."""
    if not math.isfinite(measured.loss):
        raise NonFiniteLossError(f"the loss is {measured.loss} {what}")


def _seed(seed: int, domain: str, depth: int) -> int:
    """63 bits that depend on nothing but these three."""
    digest = hashlib.sha256(json.dumps([seed, domain, depth]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
