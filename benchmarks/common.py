"""What every benchmark writes beside its figures: machine, versions, commit, date and the command that made them."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from mlx_impl import device, files

RESULTS = Path(__file__).parent / "results"


def record(name: str, figures: dict[str, Any], module: str | None = None) -> Path:
    """Write `results/NAME.json` and print it; returns its path. `module` measured it, where it has another name."""
    command = " ".join(["python", "-m", f"benchmarks.{module or name}", *map(portable, sys.argv[1:])])
    path = RESULTS / f"{name}.json"
    files.write_json(path, stamped(name, command, figures))
    print(json.dumps(figures, indent=2))
    print(f"written to {path}", file=sys.stderr)
    return path


def stamped(name: str, command: str, figures: dict[str, Any]) -> dict[str, Any]:
    """Figures with what made them: date, command, commit, machine and versions."""
    result = {
        "benchmark": name,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": command,
        "commit": commit(),
        "machine": device.describe(),
        **figures,
    }
    if result["machine"]["blas"]:
        result["machine"]["blas"] = Path(result["machine"]["blas"]).name
    return result


def portable(argument: str) -> str:
    """An argument without the folders of this machine in it."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def commit() -> str | None:
    """The checkout's commit, with "+" where files differ from it; None outside a checkout."""
    root = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
