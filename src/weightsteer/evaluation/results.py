"""What was measured: one method at one strength on one task, a value an item, and the rows that follow (no torch)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, ClassVar

from ..errors import SteerError
from ..files import read_jsonl
from ..former_names import METHODS
from ..schema import checked, is_finite

BASE = "base"
LOCAL_BASE = "base in memory"  # beside a base that an engine measured: what methods that ran here are compared with
SPLITS = ("validation", "test")  # what is chosen by, and what is reported
FORMER_CHANGE = " change"  # how rows of older versions end the name of a metric that is a change

Key = tuple[str, float, str]  # method, k, task


@dataclass(frozen=True)
class MetricRow:
    """One number: the mean of `n` items with its standard error.

    A `change` is the mean difference to the base, item by item, and its error that of the paired difference.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

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

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    method: str
    k: float
    task: str
    ids: tuple[int, ...]
    splits: tuple[str, ...]
    values: Mapping[str, Sequence[float | None]]  # None: the item does not count for the metric
    engine: str = ""  # the kind of server that it was measured on; "": in memory

    @property
    def key(self) -> Key:
        """What makes the measurement unique; k = 0 is the base whatever the method."""
        return (self.method if self.k or self.method == LOCAL_BASE else BASE, self.k, self.task)

    def as_json(self) -> dict[str, Any]:
        """The measurement as a line of a run's file; where it was measured is left out for one in memory."""
        found = asdict(self)
        if not self.engine:
            del found["engine"]
        return found

    def base_among(self, measurements: Mapping[Key, Measurement]) -> Measurement:
        """The base that this is compared with: measured where this was."""
        twin = measurements.get((LOCAL_BASE, 0.0, self.task))
        return twin if twin is not None and not self.engine else measurements[BASE, 0.0, self.task]

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
        for measured, lacking in ((self, other), (other, self)):
            if metric not in lacking.values:
                raise SteerError(
                    f"task {self.task!r}: metric {metric!r} was measured of {measured.method}, not of {lacking.method}"
                )
        theirs = dict(zip(other.ids, other.values[metric], strict=True))
        pairs = [(value, theirs.get(i)) for i, value in zip(self.ids, self.values[metric], strict=True)]
        return [None if mine is None or start is None else mine - start for mine, start in pairs]


def summary(values: Sequence[float]) -> tuple[float, int, float]:
    """(mean, n, standard error of the mean); the error of one value, or of one that overflowed, is not known: nan."""
    n = len(values)
    if not all(map(math.isfinite, values)):  # a model that was steered too far
        return sum(values) / n, n, math.nan
    try:
        return fmean(values), n, stdev(values) / math.sqrt(n) if n > 1 else math.nan
    except OverflowError:  # finite numbers whose sum is not
        return math.inf, n, math.nan


def measurements_by_key(rows: Iterable[Mapping[str, Any]], where: str) -> dict[Key, Measurement]:
    """Measurements from their JSON form, in this version's names; the last of two with one key counts.

    Args:
        where: the file that the rows come from.

    Raises:
        SteerError: a row that is no measurement, or has other numbers of items in two places.
    """
    found = (_measurement_from(row, f"{where}, row {number}") for number, row in enumerate(rows, start=1))
    return {measurement.key: measurement for measurement in found}


def _measurement_from(row: Mapping[str, Any], where: str) -> Measurement:
    measurement = checked(Measurement, {**row, "method": _method_of(row)}, where)
    counts = {"ids": len(measurement.ids), "splits": len(measurement.splits)}
    counts |= {f"values of {metric}": len(values) for metric, values in measurement.values.items()}
    if len(set(counts.values())) > 1 or len(set(measurement.ids)) < len(measurement.ids):
        raise SteerError(f"{where}: expected one value for each of its items, once; found {counts}")
    if not is_finite(measurement.k):
        raise SteerError(f"{where}: field 'k': expected a finite number, found {measurement.k}")
    return replace(measurement, values={metric: list(map(_counted, v)) for metric, v in measurement.values.items()})


def _counted(value: float | None) -> float | None:
    """A value that counts; NaN, which earlier versions wrote for a loss that overflowed, counts as none."""
    return None if value is None or math.isnan(value) else value


def _method_of(row: Mapping[str, Any]) -> object:
    """The method's name in this version."""
    name = row.get("method")
    return METHODS.get(name, name) if isinstance(name, str) else name


def read_rows(path: Path) -> list[MetricRow]:
    """The rows of a run's file.

    Raises:
        SteerError: the file is missing, or a line is not JSON, or no row.
    """
    return [row_from(fields, f"{path}, row {number}") for number, fields in enumerate(read_jsonl(path), start=1)]


def row_from(fields: Mapping[str, Any], where: str) -> MetricRow:
    """A row from its JSON form, in this version's names.

    Raises:
        SteerError: a field that is missing, unknown or of another type.
    """
    row = checked(MetricRow, {**fields, "method": _method_of(fields)}, where)
    if not is_finite(row.k):
        raise SteerError(f"{where}: field 'k': expected a finite number, found {row.k}")
    if not row.metric.endswith(FORMER_CHANGE):
        return row
    return replace(row, metric=row.metric.removesuffix(FORMER_CHANGE), change=True)
