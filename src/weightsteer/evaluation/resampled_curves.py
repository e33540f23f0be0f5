"""A method's curve read off at a loss increase, on all items and on items that are drawn again and again (no torch).

A draw is kept as how often each item was drawn, so that the means of all draws are one product of matrices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ..errors import SteerError

AT_ONCE = 1 << 22  # entries of the counts that are held as float64 at a time
Array = NDArray[np.float64]
Whole = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Curve:
    """One method on one side in one run: strengths from the base outwards, items across."""

    strengths: Array  # sizes of k, 0 first
    ids: tuple[int, ...]
    changes: Array  # (strengths, items): change of the behaviour from the base; nan where an item does not count
    loss_increase: Array  # (strengths, texts): rise of the loss

    def reaches(self, level: float) -> bool:
        """Whether a strength that was measured costs as much, and it is known how much."""
        losses = _all_losses(self)[0, 1:]
        return bool((losses >= level).any() and math.isfinite(losses[(losses >= level).argmax()]))

    def count_items(self, level: float, items: Sequence[int]) -> int:
        """How many of the items count at the strengths that the value is read off from; the base counts all."""
        steps, shares = crossings(self.strengths, _all_losses(self), level)
        step, share = int(steps[0]), float(shares[0])
        used = [row for row, weight in ((step - 1, 1 - share), (step, share)) if weight and row] or [step]
        return int((~np.isnan(self.changes[used][:, _columns_of(self, items)])).sum(axis=1).min())

    def shared_items(self, other: Curve) -> tuple[int, ...]:
        """The items that count for both curves at every strength."""
        usable = set(self.ids)
        for curve in (self, other):
            counts = np.logical_and.reduce(~np.isnan(curve.changes[1:]), axis=0)
            usable &= {item for item, good in zip(curve.ids, counts, strict=True) if good}
        return tuple(item for item in self.ids if item in usable)


@dataclass(frozen=True, eq=False)
class _Draws:
    """How often each item and text was drawn, and which runs: one row a draw."""

    items: NDArray[np.uint16]  # (draws, items)
    texts: NDArray[np.uint16]  # (draws, texts)
    runs: Whole  # (draws, runs)


@lru_cache(maxsize=4)  # most methods share their items, with the reference and among themselves
def _drawn(items: int, texts: int, runs: int, draws: int, seed: int) -> _Draws:
    """Draws of items, texts and runs with replacement; a seed gives the same ones whatever is read off.

    Of n there are n - 1 drawn, as in `bootstrap`: n of n would give (n - 1) / n of the variance.
    """
    rng = np.random.default_rng(seed)
    counts = [np.empty((draws, size), dtype=np.uint16) for size in (items, texts)]
    picked = np.empty((draws, max(1, runs - 1)), dtype=np.int64)
    for draw in range(draws):
        for count in counts:
            size = count.shape[1]
            count[draw] = np.bincount(rng.integers(size, size=max(1, size - 1)), minlength=size)
        picked[draw] = rng.integers(runs, size=picked.shape[1])
    return _Draws(counts[0], counts[1], picked)


class Sample:
    """Items, texts and runs, drawn with replacement: the same items and texts in every run, since runs share them.

    Raises:
        SteerError: the runs have no items in common.
    """

    def __init__(self, ids: Sequence[tuple[int, ...]], curves: Sequence[Curve], draws: int, seed: int) -> None:
        self.items = sorted(set.intersection(*map(set, ids)))
        if not self.items:
            raise SteerError("the runs have no test items in common; compare runs of one recipe")
        self._texts = min(curve.loss_increase.shape[1] for curve in curves)
        self._draws, self._seed = draws, seed
        self._means: dict[Curve, tuple[Array, Array]] = {}

    def whole(self, curves: Sequence[Curve], level: float) -> float:
        """The mean over runs on all items."""
        found = []
        for curve in curves:
            changes = curve.changes[:, _columns_of(curve, self.items)]
            means = np.array([[_mean(row) for row in changes]])
            losses = _as_losses(curve.loss_increase[None, :, : self._texts].mean(axis=2))
            found.append(_read_off(curve.strengths, means, losses, level)[0])
        return float(np.mean(found))

    def drawn(self, curves: Sequence[Curve], level: float) -> Array:
        """The mean over runs for each draw, (draws,)."""
        runs = _drawn(len(self.items), self._texts, len(curves), self._draws, self._seed).runs
        read = np.array(
            [_read_off(c.strengths, *self._means_of(c, len(curves)), level) for c in curves]
        )  # (runs, draws)
        means: Array = read[runs, np.arange(self._draws)[:, None]].mean(axis=1)
        return means

    def _means_of(self, curve: Curve, runs: int) -> tuple[Array, Array]:
        """Mean change and rise of the loss at each strength, by draw: (draws, strengths) each."""
        if curve not in self._means:
            drawn = _drawn(len(self.items), self._texts, runs, self._draws, self._seed)
            losses = np.nan_to_num(curve.loss_increase[:, : self._texts], nan=math.inf, posinf=math.inf)
            self._means[curve] = (
                _weighted_means(drawn.items, curve.changes[:, _columns_of(curve, self.items)]),
                _as_losses(_weighted_means(drawn.texts, losses)),
            )
        return self._means[curve]


def _weighted_means(counts: NDArray[np.uint16], rows: Array) -> Array:
    """Means of `rows` (strengths, items) over what each draw took, (draws, strengths): of the items that count.

    nan where none does; infinite where an infinite value was drawn.
    """
    values, counts_as = np.where(np.isfinite(rows), rows, 0.0).T, (~np.isnan(rows)).astype(np.float64).T
    found = np.empty((len(counts), len(rows)))
    for start, stop in _parts(*counts.shape):
        weights = counts[start:stop].astype(np.float64)
        with np.errstate(invalid="ignore"):
            means = weights @ values / (weights @ counts_as)
            for infinite in (math.inf, -math.inf):
                places = (rows == infinite).astype(np.float64).T
                if places.any():
                    means = means + np.where(weights @ places > 0, infinite, 0.0)
        found[start:stop] = means
    return found


def _parts(draws: int, items: int) -> Iterator[tuple[int, int]]:
    step = max(1, AT_ONCE // max(items, 1))
    for start in range(0, draws, step):
        yield start, min(start + step, draws)


def _columns_of(curve: Curve, items: Sequence[int]) -> Whole:
    """Where a curve has these items."""
    place = {item: column for column, item in enumerate(curve.ids)}
    return np.array([place[item] for item in items])


def _mean(row: Array) -> float:
    """Mean over the items that count; nan where none does."""
    counted = row[~np.isnan(row)]
    return float(counted.mean()) if len(counted) else math.nan


def _as_losses(means: Array) -> Array:
    """A loss that overflowed is far too much."""
    return np.nan_to_num(means, nan=math.inf, posinf=math.inf)


def _all_losses(curve: Curve) -> Array:
    """Rise of the loss on all texts, (1, strengths)."""
    return _as_losses(curve.loss_increase[None].mean(axis=2))


def crossings(strengths: Array, losses: Array, level: float) -> tuple[Whole, Array]:
    """(step, share) by draw: the level is first reached between strengths step - 1 and step, at that share in k.

    Where it is never reached, the strongest; where the loss overflows, the last strength before.
    """
    reached = losses[:, 1:] >= level
    ever = reached.any(axis=1)
    step = np.where(ever, reached.argmax(axis=1) + 1, losses.shape[1] - 1)
    rows = np.arange(len(losses))
    low, high = losses[rows, step - 1], losses[rows, step]
    near, far = strengths[step - 1], strengths[step]
    with np.errstate(invalid="ignore", divide="ignore"):
        part = (level - low) / (high - low)
        share = (np.sqrt(near**2 + part * (far**2 - near**2)) - near) / (far - near)
    return step, np.where(ever, np.where(np.isinf(high), 0.0, share), 1.0)


def _read_off(strengths: Array, means: Array, losses: Array, level: float) -> Array:
    """The value where the curve first reaches the level, between two strengths; else at its strongest: by draw."""
    step, share = crossings(strengths, losses, level)
    rows = np.arange(len(means))
    before = np.where(share < 1.0, (1.0 - share) * means[rows, step - 1], 0.0)
    after = np.where(share > 0.0, share * means[rows, step], 0.0)
    found: Array = before + after
    return found
