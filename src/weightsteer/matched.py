"""Methods at the same loss of capability, with paired bootstrap errors over items and seeds (no torch).

Each method's curve goes from the base outwards on one side of k. At a stated damage (rise of the loss on ordinary
text, in nats per token) its behaviour is read off between the two measured strengths around it: damage grows about
with k^2, behaviour about with k.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .cells import BASE, CELLS_FILE, Cell, cell_from
from .errors import SteerError
from .records import read_jsonl

DAMAGES = (0.05, 0.1, 0.2)  # nats per token
DRAWS = 1000
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Matched:
    """A method's change of behaviour at one damage, on one side of k.

    `reached` is False where the strongest k that was measured does less damage; its value stands then. `n` is
    the smaller number of items that count at the two strengths around the damage, in the run that has fewest.
    `against` is the difference to the reference method, on the `against_n` items that count for both at every strength
    in every run; None where there is none. `against_reached` is False where either of the two does less damage.
    """

    method: str
    side: int
    damage: float
    value: float
    stderr: float
    n: int
    reached: bool
    against: float | None
    against_stderr: float | None
    against_n: int
    against_reached: bool


@dataclass(frozen=True)
class _Curve:
    """One method on one side in one run: strengths from the base outwards, items across."""

    strengths: Array  # sizes of k, 0 first
    ids: tuple[int, ...]
    changes: Array  # (strengths, items): change of the behaviour from the base; nan where an item does not count
    damage: Array  # (strengths, damage items): rise of the loss


Curves = Mapping[str, Sequence[_Curve]]  # method -> one curve a run


def matched(
    runs: Sequence[Path],
    behavior: tuple[str, str],
    *,
    capability: tuple[str, str] = ("prose", "nll"),
    reference: str = "contrastive",
    damages: Sequence[float] = DAMAGES,
    draws: int = DRAWS,
    seed: int = 0,
) -> list[Matched]:
    """Every method of the runs (seeds of one recipe) at each damage, on both sides, on test items.

    Args:
        behavior: (task, metric) whose change is compared.
        capability: (task, metric) whose rise is the damage.
        reference: the method that the others are compared with, pairwise.

    Raises:
        SteerError: a run without cells of the base on these tasks or metrics, no method of the reference's name, or a
            damage that is not above 0.
    """
    if not damages or min(damages) <= 0:
        raise SteerError(f"damages: expected numbers above 0, in nats per token; found {list(damages)}")
    cells = [_cells_of(run) for run in runs]
    sides = {side: _curves(cells, behavior, capability, side) for side in (1, -1)}
    known = {method for curves in sides.values() for method in curves}
    if reference not in known:
        raise SteerError(f"reference {reference!r}: expected one of the runs' methods, {', '.join(sorted(known))}")
    return [
        _matched(curves[method], curves.get(reference), _Place(method, side, damage), draws, seed)
        for side, curves in sides.items()
        for method in curves
        for damage in damages
    ]


@dataclass(frozen=True)
class _Place:
    """Where a curve is read off."""

    method: str
    side: int
    damage: float


def _cells_of(run: Path) -> dict[tuple[str, float, str], Cell]:
    return {cell.key: cell for cell in map(cell_from, read_jsonl(run / CELLS_FILE))}


def _curves(
    runs: Sequence[Mapping[tuple[str, float, str], Cell]],
    behavior: tuple[str, str],
    capability: tuple[str, str],
    side: int,
) -> Curves:
    """Curves of the methods that every run has."""
    each = []
    for cells in runs:
        for task, metric in (behavior, capability):
            if (BASE, 0.0, task) not in cells:
                raise SteerError(f"no cells of the base on task {task!r}; finish the run, or name another task")
            if metric not in (known := cells[BASE, 0.0, task].values):
                raise SteerError(f"task {task!r}: expected one of its metrics, {', '.join(known)}; found {metric!r}")
        methods = dict.fromkeys(method for method, k, _ in cells if k * side > 0)
        each.append({m: curve for m in methods if (curve := _curve(cells, m, side, behavior, capability))})
    return {method: [curves[method] for curves in each] for method in each[0] if all(method in c for c in each)}


def _curve(
    cells: Mapping[tuple[str, float, str], Cell],
    method: str,
    side: int,
    behavior: tuple[str, str],
    capability: tuple[str, str],
) -> _Curve | None:
    tasks = (behavior[0], capability[0])
    ks = sorted({k for m, k, _ in cells if m == method and k * side > 0}, key=abs)
    ks = [k for k in ks if all((method, k, task) in cells for task in tasks)]
    if not ks:
        return None
    ids, changes = _test_changes(cells, method, ks, behavior)
    texts, damage = _test_changes(cells, method, ks, capability)
    if not (ids and texts):
        raise SteerError(f"{method}: no test items of {' and '.join(tasks)}; give the tasks some")
    counted = np.array([bool((~np.isnan(row)).any()) for row in changes])  # where no item counts, there is no value
    if not counted[1:].any():
        return None
    return _Curve(np.abs([0.0, *ks])[counted], ids, changes[counted], damage[counted])


def _test_changes(
    cells: Mapping[tuple[str, float, str], Cell], method: str, ks: Iterable[float], key: tuple[str, str]
) -> tuple[tuple[int, ...], Array]:
    """(ids, (strengths + 1, items)) of the changes from the base on test items, the base's zeros first."""
    task, metric = key
    base = cells[BASE, 0.0, task]
    rows: list[dict[int, float]] = []
    for k in ks:
        cell = cells[method, k, task]
        values = zip(cell.ids, cell.splits, cell.changes(base, metric), strict=True)
        rows.append({i: math.nan if v is None else v for i, split, v in values if split == "test"})
    ids = tuple(i for i in rows[0] if all(i in row for row in rows))
    table = np.array([[row[i] for i in ids] for row in rows], dtype=np.float64)
    start = np.where(np.isnan(table).all(axis=0), np.nan, 0.0)
    return ids, np.vstack([start, table])


