"""One writer a folder: a lock beside it that says who writes, and goes with the process that holds it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from .disk import make_folder, telling_of_disk
from .errors import SteerError

LOCKS = "WEIGHTSTEER_LOCKS"  # "off": go on where the file system keeps no locks
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class _Held(threading.local):
    """The locks that this thread holds, so that what it calls may ask for them again."""

    def __init__(self) -> None:
        # with the process, since a forked one holds nothing; the open file, or None where there are no locks
        self.places: dict[tuple[int, Path], int | None] = {}


_HELD = _Held()


@contextmanager
def hold(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a folder, which need not be there yet, for this thread alone; what dies gives it free.

    Args:
        wait: for another writer to end, instead of refusing.

    Raises:
        SteerError: another process writes it, which is named, or its file system keeps no locks.
    """
    place = lock_of(folder)
    key = os.getpid(), place
    if key in _HELD.places:
        yield
        return
    handle = _acquire(folder, place, wait)
    _HELD.places[key] = handle
    try:
        yield
    finally:
        _HELD.places.pop(key, None)
        if handle is not None:
            _release(place, handle)


@contextmanager
def held_by_caller(folder: Path) -> Iterator[None]:
    """Work on a folder that is held by the process which has started this one, and was told to go on here."""
    key = os.getpid(), lock_of(folder)
    _HELD.places[key] = None
    try:
        yield
    finally:
        _HELD.places.pop(key, None)


def held_by(folder: Path) -> tuple[int, ...]:
    """The open file by which this thread holds a folder: a process that is given it holds the folder as well."""
    handle = _HELD.places.get((os.getpid(), lock_of(folder)))
    return () if handle is None else (handle,)


def lock_of(folder: Path) -> Path:
    """The lock's file: beside the folder, or inside it where nothing can be written beside it, as on a mounted disk."""
    folder = folder.resolve()
    inside = folder.is_dir() and not os.access(folder.parent, os.W_OK)
    return (folder if inside else folder.parent) / f".{folder.name}.lock"


def _acquire(folder: Path, place: Path, wait: bool) -> int | None:
    """The open lock; None if there are no locks and the user wants none."""
    make_folder(place.parent)
    while True:
        with telling_of_disk(place):
            handle = os.open(place, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(folder, handle, wait)
        except OSError as error:
            _release(place, handle)  # nobody can hold it
            if error.errno not in NO_LOCKS:
                raise
            if os.environ.get(LOCKS) == "off":
                return None
            raise SteerError(
                f"{folder}: its file system keeps no locks ({error.strerror}), so that two commands could write it at "
                f"once; if no other command does, go on with {LOCKS}=off"
            ) from None
        except BaseException:
            os.close(handle)
            raise
        if _is_at(place, handle):
            _sign(handle)
            return handle
        os.close(handle)  # its holder took it away while we waited


def _lock(folder: Path, handle: int, wait: bool) -> None:
    """Take the lock.

    Raises:
        SteerError: another process holds it.
        OSError: there are no locks.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            raise SteerError(
                f"{folder}: {_holder(handle)} is writing it; wait until it has ended, or choose another output"
            ) from None
        warnings.warn(f"{folder}: waits until {_holder(handle)} has written it", stacklevel=2)
        fcntl.flock(handle, fcntl.LOCK_EX)


def _is_at(place: Path, handle: int) -> bool:
    try:
        return os.path.samestat(place.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _sign(handle: int) -> None:
    """Say in the lock's file who holds it."""
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since})
    with suppress(OSError):  # a full disk has still room for the lock itself
        os.ftruncate(handle, 0)
        os.pwrite(handle, text.encode(), 0)


def _holder(handle: int) -> str:
    try:
        said = json.loads(os.pread(handle, 1000, 0))
        return f"process {said['pid']} on {said['host']}, since {said['since']},"
    except (OSError, ValueError, KeyError, TypeError):  # it has not signed yet
        return "another process"


def _release(place: Path, handle: int) -> None:
    """Take the file away while the lock is held, so that whoever opened it sees that it is another's no more."""
    with suppress(OSError):
        place.unlink()
    os.close(handle)
