"""The odd and the even part of what methods do, where both signs of k are measured (no torch).

With f the behaviour, odd is (f(k) - f(-k)) / 2 and even is (f(k) + f(-k)) / 2 - f(0). The odd part is what the dial
turns; the even part is what any step along the line adds, whichever way it goes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import SteerError
from ..files import read_jsonl
from ..run_folder import RunFolder
from .metrics import MetricKey
from .results import BASE, LOCAL_BASE, Key, Measurement, measurements_by_key

DRAWS = 1000
Array = NDArray[np.float64]


@dataclass(frozen=True)
class OddEven:
    """A method's odd and even part at k, on the `n` test items that count at both signs in every run."""

    method: str
    k: float
    odd: float
    odd_stderr: float
    even: float
    even_stderr: float
    n: int


def odd_and_even(
    runs: Sequence[str | Path], behavior: MetricKey, *, draws: int = DRAWS, seed: int = 0
) -> list[OddEven]:
    """Every method's parts at the largest k that all runs have measured on both sides.

    Between measured strengths an item's change is taken to be linear in k. Errors are by bootstrap over items and runs.

    Raises:
        SteerError: a run without measurements of the base on this task or metric.
    """
    measured = [_measurements_of(run, behavior) for run in runs]
    names = dict.fromkeys(method for method, k, task in measured[0] if k and task == behavior[0])
    found = (_parts(name, measured, behavior, draws, seed) for name in names if name not in (BASE, LOCAL_BASE))
    return [parts for parts in found if parts is not None]


def _measurements_of(run: str | Path, behavior: MetricKey) -> dict[Key, Measurement]:
    path = RunFolder(Path(run)).measurements
    if not path.exists():
        raise SteerError(f"{run}: no run with measurements ({path.name}); finish it with `weightsteer run`")
    found = measurements_by_key(read_jsonl(path), str(path))
    base = found.get((BASE, 0.0, behavior[0]))
    if base is None or behavior[1] not in base.values:
        raise SteerError(f"{run}: no measurements of the base for {'/'.join(behavior)}; name another task/metric")
    return found


def _parts(
    method: str, runs: Sequence[Mapping[Key, Measurement]], behavior: MetricKey, draws: int, seed: int
) -> OddEven | None:
    """None where a run has one sign alone, or no item counts."""
    reach = [
        max((abs(k) for name, k, task in run if name == method and task == behavior[0] and k * side > 0), default=0.0)
        for run in runs
        for side in (1, -1)
    ]
    k = min(reach)
    if not k:
        return None
    tables = [{side: _changes_at(run, method, side * k, behavior) for side in (1, -1)} for run in runs]
    shared = sorted(set.intersection(*(set(side) for table in tables for side in table.values())))
    if not shared:
        return None
    up, down = (np.array([[table[side][i] for i in shared] for table in tables]) for side in (1, -1))
    return _summed(method, k, (up - down) / 2, (up + down) / 2, draws, seed)


def _changes_at(run: Mapping[Key, Measurement], method: str, k: float, behavior: MetricKey) -> dict[int, float]:
    """Each test item's change at k, between the two measured strengths around it."""
    task, metric = behavior
    strengths = sorted((abs(at) for name, at, about in run if name == method and about == task and at * k > 0))
    far = next(size for size in strengths if size >= abs(k))
    near = max((size for size in strengths if size < far), default=0.0)
    sign, share = (1.0 if k > 0 else -1.0), (abs(k) - near) / (far - near)
    rows = {size: _test_changes(run, run[method, sign * size, task], metric) for size in (near, far) if size}
    items = set.intersection(*map(set, rows.values()))
    return {i: rows[far][i] * share + (rows[near][i] * (1 - share) if near else 0.0) for i in items}


def _test_changes(run: Mapping[Key, Measurement], measurement: Measurement, metric: str) -> dict[int, float]:
    changes = measurement.changes(measurement.base_among(run), metric)
    found = zip(measurement.ids, measurement.splits, changes, strict=True)
    return {i: value for i, split, value in found if split == "test" and value is not None}


def _summed(method: str, k: float, odd: Array, even: Array, draws: int, seed: int) -> OddEven:
    """Means over runs and items of (runs, items), with their errors."""
    rng, means = np.random.default_rng(seed), []
    for _ in range(draws):
        picked = np.ix_(*(rng.integers(size, size=max(1, size - 1)) for size in odd.shape))  # see `bootstrap`
        means.append((odd[picked].mean(), even[picked].mean()))
    errors = np.std(np.array(means), axis=0, ddof=1) if odd.size > 1 else [np.nan, np.nan]
    return OddEven(method, k, float(odd.mean()), float(errors[0]), float(even.mean()), float(errors[1]), odd.shape[1])
