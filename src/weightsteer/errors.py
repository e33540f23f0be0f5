"""The one exception meant for users."""


class SteerError(Exception):
    """Something a user can fix: the message says what was expected, what was found and what to do.

    The command line prints the message as one line and exits with 1; no traceback is shown.
    """


def first_line(error: BaseException | object) -> str:
    """What another library's error says, in one line; its type where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
