"""The errors that a user can mend, each kind with its own exit code.

The command line prints only the message of these, never a traceback. A message says what is wrong, where, and
what to write instead. Everything else is a bug of ours and keeps its traceback (exit code 1).
"""

from collections.abc import Sequence


class UserError(Exception):
    """The base of all errors that the command line reports as one message."""

    exit_code = 2


class RecipeError(UserError):
    """Raised for a recipe or an override that cannot work: unknown key, wrong type, sizes that do not divide."""

    exit_code = 2


class DataError(UserError):
    """Raised for a prompt file that is missing, empty or malformed."""

    exit_code = 3


class CheckpointError(UserError):
    """Raised for a model folder or checkpoint that is missing, damaged or of another shape."""

    exit_code = 4


class LayoutError(UserError):
    """Raised for a parallel layout that the model or the number of processes cannot take."""

    exit_code = 5


class TrainingError(UserError):
    """Raised for a run that cannot go on, after its last checkpoint was kept."""

    exit_code = 6


class RolloutError(UserError):
    """Raised for a rollout engine that cannot start, or fails again and again."""

    exit_code = 7


class MachineError(UserError):
    """The machine failed a run: out of memory, a full disk, a process that no longer answers. The same command may
    go on from the last checkpoint once that is mended."""

    exit_code = 8


class ProcessError(MachineError):
    """One process's own: it speaks for itself whatever its rank, since the others do not know."""


class RewardError(UserError):
    """Raised for rewards that fail too often to train on, after a checkpoint of the last finished step."""

    exit_code = 10


class InstallationError(UserError):
    """Raised for a package that is missing, or of a version that this project was not written for."""

    exit_code = 9


INTERRUPTED_EXIT_CODE = 75
"""A run that was asked to stop and did, with a checkpoint (EX_TEMPFAIL: start it again to go on)."""


def few(names: Sequence[str], limit: int = 8, separator: str = ", ") -> str:
    """The first of some names, and how many more there are."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return separator.join(names[:limit]) + rest


def first_line(error: BaseException) -> str:
    """Return an error in one line of at most 500 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]
