"""What tests of the command line share: running it in this process, a tiny model, and what lies on the disk.

`run` replaces the three standard streams by real text streams over bytes, so that encodings and line ends are those of
a pipe. Only what needs a process of its own (signals, terminals, a reader that leaves) gets one.
"""

import io
import json
import os
import subprocess
import sys
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pydoc_data import topics
from typing import Any
from unittest import mock

import numpy as np

import cli
from mlx_impl import modeldir
from mlx_impl.config import ModelConfig
from mlx_impl.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
TEXT = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))[:9000]
"""English from CPython's own reference: about 5,000 tokens of the tiny tokenizer, enough to hold a part out."""

Tree = dict[str, bytes]


@dataclass
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str


def run(*arguments: str | Path, stdin: bytes | None = b"") -> Done:
    """Run a command in this process; `stdin` None is a closed one."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    reader = None if stdin is None else io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "stdin", reader))
        stack.enter_context(redirect_stdout(out))
        stack.enter_context(redirect_stderr(err))
        try:
            cli.main([str(argument) for argument in arguments])
        except SystemExit as ended:
            code = ended.code
    assert isinstance(code, int)
    out.flush()
    err.flush()
    return Done(code, *(stream.buffer.getvalue().decode() for stream in (out, err)))  # type: ignore[attr-defined]


def as_json(*arguments: str | Path, stdin: bytes = b"") -> Any:
    """The one JSON object that a command with --json prints."""
    done = run(*arguments, "--json", stdin=stdin)
    assert done.code == 0, done.err
    assert done.out.isascii()
    assert done.out.endswith("}\n")
    assert done.out.count("\n") == 1
    return json.loads(done.out)


def learned(model: Path, *more: str | Path) -> Any:
    """Teach one quick lesson."""
    return as_json("learn", "-m", model, "--text", "The key lies under the pot. " * 8, "--steps", "2", *more)


def start(*arguments: str | Path, **options: Any) -> subprocess.Popen:
    """Start a command as a process of its own, stdout and stderr as pipes unless `options` say otherwise."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": ROOT, **options}
    return subprocess.Popen([sys.executable, ROOT / "cli.py", *map(str, arguments)], **streams)


@cache
def tiny_tokenizer() -> Tokenizer:
    """400 ids, trained on `TEXT`."""
    return Tokenizer.train([TEXT], 400)


def write_model(folder: Path, manifest: bool = True, **changes: Any) -> Path:
    """A model directory of 30 thousand weights with the tiny tokenizer; `changes` are fields of ModelConfig."""
    tokenizer = tiny_tokenizer()
    shape = {"d_model": 32, "num_layers": 2, "num_query_heads": 4, "num_kv_heads": 2, "d_ff": 48, "max_seq_len": 256}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in ("bos", "eos", "pad")}
    config = ModelConfig(**{"vocab_size": tokenizer.vocab_size, **shape, **ids, **changes})
    rng = np.random.default_rng(0)
    arrays = {
        name: np.ones(shape, np.float32) if len(shape) == 1 else rng.standard_normal(shape, np.float32) / 8
        for name, shape in modeldir.expected_shapes(config).items()
    }
    made = folder.with_name(f"{folder.name}-tokenizer")
    tokenizer.save(made)
    files = {path.name: path.read_bytes() for path in made.iterdir()}
    modeldir.write_model_directory(folder, config, arrays, files, {}, {"test": True})
    if not manifest:
        (folder / modeldir.MANIFEST).unlink()
    return folder


def tree(folder: Path) -> Tree:
    """Every file below a folder with its content; locks, which stay as they are, are left out."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (".lock", "lock")
    }


def isolate(monkeypatch: Any, folder: Path) -> None:
    """Keep a test away from the user's models, and from what the environment says."""
    for name in ("MINIMAC_MODEL", "MINIMAC_DTYPE", "MINIMAC_QUANTISED", "PYTHONIOENCODING", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MINIMAC_HOME", str(folder))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
