"""What commands read: the model that is meant, documents, stdin."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_impl.errors import InputError

if TYPE_CHECKING:
    from mlx_impl.console import Reporter
    from mlx_impl.readers import Document


def model_directory(named: Path | None) -> Path:
    """The model directory to use: the one named, else the default. InputError for what cannot be one."""
    from mlx_impl.hub import default_model
    from mlx_impl.modeldir import CONFIG, INDEX, WEIGHTS

    model = named if named is not None else default_model()
    if not any((model / name).exists() for name in (CONFIG, WEIGHTS, INDEX)):
        source = " (MINIMAC_MODEL names it)" if named is None and os.environ.get("MINIMAC_MODEL") else ""
        raise InputError(
            f"{model}: no model directory, {CONFIG} and {WEIGHTS} are not there{source}; `minimac-mlx pull` fetches a "
            "model, `convert` makes a directory of what other programs wrote"
        )
    return model


def documents_from(
    paths: Sequence[Path], reporter: "Reporter", text: str | None = None
) -> tuple[list["Document"], str]:
    """The documents that --text, - or PATHS name, and a label for them. Says what was passed over in folders."""
    from mlx_impl import readers

    if text is not None:
        if paths:
            raise InputError(f"--text and {paths[0]}: give a text or files, not both")
        return [readers.text_document(text, "text")], "text"
    if Path("-") in paths:
        if len(paths) > 1:
            raise InputError("- is stdin and comes alone, not among files")
        return [readers.text_document(read_stdin(), "stdin")], "stdin"
    if not paths:
        raise InputError("no text: name files or folders, or - for stdin")
    skipped = readers.PassedOver()
    documents = list(readers.read_documents(paths, skipped))
    if skipped.files:
        reporter.warn(str(skipped))
    label = os.path.basename(os.path.abspath(paths[0])) or str(paths[0])
    return documents, label if len(paths) == 1 else f"{label} and {len(paths) - 1} more"


def read_stdin() -> str:
    """All of stdin as text, without a byte order mark."""
    if sys.stdin is None:
        raise InputError("stdin is closed: there is nothing to read")
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"stdin: not UTF-8 at byte {error.start:,}; convert it to UTF-8 first") from None
