"""The errors that are told in one sentence, without a trace."""


class UserError(ValueError):
    """A mistake in the user's input: one sentence that names the field, its value and the remedy.

    The command line prints it as one line and exits with code 2; nothing has been written by then.
    Invariants of our own are `assert`s instead.
    """


class TrainingFailure(RuntimeError):
    """Training cannot go on, though nothing was wrong with the input: one sentence with what happened and what to do.

    Raised on every rank alike. The command line prints it as one line and exits with code 1.
    """
