"""The one error that is the user's to mend."""


class UserError(ValueError):
    """A mistake in the user's input: one sentence that names the field, its value and the remedy.

    The command line prints it as one line and exits with code 2; nothing has been written by then.
    Invariants of our own are `assert`s instead.
    """
