"""Invented facts: how many a lesson teaches, how many stay, and what the same base does with the text in its prompt.

Counted is exact match: of a cloze, whether the greedy continuation begins with the value and nothing else; of a chat
question, whether the greedy answer contains it. Asked before the lesson, after it, after lessons in other domains, and
after one more lesson in the same domain. Two domains learn the facts, one from the text alone, one from the text and
chat rows whose questions are not those that are asked. It goes on where it was stopped.

    python -m benchmarks.facts [--facts 50] [--tokens 41000] [--set learning_rate=1e-3] [--quick]
"""

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx_impl  # noqa: F401  before MLX, for the fast BLAS

# isort: split
import mlx.core as mx

from benchmarks import texts
from benchmarks.common import record
from benchmarks.invented import Fact, Probe, chats, invent, passages, probes, summary
from benchmarks.resume import (
    BACKWARD,
    Work,
    add_common_options,
    digest_of,
    duration,
    forward_speed,
    lesson_settings,
    say,
    taught,
)
from mlx_impl import modeldir
from mlx_impl.base import BaseModel
from mlx_impl.config import ContinualLearningConfig
from mlx_impl.generate import PREFILL, prompt_ids
from mlx_impl.hub import default_model
from mlx_impl.learner import ContinualLearner
from mlx_impl.tokenizer import Tokenizer

ANSWER_TOKENS = 32
"""Of an answer in a chat, at most."""

WORTH_KEEPING = 64
"""Tokens that all prompts must begin with before they are kept in a cache and the prompts asked one by one."""

OTHER_TOKENS = 2048
"""Text of a lesson about something else."""

