"""Plain text as a chat would bring it: a part of its pieces stand as answers.

A text that is learned as it stands is gone on with, from wherever it was cut. Asked about it in a chat, a small model
then begins with what stood first, whatever the question was. What it has learned to say as an answer it finds there.
"""

import itertools
import math
import re
from collections.abc import Iterator, Sequence

from mlx_impl.holdout import joined
from mlx_impl.readers import Document, Exchange

QUESTION = "What does the text say?"
"""Before every piece: what could be asked of this one in particular is not known."""

PIECE = 300
"""Characters that a piece has at least, unless the text ends before; it ends with a line."""


def as_answers(documents: Sequence[Document], share: float) -> list[Document]:
    """The documents with `share` of their plain text, 0 <= share <= 1, as answers: pieces of it, evenly spread.

    What stands between two of them stays plain and in one. Conversations and exchanges are left as they are.
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
            contents = [Exchange(QUESTION, text.strip()) for text in texts] if answer else ["".join(texts)]
            result += [Document(f"{document.name}, part {number + 1}", content) for content in contents]
    return result


def _pieces(text: str) -> Iterator[str]:
    """Lines together until they have `PIECE` characters; joined they are the text, but for blank lines at its end."""
    piece = ""
    for line in re.findall(r"[^\n]*\n|[^\n]+", text):
        piece += line
        if len(piece) >= PIECE and piece.strip():
            yield piece
            piece = ""
    if piece.strip():
        yield piece
