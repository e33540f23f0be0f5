"""What is written outlives a power cut, and what a disk refuses is told in one line."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import SteerError

WAYS = {
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG): "make room there, and run the same command again",
    (errno.EROFS, errno.EACCES, errno.EPERM): "allow it for this user, or choose another place",
    (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG): "choose another place",
    (errno.EIO, errno.ESTALE): "check the disk, and run the same command again",
}
# Libraries in Rust and C++ give the reason as text alone; torch.save says no more than that it failed.
TEXTS = {os.strerror(code): code for codes in WAYS for code in codes} | dict.fromkeys(
    ("PytorchStreamWriter failed", "unexpected pos"), errno.ENOSPC
)
NOT_SYNCED = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF)  # file systems that sync no folder


@contextmanager
def telling_of_disk(path: Path) -> Iterator[None]:
    """Turn what the disk refuses within the block into a `SteerError` that names the file.

    Args:
        path: what is named where the error itself names nothing.

    Raises:
        SteerError: no room, no permission, a read-only or broken disk, something in the way.
    """
    try:
        yield
    except SteerError:
        raise
    except Exception as error:
        code = _refusal(error)
        if code is None:
            raise
        place = getattr(error, "filename", None) or path
        way = next(way for codes, way in WAYS.items() if code in codes)
        raise SteerError(f"{os.fsdecode(place)}: {os.strerror(code)}; {way}") from None


def _refusal(error: Exception) -> int | None:
    """The number of the disk's refusal, of an error of any library; None if it is another error."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if any(error.errno in codes for codes in WAYS) else None
    text = str(error)
    return next((code for said, code in TEXTS.items() if said in text), None)


def sync_file(path: Path) -> None:
    """Bring a file's content to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Bring to the disk which names a folder holds, where its file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NOT_SYNCED:
            raise
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Bring to the disk all that lies in a folder, the folders after what they hold; links are not followed."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            if not (path := Path(root) / name).is_symlink():
                sync_file(path)
        sync_folder(Path(root))


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, so that a power cut does not take them away again.

    Raises:
        SteerError: the disk refuses, or a file is in the way.
    """
    if folder.is_dir():
        return
    make_folder(folder.parent)
    with telling_of_disk(folder):
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)
