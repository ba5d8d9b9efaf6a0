"""The errors that are reported in one sentence, without a trace."""

import importlib.util


class UserError(ValueError):
    """A mistake in the user's input: one sentence that names the field, its value and the remedy.

    The command line prints it as one line and exits with code 2; nothing has been written by then.
    Invariants of our own are `assert`s instead.
    """


class TrainingFailure(RuntimeError):
    """Training cannot go on, though nothing was wrong with the input: one sentence with what happened and what to do.

    Raised on every rank alike. The command line prints it as one line and exits with code 1.
    """


class Stopped(Exception):
    """A signal has ended a run early; whatever there was to save is saved, and what to do next has been printed.

    exit_code: 128 plus the signal's number, by the shells' convention, so that no one takes the run for a finished one.
    """

    def __init__(self, signal_number: int):
        super().__init__(f"stopped by signal {signal_number}")
        self.exit_code = 128 + signal_number


def require_package(package: str, key: str) -> None:
    """Raises a UserError where a package is not installed that the value of a key needs."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{key} needs the package {package}, which is not installed: pip install {package}")
