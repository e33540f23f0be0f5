"""Files that are written whole or not at all, and never over an input: JSON and JSONL, hashes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from .disk import make_folder, sync_file, sync_folder, telling_of_disk
from .errors import SteerError
from .leftovers import is_leftover, part_of, sweep_beside
from .outputs import refuse_special
from .schema import MOST_ROWS_BYTES, checked, parse_json, read_limited, refuse_unusual

MOST_GROWN = 1 << 34  # bytes of a file of rows; one that grew to more is no file of ours
CONTINUED = " \n"  # between the rows of one append

T = TypeVar("T")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


LFS_POINTER = b"version https://git-lfs"  # how what git leaves in a large file's place begins


def refuse_lfs_pointer(path: Path) -> None:
    """Raise for what git leaves in the place of a large file that was not downloaded."""
    with path.open("rb") as file:
        start = file.read(len(LFS_POINTER))
    if start == LFS_POINTER:
        raise SteerError(f"{path}: is a git-lfs pointer, not the file itself; fetch it with `git lfs pull`")


def digest(value: Any) -> str:
    """SHA-256 of a JSON-serialisable value: equal values give equal digests."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def refuse_inputs(out: Path, *sources: str | Path | None) -> None:
    """Check, before any work, that an output would neither replace an input nor hold it inside.

    Args:
        out: the file or folder to be written.
        sources: files and folders that are read; a hub id, which is neither, is passed over.

    Raises:
        SteerError: the output is an input, or a folder around one, or no place for files (see `refuse_special`).
    """
    refuse_special(out)
    target = out.resolve()
    for source in sources:
        if not source:
            continue
        place = Path(source).resolve()
        there = os.path.exists(place)  # noqa: PTH110 - Path.exists raises on a name that is too long for a file
        if place == target or (there and out.exists() and out.samefile(place)):
            raise SteerError(f"{out}: is an input too; choose another output")
        if there and target in place.parents:
            raise SteerError(f"{out}: holds an input, {source}; choose another output")


def read_json(path: Path) -> Any:
    """Parse one JSON file.

    Raises:
        SteerError: the file is missing or is not JSON.
    """
    try:
        return parse_json(read_limited(path), str(path))
    except OSError as error:
        raise SteerError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def read_kept(path: Path, kind: type[T]) -> T | None:
    """What an earlier step of a run has kept in a JSON file; None where it has to be made.

    A file that is damaged counts as none, with a warning.
    """
    if not path.exists():
        return None
    try:
        value = checked(kind, read_json(path), str(path))
        refuse_unusual(value, str(path))
    except SteerError as error:
        warnings.warn(f"{error}; it is made again", stacklevel=2)
        return None
    return value


