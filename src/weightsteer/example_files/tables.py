"""Tables -> rows: CSV and TSV by the standard library, Parquet by pyarrow."""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import SteerError
from .formats import FIELDS, KNOWN_FIELDS
from .rows import EXPECTED, Row

DELIMITERS = ",\t;|"
SEPARATOR = re.compile(r"\s*sep=[,\t;|]\s*")  # Excel's first line


def csv_rows(path: Path, text: str) -> list[Row]:
    """Rows of a table with a head; what separates its cells is what splits the head into names that are known.

    Raises:
        SteerError: no name of the head is known, a name stands twice, or a row has more or fewer cells.
    """
    text = text if "\n" in text else text.replace("\r", "\n")  # the classic Mac's line ends
    skipped = SEPARATOR.match(text)
    first = text[skipped.end() if skipped else 0 :].lstrip().partition("\n")[0]
    known = {mark: len(KNOWN_FIELDS.intersection(map(_known_name, _cells(first, mark)))) for mark in DELIMITERS}
    delimiter = max(known, key=lambda mark: known[mark])
    if not known[delimiter]:
        raise SteerError(
            f"{path}: {EXPECTED}; it begins with {first[:60].strip()!r}, and a table has columns such as prompt and "
            "answer, or prompt, positive and negative"
        )
    old_limit = csv.field_size_limit(sys.maxsize)  # a long answer is no mistake
    try:
        return _table(path, text, delimiter, padded=first.count(f"{delimiter} ") == first.count(delimiter) > 0)
    finally:
        csv.field_size_limit(old_limit)


def _known_name(cell: str) -> str:
    """A column's name; one that is known is known in capitals too."""
    name = cell.strip()
    return name.lower() if name.lower() in FIELDS else name


def _cells(line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
    except csv.Error:
        return []


def _table(path: Path, text: str, delimiter: str, *, padded: bool) -> list[Row]:
    """The rows below the head; `padded`: a space follows each delimiter, and is no part of a cell.

    Columns without a name are left out, and so are blank cells beyond the last column, as Excel writes them.
    """
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=padded)
    head: list[str] = []
    rows, line = [], 1
    try:
        for cells in reader:
            where, line = f"{path}, line {line}", reader.line_num + 1
            if not any(cell.strip() for cell in cells) or (not head and SEPARATOR.fullmatch(delimiter.join(cells))):
                continue
            if not head:
                head = [_known_name(cell) for cell in cells]
                _refuse_twice(path, list(filter(None, head)))
                continue
            beyond = cells[len(head) :]
            if len(cells) < len(head) or any(cell.strip() for cell in beyond):
                raise SteerError(f"{where}: has {len(cells)} cells, but the table has {len(head)} columns")
            rows.append(Row(where, {name: cell for name, cell in zip(head, cells, strict=False) if name}))
    except csv.Error as error:
        raise SteerError(f"{path}, line {line}: not CSV ({error})") from None
    return rows


def parquet_rows(path: Path, content: bytes) -> list[Row]:
    """Rows of a Parquet file.

    Raises:
        SteerError: the file is damaged, or a column's name stands twice.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(pyarrow.BufferReader(content))
        _refuse_twice(path, file.schema_arrow.names)
        table = file.read()
    except (pyarrow.ArrowException, OSError) as error:
        raise SteerError(f"{path}: cannot be read as Parquet ({error}); download or write it again") from None
    return [Row(f"{path}, row {number}", fields) for number, fields in enumerate(table.to_pylist(), start=1)]


def _refuse_twice(path: Path, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise SteerError(f"{path}: the column {name!r} stands twice; keep one of them")
