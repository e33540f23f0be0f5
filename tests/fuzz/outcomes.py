"""One input read within a time and a memory: right, refused, or a failure of ours."""

from __future__ import annotations

import contextlib
import io
import random
import resource
import shutil
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from formats import FORMATS, SilentError

from weightsteer.errors import SteerError

SECONDS = 30
MEGABYTES = 1500  # that one input may add
GOOD = ("right", "refused")


class HangError(BaseException):
    """Time is up; no `except Exception` stops it."""


@dataclass(frozen=True)
class Outcome:
    kind: str  # right, refused, traceback, silent, hang, memory
    detail: str = ""


def outcome_of(name: str, seed: int) -> Outcome:
    """Read the input of a format that a seed makes."""
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _timed(FORMATS[name](random.Random(f"{name} {seed}"), folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _timed(call: Callable[[], object]) -> Outcome:
    before = _memory()

    def stop(*_: object) -> None:
        raise HangError

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        found = _judged(call)
    except HangError:
        found = Outcome("hang", f"more than {SECONDS} s")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    grown = _memory() - before
    return Outcome("memory", f"{grown} MB") if grown > MEGABYTES else found


def _judged(call: Callable[[], object]) -> Outcome:
    try:
        call()
    except SteerError as error:
        text = str(error)
        return Outcome("refused", text) if len(text) < 2000 else Outcome("traceback", f"a message of {len(text)}")
    except SilentError as error:
        return Outcome("silent", str(error))
    except MemoryError:
        return Outcome("memory", "MemoryError")
    except HangError:
        raise
    except BaseException as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "weightsteer/" in f.filename]
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "outside"
        return Outcome("traceback", f"{type(error).__name__}: {str(error)[:150]} at {where}")
    return Outcome("right")


def _memory() -> int:
    """The largest size that the process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
