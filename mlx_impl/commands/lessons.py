"""The lessons that were learned: seen, measured, taken back, erased, checked."""

import dataclasses
import sys
import tempfile
from pathlib import Path

import click

from mlx_impl.commands.inputs import model_directory
from mlx_impl.commands.options import FOLDER, command, common
from mlx_impl.errors import DamagedFileError, InputError, MiniMacError, printable
from mlx_impl.shell import emit


@command("list")
@common()
def list_domains(model: Path | None, store: Path | None, as_json: bool, quiet: bool) -> None:
    """Show the domains and their latest lessons.

    \b
    Example:
      minimac-mlx list
    """
    from mlx_impl.results import domains_text
    from mlx_impl.store import open_store

    lessons = open_store(model_directory(model), store)
    records = lessons.overview()
    emit(as_json, {"domains": records}, domains_text(records, str(lessons.folder)))


@command("log")
@click.argument("domain", default="main")
@common()
def log(domain: str, model: Path | None, store: Path | None, as_json: bool, quiet: bool) -> None:
    """Show the lessons that a domain stands on, newest first: what they taught, and what they did to earlier ones.

    \b
    Examples:
      minimac-mlx log
      minimac-mlx log medical
    """
    from mlx_impl.results import log_text
    from mlx_impl.store import open_store

    lessons = open_store(model_directory(model), store)
    lessons.require(domain)
    history = lessons.history(domain)
    records = [version.as_json() for version in reversed(history)]
    pruned = history[0].depth - 1
    emit(as_json, {"domain": domain, "lessons": records, "pruned": pruned}, log_text(domain, records, pruned))


@command("report")
@click.argument("domains", metavar="[DOMAIN]...", nargs=-1)
@click.option("--out", type=FOLDER, default="minimac-report", show_default=True, help="for report.json and report.png")
@click.option(
    "--tokens", type=click.IntRange(1), default=1024, show_default=True, help="of each lesson's held-out text"
)
@common()
def report(
    domains: tuple[str, ...], out: Path, tokens: int, model: Path | None, store: Path | None, as_json: bool, quiet: bool
) -> None:
    """Measure every lesson's held-out text under every version of its domain: what was learned, forgotten and kept.

    Says how long it will take. Prints a table and writes report.json, with all figures, and report.png.

    \b
    Examples:
      minimac-mlx report
      minimac-mlx report medical --tokens 4096 --out figures
    """
    from mlx_impl import report as reports
    from mlx_impl.console import Reporter
    from mlx_impl.learner import ContinualLearner
    from mlx_impl.results import report_text

    with Reporter(quiet) as reporter:
        learner = ContinualLearner.from_checkpoint(model_directory(model), store=store)
        domains = tuple(reports.named(learner.store, domains))
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):  # what cannot be written to fails before anything is measured
            pass
        record = reports.report(learner, domains, tokens, reporter)
    emit(as_json, record, report_text(record))
    Reporter(quiet).say(f"written: {', '.join(map(str, reports.write(record, out)))}")


@command("undo")
@click.argument("domain", required=False)
@click.option("--to", metavar="VERSION", help="go to this version, like v0002")
@common()
def undo(
    domain: str | None, to: str | None, model: Path | None, store: Path | None, as_json: bool, quiet: bool
) -> None:
    """Take the last lesson of a domain back, by default of the one that learned last; of a first one, remove it.

    \b
    Examples:
      minimac-mlx undo
      minimac-mlx undo medical --to v0002
    """
    from mlx_impl.results import undo_record, undo_text
    from mlx_impl.store import open_store
    from mlx_impl.versions import version_number

    lessons = open_store(model_directory(model), store)
    number = version_number(to) if to is not None else None
    with lessons.writing():
        domain = domain or lessons.latest()
        before, there = lessons.history(domain), lessons.versions(domain)
        lessons.undo(domain, number)
        record = undo_record(domain, before, lessons.history(domain), there)
    emit(as_json, record, undo_text(record))


@command("forget")
@click.argument("domain")
@click.option("--yes", is_flag=True, help="do not ask")
@common()
def forget(domain: str, yes: bool, model: Path | None, store: Path | None, as_json: bool, quiet: bool) -> None:
    """Erase a domain for good: its adapters, the text held out of its lessons, the names of its files.

    Other domains stay as they are, to the bit. A single lesson cannot be erased from the middle of a domain, because
    later ones were built on it: go back before it with undo, or forget the domain and teach the rest again.

    Only the lessons' own folder is reached: reports, exported adapters and what was typed in chat (chat_history in
    ~/.minimac-mlx) are yours to delete.

    \b
    Examples:
      minimac-mlx forget medical
      minimac-mlx forget medical --yes
    """
    from mlx_impl.results import count, forgetting_text, size
    from mlx_impl.store import open_store

    lessons = open_store(model_directory(model), store)
    lessons.require(domain)
    if not yes:
        _confirm(f"{forgetting_text(domain, [v.source for v in lessons.versions(domain)])}. Erase it for good?")
    with lessons.writing():
        before = lessons.size()
        gone = lessons.forget(domain)
        freed = before - lessons.size()
    record = {"domain": domain, "forgotten": [version.name for version in gone], "bytes": freed}
    emit(as_json, record, f"{domain} is forgotten: {count(len(gone), 'version')}, {size(freed)}")


@command("prune")
@click.option("--keep", type=click.IntRange(1), default=5, show_default=True, help="versions of each domain to keep")
@common()
def prune(keep: int, model: Path | None, store: Path | None, as_json: bool, quiet: bool) -> None:
    """Delete old versions: of each domain the current one and those it stands on, --keep in all, stay.

    What domains know stays as it is. Versions that were undone go too, undo reaches back no further than what was
    kept, and the text held out of the deleted lessons is no longer measured.

    \b
    Examples:
      minimac-mlx prune
      minimac-mlx prune --keep 1
    """
    from mlx_impl.results import count, size
    from mlx_impl.store import open_store

    lessons = open_store(model_directory(model), store)
    with lessons.writing():
        before = lessons.size()
        gone = lessons.prune(keep)
        freed = before - lessons.size()
    pruned = [{"domain": version.domain, "version": version.name} for version in gone]
    emit(
        as_json,
        {"keep": keep, "pruned": pruned, "bytes": freed},
        f"pruned {count(len(gone), 'version')}, {size(freed)} freed" if gone else "nothing to prune",
    )


@command("verify")
@common()
def verify(model: Path | None, store: Path | None, as_json: bool, quiet: bool) -> None:
    """Check the base's files, the database, every version's files, and that nothing else lies among them.

    Prints a line for each problem and ends with code 3 if there is one. Changes nothing.

    \b
    Example:
      minimac-mlx verify
    """
    from mlx_impl.results import verification_text
    from mlx_impl.verify import verify as look

    found = look(model_directory(model), store)
    record = dataclasses.asdict(found)
    record["problems"] = [printable(line) for line in found.problems]
    emit(as_json, record, verification_text(record))
    if found.problems:
        raise click.exceptions.Exit(DamagedFileError.exit_code)


def _confirm(question: str) -> None:
    """Ask on the terminal; MiniMacError for no, InputError where there is nobody to ask."""
    if sys.stdin is None or not sys.stdin.isatty():
        raise InputError("this cannot be taken back, and there is no terminal to ask on; say --yes if it is meant")
    if not click.confirm(printable(question), err=True):
        raise MiniMacError("nothing was erased")
