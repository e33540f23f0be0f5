"""The one exception meant for users."""

import re

ENDLESS = re.compile(r"(\S{300})\S{700,}")  # a name in a damaged file can be as long as the file


class SteerError(Exception):
    """Something a user can fix: the message says what was expected, what was found and what to do.

    The command line prints the message as one line and exits with 1; no traceback is shown. Of a word without end, as
    a damaged file may hold one, the message has the beginning.
    """

    def __init__(self, message: str) -> None:
        super().__init__(ENDLESS.sub(r"\1...", message))


def first_line(error: BaseException | object) -> str:
    """What another library's error says, in one line; its type where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
