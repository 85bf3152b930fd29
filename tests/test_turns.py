"""Plain text as answers of a chat: which pieces, and that nothing of the text is lost."""

import dataclasses
from pathlib import Path

import pytest
from lessons import SETTINGS, tiny_base, tiny_tokenizer
from test_chat import TEMPLATE

from mlx_impl.config import Budget
from mlx_impl.data import tokens_of
from mlx_impl.evaluate import evaluate
from mlx_impl.learner import ContinualLearner
from mlx_impl.readers import Document, Exchange
from mlx_impl.turns import PIECE, QUESTION, as_answers
from mlx_impl.windows import evaluation_windows

LINES = [f"Line {number} says that the number is {number * number}.\n" for number in range(100)]
TEXT = Document("notes.md", "".join(LINES))


@pytest.mark.parametrize(("share", "answers"), [(0.0, 0), (0.25, 3), (0.5, 6), (1.0, 12)])
def test_a_share_of_the_pieces_are_answers_and_nothing_is_lost(share: float, answers: int) -> None:
    parts = as_answers([TEXT], share)
    exchanges = [part.content for part in parts if isinstance(part.content, Exchange)]
    assert len(exchanges) in (answers, answers + 1)
    assert {exchange.prompt for exchange in exchanges} <= {QUESTION}
    assert all(PIECE <= len(exchange.completion) + 1 < PIECE + 60 for exchange in exchanges[:-1])
    said = [part.content.completion if isinstance(part.content, Exchange) else part.text for part in parts]
    assert [line for part in said for line in part.splitlines()] == [line.strip() for line in LINES]
    assert all(part.name.startswith("notes.md") for part in parts)


def test_the_share_holds_over_short_documents_and_others_stay_as_they_are() -> None:
    short = [Document(f"{number}.txt", f"Only one line, number {number}.") for number in range(9)]
    exchange = Document("qa.jsonl#1", Exchange("Who?", "She."))
    parts = as_answers([*short, exchange], 1 / 3)
    assert [isinstance(part.content, Exchange) for part in parts[:-1]] == [False, False, True] * 3
    assert parts[-1] == exchange


def test_pieces_of_a_long_text_are_joined_first_and_blank_ends_are_no_answer() -> None:
    halves = [Document("long", "The first ha", ends=False), Document("long", "lf and the second.\n\n \n")]
    (part,) = as_answers(halves, 1.0)
    assert part.content == Exchange(QUESTION, "The first half and the second.")
    assert as_answers([Document("blank", " \n\n")], 1.0) == []


def test_a_lesson_with_answers_finds_them_in_a_chat(tmp_path: Path) -> None:
    """Behind the question, its text is begun more readily than after a lesson on the same text as it stands."""
    base = tiny_base(tmp_path, tiny_tokenizer())
    losses = []
    for share in (0.0, 1.0):
        config = dataclasses.replace(SETTINGS, answer_share=share, holdout=0.0, learning_rate=1e-2)
        learner = ContinualLearner.from_checkpoint(base, config, tmp_path / str(share))
        learner.tokenizer.chat_template = TEMPLATE
        learner.learn([TEXT], budget=Budget(steps=30))
        learner.set_adapter("main")
        asked = tokens_of([Document("qa", Exchange(QUESTION, "Line"))], learner.tokenizer, "completion")
        losses.append(evaluate(learner.model, evaluation_windows(asked, 64, 32)).loss)
    assert losses[1] < losses[0] - 0.05