Scores = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Plan:
    """What is taught. `tokens` bounds what each of the two domains is trained on, repetitions included.

    Windows are short: of as many tokens, four times as many steps make more facts stay than windows of 256 do. Half of
    the text stands as answers in a chat, where the model knows chats, and their questions are not learned: else those
    that are asked find little of it.
    """

    facts: int = 50
    tokens: int = 41_000
    other_steps: int = 8
    seed: int = 0
    config: ContinualLearningConfig = ContinualLearningConfig(
        holdout=0.0, seq_len=64, learning_rate=1e-3, answer_share=0.5, loss_on="completion"
    )

    @property
    def steps(self) -> int:
        """Optimizer steps of a lesson on the facts."""
        return max(1, self.tokens // self.step_tokens)

    @property
    def step_tokens(self) -> int:
        """Tokens of a full step."""
        return self.config.batch_size * self.config.gradient_accumulation_steps * self.config.seq_len


def main() -> None:
    """Teach, ask and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", type=int, help=f"how many  [default: {Plan.facts}]")
    parser.add_argument("--tokens", type=int, help=f"trained on in each domain  [default: {Plan.tokens:,}]")
    add_common_options(parser, "facts")
    arguments = parser.parse_args()
    small = Plan(facts=10, tokens=8_000, other_steps=1) if arguments.quick else Plan()
    plan = replace(
        small,
        facts=arguments.facts or small.facts,
        tokens=arguments.tokens or small.tokens,
        seed=arguments.seed,
        config=lesson_settings(arguments.settings, replace(small.config, seed=arguments.seed)),
    )
    figures = measure(arguments.model or default_model(), arguments.work, plan)
    if arguments.quick:
        print(json.dumps(figures, indent=2))
    else:
        record("facts", figures)
    say(table(figures))


def measure(model: Path, folder: Path, plan: Plan) -> dict[str, Any]:
    """All figures, those measured before under the same plan taken from `folder`.

    Without a chat template there is no chat, neither learned from nor asked.
    """
    facts = invent(plan.facts, plan.seed)
    asked = probes(facts)
    passages_of = {"facts": passages(facts, plan.seed)}
    text = [document.text for document in [*passages_of["facts"], *chats(facts, plan.seed)]]
    text += [probe.prompt for items in asked.values() for probe in items]
    work = Work(folder, {"model": modeldir.identity(model), **asdict(plan), "text": digest_of(text)})
    learner = ContinualLearner.from_checkpoint(model, plan.config, work.folder / "store")
    tokenizer = learner.tokenizer
    if tokenizer.has_chat_template:
        passages_of["facts-chat"] = [*passages_of["facts"], *chats(facts, plan.seed)]
    else:
        del asked["chat"]
        learner.config = replace(learner.config, answer_share=0.0)
    say(f"state in {work.folder}; about {duration(predicted_seconds(learner, plan, asked, len(passages_of)))} in all")

    def ask(stage: str, domain: str | None, told: str = "") -> dict[str, list[str]]:
        def answer() -> dict[str, list[str]]:
            learner.set_adapter(domain)
            return answers(learner.model, tokenizer, asked, told)

        replies: dict[str, list[str]] = work.once(stage, answer)
        say(f"{stage}: {_line(scores(replies, asked))}")
        return replies

    told = _fitting(facts, asked, learner)
    replies = {"before": ask("before", None), "in the prompt": ask("in the prompt", None, summary(facts[:told]))}
    lessons = {}
    for domain, documents in passages_of.items():
        lessons[domain] = taught(learner, domain, 1, documents, "invented facts", plan.steps)
        replies[f"{domain}, after"] = ask(f"{domain}, after", domain)
    *others, another = texts.lesson_texts(texts.library_sources(), tokenizer, 3, OTHER_TOKENS)
    for label, documents in others:
        taught(learner, label.split()[0], 1, documents, label, plan.other_steps)
    for domain in passages_of:
        replies[f"{domain}, after other domains"] = ask(f"{domain}, after other domains", domain)
    for domain in passages_of:
        taught(learner, domain, 2, another[1], another[0], plan.other_steps)
        replies[f"{domain}, after another lesson in it"] = ask(f"{domain}, after another lesson in it", domain)
    return {
        "model": model.name,
        "plan": {**asdict(plan), "steps": plan.steps},
        "facts_in_prompt": told,
        "lessons": lessons,
        "stages": {stage: scores(given, asked) for stage, given in replies.items()},
        "unchanged_by_other_domains": all(
            replies[f"{domain}, after"] == replies[f"{domain}, after other domains"] for domain in passages_of
        ),
    }


def answers(
    model: BaseModel, tokenizer: Tokenizer, asked: dict[str, list[Probe]], told: str = ""
) -> dict[str, list[str]]:
    """The greedy reply to each probe, kind by kind; `told` is put before each prompt."""
    replies = {}
    for kind, items in asked.items():
        prompts = [_prompt(tokenizer, kind, probe, told) for probe in items]
        longest = max(len(tokenizer.encode(f" {probe.answer}")) for probe in items) + 2
        ids = greedy(model, prompts, ANSWER_TOKENS if kind == "chat" else longest, tokenizer.vocab_size)
        replies[kind] = [_text(tokenizer, reply) for reply in ids]
    return replies


def greedy(model: BaseModel, prompts: Sequence[list[int]], count: int, vocab_size: int) -> list[list[int]]:
    """The `count` likeliest tokens after each prompt, one after the other; end tokens do not end them.

    Prompts of equal length go through the model together. What all of them begin with, if it is long, is computed once
    and kept; they then come one by one, each overwriting the last one's rows in the cache.
    """
    shortest = min(map(len, prompts)) - 1  # each has a token left to go on from
    common = next((at for at in range(shortest) if len({prompt[at] for prompt in prompts}) > 1), shortest)
    if common < WORTH_KEEPING:
        together = defaultdict(list)
        for index, prompt in enumerate(prompts):
            together[len(prompt)].append(index)
        replies: dict[int, list[int]] = {}
        for indices in together.values():
            rows = mx.array([prompts[index] for index in indices])  # (B, T)
            replies |= zip(indices, _continued(model, rows, model.make_cache(), count, vocab_size), strict=True)
        return [replies[index] for index in range(len(prompts))]
    cache = model.make_cache()
    for start in range(0, common, PREFILL):
        mx.eval(model.hidden(mx.array([prompts[0][start : min(common, start + PREFILL)]]), cache))
    ones = []
    for prompt in prompts:
        for layer in cache:
            layer.trim(layer.offset - common)
        ones += _continued(model, mx.array([prompt[common:]]), cache, count, vocab_size)
    return ones


def _continued(model: BaseModel, rows: mx.array, cache: Sequence[Any], count: int, vocab_size: int) -> list[list[int]]:
    """Greedy tokens after rows (B, T) that follow on what is in the cache: B lists of `count`."""
    found = []
    for _ in range(count):
        logits = model.head(model.hidden(rows, cache)[:, -1])  # (B, V)
        rows = mx.argmax(logits[:, :vocab_size], axis=-1)[:, None]  # (B, 1)
        mx.eval(rows)
        found.append(rows)
    replies: list[list[int]] = mx.concatenate(found, axis=1).tolist()  # type: ignore[assignment]
    return replies


def _prompt(tokenizer: Tokenizer, kind: str, probe: Probe, told: str) -> list[int]:
    if kind == "chat":
        content = f"{told}\n\n{probe.prompt}" if told else probe.prompt
        return tokenizer.encode_chat([{"role": "user", "content": content}])
    return prompt_ids(tokenizer, f"{told}\n{probe.prompt}" if told else probe.prompt)


def _text(tokenizer: Tokenizer, ids: list[int]) -> str:
    end = next((at for at, id in enumerate(ids) if id in tokenizer.eos_ids), len(ids))
    return tokenizer.decode(ids[:end], skip_special=True)


def _fitting(facts: Sequence[Fact], asked: dict[str, list[Probe]], learner: ContinualLearner) -> int:
    """How many of the facts fit into a prompt with any probe and its answer."""
    tokenizer, room = learner.tokenizer, learner.model.config.max_seq_len - ANSWER_TOKENS
    for count in range(len(facts), 0, -1):
        told = summary(facts[:count])
        if all(len(_prompt(tokenizer, kind, p, told)) <= room for kind, items in asked.items() for p in items):
            return count
    return 0


def scores(replies: dict[str, list[str]], asked: dict[str, list[Probe]]) -> Scores:
    """How many replies of each kind are right."""
    result = {}
    for kind, items in asked.items():
        fits = mentions if kind == "chat" else begins_with
        right = sum(fits(reply, probe.answer) for reply, probe in zip(replies[kind], items, strict=True))
        result[kind] = {"right": right, "of": len(items), "percent": 100 * right / len(items)}
    return result


def begins_with(reply: str, answer: str) -> bool:
    """Whether the reply's first words are the answer's, letter by letter; punctuation may follow them."""
    words = answer.split()
    given = reply.split()[: len(words)]
    return [*given[:-1], *(word.rstrip(".,;:!?\"')") for word in given[-1:])] == words


def mentions(reply: str, answer: str) -> bool:
    """Whether the answer stands in the reply as words of its own; case does not matter in a sentence."""
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", reply, re.IGNORECASE) is not None


def predicted_seconds(learner: ContinualLearner, plan: Plan, asked: dict[str, list[Probe]], domains: int) -> float:
    """Time for everything, from the speed of a forward pass; a decoding step counts like four tokens of one."""
    trained = domains * (plan.steps + plan.other_steps) + 2 * plan.other_steps
    seconds_per_token = 1 / forward_speed(learner.model, plan.config.seq_len)
    measured = 1  # forward pass, about, that a lesson's own measuring adds to a step's three
    asking = (2 + 3 * domains) * len(asked) * plan.facts * (ANSWER_TOKENS + 20)
    return seconds_per_token * (trained * plan.step_tokens * (BACKWARD + measured) + asking)


def _line(found: Scores) -> str:
    return ", ".join(f"{kind} {score['right']} of {score['of']}" for kind, score in found.items())


def table(figures: dict[str, Any]) -> str:
    """Percent right, a row a stage."""
    kinds = list(figures["stages"]["before"])
    lines = [f"{'':40}" + "".join(f"{kind:>10}" for kind in kinds)]
    for stage, found in figures["stages"].items():
        lines.append(f"{stage:40}" + "".join(f"{found[kind]['percent']:9.0f}%" for kind in kinds))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
