"""What commands are declared with: `command` itself, and the options and arguments that several of them have."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from mlx_impl.commands import COMMANDS
from mlx_impl.config import default_of, help_of
from mlx_impl.errors import InputError

FOLDER = click.Path(file_okay=False, path_type=Path)

PATHS = click.argument("paths", nargs=-1, type=click.Path(path_type=Path))


def command(name: str) -> Callable[[Callable], click.Command]:
    """Make a function the command called `name`, with the line of --help that `COMMANDS` has for it."""
    _, line = COMMANDS[name]
    return click.command(name, short_help=line)


def setting(cls: type, name: str, flag: str | None = None, kind: Any = None) -> Callable:
    """A click option made from a configuration's field: its default and its help stand there."""
    default = default_of(cls, name)
    return click.option(
        flag or f"--{name.replace('_', '-')}",
        name,
        type=kind or type(default),
        default=None,
        help=help_of(cls, name) + (f"  [default: {default}]" if default is not None else ""),
    )


class _Model(click.Path):
    """A model directory, or the name of one that was pulled."""

    def __init__(self) -> None:
        super().__init__(exists=True, file_okay=False, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path: what lies at it comes first."""
        if isinstance(value, str) and not os.path.lexists(value):
            from mlx_impl.hub import pulled

            value = pulled(value) or value
        return super().convert(value, param, ctx)


def common(model: bool = True, store: bool = True) -> Callable:
    """The options that every command has: --json, --quiet, --debug, and --model and --store where it uses one."""

    def decorate(function: Callable) -> Callable:
        options = [
            click.option("--json", "as_json", is_flag=True, help="one JSON object on stdout"),
            click.option("--quiet", is_flag=True, help="no progress"),
            click.option("--debug", is_flag=True, expose_value=False, help="a traceback when something fails"),
        ]
        if model:
            shown = "model directory, or the name of one that was pulled  [default: MINIMAC_MODEL, else the last one]"
            options.append(click.option("-m", "--model", type=_Model(), help=shown))
        if model and store:
            shown = "where lessons are kept  [default: MODEL/learner]"
            options.append(click.option("--store", type=FOLDER, help=shown))
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


@contextmanager
def as_given() -> Iterator[None]:
    """Let errors about values name the options of the command; a configuration knows its own fields only."""
    try:
        yield
    except InputError as error:
        text = re.sub(r"^\w+ configuration: ", "", str(error))
        for option in click.get_current_context().command.params:
            text = re.sub(rf"\b{option.name} = ", f"{option.opts[0]} ", text)
        raise InputError(text) from None


def given(**values: Any) -> dict[str, Any]:
    """The options that were set."""
    return {name: value for name, value in values.items() if value is not None}
