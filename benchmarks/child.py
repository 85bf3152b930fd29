"""A function in a process of its own, and how much memory a process takes.

Peaks of memory cannot be compared within one process: what one side took, MLX and the system keep for the other. The
child loads the same BLAS as the parent, calls one function of this package and prints what it returned.

    python -m benchmarks.child MODULE FUNCTION JSON
"""

import contextlib
import importlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx_impl  # noqa: F401  before MLX, for the fast BLAS
from mlx_impl.errors import MiniMacError

ROOT = Path(__file__).parent.parent


def call(function: Callable[..., Any], **arguments: Any) -> Any:
    """What `function`, of a module, returns for arguments that JSON can hold, computed in a new process.

    MiniMacError where that fails; its traceback is then on stderr.
    """
    command = [sys.executable, "-m", "benchmarks.child", function.__module__, function.__name__, json.dumps(arguments)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=False, env={**os.environ, "PYTHONPATH": path}
    )
    if done.returncode:
        raise MiniMacError(
            f"{function.__module__}.{function.__name__} ended with code {done.returncode} in its process"
        )
    return json.loads(done.stdout)


def resident() -> int:
    """Bytes of this process that are in memory now."""
    if (status := _status("VmRSS")) is not None:
        return status
    done = subprocess.run(["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, text=True, check=True)
    return 1024 * int(done.stdout)


def peak_resident() -> int:
    """Bytes of this process that were in memory at most, since `reset_peak` where the system can do that."""
    if (status := _status("VmHWM")) is not None:
        return status
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # Linux counts in kB, macOS in bytes


def reset_peak() -> bool:
    """Let `peak_resident` begin anew; False where the system has no such thing (macOS)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(name: str) -> int | None:
    """A line of Linux's own account of this process, in bytes; None elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)


def main() -> None:
    """The child's side: what the function prints goes to stderr, only its result to stdout."""
    module, name, arguments = sys.argv[1:]
    with contextlib.redirect_stdout(sys.stderr):
        result = getattr(importlib.import_module(module), name)(**json.loads(arguments))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
