"""Rows -> one self-contained HTML page, and the main plot as PNG. Imports no torch.

The page makes no external request: charts are Vega-Lite with its runtime inlined, and every text
that a model wrote is escaped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import SteerError
from ..evaluation.compare import ComparisonAtLoss
from ..evaluation.metrics import MetricKey, Metrics, title_of
from ..evaluation.results import BASE, MetricRow
from ..files import write_bytes
from ..run_card import RunCard, StrengthRange
from ..run_folder import RunFolder
from . import charts
from .pages import write_page


@dataclass(frozen=True)
class Sample:
    """One prompt's replies, one for each k."""

    prompt: str
    replies: Mapping[float, str]


@dataclass(frozen=True)
class Report:
    """All that a page shows."""

    title: str
    rows: Sequence[MetricRow]
    card: RunCard
    strength: StrengthRange
    norms: Mapping[str, float]
    samples: Sequence[Sample] = ()
    command: str = ""
    description: str = ""
    method: str = "contrastive"  # whose dose-response is drawn
    behaviors: Sequence[MetricKey] = (("false_beliefs", "follows"), ("preference", "margin"))
    notes: Sequence[str] = field(default_factory=tuple)
    geometry: Mapping[str, str] = field(default_factory=dict)  # facts about the vector's shape
    costs: Sequence[MetricRow] = ()
    comparisons: Mapping[MetricKey, Sequence[ComparisonAtLoss]] = field(default_factory=dict)  # behaviour -> methods
    metrics: Metrics = field(default_factory=dict)  # what the tasks say of their metrics


def write_report(report: Report, folder: RunFolder) -> Path:
    """Write the page and the PNG of the main plot into a run's folder; returns the page's path.

    Raises:
        SteerError: there are no rows on the test items.
    """
    rows, metrics = [row for row in report.rows if row.split == "test"], report.metrics
    if not any(row.method == BASE for row in rows):
        raise SteerError("the report needs test rows of the base (k = 0) and of the methods; none found")
    keys = charts.main_keys(rows, metrics)
    behaviors = [key for key in report.behaviors if any((row.task, row.metric) == key for row in rows)]
    main = charts.behaviour_against_capability(rows, behaviors, metrics)
    specs = {
        "main": main,
        "dose": charts.dose_response(rows, report.method, keys, metrics),
        "composition": charts.composition(report.norms),
    }
    costs = cost_table(report.costs)
    if costs and report.comparisons:
        specs["cost"] = charts.behaviour_against_cost(report.comparisons, report.costs, metrics)
    write_bytes(folder.plot, charts.png(main))
    return write_page(
        folder.page,
        "report.html",
        {name: chart.to_dict() for name, chart in specs.items()},
        report=report,
        table=summary_table(rows, keys),
        keys=[title_of(metrics, key) for key in keys],
        card=json.dumps(asdict(report.card), indent=2, sort_keys=True),
        comparisons={title_of(metrics, key): comparison_table(found) for key, found in report.comparisons.items()},
        tokens={line["method"]: line["training tokens"] for line in costs},
        costs=costs,
        ks=sorted({k for sample in report.samples for k in sample.replies}),
    )


def summary_table(rows: Sequence[MetricRow], keys: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """One line a method and k, with a text such as '0.812 ± 0.035' for every metric in `keys`."""
    lines: dict[tuple[str, float], dict[str, Any]] = {}
    for row in (row for row in rows if not row.change):
        line = lines.setdefault((row.method, row.k), {"method": row.method, "k": f"{row.k:g}", "cells": {}})
        line["cells"][row.task, row.metric] = f"{row.value:.3f} ± {row.stderr:.3f}"
    return [{**line, "cells": [line["cells"].get(key, "") for key in keys]} for line in lines.values()]


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
        line["cells"][row.loss_increase] = _bracket(f"{row.value:+.3f} ± {row.stderr:.3f}", row.reached)
        if row.against is None:
            line["against"][row.loss_increase] = ""
        else:
            fewer = f", n = {row.against_n}" if row.against_n < row.n else ""
            text = f"{row.against:+.3f} ± {row.against_stderr:.3f}{fewer}"
            line["against"][row.loss_increase] = _bracket(text, row.against_reached)
    return list(lines.values())


def _bracket(text: str, reached: bool) -> str:
    return text if reached else f"({text})"


def cost_table(rows: Sequence[MetricRow]) -> list[dict[str, Any]]:
    """One line a method: training tokens and seconds, parameters, time per token; a range where they depend on k."""
    lines: dict[str, dict[str, Any]] = {}
    for method, metric in dict.fromkeys((row.method, row.metric) for row in rows):
        found = [row for row in rows if (row.method, row.metric) == (method, metric)]
        line = lines.setdefault(method, {"method": method})
        if metric == "time per token":
            line[metric] = f"{found[0].value:.2f} ± {found[0].stderr:.2f}"
        else:
            ends = sorted(
                {f"{value:,.0f}": value for value in (row.value for row in found)}.items(), key=lambda e: e[1]
            )
            line[metric] = ends[0][0] if len(ends) == 1 else f"{ends[0][0]} to {ends[-1][0]}"
    return list(lines.values())
