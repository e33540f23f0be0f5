"""Files -> examples and contrast pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ..behavior import SHIPPED, UNFILLED, ContrastPair, Example, shipped_file
from ..errors import SteerError
from ..schema import suggestion
from .formats import example_of, pair_of
from .rows import Row, read_rows


def load_pairs(name_or_path: str | Path, *, file: str = "pairs.jsonl") -> list[ContrastPair]:
    """Read contrast pairs: a shipped behaviour by name, or a file of prompts with both answers.

    The file is JSON, JSONL, a YAML list, CSV or Parquet, perhaps in gzip. Both answers are `positive` and `negative`,
    or `chosen` and `rejected` as TRL writes them (texts, messages, or whole talks without a prompt of
    their own), or those of a model-written evaluation.

    Raises:
        SteerError: a file that cannot be read, or an entry that cannot be carried over; line and field are named.
    """
    if shipped := shipped_file(str(name_or_path), file):
        return list(_shipped_pairs(shipped))
    path = Path(name_or_path)
    if not path.exists() and path.name == str(name_or_path) and not path.suffix:
        raise SteerError(
            f"{name_or_path}: no such behaviour and no such file; expected one of {', '.join(SHIPPED)}, or a file of "
            f"pairs{suggestion(path.name, SHIPPED)}"
        )
    return [pair_of(row) for row in _filled_rows(path)]


@cache
def _shipped_pairs(path: Path) -> tuple[ContrastPair, ...]:
    """Read once, since a run asks for them in many places."""
    return tuple(pair_of(row) for row in _filled_rows(path))


def load_examples(path: str | Path) -> list[Example]:
    """Read the examples of one side: prompts with one answer each.

    The file is JSON, JSONL, a YAML list, CSV or Parquet, perhaps in gzip, in one of the formats that public sets use:
    `prompt`, `question` or `instruction` with `answer`, `completion`, `response` or `output`, or talks in
    `messages` or `conversations`. Of a talk the last answer is the example's, and all turns before it are its prompt.

    Raises:
        SteerError: a file that cannot be read, or an entry that cannot be carried over; line and field are named.
    """
    return [example_of(row) for row in _filled_rows(Path(path))]


def _filled_rows(path: Path) -> list[Row]:
    """The rows of a file that `init` may have left to be written.

    Raises:
        SteerError: some of them are not written yet; which, and what to do.
    """
    rows = read_rows(path)
    empty = [number for number, row in enumerate(rows, start=1) if any(map(_is_unwritten, row.fields.values()))]
    if empty:
        listed = ", ".join(map(str, empty[:8])) + (", ..." if len(empty) > 8 else "")
        raise SteerError(
            f"{path}: {len(empty)} of {len(rows)} entries still say {UNFILLED!r} (number {listed}); write them, or "
            "take them out of the file"
        )
    return rows


def _is_unwritten(value: object) -> bool:
    return isinstance(value, str) and value.lstrip().startswith(UNFILLED)


def pairs_from(rows: Sequence[Mapping[str, Any]], where: str) -> list[ContrastPair]:
    """Contrast pairs of rows that a card holds.

    Raises:
        SteerError: a row that is no pair; `where` and its number are named.
    """
    return [pair_of(Row(f"{where}, row {number}", fields)) for number, fields in enumerate(rows, start=1)]


def examples_from(rows: Sequence[Mapping[str, Any]], where: str) -> list[Example]:
    """Examples of rows that a card holds (see `pairs_from`)."""
    return [example_of(Row(f"{where}, row {number}", fields)) for number, fields in enumerate(rows, start=1)]
