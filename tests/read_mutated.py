"""The child process of test_mutations: changes the files of one parser by one seed after the other and opens them.

`python tests/read_mutated.py PARSER FOLDER FIRST STOP` makes good files in the new FOLDER and opens one of them,
changed, for each seed, with a watch on processor time and memory. What it is about to open it says before, so that a
crash can be told from what was said last. With one seed it repeats one case, and leaves the file in FOLDER.
"""

import faulthandler
import hashlib
import json
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from outside_files import PARSERS, Subject

from mlx_impl.errors import DamagedFileError, InputError

SECONDS = 2.0
"""Of processor time for one file: a loaded machine is no hang."""
ROOM = 1 << 30
"""Bytes of memory beyond what opening the good files took."""
LONGEST = 1000
"""Characters of an error, without the path of its folder."""


def digest(value: Any) -> str:
    """Of all that came of a file; AssertionError for a value that is not finite."""
    seen = hashlib.sha256()

    def take(value: Any) -> None:
        if isinstance(value, np.ndarray):
            assert value.dtype.kind != "f" or np.isfinite(value).all(), "accepted, with values that are not finite"
            seen.update(repr((value.dtype.str, value.shape)).encode() + value.tobytes())
        elif isinstance(value, dict):
            take([list(pair) for pair in value.items()])
        elif isinstance(value, list | tuple):
            seen.update(f"[{len(value)}".encode())
            for item in value:
                take(item)
        else:
            seen.update(repr(value).encode())

    take(value)
    return seen.hexdigest()


def unclear(error: Exception, folder: Path) -> str | None:
    """What is wrong with an error's text, wherever the folder is."""
    text = str(error)
    if not text or not text.isprintable():
        return f"the error is not one printable line: {text[:300]!r}"
    length = len(text.replace(str(folder), ""))
    return f"the error has {length:,} characters: {text[:300]!r}" if length > LONGEST else None


def outcome(subject: Subject, whole: str) -> tuple[str, str]:
    """(unchanged, other, refused or failed; the error)."""
    try:
        now = digest(subject.use())
    except (InputError, DamagedFileError) as error:
        wrong = unclear(error, subject.path.parent)
        return ("failed", wrong) if wrong else ("refused", str(error))
    except Exception:
        return "failed", traceback.format_exc()[-4000:]
    return ("unchanged" if now == whole else "other"), ""


def peak() -> int:
    """Bytes of memory used at most so far."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def limit_memory() -> None:
    """ROOM more than now and no more; where the system does not say how much that is, the peak alone is looked at."""
    pages = Path("/proc/self/statm")
    if pages.is_file():
        now = int(pages.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + ROOM, now + ROOM))


def main(parser: str, folder: Path, first: int, stop: int) -> None:
    """Read the files of these seeds; two JSON lines each, before and after."""
    warnings.simplefilter("error")
    os.environ["MINIMAC_HOME"] = str(folder / "home")
    os.fsync = lambda descriptor: None  # type: ignore[assignment]  # nothing here outlives the machine
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    subjects = PARSERS[parser](folder)
    (folder / "current").mkdir()
    os.chdir(folder / "current")
    contents = [subject.path.read_bytes() for subject in subjects]
    wholes = [digest(subject.use()) for subject in subjects]
    limit_memory()
    faulthandler.enable()
    faulthandler.register(signal.SIGPROF, chain=True)  # then ends the process, as the signal does by itself
    before = peak()
    for seed in range(first, stop):
        number = seed % len(subjects)
        subject = subjects[number]
        subject.path.write_bytes(subject.change(contents[number], Random(f"{parser} {seed}")))
        print(json.dumps({"seed": seed, "subject": subject.name}), flush=True)
        started = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        result, error = outcome(subject, wholes[number])
        signal.setitimer(signal.ITIMER_PROF, 0)
        seconds, grown = time.process_time() - started, peak() - before
        if grown > ROOM:
            result, error = "failed", f"{grown:,} bytes more memory"
        for path in Path().iterdir():
            result, error = "failed", f"{path} was written"
            path.unlink()
        record = {"seed": seed, "result": result, "error": error, "seconds": seconds, "grown": grown}
        print(json.dumps(record), flush=True)
        if seed < stop - 1:
            subject.path.write_bytes(contents[number])


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
