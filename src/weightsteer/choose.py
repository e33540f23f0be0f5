"""The k to use: the largest change of behaviour whose loss of capability stays within a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .cells import BASE
from .errors import SteerError
from .records import Row, StrengthRange

# (task, metric) -> how much worse than the base it may get, and which way is worse.
DEFAULT_LOSSES = {("facts", "accuracy"): 0.03, ("prose", "nll"): 0.1}
WORSE_WHEN_HIGHER = ("nll", "over_refused", "attack_success")


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

    A side on which no measured k moves the behaviour its way within the budget gets 0. A k at which no item counts
    for one of the metrics is passed over.

    Raises:
        SteerError: the rows lack the method, the behaviour's metric, or a metric of the budget.
    """
    budget = budget or Budget()
    table = {(row.method, row.k, row.task, row.metric): row.value for row in rows if row.split == split}
    ks = sorted({row.k for row in rows if row.method == method and row.split == split})
    needed = [behavior, *budget.losses]
    for task, metric in needed:
        if not ks or (BASE, 0.0, task, metric) not in table:
            raise SteerError(
                f"choosing k needs {split} rows of {method} and the base for {task} / {metric}; none found"
            )
    measured = [k for k in ks if all((method, k, *key) in table for key in needed)]
    allowed = [k for k in measured if all(loss(table, method, k, key) <= limit for key, limit in budget.losses.items())]
    base = table[BASE, 0.0, *behavior]
    change = {k: table[method, k, *behavior] - base for k in allowed}
    up = max((k for k in allowed if k > 0 and change[k] > 0), key=lambda k: change[k], default=0.0)
    down = min((k for k in allowed if k < 0 and change[k] < 0), key=lambda k: change[k], default=0.0)
    limits = {f"{task} {metric}": limit for (task, metric), limit in budget.losses.items()}
    return StrengthRange(recommended=up, negative=down, low=min(ks), high=max(ks), budget=limits)


def loss(table: Mapping[tuple[str, float, str, str], float], method: str, k: float, key: tuple[str, str]) -> float:
    """How much worse than the base `key` = (task, metric) is at k."""
    change = table[method, k, *key] - table[BASE, 0.0, *key]
    return change if key[1] in WORSE_WHEN_HIGHER else -change
