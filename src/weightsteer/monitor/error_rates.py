"""How often a detector is right: the area under its ROC curve, and what it finds at a stated rate of false alarms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from ..errors import SteerError

RESAMPLES = 2000


@dataclass(frozen=True)
class ErrorRates:
    """A detector on fine-tunes of known truth."""

    auroc: float  # how often one with the behaviour scores above one without it; ties count half
    low: float  # the middle 95% of bootstrap resamples
    high: float
    found: dict[float, float]  # rate of false alarms -> share of those with the behaviour that are found
    positives: int
    negatives: int


def auroc(positives: np.ndarray, negatives: np.ndarray) -> float:
    """Area under the ROC curve: P(score of a positive > score of a negative), ties half.

    Raises:
        SteerError: either is empty.
    """
    if not len(positives) or not len(negatives):
        raise SteerError(f"auroc: expected scores of both kinds, found {len(positives)} and {len(negatives)}")
    ranks = rankdata(np.concatenate([positives, negatives]))[: len(positives)]
    wins = ranks.sum() - len(positives) * (len(positives) + 1) / 2
    return float(wins / (len(positives) * len(negatives)))


def threshold_at(negatives: np.ndarray, rate: float) -> float:
    """The score that at most `rate` of the negatives lie above.

    Of n negatives no rate below 1 / n can be told: then it is the largest of them.

    Raises:
        SteerError: no negatives, or a rate outside 0 to 1.
    """
    if not len(negatives) or not 0 <= rate < 1:
        raise SteerError(f"threshold: expected negatives and a rate from 0 to 1, found {len(negatives)} and {rate:g}")
    above = math.floor(rate * len(negatives) + 1e-9)
    return float(np.sort(np.asarray(negatives, dtype=float))[::-1][above])


def error_rates(
    scores: Sequence[float],
    truths: Sequence[bool],
    groups: Sequence[str],
    *,
    rates: Sequence[float] = (0.01, 0.05),
    seed: int = 0,
) -> ErrorRates:
    """AUROC with its interval, and the share found at each rate of false alarms.

    Fine-tunes of one group (a domain, its seeds) stand or fall together, so the bootstrap draws groups.

    Raises:
        SteerError: the three differ in length, or one kind is missing.
    """
    values, marks, named = np.asarray(scores, dtype=float), np.asarray(truths, dtype=bool), np.asarray(groups)
    if not len(values) == len(marks) == len(named):
        raise SteerError(f"error_rates: {len(values)} scores, {len(marks)} truths, {len(named)} groups")
    positives, negatives = values[marks], values[~marks]
    area = auroc(positives, negatives)
    low, high = _interval(values, marks, named, seed)
    found = {rate: float((positives > threshold_at(negatives, rate)).mean()) for rate in rates}
    return ErrorRates(area, low, high, found, len(positives), len(negatives))


def _interval(values: np.ndarray, marks: np.ndarray, groups: np.ndarray, seed: int) -> tuple[float, float]:
    """The middle 95% of the AUROC over resampled groups, positives and negatives drawn apart."""
    random = np.random.default_rng(seed)
    sides = [[np.flatnonzero((groups == name) & kind) for name in np.unique(groups[kind])] for kind in (marks, ~marks)]
    areas = []
    for _ in range(RESAMPLES):
        drawn = [np.concatenate([side[i] for i in random.integers(len(side), size=len(side))]) for side in sides]
        areas.append(auroc(values[drawn[0]], values[drawn[1]]))
    low, high = np.quantile(areas, (0.025, 0.975))
    return float(low), float(high)
