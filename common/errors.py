"""The one exception for mistakes that the user can mend."""


class UserError(ValueError):
    """A mistake in the user's input, settings or files.

    The message says what is wrong, where, and what to do about it. The command line prints it without a
    traceback and exits with status 2.
    """


def check_range(name: str, value: float | None, low: float, high: float) -> None:
    """Raise a UserError unless low <= value <= high; NaN is in no range, and None is no value."""
    if value is not None and not low <= value <= high:
        raise UserError(f"{name} is {value}: it must be {low:,} to {high:,}")


def first_line(error: BaseException) -> str:
    """First line of an exception's message, for a message of one line; its type's name if it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
