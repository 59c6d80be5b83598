"""Errors that a user can mend, each kind with its own exit code.

The command line prints only the message of these, never a traceback. A message says what is wrong, where, and
what to write instead. Everything else is a bug of ours and keeps its traceback (exit code 1).
"""


class UserError(Exception):
    """Base of all errors that the command line reports as one message."""

    exit_code = 2


class RecipeError(UserError):
    """A recipe or an override that cannot work: unknown key, wrong type, sizes that do not divide."""

    exit_code = 2


class DataError(UserError):
    """A prompt file that is missing, empty or malformed."""

    exit_code = 3


class CheckpointError(UserError):
    """A model folder or checkpoint that is missing, damaged or of another shape."""

    exit_code = 4


class LayoutError(UserError):
    """A parallel layout that the model or the number of processes cannot take."""

    exit_code = 5


class TrainingError(UserError):
    """A run that cannot go on, after its last checkpoint was kept."""

    exit_code = 6


INTERRUPTED_EXIT_CODE = 75
"""A run that was asked to stop and did, with a checkpoint (EX_TEMPFAIL: start it again to go on)."""
