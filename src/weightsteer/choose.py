"""The k to use: the largest change of behaviour whose loss of capability stays within a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .cells import BASE
from .errors import SteerError
from .records import CHANGE, Row, StrengthRange

# (task, metric) -> how much worse than the base it may get, and which way is worse.
DEFAULT_LOSSES = {("facts", "accuracy"): 0.03, ("prose", "nll"): 0.1}
WORSE_WHEN_HIGHER = ("nll", "over_refused", "attack_success", "harmless margin")


@dataclass(frozen=True)
class Budget:
    """How much capability steering may cost; defaults: 3 points of accuracy, 0.1 nats per token."""

    losses: Mapping[tuple[str, str], float] = field(default_factory=lambda: DEFAULT_LOSSES)


def recommend(
    rows: Sequence[Row],
    *,
    method: str = "contrastive",
    behavior: tuple[str, str] = ("preference", "margin"),
    budget: Budget | None = None,
    split: str = "validation",
) -> StrengthRange:
    """Choose k on each side from a sweep's rows, on validation items (report it on test items).

    Changes are item by item, since a method may be measured on fewer items than the base. A side on which no measured
    k moves the behaviour its way within the budget gets 0. A k at which no item counts for one of the metrics, or a
    metric overflows, is passed over.

    Raises:
        SteerError: the rows lack the method, the behaviour's metric, or a metric of the budget.
    """
    budget = budget or Budget()
    chosen = [row for row in rows if row.split == split]
    known = {(row.task, row.metric) for row in chosen if row.method == BASE}
    ks = sorted({row.k for row in chosen if row.method == method})
    changes = {
        (row.k, row.task, row.metric.removesuffix(CHANGE)): row.value
        for row in chosen
        if row.method == method and row.metric.endswith(CHANGE)
    }
    needed = [behavior, *budget.losses]
    for task, metric in needed:
        if not ks or (task, metric) not in known:
            raise SteerError(
                f"choosing k needs {split} rows of {method} and the base for {task} / {metric}, and items that count "
                "(of a judged task, usable verdicts); none found"
            )
    measured = [k for k in ks if all(math.isfinite(changes.get((k, *key), math.nan)) for key in needed)]
    limits = budget.losses.items()
    allowed = [k for k in measured if all(_worse(changes[k, *key], key[1]) <= limit for key, limit in limits)]
    change = {k: changes[k, *behavior] for k in allowed}
    up = max((k for k in allowed if k > 0 and change[k] > 0), key=lambda k: change[k], default=0.0)
    down = min((k for k in allowed if k < 0 and change[k] < 0), key=lambda k: change[k], default=0.0)
    shown = {f"{task} {metric}": limit for (task, metric), limit in limits}
    return StrengthRange(recommended=up, negative=down, low=min(ks), high=max(ks), budget=shown)


def _worse(change: float, metric: str) -> float:
    """How much worse than the base a change of a metric is."""
    return change if metric in WORSE_WHEN_HIGHER else -change
