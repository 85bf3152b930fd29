"""Prompts with known answers: how often the model's greedy answer is the right one.

The prompt is encoded as `data` encodes an exchange for training: through the chat template where there is one, else as
it stands. Answers are compared after the normalisation of SQuAD (Rajpurkar et al. 2016): case, punctuation, articles
and white space do not count.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_impl.errors import InputError
from mlx_impl.generate import Sampling, complete, prompt_ids
from mlx_impl.learner import ContinualLearner
from mlx_impl.readers import Document, Exchange, Message

SLACK = 8
"""Tokens that an answer may have beyond the expected one's: it may be the same in other tokens."""


@dataclass(frozen=True)
class Answers:
    """Expected and given answers of each pair, and how many agree."""

    expected: list[str]
    given: list[str]

    @property
    def right(self) -> int:
        """Number of answers that match."""
        return sum(map(exact_match, self.given, self.expected))

    def as_json(self) -> dict[str, Any]:
        """What `eval --answers --json` prints of them."""
        pairs = len(self.expected)
        return {"pairs": pairs, "right": self.right, "exact_match": self.right / pairs}


def answer(learner: ContinualLearner, documents: Sequence[Document], domain: str = "auto") -> Answers:
    """The greedy answers to all prompt/completion pairs among the documents, and to conversations that end with one.

    `domain` is a name, "none", or "auto", by which each prompt's last turn is routed. It is attached afterwards. Raises
    InputError where there is no pair, and for a conversation where the tokenizer has no chat template.
    """
    tokenizer = learner.tokenizer
    pairs = [pair for pair in map(_pair, documents) if pair is not None]
    if not pairs:
        raise InputError("no prompt has an answer here; --answers needs .jsonl rows of prompt and completion")
    if domain != "auto":
        learner.choose(domain)
    given = []
    for turns, expected in pairs:
        if tokenizer.has_chat_template:
            ids = tokenizer.encode_chat(turns)
        elif len(turns) == 1:
            ids = prompt_ids(tokenizer, turns[0]["content"])
        else:
            raise InputError("a conversation, but this tokenizer has no chat template; use prompt/completion")
        if domain == "auto":
            learner.choose("auto", tokenizer.encode(turns[-1]["content"]))
        text = complete(learner.model, tokenizer, ids, len(tokenizer.encode(expected)) + SLACK, Sampling()).text.strip()
        given.append(text if "\n" in expected.strip() else text.partition("\n")[0])
    return Answers([expected for _, expected in pairs], given)


def exact_match(given: str, expected: str) -> bool:
    """Whether two answers are the same once normalised; those of nothing but punctuation, as they stand."""
    return (normalized(given) or given.strip()) == (normalized(expected) or expected.strip())


def normalized(text: str) -> str:
    """Compatible characters made one, lower case, no punctuation, no English articles, single spaces."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = "".join(character for character in text if not unicodedata.category(character).startswith("P"))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _pair(document: Document) -> tuple[list[Message], str] | None:
    """The turns before an answer, and the answer; None for what has none."""
    content = document.content
    if isinstance(content, Exchange):
        return [{"role": "user", "content": content.prompt}], content.completion
    if isinstance(content, str) or content[-1]["role"] != "assistant" or len(content) < 2:
        return None
    return list(content[:-1]), content[-1]["content"]
