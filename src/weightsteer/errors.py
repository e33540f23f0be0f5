"""The one exception meant for users."""


class SteerError(Exception):
    """Something a user can fix: the message says what was expected, what was found and what to do.

    The command line prints the message as one line and exits with 1; no traceback is shown.
    """
