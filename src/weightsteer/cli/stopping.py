"""Ctrl-C and SIGTERM: what is half written is taken away, and one line says how to go on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

GO_ON = "stopped; the same command goes on from what it has kept"
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StoppedError(BaseException):
    """A signal asked the command to end. It passes every `except Exception`, as KeyboardInterrupt does."""

    def __init__(self, number: int) -> None:
        super().__init__(GO_ON)
        self.code = 128 + number  # 130 for Ctrl-C, 143 for SIGTERM, as shells give them


@contextmanager
def stopping_on_signals() -> Iterator[list[StoppedError]]:
    """Raise a `StoppedError` within the block at the first signal; a second one ends the process at once.

    Yields:
        A list that holds the error once it was raised, since other libraries may turn it into an error of theirs.
    """
    stopped: list[StoppedError] = []
    if threading.current_thread() is not threading.main_thread():  # Python gives signals to the main thread alone
        yield stopped
        return

    def stop(number: int, frame: FrameType | None) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        stopped.append(StoppedError(number))
        raise stopped[0]

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
