"""Cells: one method at one strength on one task, item by item; and the rows that follow from them (no torch)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from .records import CHANGE, SPLITS, Row

CELLS_FILE = "cells.jsonl"
BASE = "base"


@dataclass(frozen=True)
class Cell:
    """One method at one strength on one task, with a value an item; items pair across cells by their ids."""

    method: str
    k: float
    task: str
    ids: tuple[int, ...]
    splits: tuple[str, ...]
    values: Mapping[str, Sequence[float | None]]  # None: the item does not count for the metric

    @property
    def key(self) -> tuple[str, float, str]:
        """What makes the cell unique; k = 0 is the base whatever the method."""
        return (self.method if self.k else BASE, self.k, self.task)

    def rows(self, base: Cell) -> list[Row]:
        """Mean, n and standard error of every metric on every split.

        Each metric comes twice: as it is, and as `<metric> change`, the difference to the base item
        by item, whose standard error is that of the paired difference.
        """
        found = []
        for metric, values in self.values.items():
            changes = self.changes(base, metric)
            for name, row in ((metric, values), (f"{metric}{CHANGE}", changes)):
                for split in SPLITS:
                    part = [v for v, s in zip(row, self.splits, strict=True) if s == split and v is not None]
                    if part:
                        found.append(Row(self.key[0], self.k, self.task, name, *summary(part), split))
        return found

    def changes(self, other: Cell, metric: str) -> list[float | None]:
        """This cell's value minus the other's, item by item; None where the item does not count in one of them."""
        theirs = dict(zip(other.ids, other.values[metric], strict=True))
        pairs = [(value, theirs.get(i)) for i, value in zip(self.ids, self.values[metric], strict=True)]
        return [None if mine is None or start is None else mine - start for mine, start in pairs]


def summary(values: Sequence[float]) -> tuple[float, int, float]:
    """(mean, n, standard error of the mean); the error of one value, or of one that overflowed, is not known: nan."""
    n = len(values)
    if not all(map(math.isfinite, values)):  # a model that was steered too far
        return sum(values) / n, n, math.nan
    return fmean(values), n, stdev(values) / math.sqrt(n) if n > 1 else math.nan


def cell_from(fields: Mapping[str, Any]) -> Cell:
    """A cell from its JSON form."""
    return Cell(**{**fields, "ids": tuple(fields["ids"]), "splits": tuple(fields["splits"])})
