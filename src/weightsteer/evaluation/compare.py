"""Methods at the same loss increase, with paired bootstrap errors over items and seeds (no torch).

The loss increase is what steering adds to the loss on ordinary text, in nats per token. Each method's curve goes from
the base outwards on one side of k. At a stated loss increase the behaviour is read off between the two measured
strengths around it: the loss rises about with k^2, the behaviour changes about with k.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import SteerError
from ..files import read_jsonl
from ..run_folder import RunFolder
from .metrics import MetricKey
from .resampled_curves import Array, Curve, Sample
from .results import BASE, Key, Measurement, measurements_by_key

LOSS_INCREASES = (0.05, 0.1, 0.2)  # nats per token
DRAWS = 1000


@dataclass(frozen=True)
class ComparisonAtLoss:
    """A method's change of behaviour at one loss increase, on one side of k.

    `reached` is False where the strongest k that was measured costs less than that; its value stands then. `n` is
    the smaller number of items that count at the two strengths around the loss increase, in the run that has fewest.
    `against` is the difference to the reference method, on the `against_n` items that count for both at every strength
    in every run; None where there is none. `against_reached` is False where either of the two costs less.
    """

    method: str
    side: int
    loss_increase: float
    value: float
    stderr: float
    n: int
    reached: bool
    against: float | None
    against_stderr: float | None
    against_n: int
    against_reached: bool


Curves = Mapping[str, Sequence[Curve]]  # method -> one curve a run


def compare_at_loss(
    runs: Sequence[str | Path],
    behavior: MetricKey,
    *,
    capability: MetricKey = ("prose", "nll"),
    reference: str = "contrastive",
    loss_increases: Sequence[float] = LOSS_INCREASES,
    draws: int = DRAWS,
    seed: int = 0,
) -> list[ComparisonAtLoss]:
    """Every method of the runs (seeds of one recipe) at each loss increase, on both sides, on test items.

    Args:
        behavior: (task, metric) whose change is compared.
        capability: (task, metric) whose rise is the loss increase.
        reference: the method that the others are compared with, pairwise.

    Raises:
        SteerError: a run without measurements of the base on these tasks or metrics, no method of the reference's
            name, or a loss increase that is not above 0.
    """
    if not loss_increases or min(loss_increases) <= 0:
        raise SteerError(f"loss increases: expected numbers above 0, in nats per token; found {list(loss_increases)}")
    measurements = [_measurements_of(run) for run in runs]
    sides = {side: _curves(measurements, behavior, capability, side) for side in (1, -1)}
    known = {method for curves in sides.values() for method in curves}
    if reference not in known:
        raise SteerError(f"reference {reference!r}: expected one of the runs' methods, {', '.join(sorted(known))}")
    return [
        found
        for side, curves in sides.items()
        for method in curves
        for found in _compare(method, side, curves[method], curves.get(reference), loss_increases, draws, seed)
    ]


def _measurements_of(run: str | Path) -> dict[Key, Measurement]:
    path = RunFolder(Path(run)).measurements
    if not path.exists():
        raise SteerError(f"{run}: no run with measurements ({path.name}); finish it with `weightsteer run`")
    return measurements_by_key(read_jsonl(path), str(path))


def _curves(
    runs: Sequence[Mapping[Key, Measurement]],
    behavior: MetricKey,
    capability: MetricKey,
    side: int,
) -> Curves:
    """Curves of the methods that every run has."""
    each = []
    for measurements in runs:
        for task, metric in (behavior, capability):
            if (BASE, 0.0, task) not in measurements:
                raise SteerError(f"no measurements of the base on task {task!r}; finish the run, or name another task")
            if metric not in (known := measurements[BASE, 0.0, task].values):
                raise SteerError(f"task {task!r}: expected one of its metrics, {', '.join(known)}; found {metric!r}")
        methods = dict.fromkeys(method for method, k, _ in measurements if k * side > 0)
        each.append({m: curve for m in methods if (curve := _curve(measurements, m, side, behavior, capability))})
    return {method: [curves[method] for curves in each] for method in each[0] if all(method in c for c in each)}


def _curve(
    measurements: Mapping[Key, Measurement],
    method: str,
    side: int,
    behavior: MetricKey,
    capability: MetricKey,
) -> Curve | None:
    tasks = (behavior[0], capability[0])
    ks = sorted({k for m, k, _ in measurements if m == method and k * side > 0}, key=abs)
    ks = [k for k in ks if all((method, k, task) in measurements for task in tasks)]
    if not ks:
        return None
    ids, changes = _test_changes(measurements, method, ks, behavior)
    texts, loss_increase = _test_changes(measurements, method, ks, capability)
    if not (ids and texts):
        raise SteerError(f"{method}: no test items of {' and '.join(tasks)}; give the tasks some")
    counted = np.array([bool((~np.isnan(row)).any()) for row in changes])  # where no item counts, there is no value
    if not counted[1:].any() or not math.isfinite(loss_increase[counted][1].mean()):
        return None
    return Curve(np.abs([0.0, *ks])[counted], ids, changes[counted], loss_increase[counted])


def _test_changes(
    measurements: Mapping[Key, Measurement], method: str, ks: Iterable[float], key: MetricKey
) -> tuple[tuple[int, ...], Array]:
    """(ids, (strengths + 1, items)) of the changes from the base on test items, the base's zeros first."""
    task, metric = key
    rows: list[dict[int, float]] = []
    for k in ks:
        measurement = measurements[method, k, task]
        changes = measurement.changes(measurement.base_among(measurements), metric)
        values = zip(measurement.ids, measurement.splits, changes, strict=True)
        rows.append({i: math.nan if v is None else v for i, split, v in values if split == "test"})
    ids = tuple(i for i in rows[0] if all(i in row for row in rows))
    table = np.array([[row[i] for i in ids] for row in rows], dtype=np.float64)
    start = np.where(np.isnan(table).all(axis=0), np.nan, 0.0)
    return ids, np.vstack([start, table])


