"""A file -> its rows, whatever it is called: JSON, JSONL, YAML, CSV or Parquet, perhaps in gzip."""

from __future__ import annotations

import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import SteerError
from ..files import LFS_POINTER
from ..schema import MOST_ROWS_BYTES, STRICT_JSON, TwiceError, read_bounded, require_bounded

GZIP, PARQUET = b"\x1f\x8b", b"PAR1"
NOT_READ = {
    b"\x28\xb5\x2f\xfd": "compressed by zstd; decompress it, or compress it by gzip",
    b"BZh": "compressed by bzip2; decompress it, or compress it by gzip",
    b"\xfd7zXZ": "compressed by xz; decompress it, or compress it by gzip",
    b"PK\x03\x04": "a zip archive (or a spreadsheet); unpack it, or save it as CSV",
    b"ARROW1": "an Arrow file; save it as Parquet",
    b"GGUF": "a model (GGUF) and no data",
    LFS_POINTER: "a pointer of git-lfs, not the file itself; run `git lfs pull`",
    b"<": "a web page or XML and no data; download the file itself",
    b"\xff\xfe": "text in UTF-16 or UTF-32; save it in UTF-8",
    b"\xfe\xff": "text in UTF-16; save it in UTF-8",
    b"\x00\x00\xfe\xff": "text in UTF-32; save it in UTF-8",
}
EXPECTED = "expected JSON, JSONL, YAML, CSV or Parquet"
YAML_LIST = re.compile(r"(?:[^\S\n]*(?:#[^\n]*|---)?[^\S\n]*\n)*-\s")  # comments and blank lines, then a list begins
MOST_YAML = 1_000_000  # values


@dataclass(frozen=True)
class Row:
    """The fields of one entry, and where it stands: `FILE, line 3`."""

    where: str
    fields: Mapping[str, Any]

    def error(self, reason: str) -> SteerError:
        """The mistake of this row."""
        return SteerError(f"{self.where}: {reason}")

    def filled(self, name: str) -> Any:
        """A field's value; None if it is absent, null, NaN, blank or empty, which all mean the same."""
        value = self.fields.get(name)
        return None if is_unfilled(value) else value


def is_unfilled(value: Any) -> bool:
    """True for null, NaN, a text without a visible character, and an empty list or object."""
    if isinstance(value, str):
        return not has_content(value)
    return value is None or value in ([], {}) or (isinstance(value, float) and math.isnan(value))


def has_content(text: str) -> bool:
    """True if a text has a character that shows: neither a space nor one of zero width."""
    return any(char.isprintable() and not char.isspace() for char in text)


def described(value: Any) -> str:
    """A value's kind in words, for a message."""
    if isinstance(value, str):
        return "a text" if has_content(value) else "a blank text"
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a file; what it is, its content tells and not its suffix.

    JSON may be a list of objects, one object a line, or objects one after the other. Line ends are of
    any system, and a byte order mark is passed over.

    Raises:
        SteerError: the file is missing, damaged, empty or of another kind, or a line cannot be read.
    """
    content = _content(path)
    rows = _parquet(path, content) if content.startswith(PARQUET) else _text_rows(path, _decoded(path, content))
    if not rows:
        raise SteerError(f"{path}: holds no entry; {EXPECTED}")
    return rows


def _parquet(path: Path, content: bytes) -> list[Row]:
    from .tables import parquet_rows

    return parquet_rows(path, content)


def _text_rows(path: Path, text: str) -> list[Row]:
    start = text.lstrip()[:1]
    if not start:
        raise SteerError(f"{path}: the file is empty; {EXPECTED}")
    if start in "[{":
        return list(_json_rows(path, text.replace("\r\n", "\n").replace("\r", "\n")))
    if YAML_LIST.match(text):
        return list(_yaml_rows(path, text))
    from .tables import csv_rows

    return csv_rows(path, text)


def _yaml_rows(path: Path, text: str) -> Iterator[Row]:
    """The entries of a YAML list, every value a text as it stands there."""
    from ..yaml_file import parse_yaml

    values = parse_yaml(text, str(path), what="data", most_values=MOST_YAML, texts_only=True)
    for number, value in enumerate(values, start=1):
        yield _row(f"{path}, entry {number}", value)


def _content(path: Path) -> bytes:
    """The file's bytes, unpacked."""
    try:
        content = read_bounded(path)
        if content.startswith(GZIP):
            with gzip.open(io.BytesIO(content)) as packed:
                content = require_bounded(path, packed.read(MOST_ROWS_BYTES + 1), MOST_ROWS_BYTES)
    except IsADirectoryError:
        raise SteerError(f"{path}: is a folder; expected a file of examples in it") from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise SteerError(f"{path}: its gzip data are damaged; download or write it again") from None
    except OSError as error:
        raise SteerError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    for start, found in NOT_READ.items():
        if content.startswith(start):
            raise SteerError(f"{path}: is {found}")
    return content


