"""What `minimac-mlx bench NAME` runs: measures, and writes `bench_NAME.json` with the machine beside the figures.

What lies in a folder of such files as a table in Markdown, for the README:

    python -m benchmarks.bench [FOLDER]
"""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import BENCH, mac
from benchmarks.common import RESULTS, portable, stamped
from benchmarks.harness import Options
from mlx_impl import files


def run(name: str, options: Options, out: Path) -> dict[str, Any]:
    """Measure one of `BENCH` and write its JSON, and its picture if it has one, into `out`; returns what it wrote.

    A quick run's files are named so: its figures say that it works, and nothing more. `written` names the files.
    """
    module = importlib.import_module(f"benchmarks.{name}")
    options.say(f"-- {name}")
    found = module.measure(options)
    command = " ".join(["minimac-mlx", *map(portable, sys.argv[1:])])
    record = stamped(f"bench_{name}", command, {"mac": mac.describe(), "quick": options.quick, **found})
    out.mkdir(parents=True, exist_ok=True)
    target = out / f"bench_{name}{'_quick' if options.quick else ''}.json"
    files.write_json(target, record)
    written = [target]
    if hasattr(module, "draw"):
        written.append(target.with_suffix(".png"))
        module.draw(found, written[-1])
    return {**record, "written": [str(path) for path in written]}


def table(folder: Path) -> str:
    """The figures of the files in a folder, a line each, with their goals; quick runs are left out."""
    return "\n".join(["| figure | measured | goal | |", "|---|---:|---|---|", *_lines(folder)])


def _lines(folder: Path) -> Iterator[str]:
    for path in (folder / f"bench_{name}.json" for name in BENCH):
        for row in files.read_json(path)["figures"] if path.is_file() else ():
            value = "" if row["value"] is None else f"{row['value']:.3g} {row['unit']}"
            met = {True: "met", False: "not met", None: ""}[row["met"]]
            yield f"| {row['figure']} | {value} | {row['goal'] or ''} | {met} |"


if __name__ == "__main__":
    print(table(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS))
