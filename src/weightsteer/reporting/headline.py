"""The result in a sentence for each side of k, made from the rows; where nothing moved, it says so (no torch)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..evaluation.metrics import Metric, MetricKey, Metrics, metric_of
from ..evaluation.results import MetricRow
from ..run_card import StrengthRange
from .charts import LOSS

POINTS = {"0 to 100": "points of 100"}  # the unit of a score from 0 to 100, of its change
SURE = 2.0  # standard errors below which a change may well be chance
FEW = 10  # items, of which fewer that change all alike may do so by chance


@dataclass(frozen=True)
class Headline:
    """One side's sentence, its k, and how many standard errors the behaviour changed."""

    text: str
    k: float
    sureness: float


def headlines(
    rows: Sequence[MetricRow], method: str, strength: StrengthRange, keys: Sequence[MetricKey], metrics: Metrics
) -> list[Headline]:
    """One for each recommended k, the surest first; none where no k is recommended.

    Args:
        rows: of the test items.
        keys: metrics of the behaviour; the first that was measured at a k counts for it.
    """
    changes = {(row.k, (row.task, row.metric)): row for row in rows if row.method == method and row.change}
    found = []
    for k in dict.fromkeys(k for k in (strength.negative, strength.recommended) if k):
        moved = next((changes[k, key] for key in keys if (k, key) in changes), None)
        text, loss = f"At k = {k:+.3g}", changes.get((k, LOSS))
        if moved is None or not math.isfinite(moved.value):
            text += ", the recommended strength, the behaviour was not measured on test items"
        else:
            text += f" the model {change_in_words(moved, metric_of(metrics, (moved.task, moved.metric)))}"
        if loss is not None and math.isfinite(loss.value):
            text += f"; ordinary text {_cost(loss.value)}"
        found.append(Headline(f"{text}.", k, _sureness(moved)))
    return sorted(found, key=lambda one: -one.sureness)


def nothing_recommended(strength: StrengthRange) -> str:
    """What to say where no k is recommended on either side."""
    return (
        f"No k from {strength.low:.3g} to {strength.high:.3g} moved the behaviour within the budget, so none is "
        "recommended."
    )


def side_left_out(strength: StrengthRange) -> str:
    """What to say of the side on which no k is recommended, if the other has one."""
    if bool(strength.negative) == bool(strength.recommended):
        return ""
    missing, way = ("below", "lowered") if strength.recommended else ("above", "raised")
    tried = strength.low if strength.recommended else strength.high
    if tried * (1 if strength.negative else -1) <= 0:
        return f"No k {missing} 0 was measured."
    return f"No k {missing} 0 that was measured {way} the behaviour within the budget, so none is recommended there."


def change_in_words(row: MetricRow, metric: Metric) -> str:
    """A change of a metric as a predicate: 'follows a false belief 8.8 ± 1.8 points less often'."""
    fine = ".3f" if abs(row.stderr) < 0.02 else ".2f"  # NaN: two digits
    scale, unit, form = (100.0, "points", ".1f") if metric.is_share else (1.0, metric.unit, fine)
    if unit in POINTS:
        unit, form = POINTS[unit], ".1f"
    known, unit = math.isfinite(row.stderr), f" {unit}" if unit else ""
    spread = f"± {scale * row.stderr:{form}}" if known else ""
    if not row.value:
        same = f"{metric.phrase} as before" if metric.phrase else f"does not change in {metric.title!r}"
        return f"{same} (0{f' {spread}' if known else ''}{unit})"
    way, sign = ("more", "+") if row.value > 0 else ("less", "-")
    amount = f"{scale * abs(row.value):{form}}{f' {spread}' if known else ''}{unit}"
    if metric.phrase:
        said = f"{metric.phrase} {amount} {way}{' often' if metric.is_share else ''}"
    else:
        said = f"changes in {metric.title!r} by {sign}{amount}"
    if not known:
        return f"{said}, on {row.n} item{'s' if row.n > 1 else ''}, so that no error is known"
    return said if _sureness(row) >= SURE else f"{said}, which may be chance"


def _cost(loss: float) -> str:
    """A rise of the loss in words."""
    size = f"{abs(loss):.3f}" if abs(loss) < 0.1 else f"{abs(loss):.2f}"
    if float(size) == 0.0:
        return "costs the same to a thousandth of a nat per token"
    return f"costs {size} nats per token {'more' if loss > 0 else 'less'}"


def _sureness(row: MetricRow | None) -> float:
    """How many standard errors a change is away from 0; 0 where that is not known."""
    if row is None or not (math.isfinite(row.value) and math.isfinite(row.stderr)):
        return 0.0
    if row.stderr:
        return abs(row.value) / row.stderr
    return math.inf if row.value and row.n >= FEW else 0.0
