"""Files that are written whole or not at all, and never over an input: JSON and JSONL, hashes, locks."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import SteerError
from .schema import parse_json, read_limited

MOST_GROWN = 1 << 34  # bytes of a file of rows; one that grew to more is no file of ours


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """SHA-256 of a JSON-serialisable value: equal values give equal digests."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def refuse_inputs(out: Path, *sources: str | Path | None) -> None:
    """Check, before any work, that an output would neither replace an input nor hold it inside.

    Args:
        out: the file or folder to be written.
        sources: files and folders that are read; a hub id, which is neither, is passed over.

    Raises:
        SteerError: the output is an input, or a folder around one.
    """
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


def read_jsonl(path: Path, *, required: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Read one JSON object a line; blank lines are passed over.

    Raises:
        SteerError: the file is missing, a line is not a JSON object, a `required` field is absent,
            is not text or is blank, or the file holds no line at all. The message names file, line, field.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # line ends of any system become \n
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise SteerError(f"{path}: cannot be read ({reason}); check the path") from None
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
    """Replace a file in one step, with the permissions that the umask gives a new file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write one JSON file, in one step."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, in one step."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows and flush them to disk, so that a kill loses at most the line being written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_finished(path: Path) -> list[dict[str, Any]]:
    """Rows of a file that grows by `append_jsonl`; a last line cut short by a kill is dropped.

    The file is put right as it is read, so that the next append starts on a fresh line.
    """
    if not path.exists():
        return []
    text = read_limited(path, MOST_GROWN)
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_text(path, whole)
    return [_parse_line(path, number, line, ()) for number, line in enumerate(whole.split("\n")[:-1], 1)]


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold a folder for this process alone.

    Raises:
        SteerError: another process holds it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SteerError(
                f"{folder}: another process is running this; wait for it, or choose another --out"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)


def is_empty(folder: Path) -> bool:
    """True if a folder holds nothing but unfinished writes of ours, as a kill leaves them."""
    return all(path.name.startswith(".") and path.name.endswith(".part") for path in folder.iterdir())


def current_umask() -> int:
    """The process's umask (reading it means setting it for a moment)."""
    umask = os.umask(0)
    os.umask(umask)
    return umask
