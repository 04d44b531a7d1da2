"""The one exception for mistakes that the user can mend."""


class UserError(ValueError):
    """A mistake in the user's input, settings or files.

    The message says what is wrong, where, and what to do about it. The command line prints it without a
    traceback and exits with status 2.
    """
