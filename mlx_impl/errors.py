"""Errors meant for a person, each with the exit code that the command line ends with.

One line: what is wrong, where, both values where there are two, and what to do. Anything that is not one of
these is a defect of ours and shows as such.
"""


class MiniMacError(Exception):
    """Something failed that is nobody's wrong input: exit code 1."""

    exit_code = 1


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
