"""Unfinished files and folders that a kill left behind: the next writer of the same name takes them away."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import socket
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

from .disk import sync_folder
from .errors import SteerError
from .locks import hold

REPLACED = ".replaced.part"  # an older artifact, for the moment in which the new one takes its place
FOLDER_PART = re.compile(r"\.(.+)\.[a-z0-9_]{8}\.part")
FILE_PART = re.compile(r"\.(.+?)\.(\d+)(?:\.([0-9a-f]{6}))?(?:\.[0-9a-f]{8})?\.part")  # process, machine; once neither
FORGOTTEN = 24 * 3600.0  # seconds after which what another machine writes is no longer written


def part_of(target: Path) -> Path:
    """A name beside `target` for a file in the making, which tells who makes it."""
    return target.with_name(f".{target.name}.{os.getpid()}.{_machine()}.{secrets.token_hex(4)}.part")


@cache
def _machine() -> str:
    """What tells this machine's processes from those of another that shares the folder."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]


def is_leftover(path: Path) -> bool:
    """Whether a name is one that our unfinished writes and locks have."""
    return path.name.startswith(".") and path.name.endswith((".part", ".lock"))


def sweep_beside(target: Path) -> None:
    """Remove what killed writers of `target` left beside it; a folder's only for a caller that holds `target`.

    A folder that was killed between its two renames gives the older artifact back.
    """
    with suppress(OSError):
        for path in list(target.parent.iterdir()):
            if is_leftover(path) and _target_of(path) == target.name:
                _remove(path, target)


def sweep_within(folder: Path) -> None:
    """Remove what killed writers left anywhere in a folder that the caller holds; what another process writes stays."""
    for root, folders, files in os.walk(folder):
        for path in [Path(root) / name for name in (*folders, *files) if is_leftover(Path(name))]:
            if path.name == REPLACED:
                shutil.rmtree(path, ignore_errors=True)
            elif name := _target_of(path):
                with suppress(SteerError), hold(path.with_name(name)):  # a lock that is taken goes away with that
                    sweep_beside(path.with_name(name))
        folders[:] = [name for name in folders if not is_leftover(Path(name))]


def _target_of(path: Path) -> str | None:
    """The name for which a leftover was written; None if it is none of ours, or its writer lives."""
    if path.name.endswith(".lock"):
        return path.name[1 : -len(".lock")]
    if path.is_dir():
        found = FOLDER_PART.fullmatch(path.name)
        return found[1] if found else None
    found = FILE_PART.fullmatch(path.name)
    return found[1] if found and not _is_written(path, int(found[2]), found[3]) else None


def _is_written(path: Path, pid: int, machine: str | None) -> bool:
    """Whether somebody may still write a file; another machine's processes cannot be asked for."""
    if machine in (None, _machine()):
        return _lives(pid)
    with suppress(FileNotFoundError):
        return time.time() - path.stat().st_mtime < FORGOTTEN
    return True


def _lives(pid: int) -> bool:
    """Whether a process of this number runs; our own counts, since another thread may write."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _remove(path: Path, target: Path) -> None:
    if path.name.endswith(".lock"):
        return  # its holder's to take away
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    if (path / REPLACED).exists() and not target.exists():
        (path / REPLACED).rename(target)  # killed between the two renames: the older artifact stands
        sync_folder(target.parent)
    shutil.rmtree(path, ignore_errors=True)
