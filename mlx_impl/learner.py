"""ContinualLearner: lessons on a frozen base.

A lesson reads documents, holds a part of them out, trains the domain's adapter on the rest within a budget of time,
measures before and after, and commits the result as a version. The base's arrays are never written to. Everything
random in a lesson is a function of the seed, the domain and the number of lessons before it.
"""

import hashlib
import json
import math
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_impl import data, generate, lora, states
from mlx_impl.adapters import Statistics, read_adapter, read_statistics, write_adapter, write_state
from mlx_impl.arrays import flatten
from mlx_impl.base import BaseModel
from mlx_impl.config import Budget, ContinualLearningConfig
from mlx_impl.device import compute_dtype, use_device
from mlx_impl.errors import InputError, NonFiniteLossError
from mlx_impl.evaluate import Evaluation, Measuring, evaluate, total
from mlx_impl.foreign import open_model
from mlx_impl.holdout import estimated_tokens, sample_documents, split_holdout
from mlx_impl.memory import lesson_bytes
from mlx_impl.past import Past, recall
from mlx_impl.readers import Document, text_document
from mlx_impl.reservoirs import check_importance
from mlx_impl.router import DOCUMENT_PREFIX, Router, Routing, count_tokens
from mlx_impl.session import Session
from mlx_impl.store import HeldOut, Store, Version, check_domain, open_store
from mlx_impl.tokenizer import Tokenizer
from mlx_impl.windows import evaluation_windows

HELD_OUT_FROM = 2000
"""Tokens from which a lesson holds a part out; a smaller one is measured on its own text and says so."""

TOKENS_PER_SECOND_AT_MOST = 10_000
"""Faster than a lesson trains, but for tiny models and large machines; what a budget of time takes of a longer text."""

HELD_OUT_AT_MOST = 4096
MEASURING_SHARE = 0.08
"""Share of the time that measuring may take before the steps, and again after them."""

STATES_SHARE = 0.15
"""Share of the time that a domain's states may take, in its first lesson mostly: the base's own text takes longest."""

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
    `kept` is what happened to the domain's earlier lessons, latest first, as far as the time sufficed to measure them.
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

    def as_json(self) -> dict[str, Any]:
        """What `learn --json` prints."""
        record = asdict(self)
        before, after = record.pop("before"), record.pop("after")
        record[record.pop("measured")] = {
            "before": before,
            "after": after,
            "tokens": record.pop("measured_tokens"),
        }
        return {**record, "tokens_per_second": self.trained_tokens / self.training_seconds}


