"""Where nothing is written: devices, pipes, sockets, links, and files that somebody else made."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

from .errors import SteerError

KINDS = {stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


def refuse_special(path: Path) -> None:
    """Raise unless a path is free, a plain file or a folder. A link is none of these, wherever it leads."""
    try:
        mode = path.lstat().st_mode
    except OSError:  # it is not there, or what is done with it will say what is wrong
        return
    if stat.S_ISLNK(mode):
        raise SteerError(f"{path}: is a link to {path.readlink()}; name the place itself, or choose another output")
    if kind := KINDS.get(stat.S_IFMT(mode)):
        raise SteerError(f"{path}: is {kind}; choose another output")


def refuse_foreign_file(path: Path, is_ours: Callable[[bytes], bool]) -> None:
    """Raise if a path is taken by what was not made by us, as its content tells."""
    refuse_special(path)
    if path.is_dir():
        raise SteerError(f"{path}: is a folder; expected the name of a file to write")
    if path.is_file() and not is_ours(path.read_bytes()):
        raise SteerError(f"{path}: exists and was not made by weightsteer; choose another output")
