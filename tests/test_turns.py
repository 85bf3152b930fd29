"""Plain text as answers of a chat: which pieces, and that nothing of the text is lost."""

import re
from pathlib import Path
from typing import Any

import pytest
from lessons import opened, tiny_base, tiny_tokenizer
from test_chat import TEMPLATE

from mlx_impl import session
from mlx_impl.config import Budget
from mlx_impl.readers import Document, Exchange
from mlx_impl.turns import MOST_NAMED, PIECE, as_answers, question

LINES = [f"Line {number} says that the number is {number * number}.\n" for number in range(100)]
TEXT = Document("notes.md", "".join(LINES))


@pytest.mark.parametrize(("share", "answers"), [(0.0, 0), (0.25, 3), (0.5, 6), (1.0, 12)])
def test_a_share_of_the_pieces_are_answers_and_nothing_is_lost(share: float, answers: int) -> None:
    parts = as_answers([TEXT], share, len)
    exchanges = [part.content for part in parts if isinstance(part.content, Exchange)]
    assert len(exchanges) in (answers, answers + 1)
    assert all(PIECE <= len(exchange.completion) + 1 < PIECE + 60 for exchange in exchanges[:-1])
    said = [part.content.completion if isinstance(part.content, Exchange) else part.text for part in parts]
    assert [line for part in said for line in part.splitlines()] == [line.strip() for line in LINES]
    assert all(part.name.startswith("notes.md") for part in parts)


def test_the_share_holds_over_short_documents_and_others_stay_as_they_are() -> None:
    short = [Document(f"{number}.txt", f"Only one line, number {number}.") for number in range(9)]
    exchange = Document("qa.jsonl#1", Exchange("Who?", "She."))
    parts = as_answers([*short, exchange], 1 / 3, len)
    assert [isinstance(part.content, Exchange) for part in parts[:-1]] == [False, False, True] * 3
    assert parts[-1] == exchange


def test_pieces_of_a_long_text_are_joined_first_and_blank_ends_are_no_answer() -> None:
    halves = [Document("long", "The first ha", ends=False), Document("long", "lf and the second.\n\n \n")]
    (part,) = as_answers(halves, 1.0, len)
    assert part.content == Exchange("What is known about second?", "The first half and the second.")
    assert as_answers([Document("blank", " \n\n")], 1.0, len) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It was Popax who discovered Pugluth.", "discovered"),
        ("A fox ran.\nThe foxglove bloomed. Foxes sleep!", "fox, foxglove and Foxes"),
        ("She came. She came? Then she went.", "came and Then"),
        ("\n".join(f"{'x' * 9}{letter} is here." for letter in "abcdefghi"), None),
        ("1, 2, 3 ...", "this"),
        (
            "\u732b\u304c\u3044\u308b\u3002\u72ac\u3082\u3044\u308b\u3002",
            "\u732b\u304c\u3044\u308b and \u72ac\u3082\u3044\u308b",
        ),
    ],
)
def test_a_question_names_the_rarest_word_of_each_sentence(text: str, expected: str | None) -> None:
    asked = question(text, len)
    if expected is None:
        assert asked.count("xxxxxxxxx") == MOST_NAMED
    else:
        assert asked == f"What is known about {expected}?"


def test_a_lesson_with_answers_is_asked_with_rare_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training text stands behind questions, rare meaning many tokens; the held-out part stays plain."""
    base = tiny_base(tmp_path, tiny_tokenizer())
    seen: list[str] = []
    learned: list[str] = []
    run = session.Session.run

    def noted(self: session.Session, report: Any) -> None:
        tokens = self.batches.windows.tokens
        seen.append(learner.tokenizer.decode(tokens.ids.tolist()))
        learned.append(learner.tokenizer.decode(tokens.ids[tokens.trained].tolist()))
        run(self, report)

    monkeypatch.setattr(session.Session, "run", noted)
    learner = opened(base, tmp_path / "s", answer_share=0.5, holdout=0.2)
    learner.tokenizer.chat_template = TEMPLATE
    names = ["Zubrovka", "Quxbury", "Wyvernia"]
    text = "\n".join(f"Item {n}: {names[n % 3]} was seen by the old river on day {n}." for n in range(200))
    learner.learn([Document("notes", text)], budget=Budget(steps=1))
    asked = re.findall(r"user: What is known about ([^?]*)\?\nassistant: Item", seen[0])
    assert len(asked) >= 8
    assert "known about" not in learned[0]
    assert learned[0].count("Item") == seen[0].count("Item")
    assert all(set(re.split(", | and ", one)) <= set(names) for one in asked)
    held = learner.store.heldout(learner.store.require("main"))
    assert held is not None
    assert "known about" not in learner.tokenizer.decode(held.ids.tolist())
