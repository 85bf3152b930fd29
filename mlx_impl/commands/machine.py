"""This machine: how it is doing, how fast it is, and everything once."""

import os
from pathlib import Path

import click

from benchmarks import BENCH, REPETITIONS
from mlx_impl.commands.inputs import model_directory
from mlx_impl.commands.options import FOLDER, command, common
from mlx_impl.errors import InputError, MiniMacError
from mlx_impl.shell import emit, write


@command("doctor")
@common(store=False)
def doctor(model: Path | None, as_json: bool, quiet: bool) -> None:
    """Show this machine as minimac-mlx sees it, and what to do if something is wrong.

    \b
    Example:
      minimac-mlx doctor
    """
    from mlx_impl import device
    from mlx_impl.results import doctor_text

    found, advice = _default_model() if model is None else (str(model), [])
    record = {**device.describe(), "model": found, "advice": [*device.advice(), *advice]}
    emit(as_json, record, doctor_text(record))


@command("bench")
@click.argument("name", metavar="NAME", type=click.Choice([*BENCH, "all"]))
@click.option("--out", type=FOLDER, default="minimac-bench", show_default=True, help="folder for JSON and pictures")
@click.option("--data", type=FOLDER, help="folder of NAME/train.txt to train on  [default: Python's reference]")
@click.option(
    "--repetitions", type=click.IntRange(1), default=REPETITIONS, show_default=True, help="of each measurement"
)
@click.option("--quick", is_flag=True, help="small sizes, to see that it works: no figures to keep")
@common(store=False)
def bench(
    name: str,
    out: Path,
    data: Path | None,
    repetitions: int,
    quick: bool,
    model: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure this machine: warmed up, repeated, mlx-lm and PyTorch in the same run, a JSON file for each NAME.

    One that was interrupted goes on where it was when it is asked for again.

    \b
      tokens   decoding and prefill              train    LoRA and full steps, memory
      route    choosing among many domains       startup  to the first token
      curves   how costs grow                    learn    seconds to a held-out loss

    \b
    Examples:
      minimac-mlx bench all
      minimac-mlx bench tokens --quick
    """
    from benchmarks.bench import run, run_all
    from benchmarks.harness import Options
    from mlx_impl.console import Reporter
    from mlx_impl.results import bench_text

    with Reporter(quiet) as reporter:
        options = Options(model_directory(model), data, repetitions, quick, reporter.say)
        records, failed = run_all(BENCH, options, out) if name == "all" else ([run(name, options, out)], {})
    emit(as_json, {"benchmarks": records, "failed": failed}, "\n\n".join(map(bench_text, records)))
    if failed:
        raise MiniMacError(f"failed: {'; '.join(f'{one}: {why}' for one, why in failed.items())}")


@command("demo")
@click.option("--seconds", type=float, default=60.0, show_default=True, help="time for each of the two trainings")
@common(store=False)
def demo(seconds: float, model: Path | None, as_json: bool, quiet: bool) -> None:
    """Everything once: pull a base, train a tiny model from scratch, teach the base a file, take it back.

    The text is Python's own language reference, which every Python brings along. With --model nothing is pulled and
    that model is taught; it is not changed either way.

    \b
    Examples:
      minimac-mlx demo
      minimac-mlx demo --seconds 20 --model my-model
    """
    from mlx_impl.console import Reporter
    from mlx_impl.demo import demo as play

    with Reporter(quiet) as reporter:
        record = play(seconds, model, reporter, reporter.say if as_json else lambda line: write(f"{line}\n"))
    if as_json:
        emit(as_json, record, "")


def _default_model() -> tuple[str | None, list[str]]:
    """The default model's folder, if there is one, and what is wrong where one is named that is none."""
    from mlx_impl.files import home_path

    if not os.environ.get("MINIMAC_MODEL") and not (home_path() / "default").is_file():
        return None, []
    try:
        return str(model_directory(None)), []
    except (InputError, OSError) as error:
        return None, [str(error)]
