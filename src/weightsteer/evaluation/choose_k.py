"""The k to use: the largest change of behaviour whose loss of capability stays within a budget (no torch)."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from ..errors import SteerError
from ..run_card import StrengthRange
from .metrics import MetricKey, Metrics, metric_of
from .results import BASE, MetricRow

# How much worse than the base each metric may get: 3 points of accuracy, 0.1 nats per token.
DEFAULT_BUDGET: Mapping[MetricKey, float] = {("facts", "accuracy"): 0.03, ("prose", "nll"): 0.1}


def recommend(
    rows: Sequence[MetricRow],
    *,
    metrics: Metrics,
    method: str = "contrastive",
    behavior: MetricKey = ("preference", "margin"),
    budget: Mapping[MetricKey, float] | None = None,
    split: str = "validation",
    refused: Collection[float] = (),
) -> StrengthRange:
    """Choose k on each side from a sweep's rows, on validation items (report it on test items).

    Changes are item by item, since a method may be measured on fewer items than the base. A side on which no measured
    k moves the behaviour its way within the budget gets 0. A k at which no item counts for one of the metrics, or a
    metric overflows, is passed over.

    Args:
        metrics: what the tasks say of their metrics: which way is worse.
        budget: (task, metric) -> how much worse than the base it may get; default `DEFAULT_BUDGET`.
        refused: k that are not to be recommended, since replies loop there (see `looping.breaks_more`).

    Raises:
        SteerError: the rows lack the method, the behaviour's metric, or a metric of the budget.
    """
    budget = DEFAULT_BUDGET if budget is None else budget
    needed = [behavior, *budget]
    rows = [row for row in rows if row.split == split]
    ks = _measured_ks(rows, method, needed, split)
    changes = {(row.k, row.task, row.metric): row.value for row in rows if row.method == method and row.change}

    allowed = [k for k in ks if k not in refused and _is_within(budget, k, changes, needed, metrics)]
    way = metric_of(metrics, behavior).way or 1
    change = {k: way * changes[k, *behavior] for k in allowed}
    shown = {f"{task} {metric}": limit for (task, metric), limit in budget.items()}
    return StrengthRange(furthest(change, 1), furthest(change, -1), low=min(ks), high=max(ks), budget=shown)


def _is_within(
    budget: Mapping[MetricKey, float],
    k: float,
    changes: Mapping[tuple[float, str, str], float],
    needed: Sequence[MetricKey],
    metrics: Metrics,
) -> bool:
    """Whether every change that is needed is known at k, and none of the budget's is worse than it allows."""
    if not all(math.isfinite(changes.get((k, *key), math.nan)) for key in needed):
        return False
    return all(metric_of(metrics, key).worsening(changes[k, *key]) <= limit for key, limit in budget.items())


def furthest(change: Mapping[float, float], side: int) -> float:
    """The k on one side that moves the behaviour furthest that way; of equal ones the smallest, 0 if none does."""
    moved = [k for k in sorted(change, key=abs) if k * side > 0 and change[k] * side > 0]
    return max(moved, key=lambda k: change[k] * side, default=0.0)


def _measured_ks(rows: Sequence[MetricRow], method: str, needed: Sequence[MetricKey], split: str) -> list[float]:
    """The method's strengths, after checking that the base has every metric that is needed."""
    ks = sorted({row.k for row in rows if row.method == method})
    known = {(row.task, row.metric) for row in rows if row.method == BASE and not row.change}
    for task, metric in needed:
        if not ks or (task, metric) not in known:
            raise SteerError(
                f"choosing k needs {split} rows of {method} and the base for {task} / {metric}, and items that count "
                "(of a judged task, usable verdicts); none found"
            )
    return ks
