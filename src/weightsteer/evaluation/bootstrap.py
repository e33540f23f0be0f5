"""Paired bootstrap over seeds and items, and Holm's correction for many tests (no torch).

A table has a row a seed and a column an item, and both are drawn with replacement: the same items in every seed, since
seeds share them (Owen, "The pigeonhole bootstrap", 2007). Of n there are n - 1 drawn, which makes the variance that of
the sample mean, s^2 / n, and not a share (n - 1) / n of it: with three seeds that would be a third too little
(Rao and Wu, "Resampling inference with complex survey data", 1988).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

DRAWS = 10_000
LEVEL = 0.95  # of an interval
SAME = 1e-12  # an error that is such a share of the mean is rounding

Table = NDArray[np.float64]  # (seeds, items); nan where an item does not count


@dataclass(frozen=True)
class Estimate:
    """The mean of a table, and how far it would differ with other seeds and other items.

    The interval and the two-sided `p` are those of Student's t with this error: three seeds draw no tails of their own.
    Numbers that are all the same tell of no spread: the interval is not known then, nor is p, but for a mean of 0.
    """

    mean: float
    stderr: float
    low: float  # of the interval
    high: float
    p: float
    seeds: int
    items: int


def bootstrap(table: Table, *, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """The table's mean with errors over seeds and items; of paired differences, this is the paired bootstrap.

    With one seed the error is that over items alone, and the other way round. Each seed and each item weighs as
    much as it has numbers.

    Raises:
        ValueError: no number in the table.
    """
    table = np.atleast_2d(np.asarray(table, dtype=np.float64))
    table = table[~np.isnan(table).all(axis=1)][:, ~np.isnan(table).all(axis=0)]
    if not table.size:
        raise ValueError("a table without numbers")
    seeds, items = table.shape
    mean = float(np.nanmean(table))
    if not math.isfinite(mean) or table.size == 1:
        return Estimate(mean, math.nan, math.nan, math.nan, math.nan, seeds, items)
    drawn = _drawn_means(table, draws, seed)
    stderr = float(np.nanstd(drawn, ddof=1))  # a draw in which no item counts has no mean
    if stderr <= SAME * abs(mean):
        p = math.nan if mean else 1.0
        return Estimate(mean, stderr, math.nan, math.nan, p, seeds, items)
    free = _freedom(table)
    reach = float(stdtrit(free, (1 + LEVEL) / 2)) * stderr
    p = 2 * float(stdtr(free, -abs(mean) / stderr))
    return Estimate(mean, stderr, mean - reach, mean + reach, p, seeds, items)


def _freedom(table: Table) -> float:
    """Degrees of freedom of the error, from the shares that seeds and items have in it (Satterthwaite, 1946)."""
    with np.errstate(invalid="ignore"):
        means = [np.nanmean(table, axis=axis) for axis in (1, 0) if table.shape[1 - axis] > 1]
    parts = [(float(np.var(row, ddof=1)) / len(row), len(row) - 1) for row in means]
    total = sum(part for part, _ in parts)
    return total**2 / sum(part**2 / free for part, free in parts) if total > 0 else 1.0


def _drawn_means(table: Table, draws: int, seed: int) -> Table:
    """The mean of each draw. The same seed draws the same, so that tables of one shape pair."""
    counted, filled = ~np.isnan(table), np.nan_to_num(table)
    rows, columns = (_weights(size, draws, (seed, axis)) for axis, size in enumerate(table.shape))
    sums = ((rows @ filled) * columns).sum(axis=1)
    if counted.all():
        return sums / (rows.sum(axis=1) * columns.sum(axis=1))
    weights = ((rows @ counted.astype(np.float64)) * columns).sum(axis=1)
    with np.errstate(invalid="ignore"):
        return np.asarray(sums / weights, dtype=np.float64)


@lru_cache(maxsize=6)  # a study asks for few shapes, hundreds of times
def _weights(size: int, draws: int, seed: tuple[int, int]) -> Table:
    """(draws, size): how often each of `size` is drawn."""
    if size == 1:
        return np.ones((draws, 1))
    rng = np.random.default_rng(seed)
    return rng.multinomial(size - 1, np.full(size, 1 / size), size=draws).astype(np.float64)


def holm(ps: Sequence[float]) -> list[float]:
    """p-values corrected for their number, in their order (Holm, "A simple sequentially rejective procedure", 1979).

    The smallest is multiplied by their number, the next by one less, and so on; none falls below the one before it. A
    p that is nan is no test, and stays so.
    """
    tests = sorted((p, place) for place, p in enumerate(ps) if not math.isnan(p))
    found, least = list(ps), 0.0
    for rank, (p, place) in enumerate(tests):
        least = max(least, min(1.0, (len(tests) - rank) * p))
        found[place] = least
    return found