def read_jsonl(path: Path, *, required: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Read one JSON object a line; blank lines are passed over.

    Raises:
        SteerError: the file is missing, a line is not a JSON object, a `required` field is absent,
            is not text or is blank, or the file holds no line at all. The message names file, line, field.
    """
    try:
        text = read_limited(path, MOST_ROWS_BYTES)
    except OSError as error:
        raise SteerError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    rows = [
        _parse_line(path, number, line, required)
        for number, line in enumerate(text.split("\n"), start=1)  # not splitlines: JSON may hold U+0085
        if line.strip()
    ]
    if not rows:
        raise SteerError(f"{path}: the file is empty; expected one JSON object a line")
    return rows


def _parse_line(path: Path, number: int, line: str, required: Sequence[str]) -> dict[str, Any]:
    try:
        row = parse_json(line, f"{path}, line {number}")
    except SteerError as error:
        raise SteerError(f"{error}; expected one object a line") from None
    if not isinstance(row, dict):
        raise SteerError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}")
    for name in required:
        if not isinstance(row.get(name), str):
            found = ", ".join(sorted(row)) or "none"
            raise SteerError(f"{path}, line {number}: expected a text field {name!r}; fields found: {found}")
        if not row[name].strip():
            raise SteerError(f"{path}, line {number}: field {name!r} is blank; expected a text")
    return row


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: readers see the old text or the new, never a part."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file in one step, with the permissions that the umask gives a new file; a power cut leaves it so.

    Raises:
        SteerError: the disk refuses, and the old file stands; or the path is a device, a pipe, a socket or a link.
    """
    with new_file(path) as part, part.open("wb") as file:
        file.write(content)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield the path of a file beside `path` that takes its place when the block succeeds (see `write_bytes`)."""
    refuse_special(path)
    make_folder(path.parent)
    sweep_beside(path)
    part = part_of(path)
    with telling_of_disk(path):
        try:
            yield part
            sync_file(part)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write one JSON file, in one step."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, in one step."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows, all of them or none, and bring them to the disk.

    A space before a line's end says that the next line belongs to the same append, so that `read_finished` tells one
    that a kill or a power cut broke off.

    Raises:
        SteerError: see `write_bytes`; the file stands as it was.
    """
    refuse_special(path)
    text = CONTINUED.join(json.dumps(row, ensure_ascii=False) for row in rows)
    if not text:
        return
    make_folder(path.parent)
    with telling_of_disk(path):
        new = not path.exists()
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            _append(path, handle, f"{text}\n".encode())
        finally:
            os.close(handle)
        if new:
            sync_folder(path.parent)


def _append(path: Path, handle: int, content: bytes) -> None:
    size = os.fstat(handle).st_size
    end = os.pread(handle, 2, max(0, size - 2)).decode(errors="replace")
    if size and (not end.endswith("\n") or end == CONTINUED):
        read_finished(path)  # cuts off what a kill left there
        size = os.fstat(handle).st_size
    try:
        done = 0
        while done < len(content):
            done += os.write(handle, content[done:])
        os.fsync(handle)
    except BaseException:
        os.ftruncate(handle, size)
        raise


def read_finished(path: Path) -> list[dict[str, Any]]:
    """Rows of a file that grows by `append_jsonl`.

    An append that was broken off is cut off the file, so that the next one starts on a fresh line. A damaged line
    before that is left out, with a warning.

    Raises:
        SteerError: the file cannot be read, or has no row at all and is none of ours.
    """
    if not path.exists():
        return []
    if path.stat().st_size > MOST_GROWN:
        raise SteerError(f"{path}: is larger than {MOST_GROWN / 1e9:.3g} GB, more than such a file can need")
    with telling_of_disk(path):
        content = path.read_bytes()
    lines = content.split(b"\n")
    rows = [_row_of(line) for line in lines]
    rest = content.strip(b"\0 \n")
    foreign = all(row is None for row in rows) and b"\0" not in content
    if rest and foreign and (len(rows) > 1 or not rest.startswith(b"{")):
        raise SteerError(f"{path}, line 1: not JSON; expected one object a line")
    keep = len(lines) - 1  # what follows the last end of a line was broken off
    while keep and (lines[keep - 1].endswith(b" ") or (rows[keep - 1] is None and lines[keep - 1].strip())):
        keep -= 1
    whole = sum(len(line) + 1 for line in lines[:keep])
    if whole < len(content):
        with telling_of_disk(path):
            _cut(path, whole)
    for number, (line, row) in enumerate(zip(lines[:keep], rows[:keep], strict=True), start=1):
        if row is None and line.strip():
            warnings.warn(f"{path}, line {number}: is damaged and left out; what it said is made again", stacklevel=2)
    return [row for row in rows[:keep] if row is not None]


def _row_of(line: bytes) -> dict[str, Any] | None:
    """The object that a line holds; None if it holds none, or is blank."""
    try:
        row = parse_json(line.decode(), "a line")
    except (SteerError, UnicodeDecodeError):
        return None
    return row if isinstance(row, dict) else None


def _cut(path: Path, size: int) -> None:
    handle = os.open(path, os.O_RDWR)
    try:
        os.ftruncate(handle, size)
        os.fsync(handle)
    finally:
        os.close(handle)


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link, or a copy where there is none: on another disk, or on a file system without links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def is_empty(folder: Path) -> bool:
    """True if a folder holds nothing but unfinished writes and locks of ours, as a kill leaves them."""
    return all(is_leftover(path) for path in folder.iterdir())


def current_umask() -> int:
    """The process's umask (reading it means setting it for a moment)."""
    umask = os.umask(0)
    os.umask(umask)
    return umask
