"""Methods x k x tasks -> rows: every cell measured once, written at once, never measured again."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from .lm import LM
from .methods import Steering
from .progress import Progress, silent
from .records import CHANGE, Row, append_jsonl, read_finished, write_jsonl
from .tasks.task import SPLITS, Task

CELLS_FILE = "cells.jsonl"
ROWS_FILE = "rows.jsonl"
BASE = "base"
FAR_TOO_MUCH = 1e3  # nats of damage that stand for a loss that overflowed


@dataclass(frozen=True)
class Cell:
    """One method at one strength on one task, with a value an item (items pair across cells)."""

    method: str
    k: float
    task: str
    splits: tuple[str, ...]
    values: Mapping[str, Sequence[float]]

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
            before = [v for v, s in zip(base.values[metric], base.splits, strict=True) if s in self.splits]
            changes = [value - start for value, start in zip(values, before, strict=True)]
            for name, row in ((metric, values), (f"{metric}{CHANGE}", changes)):
                for split in SPLITS:
                    part = [v for v, s in zip(row, self.splits, strict=True) if s == split]
                    if part:
                        found.append(Row(self.key[0], self.k, self.task, name, *summary(part), split))
        return found


def summary(values: Sequence[float]) -> tuple[float, int, float]:
    """(mean, n, standard error of the mean); the error of one value is not known: nan."""
    n = len(values)
    return fmean(values), n, stdev(values) / math.sqrt(n) if n > 1 else math.nan


def run_sweep(
    lm: LM,
    methods: Sequence[tuple[Steering, Sequence[float]]],
    tasks: Sequence[Task],
    folder: Path,
    *,
    validated: Collection[str] | None = None,
    batch_size: int = 8,
    progress: Progress = silent,
) -> list[Row]:
    """Measure the base and every method at its strengths on every task.

    `validated` names the methods that are measured on validation items too, since something is to
    be chosen by them (None: all); the others are measured on test items only. Each cell is appended
    to `cells.jsonl` when it is done, so a killed sweep goes on where it stopped; `rows.jsonl` is
    written at the end.

    Returns:
        All rows, base first.
    """
    path = folder / CELLS_FILE
    done = {cell.key: cell for cell in map(cell_from, read_finished(path))}
    plan: list[tuple[Steering | None, float]] = [(None, 0.0)]
    plan += [(method, float(k)) for method, ks in methods for k in ks if k]
    for number, (method, k) in enumerate(plan):
        name = method.name if method else BASE
        todo = [task for task in tasks if (name, k, task.name) not in done]
        if method and validated is not None and name not in validated:
            todo = [task.of_split("test") for task in todo]
        progress(number, len(plan), f"{name} k = {k:g}")
        cells = _measured(lm, method, k, todo, batch_size) if todo else []
        append_jsonl(path, [asdict(cell) for cell in cells])
        done.update({cell.key: cell for cell in cells})
    progress(len(plan), len(plan), "done")
    wanted = [(method.name if method else BASE, k, task.name) for method, k in plan for task in tasks]
    rows = [row for key in wanted for row in done[key].rows(done[BASE, 0.0, key[2]])]
    write_jsonl(folder / ROWS_FILE, [asdict(row) for row in rows])
    return rows


def cell_from(fields: Mapping[str, Any]) -> Cell:
    """A cell from its JSON form."""
    return Cell(**{**fields, "splits": tuple(fields["splits"])})


def _measured(lm: LM, method: Steering | None, k: float, tasks: Sequence[Task], batch_size: int) -> list[Cell]:
    if method is None:
        return [_cell(lm, BASE, k, task, batch_size) for task in tasks]
    with method.applied(lm, k) as steered:
        return [_cell(steered, method.name, k, task, batch_size) for task in tasks]


def _cell(lm: LM, name: str, k: float, task: Task, batch_size: int) -> Cell:
    with torch.no_grad():
        values = task.measure(lm, batch_size=batch_size)
    return Cell(name, k, task.name, tuple(task.splits), values)


def strength_at_damage(
    lm: LM, method: Steering, probe: Task, *, damage: float, sign: int, metric: str = "nll", tries: int = 6
) -> float:
    """The k on one side (`sign` 1 or -1) at which `metric` on `probe` has risen by about `damage`.

    Damage grows about with k^2, so each try takes the k that a parabola through the tries on both
    sides of the aim gives (before there are two, k is scaled, by a factor of 4 at most). It stops
    within 15%, or takes the nearest try. This is what makes methods comparable: each is swept over
    the same range of damage whatever its units of k.
    """
    base = fmean(probe.measure(lm)[metric])
    below, above = (0.0, 0.0), None  # (|k|, damage) of the tries nearest the aim
    tried: dict[float, float] = {}  # |k| -> how far its damage is from the aim
    size = 1.0
    while len(tried) < tries and min(tried.values(), default=damage) > 0.15 * damage:
        with method.applied(lm, sign * size) as steered:
            found = fmean(probe.measure(steered)[metric]) - base
        found = found if math.isfinite(found) else FAR_TOO_MUCH
        tried[size] = abs(found - damage)
        if found < damage:
            below = (size, found)
        else:
            above = (size, found)
        size = _next_size(below, above, damage)
    nearest = min(tried, key=lambda size: tried[size])
    return float(f"{sign * nearest:.2g}")


def _next_size(below: tuple[float, float], above: tuple[float, float] | None, damage: float) -> float:
    """The |k| to try next, from the tries below and above the damage aimed at."""
    if above is None:
        size, found = below
        return size * min(4.0, math.sqrt(damage / max(found, damage / 16)))
    share = (damage - below[1]) / (above[1] - below[1])
    squares = below[0] ** 2, above[0] ** 2
    return math.sqrt(squares[0] + share * (squares[1] - squares[0]))
