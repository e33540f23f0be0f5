"""Methods at the same loss of capability, with paired bootstrap errors over items and seeds (no torch).

Each method's curve goes from the base outwards on one side of k. At a stated damage (rise of the loss on ordinary
text, in nats per token) its behaviour is read off between the two measured strengths around it.
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

    `reached` is False where the strongest k that was measured does less damage; its value stands then.
    `against` is the difference to the reference method on the items that both were measured on.
    """

    method: str
    side: int
    damage: float
    value: float
    stderr: float
    n: int
    reached: bool
    against: float
    against_stderr: float


@dataclass(frozen=True)
class _Curve:
    """One method on one side in one run: strengths from the base outwards, items across."""

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
        SteerError: a run without cells of the base on these tasks.
    """
    cells = [_cells_of(run) for run in runs]
    found = []
    for side in (1, -1):
        curves = _curves(cells, behavior, capability, side)
        for method in curves:
            for damage in damages:
                found.append(_matched(curves, method, side, damage, reference, draws, seed))
    return found


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
        for task, _ in (behavior, capability):
            if (BASE, 0.0, task) not in cells:
                raise SteerError(f"no cells of the base on task {task!r}; finish the run, or name another task")
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
    _, damage = _test_changes(cells, method, ks, capability)
    return _Curve(ids, changes, damage)


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


def _matched(curves: Curves, method: str, side: int, damage: float, reference: str, draws: int, seed: int) -> Matched:
    mine, theirs = curves[method], curves.get(reference, curves[method])
    whole = [_at(curve, damage) for curve in mine]
    rng = np.random.default_rng(seed)
    samples, differences = [], []
    for _ in range(draws):
        values = [_pair(mine[run], theirs[run], damage, rng) for run in rng.integers(len(mine), size=len(mine))]
        samples.append(float(np.mean([own for own, _ in values])))
        differences.append(float(np.mean([own - other for own, other in values])))
    exact = [_pair(own, other, damage, None) for own, other in zip(mine, theirs, strict=True)]
    return Matched(
        method=method,
        side=side,
        damage=damage,
        value=float(np.mean([value for value, _ in whole])),
        stderr=float(np.std(samples, ddof=1)),
        n=len(mine[0].ids),
        reached=all(reached for _, reached in whole),
        against=float(np.mean([own - other for own, other in exact])),
        against_stderr=float(np.std(differences, ddof=1)),
    )


def _pair(own: _Curve, other: _Curve, damage: float, rng: np.random.Generator | None) -> tuple[float, float]:
    """Both methods' values at a damage on the items they share; with `rng` on items drawn with replacement."""
    shared = sorted(set(own.ids) & set(other.ids))
    items, texts = np.array(shared), np.arange(own.damage.shape[1])
    if rng is not None:
        items, texts = (drawn[rng.integers(len(drawn), size=len(drawn))] for drawn in (items, texts))
    return _read_off(own, items, texts, damage)[0], _read_off(other, items, texts, damage)[0]


def _at(curve: _Curve, damage: float) -> tuple[float, bool]:
    return _read_off(curve, np.array(curve.ids), np.arange(curve.damage.shape[1]), damage)


def _read_off(curve: _Curve, items: NDArray[np.int64], texts: NDArray[np.int64], damage: float) -> tuple[float, bool]:
    """(value at the damage, whether it is reached): where the curve first crosses it, between two strengths."""
    place = {item: column for column, item in enumerate(curve.ids)}
    columns = [place[int(item)] for item in items]
    values = _means(curve.changes[:, columns])
    harm = curve.damage[:, texts % curve.damage.shape[1]].mean(axis=1)
    for step in range(1, len(harm)):
        if harm[step] >= damage:
            share = (damage - harm[step - 1]) / (harm[step] - harm[step - 1])
            return float(values[step - 1] + share * (values[step] - values[step - 1])), True
    return float(values[-1]), False


def _means(rows: Array) -> Array:
    """Mean of each row over the entries that are not nan; 0 where there are none."""
    counts = (~np.isnan(rows)).sum(axis=1)
    return np.nansum(rows, axis=1) / np.maximum(counts, 1)
