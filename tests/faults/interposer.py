"""What a process does to files in one folder: counted, stopped at the n-th operation, refused, or recorded.

Python's own calls are wrapped, and what libraries in other languages write is written through Python instead. A write
is the system call, not Python's buffer, so that it can be broken off half-way.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import io
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch

ENTRIES = {"rename": 2, "replace": 2, "mkdir": 1, "unlink": 1, "remove": 1, "rmdir": 1, "link": 2}  # and their paths
Happened = tuple[Any, ...]  # ("write", inode, position, bytes), ("rename", from, to), ...


class Interposer:
    """Sees every operation on files below `root`, from `install` on to the end of the process.

    Args:
        kill_at: the number of the operation at which the process is killed; a write is half done then.
        room: how many bytes may still be written before the disk is full; None is no end of them.
        record: called with each operation when it is done.
    """

    def __init__(
        self,
        root: Path,
        *,
        kill_at: int | None = None,
        room: int | None = None,
        record: Callable[[Happened], None] | None = None,
    ) -> None:
        self.root, self.kill_at, self.room, self.record = str(root.resolve()), kill_at, room, record
        self.count = self.written = 0
        self.real = {name: getattr(os, name) for name in (*ENTRIES, "write", "pwrite", "ftruncate", "fsync")}

    def install(self) -> None:
        """Take the place of the functions, for good."""
        for name in ENTRIES:
            setattr(os, name, self._entry(name))
        for name in ("write", "pwrite", "ftruncate", "fsync"):
            setattr(os, name, getattr(self, name))
        shutil._USE_CP_SENDFILE = False  # type: ignore[attr-defined]
        self.open, self.os_open = io.open, os.open
        io.open = builtins.open = self._open  # type: ignore[assignment]
        os.open = self._os_open  # type: ignore[assignment]
        save_from_other_languages(io.open)

    def sees(self, path: Any, dir_fd: int | None = None) -> str | None:
        """The whole path, if it lies below the root."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        path = os.fsdecode(path)
        if dir_fd is not None:
            path = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path)
        path = os.path.abspath(path)
        return path if path.startswith(self.root) else None

    def step(self, half: Callable[[], object] | None = None) -> None:
        """Count an operation, and be killed at it if it is the one."""
        self.count += 1
        if self.count == self.kill_at:
            if half is not None:
                half()
            os.kill(os.getpid(), signal.SIGKILL)

    def done(self, *happened: Any) -> None:
        """Tell of an operation."""
        if self.record is not None:
            self.record(happened)

    def _entry(self, name: str) -> Callable[..., Any]:
        """One of the functions that change which names there are."""
        real = self.real[name]

        def wrapped(*args: Any, **options: Any) -> Any:
            paths = [self.sees(path, options.get("dir_fd")) for path in args[: ENTRIES[name]]]
            if not all(paths):
                return real(*args, **options)
            self.step()
            if name == "mkdir":
                self._take(0)
            result = real(*args, **options)
            self.done(name, *paths)
            return result

        return wrapped

    def _take(self, size: int) -> int:
        """How many of so many bytes there is room for; a full disk raises."""
        if self.room is None:
            return size
        if self.room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = min(size, self.room)
        self.room -= taken
        return taken

    def write(self, fd: int, content: Any) -> int:
        """`os.write`, as short as the room is."""
        return self._written(fd, content, None, lambda some: self.real["write"](fd, some))

    def pwrite(self, fd: int, content: Any, at: int) -> int:
        """`os.pwrite`, as short as the room is."""
        return self._written(fd, content, at, lambda some: self.real["pwrite"](fd, some, at))

    def _written(self, fd: int, content: Any, at: int | None, write: Callable[[memoryview], int]) -> int:
        if not self.sees(fd):
            return write(memoryview(content))
        view = memoryview(content).cast("B")
        self.step(lambda: write(view[: len(view) // 2]))
        if at is None:
            position = os.lseek(fd, 0, os.SEEK_CUR)
            at = os.fstat(fd).st_size if _appends(fd) else position
        count = write(view[: self._take(len(view))])
        self.written += count
        self.done("write", os.fstat(fd).st_ino, at, bytes(view[:count]))
        return count

    def ftruncate(self, fd: int, size: int) -> None:
        """`os.ftruncate`."""
        if self.sees(fd):
            self.step()
        self.real["ftruncate"](fd, size)
        if self.sees(fd):
            self.done("truncate", os.fstat(fd).st_ino, size)

    def fsync(self, fd: int) -> None:
        """`os.fsync`."""
        path = self.sees(fd)
        if path is None:
            self.real["fsync"](fd)
            return
        self.step()  # nothing is brought to the disk, since a kill loses nothing, and a power cut is only recorded
        self.done("fsync", os.fstat(fd).st_ino, path)

    def _os_open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        place = self.sees(path, dir_fd)
        new = place is not None and flags & os.O_CREAT and not os.path.lexists(place)
        if place is not None and flags & (os.O_CREAT | os.O_TRUNC):
            self.step()
            if new:
                self._take(0)
        fd = self.os_open(path, flags, mode, dir_fd=dir_fd)
        if new:
            self.done("create", place, os.fstat(fd).st_ino)
        elif place is not None and flags & os.O_TRUNC:
            self.done("truncate", os.fstat(fd).st_ino, 0)
        return fd

    def _open(self, file: Any, mode: str = "r", buffering: int = -1, *args: Any, **options: Any) -> Any:
        if isinstance(file, int) or not set(mode) & set("wax+") or not self.sees(file):
            return self.open(file, mode, buffering, *args, **options)
        text, binary = "b" not in mode, mode.replace("b", "").replace("t", "")
        raw = _Raw(file, binary, opener=lambda path, flags: os.open(path, flags, 0o666))
        raw.seen_by = self
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if not text:
            return raw if buffering == 0 else buffered
        return io.TextIOWrapper(buffered, *args, line_buffering=buffering == 1, **options)


class _Raw(io.FileIO):
    """A file whose writes and cuts are the interposer's."""

    seen_by: Interposer

    def write(self, content: Any) -> int:
        return self.seen_by.write(self.fileno(), content)

    def truncate(self, size: int | None = None) -> int:
        size = self.tell() if size is None else size
        self.seen_by.ftruncate(self.fileno(), size)
        return size


def _appends(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND)


def save_from_other_languages(open_file: Callable[..., Any]) -> None:
    """Let safetensors and torch write through Python's files, so that what they write is seen."""
    import torch

    save = torch.save

    def serialize_file(tensors: Any, path: Any, metadata: Any = None) -> None:
        with open_file(path, "wb") as file:
            file.write(safetensors.torch.serialize(tensors, metadata=metadata))

    def save_to_file(value: Any, f: Any, *args: Any, **options: Any) -> None:
        if not isinstance(f, str | os.PathLike):
            save(value, f, *args, **options)
            return
        with open_file(f, "wb") as file:
            save(value, file, *args, **options)

    safetensors.torch.serialize_file = serialize_file
    torch.save = save_to_file
