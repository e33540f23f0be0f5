"""A run's numbers as tables: for a page, with the values behind the texts, and as lines for a terminal (no torch)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation.compare import ComparisonAtLoss
from ..evaluation.metrics import MetricKey, Metrics, title_of
from ..evaluation.results import MetricRow
from .tables import Cell, Head, Table, estimate, number

COSTS = {  # metric -> head, form
    "training tokens": ("Training tokens", ",.0f"),
    "training seconds": ("Training seconds", ",.0f"),
    "settings tried": ("Settings tried", ",.0f"),
    "parameters": ("Parameters trained", ",.0f"),
    "time per token": ("Time for each generated token, base = 1", ".2f"),
}


def summary_table(rows: Sequence[MetricRow], keys: Sequence[MetricKey]) -> list[dict[str, Any]]:
    """One line a method and k, with a text such as '0.812 ± 0.035' for every metric in `keys`."""
    lines: dict[tuple[str, float], dict[str, Any]] = {}
    for row in (row for row in rows if not row.change):
        line = lines.setdefault((row.method, row.k), {"method": row.method, "k": f"{row.k:g}", "cells": {}})
        line["cells"][row.task, row.metric] = estimate(row.value, row.stderr).text
    return [{**line, "cells": [line["cells"].get(key, "") for key in keys]} for line in lines.values()]


def all_numbers(rows: Sequence[MetricRow], keys: Sequence[MetricKey], metrics: Metrics) -> Table:
    """One line a method and k, and every metric's value with its error."""
    places = dict.fromkeys((row.method, row.k) for row in rows)
    values = {(row.method, row.k, (row.task, row.metric)): row for row in rows if not row.change}
    lines = []
    for method, k in places:
        found = [values.get((method, k, key)) for key in keys]
        lines.append([Cell(method), number(k), *(estimate(r.value, r.stderr) if r else Cell("") for r in found)])
    heads = [Head("Method"), Head("k", "multiples of the vector; 0 is the base model")]
    return Table("numbers", [*heads, *(Head(title_of(metrics, key)) for key in keys)], lines)


def comparison_table(found: Sequence[ComparisonAtLoss]) -> list[dict[str, Any]]:
    """One line a method and side, with a text such as '+0.112 ± 0.020' for every loss increase.

    A value in brackets stands where the strongest k that was measured costs less than that, a difference in
    brackets where that holds for either method. `n` is the smallest over the loss increases.
    """
    lines: dict[tuple[str, int], dict[str, Any]] = {}
    for row in found:
        side = "more" if row.side > 0 else "less"
        line = lines.setdefault(
            (row.method, row.side), {"method": row.method, "side": side, "n": row.n, "cells": {}, "against": {}}
        )
        line["n"] = min(line["n"], row.n)
        line["cells"][row.loss_increase] = _value(row).text
        line["against"][row.loss_increase] = _difference(row).text
    return list(lines.values())


def comparison_of_methods(found: Sequence[ComparisonAtLoss], reference: str, name: str) -> Table:
    """The same for a page: the changes at each loss increase, then the differences to the reference method."""
    levels = list(dict.fromkeys(row.loss_increase for row in found))
    places = dict.fromkeys((row.method, row.side) for row in found)
    at = {(row.method, row.side, row.loss_increase): row for row in found}
    heads = [
        Head("Method"),
        Head("Side", "more: k above 0; less: k below 0"),
        Head("n", "items that count"),
        *(Head(f"Change at +{level:g} nats", "where the loss on ordinary text is higher by this") for level in levels),
        *(Head(f"Minus {reference}, at +{level:g} nats", "on the items that count for both") for level in levels),
    ]
    lines = []
    for method, side in places:
        rows = [row for level in levels if (row := at.get((method, side, level)))]
        first = [Cell(method), Cell("more" if side > 0 else "less"), number(min(row.n for row in rows))]
        lines.append([*first, *map(_value, rows), *map(_difference, rows)])
    return Table(name, heads, lines)


def _value(row: ComparisonAtLoss) -> Cell:
    return _bracketed(estimate(row.value, row.stderr, "+.3f"), row.reached)


def _difference(row: ComparisonAtLoss) -> Cell:
    if row.against is None:
        return Cell("")
    fewer = f", n = {row.against_n}" if row.against_n < row.n else ""
    return _bracketed(estimate(row.against, row.against_stderr, "+.3f", note=fewer), row.against_reached)


def _bracketed(cell: Cell, reached: bool) -> Cell:
    return cell if reached else Cell(f"({cell.text})", cell.value, cell.error)


def cost_table(rows: Sequence[MetricRow]) -> Table | None:
    """One line a method: training tokens and seconds, parameters, time per token; a range where they depend on k."""
    if not rows:
        return None
    found: dict[str, dict[str, list[MetricRow]]] = {}
    for row in rows:
        found.setdefault(row.method, {}).setdefault(row.metric, []).append(row)
    heads = [Head("Method"), *(Head(head) for head, _ in COSTS.values())]
    return Table("costs", heads, [[Cell(name), *_costs_of(metrics)] for name, metrics in found.items()])


def _costs_of(metrics: Mapping[str, Sequence[MetricRow]]) -> list[Cell]:
    cells = []
    for metric, (_, form) in COSTS.items():
        rows = sorted(metrics.get(metric, ()), key=lambda row: row.value)
        if not rows:
            cells.append(Cell(""))
        elif metric == "time per token":
            cells.append(estimate(rows[0].value, rows[0].stderr, form))
        else:
            texts = list(dict.fromkeys(format(row.value, form) for row in rows))
            cells.append(Cell(texts[0] if len(texts) == 1 else f"{texts[0]} to {texts[-1]}", rows[-1].value))
    return cells
