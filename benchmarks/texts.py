"""Texts for lessons: from a folder of them, or from the Python that runs this, so that a checkout alone suffices."""

import importlib.util
import itertools
import re
from pathlib import Path
from pydoc_data import topics

from mlx_impl.errors import InputError
from mlx_impl.readers import Document, pieces
from mlx_impl.tokenizer import Tokenizer

MODULES = ("argparse", "ast", "difflib", "pickle", "tarfile", "typing", "unittest.mock")
LONGEST = 2000
"""Characters of a document, about 500 tokens: longer ones are cut at a line, so that lessons come out alike in size."""

Sources = dict[str, list[Document]]


def library_sources() -> Sources:
    """Python's language reference, and the sources of some modules of its library."""
    code = [Path(str(spec.origin)).read_text("utf-8") for name in MODULES if (spec := importlib.util.find_spec(name))]
    return {
        "topics": _documents("topics", [topics.topics[name] for name in sorted(topics.topics)]),
        "code": _documents("code", itertools.chain.from_iterable(text.split("\n\n\n") for text in code)),
    }


def folder_sources(folder: Path, part: str = "train.txt") -> Sources:
    """The documents of each NAME/`part` in a folder; blank lines separate them. InputError where there is none."""
    paths = sorted(folder.glob(f"*/{part}"))
    if not paths:
        raise InputError(f"{folder}: no NAME/{part} in it")
    return {path.parent.name: _documents(path.parent.name, _split(path.read_text("utf-8"))) for path in paths}


def lesson_texts(sources: Sources, tokenizer: Tokenizer, count: int, tokens: int) -> list[tuple[str, list[Document]]]:
    """`count` groups of consecutive documents, each with the first few more than `tokens` tokens; sources take turns.

    No document is in two groups. InputError where a source does not have enough.
    """
    remaining = {name: iter(documents) for name, documents in sources.items()}
    lessons = []
    for number, name in zip(range(1, count + 1), itertools.cycle(sources), strict=False):
        taken: list[Document] = []
        size = 0
        while size < tokens:
            document = next(remaining[name], None)
            if document is None:
                raise InputError(
                    f"{name} is too short: it ends in lesson {number} of {count} with {tokens:,} tokens each"
                )
            taken.append(document)
            size += len(tokenizer.encode(document.text)) + 1
        lessons.append((f"{name} {number}", taken))
    return lessons


def _split(text: str) -> list[str]:
    return re.split(r"\n[ \t]*\n", text)


def _documents(name: str, texts: itertools.chain[str] | list[str]) -> list[Document]:
    parts = (piece.strip() for text in texts for piece in pieces([text], LONGEST))
    return [Document(f"{name}#{number}", part) for number, part in enumerate(filter(None, parts), 1)]
