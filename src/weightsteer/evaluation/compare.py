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
from numpy.typing import NDArray

from ..errors import SteerError
from ..files import read_jsonl
from ..run_folder import RunFolder
from .metrics import MetricKey
from .results import BASE, Key, Measurement, measurements_by_key

LOSS_INCREASES = (0.05, 0.1, 0.2)  # nats per token
DRAWS = 1000
Array = NDArray[np.float64]


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


@dataclass(frozen=True, eq=False)
class _Curve:
    """One method on one side in one run: strengths from the base outwards, items across."""

    strengths: Array  # sizes of k, 0 first
    ids: tuple[int, ...]
    changes: Array  # (strengths, items): change of the behaviour from the base; nan where an item does not count
    loss_increase: Array  # (strengths, texts): rise of the loss


Curves = Mapping[str, Sequence[_Curve]]  # method -> one curve a run


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
        _compare(curves[method], curves.get(reference), _Place(method, side, loss_increase), draws, seed)
        for side, curves in sides.items()
        for method in curves
        for loss_increase in loss_increases
    ]


@dataclass(frozen=True)
class _Place:
    """Where a curve is read off."""

    method: str
    side: int
    loss_increase: float


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
) -> _Curve | None:
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
    if not counted[1:].any():
        return None
    return _Curve(np.abs([0.0, *ks])[counted], ids, changes[counted], loss_increase[counted])


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
    mine: Sequence[_Curve], theirs: Sequence[_Curve] | None, place: _Place, draws: int, seed: int
) -> ComparisonAtLoss:
    """The value at one place, its error, and the paired difference to the reference."""
    own = _Sample([curve.ids for curve in mine], mine)
    values = own.drawn(mine, place.loss_increase, draws, seed)
    shared = [_shared_items(one, other) for one, other in zip(mine, theirs, strict=True)] if theirs else []
    difference, error, count = None, None, 0
    if theirs and set.intersection(*map(set, shared)):
        both = _Sample(shared, [*mine, *theirs])
        drawn = both.drawn(mine, place.loss_increase, draws, seed) - both.drawn(
            theirs, place.loss_increase, draws, seed
        )
        difference = both.whole(mine, place.loss_increase) - both.whole(theirs, place.loss_increase)
        error, count = float(np.std(drawn, ddof=1)), len(both.items)
    reached = _all_reach(mine, place.loss_increase)
    return ComparisonAtLoss(
        **vars(place),
        value=own.whole(mine, place.loss_increase),
        stderr=float(np.nanstd(values, ddof=1)),  # a draw in which no item counts has no value
        n=min(_count_items(curve, place.loss_increase) for curve in mine),
        reached=reached,
        against=difference,
        against_stderr=error,
        against_n=count,
        against_reached=reached and _all_reach(theirs or (), place.loss_increase),
    )


def _shared_items(one: _Curve, other: _Curve) -> tuple[int, ...]:
    """The items that count for both curves at every strength."""
    usable = set(one.ids)
    for curve in (one, other):
        columns = zip(curve.ids, curve.changes[1:].T, strict=True)
        usable &= {item for item, column in columns if not np.isnan(column).any()}
    return tuple(item for item in one.ids if item in usable)


class _Sample:
    """Items, texts and runs, drawn with replacement: the same items and texts in every run, since runs share them."""

    def __init__(self, ids: Sequence[tuple[int, ...]], curves: Sequence[_Curve]) -> None:
        self.items = sorted(set.intersection(*map(set, ids)))
        self.texts = np.arange(min(curve.loss_increase.shape[1] for curve in curves))
        self._columns = {curve: _columns_of(curve, self.items) for curve in curves}

    def whole(self, curves: Sequence[_Curve], level: float) -> float:
        """The mean over runs on all items."""
        return float(np.mean([_read_off(curve, self._columns[curve], self.texts, level) for curve in curves]))

    def drawn(self, curves: Sequence[_Curve], level: float, draws: int, seed: int) -> Array:
        """The mean over runs for each draw; the same seed gives the same draws whatever the curves."""
        rng = np.random.default_rng(seed)
        found = []
        for _ in range(draws):
            items, texts = (rng.integers(count, size=count) for count in (len(self.items), len(self.texts)))
            picked = [curves[run] for run in rng.integers(len(curves), size=len(curves))]
            found.append(np.mean([_read_off(curve, self._columns[curve][items], texts, level) for curve in picked]))
        return np.array(found)


def _columns_of(curve: _Curve, items: Sequence[int]) -> NDArray[np.int64]:
    """Where a curve has these items: looked up once, not at every draw."""
    place = {item: column for column, item in enumerate(curve.ids)}
    return np.array([place[item] for item in items])


def _loss_increases(curve: _Curve, texts: NDArray[np.int64]) -> Array:
    """Rise of the loss at each strength; a loss that overflowed is far too much."""
    return np.nan_to_num(curve.loss_increase[:, texts].mean(axis=1), nan=math.inf)


def _all_reach(curves: Sequence[_Curve], level: float) -> bool:
    return all((_loss_increases(curve, _all_texts(curve))[1:] >= level).any() for curve in curves)


def _all_texts(curve: _Curve) -> NDArray[np.int64]:
    return np.arange(curve.loss_increase.shape[1])


def _find_crossing(curve: _Curve, texts: NDArray[np.int64], level: float) -> tuple[int, float]:
    """(step, share): the level is first reached between strengths step - 1 and step, at that share of the way in k.

    Where it is never reached, the strongest; where the loss overflows, the last strength before.
    """
    increase = _loss_increases(curve, texts)
    for step in range(1, len(increase)):
        if increase[step] >= level:
            if math.isinf(increase[step]):
                return step, 0.0
            part = (level - increase[step - 1]) / (increase[step] - increase[step - 1])
            near, far = curve.strengths[step - 1 : step + 1]
            return step, float((math.sqrt(near**2 + part * (far**2 - near**2)) - near) / (far - near))
    return len(increase) - 1, 1.0


def _count_items(curve: _Curve, level: float) -> int:
    """How many items count at the strengths that the value is read off from; the base counts all of them."""
    step, share = _find_crossing(curve, _all_texts(curve), level)
    used = [row for row, weight in ((step - 1, 1 - share), (step, share)) if weight and row] or [step]
    return int((~np.isnan(curve.changes[used])).sum(axis=1).min())


def _read_off(curve: _Curve, columns: NDArray[np.int64], texts: NDArray[np.int64], level: float) -> float:
    """The value where the curve first reaches the loss increase, between two strengths; else at its strongest."""
    step, share = _find_crossing(curve, texts, level)
    return math.fsum(w * _mean(curve.changes[step - i, columns]) for i, w in ((1, 1 - share), (0, share)) if w)


def _mean(row: Array) -> float:
    """Mean over the items that count; nan where none does."""
    counted = row[~np.isnan(row)]
    return float(counted.mean()) if len(counted) else math.nan