def _compare(
    method: str,
    side: int,
    mine: Sequence[Curve],
    theirs: Sequence[Curve] | None,
    levels: Sequence[float],
    draws: int,
    seed: int,
) -> list[ComparisonAtLoss]:
    """One method on one side at each loss increase: its value, its error, the paired difference to the reference."""
    own = Sample([curve.ids for curve in mine], mine, draws, seed)
    alone = len(own.items) == len(mine) == 1  # of which no error is known
    shared = [one.shared_items(other) for one, other in zip(mine, theirs, strict=True)] if theirs else []
    paired = bool(shared) and bool(set.intersection(*map(set, shared)))
    both = Sample(shared, [*mine, *(theirs or ())], draws, seed) if paired else None
    found = []
    for level in levels:
        reached = all(curve.reaches(level) for curve in mine)
        against, error, count = _difference(both, mine, theirs or (), level) if both else (None, None, 0)
        found.append(
            ComparisonAtLoss(
                method,
                side,
                level,
                value=own.whole(mine, level),
                # a draw in which no item counts has no value
                stderr=math.nan if alone else float(np.nanstd(own.drawn(mine, level), ddof=1)),
                n=min(curve.count_items(level, own.items) for curve in mine),
                reached=reached,
                against=against,
                against_stderr=error,
                against_n=count,
                against_reached=reached and all(curve.reaches(level) for curve in theirs or ()),
            )
        )
    return found


def _difference(both: Sample, mine: Sequence[Curve], theirs: Sequence[Curve], level: float) -> tuple[float, float, int]:
    """The paired difference on shared items, its error, and how many items there are."""
    drawn = both.drawn(mine, level) - both.drawn(theirs, level)
    error = math.nan if len(both.items) == len(mine) == 1 else float(np.std(drawn, ddof=1))
    return both.whole(mine, level) - both.whole(theirs, level), error, len(both.items)
