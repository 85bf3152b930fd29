"""Errors meant for a person, each with the exit code that the command line ends with.

One line: what is wrong, where, both values where there are two, and what to do. Anything that is not one of
these is a defect of ours and shows as such. What a file or another library says may be a gigabyte, many lines, or hold
what a terminal would obey: `printable`, `listed` and `shown` make it fit to be part of an error.
"""

import re
import reprlib
from collections.abc import Sequence

SHOWN = 10
"""Names that an error lists; the others are counted."""


class MiniMacError(Exception):
    """Something failed that is nobody's wrong input: exit code 1."""

    exit_code = 1


class OutputError(MiniMacError):
    """Stdout takes no more, so that there is no use in going on: exit code 1."""


class InputError(MiniMacError, ValueError):
    """Wrong usage or input that cannot be used as it is: exit code 2."""

    exit_code = 2


class DamagedFileError(MiniMacError):
    """A file is damaged or is not what it claims to be: exit code 3."""

    exit_code = 3


class LockedError(MiniMacError):
    """Another process is writing here: exit code 4. The message names its pid."""

    exit_code = 4


class NonFiniteLossError(MiniMacError):
    """The loss became NaN or infinite; the message names the step. Nothing after the last good state is kept."""


class Interrupted(MiniMacError):
    """Stopped by the user after saving: exit code 130, like a shell's."""

    exit_code = 130


OBEYED = "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
"""Control characters, line ends, what turns the direction of writing, and halves of surrogate pairs."""


def legible(text: str) -> str:
    """The text on one line, without what a terminal would obey; spaces of all kinds and joined emoji stay as they are.

    For what a person wrote: macOS puts U+202F into the names of its screenshots.
    """
    return re.sub(OBEYED, "\ufffd", text)


def printable(text: str, at_most: int | None = None) -> str:
    """The text on one line, without what a terminal would obey or an encoding refuse, cut to so many characters."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text[:at_most])


def listed(names: Sequence[str], separator: str = ", ", longest: int = 120) -> str:
    """The first names, each cut to so many characters, and how many there are more."""
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return separator.join(printable(name, longest) for name in names[:SHOWN]) + more


def shown(value: object) -> str:
    """A value from outside, shortened where it is made text: a few lists in each other can stand for gigabytes."""
    return printable(reprlib.repr(value), 80)
