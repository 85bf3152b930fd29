"""Startup: seconds of `minimac-mlx --help`, and of `generate` until its first token is there, files in the cache.

Each run is a new process, timed from its start to the first byte of its output (or to its end, for --help), beside the
interpreter alone and mlx-lm's own command on the same model.

    minimac-mlx bench startup
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cli
from benchmarks.harness import Options, alternate, beside, peers, row
from mlx_impl.errors import MiniMacError
from mlx_impl.hub import default_model

PROMPT = "The capital of France is"
OURS = (sys.executable, "-m", "cli")
ROOT = Path(cli.__file__).parent
MLX_LM = "import mlx_impl, runpy; runpy.run_module('mlx_lm', run_name='__main__')"
"""Its command with the fast BLAS that we load: without it a prompt takes many times as long on a CPU."""


def measure(options: Options) -> dict[str, Any]:
    """Both figures, and what they stand beside."""
    model = options.model or default_model()
    named = str(model)
    generate = [*OURS, "generate", PROMPT, "-m", named, "--domain", "none", "--temperature", "0", "--max-tokens", "4"]
    theirs = [sys.executable, "-c", MLX_LM, "generate", "--model", named, "--prompt", PROMPT]
    theirs += ["--verbose", "False", "--max-tokens", "1", "--ignore-chat-template"]
    options.say("minimac-mlx --help")
    help_sides = {
        "minimac-mlx": lambda: seconds_of([*OURS, "--help"], to_the_end=True),
        "python": lambda: seconds_of([sys.executable, "-c", "print()"], to_the_end=True),
    }
    helped = options.once("help", lambda: alternate(help_sides, 2 * options.repetitions))
    options.say("generate to the first token")
    first_sides = {"minimac-mlx": lambda: seconds_of(generate), "mlx-lm": lambda: seconds_of(theirs)}
    first = options.once("generate", lambda: alternate(first_sides, options.repetitions))
    helped_by, first_by = beside(helped, rates=False), beside(first, rates=False)
    return {
        "model": model.name,
        "peers": peers("mlx-lm"),
        "figures": [
            row("minimac-mlx --help", helped_by["minimac-mlx"]["median"], "s", 0.15, at_most=True),
            row("generate to the first token", first_by["minimac-mlx"]["median"], "s", 1.5, at_most=True),
            row("generate to the first token, against mlx-lm", first_by["times_better"]["mlx-lm"]["median"], "times"),
        ],
        "help_seconds": helped_by,
        "first_token_seconds": first_by,
    }


def seconds_of(command: Sequence[str], to_the_end: bool = False) -> float:
    """Seconds from starting a program to its first byte on stdout, or to its end; MiniMacError if it fails."""
    started = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed program is compiled once, and not at every start
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    process.stdout.read(1)
    taken = time.perf_counter() - started
    _, told = process.communicate()
    if process.returncode:
        last = told.decode(errors="replace").strip().splitlines()[-1:]
        raise MiniMacError(f"{' '.join(command[:4])} ended with code {process.returncode}: {' '.join(last)}")
    return time.perf_counter() - started if to_the_end else taken
