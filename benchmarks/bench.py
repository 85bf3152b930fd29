"""What `minimac-mlx bench NAME` runs: measures, and writes `bench_NAME.json` with the machine beside the figures.

What a part measured is kept in `work` beside the JSON until that is written: who is interrupted goes on by asking for
the same again, with the same settings, machine and commit.

What lies in a folder of such files as a table in Markdown, for RESULTS.md and, those with a goal, for the README:

    python -m benchmarks.bench [FOLDER] [--goals]
"""

import argparse
import contextlib
import importlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import BENCH, mac
from benchmarks.common import RESULTS, commit, portable, stamped
from benchmarks.harness import Options
from benchmarks.resume import Work
from mlx_impl import device, files
from mlx_impl.hub import default_model


def run_all(names: Sequence[str], options: Options, out: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """`run` of each name, and why those that failed did: one that fails does not keep the others from running."""
    options = replace(options, model=options.model or default_model())  # without any, none can run
    records, failed = [], {}
    for name in names:
        try:
            records.append(run(name, options, out))
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
            options.say(f"{name} failed, {failed[name]}")
    return records, failed


def run(name: str, options: Options, out: Path) -> dict[str, Any]:
    """Measure one of `BENCH` and write its JSON, and its picture if it has one, into `out`; returns what it wrote.

    A quick run's files are named so: its figures say that it works, and nothing more. `written` names the files,
    `resumed` how many of the parts an interrupted run had measured.
    """
    module = importlib.import_module(f"benchmarks.{name}")
    options.say(f"-- {name}")
    made_from, machine = commit(), device.describe()  # before hours in which files may change
    settings = {
        "model": str((options.model or default_model()).resolve()),
        "data": str(options.data and options.data.resolve()),
        "repetitions": options.repetitions,
        "quick": options.quick,
        "commit": made_from,
        "machine": machine,
    }
    work, resumed = Work(out / "work" / name, settings), 0

    def once(key: str, measure: Callable[[], Any]) -> Any:
        nonlocal resumed
        resumed += key in work
        return work.once(key, lambda: finite(measure()))

    found = module.measure(replace(options, once=once))
    command = " ".join(["minimac-mlx", *map(portable, sys.argv[1:])])
    figures = {"mac": mac.describe(), "quick": options.quick, "resumed": resumed, **finite(found)}
    record = {**stamped(f"bench_{name}", command, figures), "commit": made_from}
    target = out / f"bench_{name}{'_quick' if options.quick else ''}.json"
    files.write_json(target, record)
    written = [target]
    if hasattr(module, "draw"):
        written.append(target.with_suffix(".png"))
        module.draw(found, written[-1])
    shutil.rmtree(out / "work" / name)
    with contextlib.suppress(OSError):  # another name may have its own in there
        (out / "work").rmdir()
    return {**record, "written": [str(path) for path in written]}


def finite(value: Any) -> Any:
    """As JSON gives it back, None for each number that is not finite: JSON has none."""
    return json.loads(json.dumps(value), parse_constant=lambda name: None)


def table(folder: Path, goals: bool = False) -> str:
    """The figures of the files in a folder, a line each, or those with `goals` only; quick runs are left out."""
    return "\n".join(["| figure | measured | goal | |", "|---|---:|---|---|", *_lines(folder, goals)])


def _lines(folder: Path, goals: bool) -> Iterator[str]:
    for path in (folder / f"bench_{name}.json" for name in BENCH):
        for row in files.read_json(path)["figures"] if path.is_file() else ():
            if goals and not row["goal"]:
                continue
            value = "" if row["value"] is None else f"{row['value']:.4g} {row['unit']}"
            met = {True: "met", False: "not met", None: ""}[row["met"]]
            yield f"| {row['figure']} | {value} | {row['goal'] or ''} | {met} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=RESULTS)
    parser.add_argument("--goals", action="store_true", help="only figures that have a goal")
    chosen = parser.parse_args()
    print(table(chosen.folder, chosen.goals))
