"""Plain text as a chat would bring it: a part of its pieces stand as answers.

A text that is learned as it stands is gone on with, from wherever it was cut. Asked about it in a chat, a small model
then begins with what stood first, whatever the question was. So the question before a piece names what it is about, its
rarest words, and the model learns to look there.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence

from mlx_impl.holdout import joined, lines, sentences
from mlx_impl.readers import Document, Exchange

PIECE = 300
"""Characters that a piece has at least, unless the text ends before; it ends with a line."""

MOST_NAMED = 6
"""Words that a question names, at most: one of each sentence of the piece."""


def as_answers(documents: Sequence[Document], share: float, rarity: Callable[[str], int]) -> list[Document]:
    """The documents with `share` of their plain text, 0 <= share <= 1, as answers: pieces of it, evenly spread.

    What stands between two of them stays plain and in one. Conversations and exchanges are left as they are. `rarity`
    says how rare a word is, such as the number of its tokens.
    """
    result: list[Document] = []
    pieces = 0
    for document in joined(list(documents)):
        if not isinstance(document.content, str):
            result.append(document)
            continue
        cut = list(_pieces(document.content))
        answers = [math.floor((pieces + n + 1) * share) > math.floor((pieces + n) * share) for n in range(len(cut))]
        pieces += len(cut)
        for number, (answer, group) in enumerate(itertools.groupby(zip(answers, cut, strict=True), lambda one: one[0])):
            texts = [text for _, text in group]
            contents = (
                [Exchange(question(text, rarity), text.strip()) for text in texts] if answer else ["".join(texts)]
            )
            result += [Document(f"{document.name}, part {number + 1}", content) for content in contents]
    return result


def question(text: str, rarity: Callable[[str], int]) -> str:
    """What a piece is an answer to: it names the rarest word of each of its sentences, the first of those as rare."""
    named: list[str] = []
    for sentence in itertools.chain.from_iterable(map(sentences, lines(text))):
        words = re.findall(r"[^\W\d_][\w'-]*", sentence)
        if words and (rarest := max(words, key=rarity)) not in named:
            named.append(rarest)
        if len(named) == MOST_NAMED:
            break
    *others, last = named or ["this"]
    return f"What is known about {', '.join(others)}{' and ' if others else ''}{last}?"


def _pieces(text: str) -> Iterator[str]:
    """Lines together until they have `PIECE` characters; joined they are the text, but for blank lines at its end."""
    piece = ""
    for line in lines(text):
        piece += line
        if len(piece) >= PIECE and piece.strip():
            yield piece
            piece = ""
    if piece.strip():
        yield piece