class ContinualLearner:
    """A base model, what it has learned, and the means to teach it more.

    `base_model` is left as it is; adapters are attached to it and taken off. Without a store the lessons are kept in
    a temporary folder, which goes with the learner.
    """

    def __init__(
        self,
        base_model: BaseModel,
        config: ContinualLearningConfig | None = None,
        tokenizer: Tokenizer | None = None,
        store: Store | None = None,
    ) -> None:
        if tokenizer is None:
            raise InputError("ContinualLearner needs the model's tokenizer")
        tokenizer.check_fits(base_model.vocab_size)
        self.model = base_model
        config = config or ContinualLearningConfig()
        self.config = replace(config, seq_len=min(config.seq_len, base_model.config.max_seq_len))
        self.tokenizer = tokenizer
        if store is None:
            folder = tempfile.mkdtemp(prefix="minimac-lessons-")
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            store = Store(Path(folder), "the model in memory", tokenizer.digest)
        self.store = store
        self.adapter: str | None = None
        """The attached domain; None is the bare base."""
        self._attached: Adapter | None = None
        self._router = Router(base_model, tokenizer, store)
        use_device(self.config.device)

    @classmethod
    def from_checkpoint(
        cls,
        directory: str | Path,
        config: ContinualLearningConfig | None = None,
        store: str | Path | None = None,
    ) -> "ContinualLearner":
        """Open a model directory with what it has learned, kept in `store` or in the directory's `learner`."""
        directory = Path(directory).expanduser()
        config = config or ContinualLearningConfig()
        use_device(config.device)
        model = open_model(directory, compute_dtype())
        tokenizer = Tokenizer.load(directory)
        return cls(model, config, tokenizer, open_store(directory, Path(store) if store else None))

    # -- domains -------------------------------------------------------------------------------------------------

    def set_adapter(self, domain: str | None) -> None:
        """Attach the current version of a domain, or with None the bare base. Hashes are checked on reading."""
        if domain is None:
            self._put(None, None)
        else:
            version = self.store.require(domain)
            self._put(domain, read_adapter(self.store.files_of(version)))

    def _put(self, domain: str | None, adapter: Adapter | None) -> None:
        """Attach an adapter, or none; one that does not fit leaves the bare base."""
        self.adapter = self._attached = None
        if adapter is None:
            lora.detach(self.model)
        else:
            lora.attach_arrays(self.model, *adapter, self.config.lora_dropout)
        self.model.train(False)
        self.adapter, self._attached = domain, adapter

    def choose(self, domain: str | None = None, prompt: Sequence[int] | None = None) -> str | None:
        """Attach what a person means: a domain by name, "none" for the bare base, "auto" or None what `route` says.

        `prompt` are the token ids to route by; without any it is the base. Returns the domain, None for the base.
        """
        if domain in (None, "auto"):
            self.set_adapter(self.route(prompt if prompt is not None else ()).domain)
        else:
            self.set_adapter(None if domain == "none" else domain)
        return self.adapter

    def route(self, prompt: Sequence[int]) -> Routing:
        """Which domain a prompt belongs to, by its first token ids; what is attached stays attached. See `router`."""
        before = self.adapter, self._attached
        try:
            self._put(None, None)
            return self._router.route(prompt)
        finally:
            self._put(*before)

    def undo(self, domain: str = "main", to: int | None = None) -> Version | None:
        """Take the last lesson of a domain back, or go to version `to`; of a first lesson, remove the domain."""
        with self.store.writing():
            head = self.store.undo(domain, to)
        if self.adapter == domain:
            self.set_adapter(domain if head else None)
        return head

    def forget(self, domain: str) -> list[Version]:
        """Erase a domain: its versions, held-out text and replay windows, without a trace. Returns what it had."""
        with self.store.writing():
            erased = self.store.forget(domain)
        if self.adapter == domain:
            self.set_adapter(None)
        return erased

    def get_stats(self) -> dict[str, Any]:
        """Domains, lessons that they stand on, weights of one adapter as attached (0: none) and the attached domain."""
        return {
            "domains": self.store.domains(),
            "lessons": sum(record["lessons"] for record in self.store.overview()),
            "adapter_parameters": lora.num_parameters(lora.adapter_arrays(self.model)),
            "attached": self.adapter,
        }

    def print_stats(self) -> None:
        """Print `get_stats`, one figure a line."""
        for name, value in self.get_stats().items():
            print(f"{name.replace('_', ' ')}: {', '.join(value) if isinstance(value, list) else value}")

    def save_checkpoint(self, path: str | Path) -> Path:
        """Copy all that was learned to a folder that is not there yet; returns it. The base is not part of it."""
        return self.store.copy_to(Path(path).expanduser())

    def load_checkpoint(self, path: str | Path) -> None:
        """Go on with what `save_checkpoint` wrote; lessons are then added to that folder.

        InputError where it belongs to another base or tokenizer, or holds no lessons. The bare base is attached.
        """
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder")
        store = self.store.beside(folder)
        if not store.domains():
            raise InputError(f"{folder}: no lessons in it; name a folder that save_checkpoint wrote")
        self.set_adapter(None)
        self.store = store
        self._router = Router(self.model, self.tokenizer, store)

    # -- learning ------------------------------------------------------------------------------------------------

    def learn_from_text(
        self, text: str, domain: str = "main", importance: float = 1.0, budget: Budget | None = None
    ) -> Lesson:
        """Teach a text; see `learn`."""
        return self.learn([text_document(text, "text")], domain, "text", budget, importance=importance)

    def learn_from_batch(
        self, texts: Sequence[str], domain: str = "main", importance: float = 1.0, budget: Budget | None = None
    ) -> Lesson:
        """Teach several texts in one lesson; see `learn`."""
        documents = [text_document(text, f"text {number}") for number, text in enumerate(texts, 1)]
        return self.learn(documents, domain, "batch", budget, importance=importance)

    def learn(
        self,
        documents: Sequence[Document],
        domain: str = "main",
        source: str = "text",
        budget: Budget | None = None,
        report: Callable[[Event], None] = lambda event: None,
        importance: float = 1.0,
        like_base: Sequence[Document] = (),
    ) -> Lesson:
        """Teach documents to a domain: at least one optimizer step on them, then a new version of it.

        From the second lesson on, `replay_ratio` of each batch comes from the domain's earlier lessons, and elastic
        weight consolidation holds the adapter near the version before. `importance` is how often this lesson's
        windows will be replayed, relative to other lessons'. `like_base` are documents of the kind that the base was
        trained on (see `sampled_from_base`): `base_ratio` of them is added to each batch, to keep what the base can do.

        Raises InputError for a text with nothing to predict, NonFiniteLossError when the loss explodes. Whatever
        is raised, also KeyboardInterrupt, the domain is as before.
        """
        started = time.perf_counter()
        check_domain(domain)
        check_importance(importance)
        source = source.encode("utf-8", "replace").decode()  # a file's name need not be text
        before = self.adapter, self._attached
        try:
            with self.store.writing():
                return self._lesson(
                    list(documents), domain, source, importance, budget or Budget(), started, report, like_base
                )
        except BaseException:
            self._put(*before)
            raise

    def _lesson(
        self,
        documents: list[Document],
        domain: str,
        source: str,
        importance: float,
        budget: Budget,
        started: float,
        report: Callable[[Event], None],
        like_base: Sequence[Document],
    ) -> Lesson:
        taken = self._affordable(documents, budget, report)
        train, heldout = self._split(taken)
        probe = heldout if heldout is not None else train
        history = self.store.history(domain)
        parent = history[-1] if history else None
        depth = parent.depth if parent else 0  # not the history's length: early versions may have been pruned
        seed = _seed(self.config.seed, domain, depth)
        shape = self._attach(parent, mx.random.key(seed))
        if shape.rank != self.config.lora_r:
            report({"event": "note", "text": f"{domain} keeps its rank of {shape.rank}"})
        report(
            {
                "event": "begin",
                "tokens": len(train),
                "heldout": len(heldout) if heldout is not None else 0,
                "predicted_memory": self._predicted_memory(len(train), bool(history), bool(like_base)),
            }
        )

        measuring = Measuring(self.model, self.config.seq_len)
        first, earlier = self._measure(measuring, probe, history, len(train), budget)
        _check_finite(first, "before the lesson: the base model is damaged, or its domain is; see undo")
        report({"event": "measured", "when": "before", "loss": first.loss, "tokens": first.tokens})

        statistics = self._statistics(train, parent, budget)
        length = min(self.config.seq_len, len(train) - 1)
        past = recall(self.store, parent, self.model, self.config, seed, budget, length)
        past.source, past.importance = source, importance
        end = started + budget.seconds
        general = None
        if like_base:
            general = data.tokens_of(self._affordable(list(like_base), budget, report), self.tokenizer)
        deadline = end - measuring.seconds
        session = Session(
            self.model, self.config, train, past, seed % 2**32, budget, deadline, measuring.speed, general
        )
        session.run(report)

        left = end - time.perf_counter() if budget.steps is None else math.inf
        (first, last), *rest = measuring.after(max(left, measuring.seconds))
        _check_finite(last, "after the lesson: nothing was kept, try a lower --lr")
        report({"event": "measured", "when": "after", "loss": last.loss, "tokens": last.tokens})
        arrays = lora.adapter_arrays(self.model)
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
            kept=[_kept(version, *pair) for version, pair in zip(earlier, rest, strict=False)],
        )

        def write(folder: Path) -> None:
            write_adapter(folder, arrays, shape, self.model)
            write_state(folder, past.fisher, statistics)

        lesson.version = self._commit(lesson, parent, write, heldout, past).name
        lesson.seconds = time.perf_counter() - started
        self.adapter, self._attached = domain, (arrays, shape.scale)
        return lesson

    def _statistics(self, train: data.Tokens, parent: Version | None, budget: Budget) -> Statistics:
        """What the router will know of the domain after this lesson: no states of it where the time is too short."""
        before = (read_statistics(self.store.files_of(parent)) if parent else None) or {}
        statistics = {**before, **count_tokens(train.ids, before or None)}
        start, rows = states.first_token(self.tokenizer), states.stretches(train.ids, states.PER_LESSON)
        with lora.bare(self.model):
            started = time.perf_counter()
            states.mean_states(self.model, rows[:1], start)
            one = time.perf_counter() - started
            affordable = STATES_SHARE * budget.seconds / one if budget.steps is None else math.inf  # stretches
            background = self._router.background()
            if background is None and affordable > states.PRICE:
                background = states.background(self.model, self.tokenizer)
                affordable -= states.PRICE
            if background is None or affordable < 1:
                return statistics
            rows = states.stretches(train.ids, int(min(affordable, states.PER_LESSON)))
            means = states.mean_states(self.model, rows, start)
        if states.MEANS in before:
            share = len(train) / float(statistics["counts"].sum())
            means = states.merged(before[states.MEANS], means, share)
        return {**statistics, states.MEANS: means, states.BACKGROUND: background}

    def _predicted_memory(self, tokens: int, replayed: bool, like_base: bool) -> int:
        """Bytes at the peak of the lesson's steps, if the time allows whole batches."""
        c = self.config
        rows = c.batch_size + (like_base and c.base_ratio > 0)
        if replayed and c.replay_ratio > 0 and c.batch_size == 1:
            rows += 1  # see replay.split_rows
        adapter = lora.num_parameters(lora.adapter_arrays(self.model))
        weights = flatten(self.model.parameters()).items()
        base = sum(array.nbytes for name, array in weights if not name.endswith((".lora_a", ".lora_b")))
        return lesson_bytes(self.model.config, base, adapter, rows, min(c.seq_len, tokens - 1))

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
        self, measuring: Measuring, probe: data.Tokens, history: list[Version], tokens: int, budget: Budget
    ) -> tuple[Evaluation, list[Version]]:
        """Measure the lesson's own probe, then those of earlier lessons, latest first; returns the one and the others.

        The probe is measured on a window at least and, where the time allows, one earlier lesson on a short one. With
        a number of steps the clock has no say.
        """
        c = self.config
        asked = budget.passes(math.ceil(tokens / c.seq_len)) * tokens
        seconds = MEASURING_SHARE * budget.seconds
        if budget.steps is not None:
            asked = budget.steps * c.batch_size * c.gradient_accumulation_steps * c.seq_len
            seconds = math.inf
        at_most = MEASURED_TOKENS * asked
        share = 2 / 3 if history else 1.0
        first = measuring.before(probe, max(c.seq_len, share * at_most), share * seconds)
        left = at_most - first.tokens
        earlier: list[Version] = []
        for version in reversed(history):
            if measuring.seconds + c.seq_len / measuring.speed > seconds or (earlier and left <= 0):
                break
            kept = self.store.heldout(version)
            if kept is not None:
                text = data.Tokens(kept.ids, kept.trained, kept.documents, kept.bytes)
                left -= measuring.before(text, min(KEPT_TOKENS, left), seconds - measuring.seconds).tokens
                earlier.append(version)
        return first, earlier

    def _affordable(self, documents: list[Document], budget: Budget, report: Callable[[Event], None]) -> list[Document]:
        """The documents themselves, or a sample of them where these are far more than the time allows to train on."""
        most = round(TOKENS_PER_SECOND_AT_MOST * max(1.0, budget.seconds))
        there = sum(estimated_tokens(document.text) for document in documents)
        if budget.steps is not None or there <= most:
            return documents
        # The same for each lesson on this text, so that none trains on what another holds out.
        taken = sample_documents(documents, most, self.config.seed)
        count = sum(estimated_tokens(document.text) for document in taken)
        text = f"the text has about {there:,} tokens; about {count:,} of them, drawn over all of it, are what"
        report({"event": "note", "text": f"{text} {budget.seconds:g} seconds can hold"})
        return taken

    def _split(self, documents: list[Document]) -> tuple[data.Tokens, data.Tokens | None]:
        """Training and held-out tokens; the latter None where the text is too short or nothing is to be held out."""
        tokens_of = lambda chosen: data.tokens_of(chosen, self.tokenizer, self.config.loss_on)  # noqa: E731
        if self.config.holdout > 0 and self._is_long(documents):
            size = HELD_OUT_AT_MOST
            while True:
                train, held = split_holdout(documents, self.config.holdout, size, estimated_tokens, self.config.seed)
                kept = tokens_of(held)
                if len(kept) <= HELD_OUT_AT_MOST:
                    break
                estimate = sum(estimated_tokens(document.text) for document in held)  # was too low for this text
                size = int(0.95 * estimate * HELD_OUT_AT_MOST / len(kept))
            rest = tokens_of(train)
            if _teaches(kept) and _teaches(rest):
                return rest, kept
        everything = tokens_of(documents)
        if not _teaches(everything):
            raise InputError(
                f"nothing to predict in this text: it has {len(everything)} tokens, of which the first is given, and "
                f"--loss-on {self.config.loss_on} says which of the others count"
            )
        return everything, None

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

    # -- using ---------------------------------------------------------------------------------------------------

    def evaluate(self, documents: Sequence[Document], context: int | None = None) -> Evaluation:
        """Measure documents under the attached domain, each token with at least half of `context` before it.

        The default context is that of the model, at most 512 tokens.
        """
        context = context or min(512, self.model.config.max_seq_len)
        tokens = data.tokens_of(documents, self.tokenizer)
        windows = evaluation_windows(tokens, context, max(1, context // 2))
        first = tokens.ids[:1].tolist()  # is never a target
        unseen = sum(len(self.tokenizer.token_bytes(id)) for id in first if id not in self.tokenizer.special_ids)
        measured = evaluate(self.model, windows, tokens.n_bytes - unseen)
        _check_finite(
            measured, "on this text: the model is damaged, or its numbers overflow; try MINIMAC_DTYPE=float32"
        )
        return measured

    def evaluate_routed(
        self, documents: Sequence[Document], context: int | None = None
    ) -> tuple[Evaluation, dict[str, int]]:
        """Measure each document under the domain that its first tokens suggest, those without text left out.

        Also returns how many documents went to which domain, "none" being the base. What is attached stays attached.
        """
        groups: dict[str | None, list[Document]] = {}
        chosen: dict[str, int] = {}
        begins, domain = True, None
        for document in filter(lambda document: document.text, documents):
            if begins:
                domain = self.route(self._beginning(document)).domain
                chosen[domain or "none"] = chosen.get(domain or "none", 0) + 1
            groups.setdefault(domain, []).append(document)
            begins = document.ends
        before = self.adapter, self._attached
        parts = []
        try:
            for domain, group in groups.items() or [(None, [])]:
                self.set_adapter(domain)
                parts.append(self.evaluate(group, context))
        finally:
            self._put(*before)
        measured = total(parts)
        sizes = [part.bytes for part in parts if part.bytes is not None]
        measured.bytes = sum(sizes) if len(sizes) == len(parts) else None
        return measured, chosen

    def _beginning(self, document: Document) -> list[int]:
        """The first tokens of a document, without encoding the rest of it."""
        return self.tokenizer.encode(document.text[: 16 * DOCUMENT_PREFIX])[:DOCUMENT_PREFIX]

    def sampled_from_base(self, rows: int = 8, tokens: int = 256) -> list[Document]:
        """Texts that the bare base makes up, each of `tokens` tokens, a function of the seed: what it knew before.

        They begin where a document does and are drawn at temperature 1, from the model's own distribution.
        """
        start = self.tokenizer.eos_id if self.tokenizer.eos_id is not None else self.tokenizer.bos_id
        if start is None:
            raise InputError("the tokenizer has no token that a text could begin with; give a file to --base-data")
        with lora.bare(self.model):
            drawn = generate.sampled_rows(
                self.model, start, rows, tokens, mx.random.key(self.config.seed % 2**32), self.tokenizer.vocab_size
            )
        return [Document(f"base {number}", self.tokenizer.decode(row)) for number, row in enumerate(drawn, 1)]

    def answer(self, prompt: str, domain: str | None = None, max_tokens: int = 64) -> str:
        """What `domain` says to a person's message, greedily: through the chat template where the model has one."""
        ids = generate.prompt_ids(self.tokenizer, prompt)
        self.choose(domain, ids)  # a chat template says nothing about what the prompt is about
        if self.tokenizer.has_chat_template:
            ids = self.tokenizer.encode_chat([{"role": "user", "content": prompt}])
        return generate.complete(self.model, self.tokenizer, ids, max_tokens).text

    def generate(self, prompt: str, max_length: int = 100, **sampling: Any) -> str:
        """The text that follows `prompt` under the attached domain; `sampling` as in `generate.Sampling`."""
        settings = generate.Sampling(**sampling)
        return generate.complete(self.model, self.tokenizer, prompt, max_length, settings).text


def _teaches(tokens: data.Tokens) -> bool:
    """Whether there is a token to predict that counts."""
    return len(tokens) >= 2 and (tokens.trained is None or bool(tokens.trained[1:].any()))


def _check_finite(measured: Evaluation, what: str) -> None:
    if not math.isfinite(measured.loss):
        raise NonFiniteLossError(f"the loss is {measured.loss} {what}")


def _kept(version: Version, before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """How the loss on an earlier lesson's held-out part changed; the percentage is that of its perplexity."""
    change = min(after.loss - before.loss, 700.0)  # what exp still can
    return {
        "version": version.name,
        "source": version.source,
        "before": before.loss,
        "after": after.loss,
        "tokens": after.tokens,
        "ppl_forget_percent": 100 * math.expm1(change),
    }


def _seed(seed: int, domain: str, depth: int) -> int:
    """63 bits that depend on nothing but these three."""
    digest = hashlib.sha256(json.dumps([seed, domain, depth]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
