"""What was measured: one method at one strength on one task, a value an item, and the rows that follow (no torch)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ..files import read_jsonl
from ..former_names import METHODS

BASE = "base"
SPLITS = ("validation", "test")  # what is chosen by, and what is reported
FORMER_CHANGE = " change"  # how rows of older versions end the name of a metric that is a change

Key = tuple[str, float, str]  # method, k, task


@dataclass(frozen=True)
class MetricRow:
    """One number: the mean of `n` items with its standard error.

    A `change` is the mean difference to the base, item by item, and its error that of the paired difference.
    """

    method: str
    k: float
    task: str
    metric: str
    value: float
    n: int
    stderr: float
    split: str = "test"
    change: bool = False


@dataclass(frozen=True)
class Measurement:
    """One method at one strength on one task, with a value an item; items pair across measurements by their ids."""

    method: str
    k: float
    task: str
    ids: tuple[int, ...]
    splits: tuple[str, ...]
    values: Mapping[str, Sequence[float | None]]  # None: the item does not count for the metric

    @property
    def key(self) -> Key:
        """What makes the measurement unique; k = 0 is the base whatever the method."""
        return (self.method if self.k else BASE, self.k, self.task)

    def rows(self, base: Measurement) -> list[MetricRow]:
        """Every metric on every split, as it is and as its change from the base; without those where no item counts."""
        found = []
        for metric, values in self.values.items():
            for change, row in ((False, values), (True, self.changes(base, metric))):
                for split in SPLITS:
                    part = [v for v, s in zip(row, self.splits, strict=True) if s == split and v is not None]
                    if part:
                        mean = summary(part)
                        found.append(MetricRow(self.key[0], self.k, self.task, metric, *mean, split, change))
        return found

    def changes(self, other: Measurement, metric: str) -> list[float | None]:
        """This value minus the other's, item by item; None where the item does not count in one of them."""
        theirs = dict(zip(other.ids, other.values[metric], strict=True))
        pairs = [(value, theirs.get(i)) for i, value in zip(self.ids, self.values[metric], strict=True)]
        return [None if mine is None or start is None else mine - start for mine, start in pairs]


def summary(values: Sequence[float]) -> tuple[float, int, float]:
    """(mean, n, standard error of the mean); the error of one value, or of one that overflowed, is not known: nan."""
    n = len(values)
    if not all(map(math.isfinite, values)):  # a model that was steered too far
        return sum(values) / n, n, math.nan
    return fmean(values), n, stdev(values) / math.sqrt(n) if n > 1 else math.nan


def measurements_by_key(rows: Iterable[Mapping[str, Any]]) -> dict[Key, Measurement]:
    """Measurements from their JSON form, in this version's names."""
    found = (
        Measurement(
            **{
                **row,
                "method": METHODS.get(row["method"], row["method"]),
                "ids": tuple(row["ids"]),
                "splits": tuple(row["splits"]),
            }
        )
        for row in rows
    )
    return {measurement.key: measurement for measurement in found}


def read_rows(path: Path) -> list[MetricRow]:
    """The rows of a run's file.

    Raises:
        SteerError: the file is missing, or a line is not JSON.
    """
    return [row_from(fields) for fields in read_jsonl(path)]


def row_from(fields: Mapping[str, Any]) -> MetricRow:
    """A row from its JSON form, in this version's names."""
    row = MetricRow(**{**fields, "method": METHODS.get(fields["method"], fields["method"])})
    if not row.metric.endswith(FORMER_CHANGE):
        return row
    return MetricRow(**{**vars(row), "metric": row.metric.removesuffix(FORMER_CHANGE), "change": True})
