"""The `minimac-mlx` command: a group of the commands in `mlx_impl/commands`, each imported when it is called for.

Results go to stdout (with --json one JSON object, in ASCII), progress and errors to stderr. How errors become one line
and an exit code is in `mlx_impl/shell.py`.
"""

from collections.abc import Iterator, Mapping
from importlib import import_module

import click

from mlx_impl.commands import COMMANDS
from mlx_impl.shell import run, show_version


class Commands(Mapping[str, click.Command]):
    """All commands by name; to have one imports its module, to list the names imports nothing."""

    def __getitem__(self, name: str) -> click.Command:
        module, _ = COMMANDS[name]
        members = vars(import_module(f"mlx_impl.commands.{module}")).values()
        return {member.name: member for member in members if isinstance(member, click.Command)}[name]

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class Group(click.Group):
    """A group whose help is made from the table; click's own would import every command."""

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write each command's name and line."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in self.list_commands(context)])


@click.group(
    cls=Group,
    commands=Commands(),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=show_version, help="print the version"
)
def cli() -> None:
    """A local language model that keeps learning.

    Teach it a file in seconds, see what it learned, take it back.

    \b
      minimac-mlx pull                        a base to start from (SmolLM2-135M)
      minimac-mlx learn notes.md              teach it a file
      minimac-mlx generate "My notes say"     let it speak
      minimac-mlx undo                        take the lesson back
    """


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    run(cli, "minimac-mlx", arguments)


if __name__ == "__main__":
    main()
