"""ContinualLearner: lessons on a frozen base.

A lesson reads documents, holds a part of them out, trains the domain's adapter on the rest within a budget of time,
measures before and after, and commits the result as a version. The base's arrays are never written to. Everything
random in a lesson is a function of the seed, the domain and the number of lessons before it.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_impl import data, generate, lora
from mlx_impl.adapters import read_adapter, write_adapter
from mlx_impl.config import ContinualLearningConfig
from mlx_impl.device import compute_dtype, use_device
from mlx_impl.errors import InputError
from mlx_impl.evaluate import Evaluation, evaluate
from mlx_impl.holdout import split_holdout
from mlx_impl.model import ContinualLLM
from mlx_impl.readers import Document, text_document
from mlx_impl.session import Budget, Session
from mlx_impl.store import HeldOut, Store, Version, check_domain, open_store
from mlx_impl.tokenizer import Tokenizer
from mlx_impl.windows import Batch, evaluation_windows

HELD_OUT_FROM = 2000
"""Tokens from which a lesson holds a part out; a smaller one is measured on its own text and says so."""

HELD_OUT_AT_MOST = 4096
MEASURING_SHARE = 0.1
"""Share of the time that one of the two evaluations may take; both leave over three quarters to the steps."""

Event = dict[str, Any]


@dataclass
class Lesson:
    """What one `learn` did. Losses are in nats per token; `measured` says on which text: heldout, or fit on its own."""

    domain: str
    version: str
    source: str
    tokens: int
    steps: int
    seconds: float
    training_seconds: float
    trained_tokens: int
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

    `base_model` is left as it is; adapters are attached to it and taken off. Without a store lessons live in memory:
    the attached adapter is what has been learned.
    """

    def __init__(
        self,
        base_model: ContinualLLM,
        config: ContinualLearningConfig | None = None,
        tokenizer: Tokenizer | None = None,
        store: Store | None = None,
    ) -> None:
        if tokenizer is None:
            raise InputError("ContinualLearner needs the model's tokenizer")
        tokenizer.check_fits(base_model.vocab_size)
        self.model = base_model
        self.config = config or ContinualLearningConfig()
        self.tokenizer = tokenizer
        self.store = store
        self.adapter: str | None = None
        """The attached domain; None is the bare base."""
        use_device(self.config.device)

    @classmethod
    def from_checkpoint(
        cls,
        directory: str | Path,
        config: ContinualLearningConfig | None = None,
        store: str | Path | None = None,
    ) -> "ContinualLearner":
        """Open a model directory with what it has learned, kept in `store` or in the directory's `learner`."""
        directory = Path(directory)
        config = config or ContinualLearningConfig()
        use_device(config.device)
        model = ContinualLLM.from_checkpoint(directory, compute_dtype())
        tokenizer = Tokenizer.load(directory)
        return cls(model, config, tokenizer, open_store(directory, Path(store) if store else None))

    # -- domains -------------------------------------------------------------------------------------------------

    def set_adapter(self, domain: str | None) -> None:
        """Attach the current version of a domain, or with None the bare base. Hashes are checked on reading."""
        if domain is None:
            lora.detach(self.model)
        else:
            version = self._store.require(domain)
            arrays, scale = read_adapter(self._store.files_of(version))
            lora.attach_arrays(self.model, arrays, scale, self.config.lora_dropout)
            self.model.train(False)
        self.adapter = domain

    def choose(self, domain: str | None = None) -> str | None:
        """Attach what a person means: a domain by name, "none" for the bare base, None for main if it has lessons."""
        if domain is None:
            domain = "main" if "main" in self._store.domains() else "none"
        self.set_adapter(None if domain == "none" else domain)
        return self.adapter

    def undo(self, domain: str = "main", to: int | None = None) -> Version | None:
        """Take the last lesson of a domain back, or go to version `to`; of a first lesson, remove the domain."""
        with self._store.writing():
            head = self._store.undo(domain, to)
        if self.adapter == domain:
            self.set_adapter(domain if head else None)
        return head

    @property
    def _store(self) -> Store:
        if self.store is None:
            raise InputError("this learner keeps nothing on disk: open it with from_checkpoint or give it a store")
        return self.store

    # -- learning ------------------------------------------------------------------------------------------------

    def learn_from_text(self, text: str, domain: str = "main", budget: Budget | None = None) -> Lesson:
        """Teach a text; see `learn`."""
        return self.learn([text_document(text, "text")], domain, "text", budget)

    def learn(
        self,
        documents: Sequence[Document],
        domain: str = "main",
        source: str = "text",
        budget: Budget | None = None,
        report: Callable[[Event], None] = lambda event: None,
    ) -> Lesson:
        """Teach documents to a domain: at least one optimizer step on them, then a new version of it.

        Raises InputError for a text of fewer than two tokens, NonFiniteLossError when the loss explodes. Whatever
        is raised, also KeyboardInterrupt, the domain is as before.
        """
        check_domain(domain)
        budget = budget or Budget()
        before = self.adapter
        try:
            if self.store is None:
                return self._lesson(documents, domain, source, budget, report)
            with self.store.writing():
                return self._lesson(documents, domain, source, budget, report)
        except BaseException:
            lora.detach(self.model)
            self.adapter = None
            if before is not None and self.store is not None and before in self.store.domains():
                self.set_adapter(before)
            raise

    def _lesson(
        self,
        documents: Sequence[Document],
        domain: str,
        source: str,
        budget: Budget,
        report: Callable[[Event], None],
    ) -> Lesson:
        started = time.perf_counter()
        train, heldout = self._split(list(documents))
        parent = self.store.head(domain) if self.store else None
        depth = parent.depth if parent else 0
        seed = _seed(self.config.seed, domain, depth)
        self._attach(domain, parent, mx.random.key(seed))
        probe = heldout if heldout is not None else train
        report({"event": "begin", "tokens": len(train), "heldout": len(heldout) if heldout is not None else 0})

        clock = time.perf_counter()
        allowed = MEASURING_SHARE * budget.seconds
        first = evaluate(self.model, self._windows(probe), seconds=allowed)
        forward = first.tokens / (time.perf_counter() - clock)
        report({"event": "measured", "when": "before", "loss": first.loss, "tokens": first.tokens})

        session = Session(self.model, self.config, train, seed % 2**32, budget, started, forward, allowed)
        session.run(report)

        after = evaluate(self.model, self._windows(probe, first.tokens))
        report({"event": "measured", "when": "after", "loss": after.loss, "tokens": after.tokens})
        arrays = lora.adapter_arrays(self.model)
        lesson = Lesson(
            domain=domain,
            version="v0001",
            source=source,
            tokens=len(train),
            steps=session.step,
            seconds=0.0,
            training_seconds=session.seconds,
            trained_tokens=session.tokens,
            trainable_parameters=lora.num_parameters(arrays),
            measured="fit" if heldout is None else "heldout",
            measured_tokens=after.tokens,
            before=first.loss,
            after=after.loss,
            batch_size=session.rows,
            complete=session.complete,
        )
        lesson.seconds = time.perf_counter() - started
        if self.store is not None:
            lesson.version = self._commit(lesson, parent, arrays, heldout).name
        self.adapter = domain
        return lesson

    def _attach(self, domain: str, parent: Version | None, key: mx.array) -> None:
        """The domain's adapter as the lesson begins: its head's, what is attached of it, or a fresh one."""
        shape = self._shape()
        if parent is not None and self.store is not None:
            arrays, scale = read_adapter(self.store.files_of(parent))
            lora.attach_arrays(self.model, arrays, scale, shape.dropout)
        elif self.store is not None or self.adapter != domain:
            lora.attach(self.model, shape, key)
        self.model.train(False)

    def _split(self, documents: list[Document]) -> tuple[data.Tokens, data.Tokens | None]:
        """Training and held-out tokens; the latter None where the text is too short or nothing is to be held out."""
        loss_on = self.config.loss_on
        everything = data.tokens_of(documents, self.tokenizer, loss_on)
        if len(everything) < 2:
            raise InputError(
                f"the text has {len(everything)} tokens, at least 2 are needed: there is nothing to predict"
            )
        if self.config.holdout == 0 or len(everything) < HELD_OUT_FROM:
            return everything, None
        count = lambda text: len(self.tokenizer.encode(text))  # noqa: E731
        train, held = split_holdout(documents, self.config.holdout, HELD_OUT_AT_MOST, count, self.config.seed)
        kept = data.tokens_of(held, self.tokenizer, loss_on)
        if len(kept) < 2:
            return everything, None
        return data.tokens_of(train, self.tokenizer, loss_on), kept

    def _windows(self, tokens: data.Tokens, at_most: int = HELD_OUT_AT_MOST) -> Iterator[Batch]:
        """Evaluation windows that count `at_most` tokens or, to end on a window, a few more."""
        counted = 0
        for rows, mask in evaluation_windows(tokens, self.config.seq_len, self.config.seq_len):
            if counted >= at_most:
                return
            counted += int(mask.sum())
            yield rows, mask

    def _commit(
        self, lesson: Lesson, parent: Version | None, arrays: lora.Arrays, heldout: data.Tokens | None
    ) -> Version:
        assert self.store is not None
        kept = None
        if heldout is not None:
            kept = HeldOut(heldout.ids, heldout.trained, heldout.n_documents, heldout.n_bytes)
        figures = {k: v for k, v in lesson.as_json().items() if k not in ("version", "domain", "source")}
        return self.store.commit(
            lesson.domain,
            parent,
            lambda folder: write_adapter(folder, arrays, self._shape(), self.model),
            source=lesson.source,
            config=asdict(self.config),
            figures=figures,
            heldout=kept,
        )

    def _shape(self) -> lora.LoRAConfig:
        c = self.config
        return lora.LoRAConfig(c.lora_r, c.lora_alpha, c.lora_dropout, tuple(c.lora_target_modules))

    # -- using ---------------------------------------------------------------------------------------------------

    def evaluate(self, documents: Sequence[Document], context: int = 512) -> Evaluation:
        """Measure documents under the attached domain, each token with at least half of `context` before it."""
        tokens = data.tokens_of(documents, self.tokenizer)
        windows = evaluation_windows(tokens, context, max(1, context // 2))
        unseen = len(self.tokenizer.token_bytes(int(tokens.ids[0]))) if len(tokens) else 0  # is never a target
        return evaluate(self.model, windows, tokens.n_bytes - unseen)

    def generate(self, prompt: str, max_length: int = 100, **sampling: Any) -> str:
        """The text that follows `prompt` under the attached domain; `sampling` as in `generate.Sampling`."""
        settings = generate.Sampling(**sampling)
        return generate.complete(self.model, self.tokenizer, prompt, max_length, settings).text


def _seed(seed: int, domain: str, depth: int) -> int:
    """63 bits that depend on nothing but these three."""
    digest = hashlib.sha256(json.dumps([seed, domain, depth]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
