"""ContinualLearner: a frozen base, the domains that it learned, lessons for them, and what they make of a prompt."""

import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_impl import data, decoder, generate, lora
from mlx_impl.adapters import read_adapter
from mlx_impl.arrays import digest_of, flatten
from mlx_impl.base import BaseModel
from mlx_impl.config import Budget, ContinualLearningConfig
from mlx_impl.device import compute_dtype, dtype_name, use_device
from mlx_impl.errors import InputError
from mlx_impl.evaluate import Evaluation, evaluate, total
from mlx_impl.foreign import open_model
from mlx_impl.lesson import Adapter, Event, Lesson, Teacher, check_finite
from mlx_impl.readers import Document, text_document
from mlx_impl.reservoirs import check_importance
from mlx_impl.router import DOCUMENT_PREFIX, Router, Routing
from mlx_impl.store import Store, open_store
from mlx_impl.tokenizer import Tokenizer
from mlx_impl.versions import Version, check_domain
from mlx_impl.windows import evaluation_windows

KEPT = 8
"""Adapters that stay in memory, so that going back to one reads nothing: 11 MB each on a base of 135 M weights."""


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
            with lora.bare(base_model):
                store = Store(Path(folder), digest_of(flatten(base_model.parameters())), tokenizer.digest)
        self.store = store
        self.adapter: str | None = None
        """The attached domain; None is the bare base."""
        self._attached: Adapter | None = None
        self._layers: list[tuple[str, lora.LoRALinear]] = []  # those that were taken off last
        self._read: dict[str, Adapter] = {}  # by the hashes of a version's files, which never change
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
        return cls(model, config, tokenizer, open_store(directory, Path(store).expanduser() if store else None))

    # -- domains -------------------------------------------------------------------------------------------------

    def set_adapter(self, domain: str | None) -> None:
        """Attach the current version of a domain, or with None the bare base.

        Hashes are checked on reading; the versions attached last stay in memory.
        """
        if domain is None:
            self._put(None, None)
        else:
            version = self.store.require(domain)
            key = str(sorted(version.files.items()))
            if key not in self._read:
                while len(self._read) >= KEPT:
                    del self._read[next(iter(self._read))]
                self._read[key] = read_adapter(self.store.files_of(version))
            self._put(domain, self._read[key])

    def _put(self, domain: str | None, adapter: Adapter | None) -> None:
        """Attach an adapter, or none; one that does not fit leaves the bare base."""
        bare = self._attached is None
        self.adapter = self._attached = None
        if adapter is None:
            self._layers = lora.detach(self.model) or self._layers
        else:
            if bare and self._layers:
                lora.put_back(self.model, self._layers)
            lora.attach_arrays(self.model, *adapter, self.config.lora_dropout)
        if getattr(self.model, "training", True):  # going through all modules takes longer than a switch
            self.model.train(False)
        self.adapter, self._attached = domain, adapter

    def weights_id(self) -> str:
        """What the base and the attached version are known by: equal for equal weights, in another process too."""
        head = self.store.head(self.adapter) if self.adapter else None
        dtype = dtype_name(compute_dtype())
        return f"{self.store.database.owner[0]} {dtype} {sorted(head.files.items()) if head else 'bare'}"

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
        self._read.clear()
        decoder.release(self.model)  # which may have merged it
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
        decoder.release(self.model)
        check_domain(domain)
        check_importance(importance)
        source = source.encode("utf-8", "replace").decode()  # a file's name need not be text
        before = self.adapter, self._attached
        try:
            with self.store.writing():
                teacher = Teacher(self.model, self.config, self.tokenizer, self.store, self._router)
                lesson, attached = teacher.teach(
                    list(documents), domain, source, importance, budget or Budget(), started, report, like_base
                )
                self.adapter, self._attached = domain, attached
                return lesson
        except BaseException:
            self._put(*before)
            raise

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
        check_finite(measured, "on this text: the model is damaged, or its numbers overflow; try MINIMAC_DTYPE=float32")
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
