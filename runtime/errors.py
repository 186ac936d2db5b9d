"""Every error that a person may meet. The command line prints the message and exits with `exit_code`."""

from __future__ import annotations


class EdgeError(Exception):
    """Something failed that was not the user's mistake: a disk, a kernel, a lost file. Exit code 1."""

    exit_code = 1


class UsageError(EdgeError):
    """The user asked for something that cannot be: the message says what was wanted, what was found, what to run."""

    exit_code = 2


class BundleError(UsageError):
    """A bundle is missing, damaged or of another version. Names the file and the field."""


class CheckpointError(UsageError):
    """A checkpoint cannot be read or is not supported. Names the file, tensor or config field."""


class BudgetError(UsageError):
    """A memory budget cannot hold what it must. The message spells the sum out."""


class ReadError(EdgeError):
    """An expert blob could not be read whole and unchanged. Names the blob; the engine can serve the next request."""


def first_line(error: Exception) -> str:
    """What an error of somebody else's code says, in one line of ours; its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