def _matched(mine: Sequence[_Curve], theirs: Sequence[_Curve] | None, place: _Place, draws: int, seed: int) -> Matched:
    """The value at one place, its error, and the paired difference to the reference."""
    own = _Sample([curve.ids for curve in mine], mine)
    values = own.drawn(mine, place.damage, draws, seed)
    shared = [_counting(one, other) for one, other in zip(mine, theirs, strict=True)] if theirs else []
    difference, error, count = None, None, 0
    if theirs and set.intersection(*map(set, shared)):
        both = _Sample(shared, [*mine, *theirs])
        drawn = both.drawn(mine, place.damage, draws, seed) - both.drawn(theirs, place.damage, draws, seed)
        difference = both.whole(mine, place.damage) - both.whole(theirs, place.damage)
        error, count = float(np.std(drawn, ddof=1)), len(both.items)
    reached = _all_reach(mine, place.damage)
    return Matched(
        **vars(place),
        value=own.whole(mine, place.damage),
        stderr=float(np.nanstd(values, ddof=1)),  # a draw in which no item counts has no value
        n=min(_counted(curve, place.damage) for curve in mine),
        reached=reached,
        against=difference,
        against_stderr=error,
        against_n=count,
        against_reached=reached and _all_reach(theirs or (), place.damage),
    )


def _counting(one: _Curve, other: _Curve) -> tuple[int, ...]:
    """The items that count for both curves at every strength."""
    usable = set(one.ids)
    for curve in (one, other):
        columns = zip(curve.ids, curve.changes[1:].T, strict=True)
        usable &= {item for item, column in columns if not np.isnan(column).any()}
    return tuple(item for item in one.ids if item in usable)


class _Sample:
    """Items, texts and runs, drawn with replacement: the same items and texts in every run, since runs share them."""

    def __init__(self, ids: Sequence[tuple[int, ...]], curves: Sequence[_Curve]) -> None:
        self.items = np.array(sorted(set.intersection(*map(set, ids))))
        self.texts = np.arange(min(curve.damage.shape[1] for curve in curves))

    def whole(self, curves: Sequence[_Curve], damage: float) -> float:
        """The mean over runs on all items."""
        return float(np.mean([_read_off(curve, self.items, self.texts, damage) for curve in curves]))

    def drawn(self, curves: Sequence[_Curve], damage: float, draws: int, seed: int) -> Array:
        """The mean over runs for each draw; the same seed gives the same draws whatever the curves."""
        rng = np.random.default_rng(seed)
        found = []
        for _ in range(draws):
            items, texts = (row[rng.integers(len(row), size=len(row))] for row in (self.items, self.texts))
            runs = rng.integers(len(curves), size=len(curves))
            found.append(np.mean([_read_off(curves[run], items, texts, damage) for run in runs]))
        return np.array(found)


def _harm(curve: _Curve, texts: NDArray[np.int64]) -> Array:
    """Rise of the loss at each strength; a loss that overflowed is far too much."""
    return np.nan_to_num(curve.damage[:, texts].mean(axis=1), nan=math.inf)


def _all_reach(curves: Sequence[_Curve], damage: float) -> bool:
    return all((_harm(curve, _all_texts(curve))[1:] >= damage).any() for curve in curves)


def _all_texts(curve: _Curve) -> NDArray[np.int64]:
    return np.arange(curve.damage.shape[1])


def _crossing(curve: _Curve, texts: NDArray[np.int64], damage: float) -> tuple[int, float]:
    """(step, share): the damage is first reached between strengths step - 1 and step, at that share of the way in k.

    Where it is never reached, the strongest; where the loss overflows, the last strength before.
    """
    harm = _harm(curve, texts)
    for step in range(1, len(harm)):
        if harm[step] >= damage:
            if math.isinf(harm[step]):
                return step, 0.0
            part = (damage - harm[step - 1]) / (harm[step] - harm[step - 1])
            near, far = curve.strengths[step - 1 : step + 1]
            return step, float((math.sqrt(near**2 + part * (far**2 - near**2)) - near) / (far - near))
    return len(harm) - 1, 1.0


def _counted(curve: _Curve, damage: float) -> int:
    """How many items count at the strengths that the value is read off from; the base counts all of them."""
    step, share = _crossing(curve, _all_texts(curve), damage)
    used = [row for row, weight in ((step - 1, 1 - share), (step, share)) if weight and row] or [step]
    return int((~np.isnan(curve.changes[used])).sum(axis=1).min())


def _read_off(curve: _Curve, items: NDArray[np.int64], texts: NDArray[np.int64], damage: float) -> float:
    """The value where the curve first crosses the damage, between two strengths; else at its strongest."""
    place = {item: column for column, item in enumerate(curve.ids)}
    step, share = _crossing(curve, texts, damage)
    columns = [place[int(item)] for item in items]
    return math.fsum(w * _mean(curve.changes[step - i, columns]) for i, w in ((1, 1 - share), (0, share)) if w)


def _mean(row: Array) -> float:
    """Mean over the items that count; nan where none does."""
    counted = row[~np.isnan(row)]
    return float(counted.mean()) if len(counted) else math.nan
