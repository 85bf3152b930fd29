"""What running any command takes: output, and errors told to a person.

Results go to stdout, everything else to stderr. Whatever fails becomes one line and an exit code: 0 done, 1 failed,
2 wrong usage or input, 3 a damaged file, 4 locked by another process, 130 interrupted. --debug puts the traceback
before it. What --help does not need is imported inside the functions.
"""

import errno
import io
import re
import sys
import traceback
from typing import Any, NoReturn

import click

from mlx_impl.errors import MiniMacError, OutputError, printable


def emit(as_json: bool, record: dict[str, Any], text: str) -> None:
    """Print a result: as JSON, or as text for a person."""
    import json

    write((json.dumps(record, allow_nan=False) if as_json else text) + "\n")


def write(text: str) -> None:
    """Put text on stdout at once. Where its reader has left, the command ends there, as done.

    Raises OutputError where it cannot be written.
    """
    if sys.stdout is None:  # closed by whoever started us
        return
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        from mlx_impl.console import silence

        silence(sys.stdout)
        if isinstance(error, BrokenPipeError):
            raise click.exceptions.Exit(0) from None
        raise OutputError(f"the result could not be written to stdout: {error.strerror}") from None


def show_version(context: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    """What --version prints; a checkout that is not installed has no version of its own."""
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            write(f"minimac-mlx {version('minimac-mlx')}\n")
        except PackageNotFoundError:
            write("minimac-mlx, a checkout that is not installed\n")
        context.exit()


def harmless(text: str) -> str:
    """The text with its line ends, without what a terminal would obey: a model can write escape sequences too.

    Of the two characters that end a line on Windows the first is left out, also where the second comes in another
    piece: alone it would have what follows written over the line.
    """
    text = re.sub("\r(?=\n|$)", "", text)
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", "\ufffd", text)


def _explain(error: Exception) -> tuple[str, int]:
    """What is said of an error, and the exit code it ends with."""
    if isinstance(error, click.UsageError):
        where = error.ctx.command_path if error.ctx else "minimac-mlx"
        text = " ".join(error.format_message().split()).rstrip(".")  # click breaks lists of choices into lines
        return f"{text}; see `{where} --help`", error.exit_code
    if isinstance(error, click.ClickException):
        return error.format_message(), error.exit_code
    if isinstance(error, MiniMacError):
        return str(error), error.exit_code
    if isinstance(error, OSError):
        return _explain_system(error)
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if isinstance(error, MemoryError) or "allocate" in reason:  # MLX says so in a RuntimeError
        return f"out of memory; take a smaller --batch-size, context or model ({reason})", 1
    return f"internal error: {reason}; run it again with --debug and report what that prints", 1


def _explain_system(error: OSError) -> tuple[str, int]:
    """What is said where the operating system refused."""
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{where}{error.strerror}; nothing was half-written, make room and try again", 1
    if isinstance(error, PermissionError):
        return f"{where}permission denied", 1
    if isinstance(error, FileNotFoundError):
        return f"{where}no such file or folder", 2
    if isinstance(error, NotADirectoryError | FileExistsError):
        return f"{where}a folder is needed here and a file is in its place", 2
    return f"{where}{error.strerror or error}", 1


def run(group: click.Group, name: str, arguments: list[str] | None) -> NoReturn:
    """Run a program's commands as called `name`; turns their errors into one line and ends with the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an encoding without the character is no reason to stop
    try:
        code = group.main(arguments, prog_name=name, standalone_mode=False) or 0
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort) as interrupt:
        _tell(f"interrupted; {interrupt}" if str(interrupt) else "interrupted")
        code = 130
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        text, code = _explain(error)
        _tell(f"{'' if code == 130 else 'error: '}{printable(text)}")
    sys.exit(code)


def _tell(text: str) -> None:
    """A line on stderr, if anybody can still read it: the exit code says what happened, too."""
    try:
        click.echo(text, err=True)
    except OSError:
        from mlx_impl.console import silence

        silence(sys.stderr)