def _decoded(path: Path, content: bytes) -> str:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise SteerError(
            f"{path}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8 text; save the file in UTF-8"
        ) from None
    if "\0" in text:  # JSON writes this character as an escape
        line = text.count("\n", 0, text.index("\0")) + 1
        raise SteerError(f"{path}, line {line}: holds a NUL byte, so it is UTF-16 or no text; save it in UTF-8")
    return text


def _json_rows(path: Path, text: str) -> Iterator[Row]:
    if text.lstrip().startswith("["):
        yield from _list_rows(path, text)
        return
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not _is_json(lines[0][1]):  # an object over several lines
        yield from _object_rows(path, text)
        return
    for number, line in lines:
        where = f"{path}, line {number}"
        value, end = _parse(where, line, len(line) - len(line.lstrip()))
        if rest := line[end:].strip():
            why = "a comma follows the object" if rest == "," else f"{rest[:20]!r} follows the object"
            raise SteerError(f"{where}: not JSON ({why}); expected one object a line")
        yield _row(where, value)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.msg.startswith("Extra data")
    except (ValueError, RecursionError):
        return True
    return True


def _parse(where: str, text: str, start: int) -> tuple[Any, int]:
    """The JSON value that starts there, and where it ends."""
    try:
        return STRICT_JSON.raw_decode(text, start)
    except TwiceError as error:
        raise SteerError(f"{where}: {error}; keep one of them") from None
    except RecursionError:
        raise SteerError(f"{where}: nested too deeply for data") from None
    except ValueError as error:
        raise SteerError(f"{where}: not JSON ({error}); expected an object") from None


def _object_rows(path: Path, text: str) -> Iterator[Row]:
    """Objects one after the other, each over any number of lines."""
    place = _past_space(text, 0)
    line = 1 + text.count("\n", 0, place)
    while place < len(text):
        start, where = place, f"{path}, line {line}"
        value, place = _parse(where, text, place)
        yield _row(where, value)
        place = _past_space(text, place)
        line += text.count("\n", start, place)


def _list_rows(path: Path, text: str) -> Iterator[Row]:
    """A list of objects, read one by one, so that a mistake has a line."""
    place, number = _past_space(text, text.index("[") + 1), 0
    line = 1 + text.count("\n", 0, place)
    while place < len(text) and text[place] != "]":
        number += 1
        start, where = place, f"{path}, line {line} (entry {number})"
        value, place = _parse(where, text, place)
        yield _row(where, value)
        place = _past_comma(where, text, place)
        line += text.count("\n", start, place)
    if text[place : place + 1] != "]" or text[place + 1 :].strip():
        raise SteerError(f"{path}: expected one JSON list; found more after it, or no end")


def _past_comma(where: str, text: str, place: int) -> int:
    """Where the next entry of a list starts, or the list ends."""
    place = _past_space(text, place)
    mark = text[place : place + 1]
    if mark not in (",", "]"):
        raise SteerError(f"{where}: not JSON (neither a comma nor the list's end follows); is the file whole?")
    if mark == "]":
        return place
    place = _past_space(text, place + 1)
    if text[place : place + 1] == "]":
        raise SteerError(f"{where}: not JSON (a comma follows the last entry); remove it")
    return place


def _past_space(text: str, place: int) -> int:
    while place < len(text) and text[place] in " \t\n":
        place += 1
    return place


def _row(where: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise SteerError(f"{where}: expected a JSON object, found {described(value)}")
    return Row(where, value)
