"""Tables of a page: what a cell shows, and the number behind it, by which it is sorted and downloaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """A text, and the number that it stands for where it is one."""

    text: str
    value: float | None = None
    error: float | None = None


@dataclass(frozen=True)
class Head:
    """A column's name, and what it means where the name does not say."""

    text: str
    meaning: str = ""


@dataclass(frozen=True)
class Table:
    """A table that can be sorted and downloaded; `name` is that of the file, without its ending."""

    name: str
    heads: Sequence[Head]
    lines: Sequence[Sequence[Cell]]


def plain_table(name: str, rows: Sequence[Sequence[str]]) -> Table:
    """A table of texts whose first row is its head."""
    return Table(name, [Head(text) for text in rows[0]], [[Cell(text) for text in row] for row in rows[1:]])


def number(value: float, form: str = "g") -> Cell:
    """A number as it is shown in the form given."""
    return Cell(format(value, form), value)


def estimate(value: float, error: float | None, form: str = ".3f", *, note: str = "") -> Cell:
    """A number with its standard error, such as '0.812 ± 0.035'; an error that is not known is left out."""
    known = error if error is not None and math.isfinite(error) else None
    spread = "" if known is None else f" ± {known:{form.lstrip('+')}}"
    return Cell(f"{value:{form}}{spread}{note}", value, known)
