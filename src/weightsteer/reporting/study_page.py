"""The page of a study: which method wins where, and each claim over seeds (no torch)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..evaluation.metrics import MetricKey, Metrics, metric_of, title_of
from ..evaluation.study import COSTS, Difference, Place, StudyResults, Value
from .charts import COMPARED_AT, SIDES, study_panel
from .pages import write_page
from .palette import method_colours
from .tables import Cell, Head, Table, estimate, number

CLEAR = 0.05  # p after Holm's correction, below which a difference is called clear
UNITS = "; ".join(f"{cost.name} in {cost.unit}" for cost in COSTS)
SIDE_NAMES = {1: "more", -1: "less"}


@dataclass(frozen=True)
class StudyReport:
    """All that a page shows."""

    title: str
    results: StudyResults
    seeds: Sequence[int]
    metrics: Mapping[str, Metrics]  # recipe -> what its tasks say of their metrics
    behaviors: Mapping[str, Sequence[MetricKey]]  # recipe -> the metrics that steering is to move
    reports: Mapping[str, str] = field(default_factory=dict)  # run -> its own page, beside this one
    missing: Mapping[str, str] = field(default_factory=dict)  # run -> why it is not there
    reference: str = "contrastive"
    command: str = ""


def write_study_page(report: StudyReport, path: Path) -> Path:
    """Write the page; returns its path."""
    results = report.results
    recipes = list(dict.fromkeys(value.place.recipe for value in results.values))
    colours = method_colours({value.method for value in results.values})
    panels = {
        recipe: {f"chart{number}-{place}": key for place, key in enumerate(report.behaviors[recipe])}
        for number, recipe in enumerate(recipes)
    }
    charts = {
        name: study_panel(_drawn(results.values, recipe, key), metric_of(report.metrics[recipe], key), colours)
        for recipe, named in panels.items()
        for name, key in named.items()
    }
    sections = [
        {
            "recipe": recipe,
            "panels": {name: title_of(report.metrics[recipe], key, change=True) for name, key in named.items()},
            "values": values_table(report, recipe, f"values-{recipe}"),
            "differences": differences_table(report, recipe, f"differences-{recipe}"),
        }
        for recipe, named in panels.items()
    ]
    return write_page(
        path,
        "study.html",
        {name: chart.to_dict() for name, chart in charts.items()},
        title=report.title,
        report=report,
        sentences=sentences(results, report.reference),
        best=best_table(report),
        sections=sections,
        colours=colours,
        compared_at=f"{COMPARED_AT:g}",
        clear=CLEAR,
    )


def sentences(results: StudyResults, reference: str) -> list[str]:
    """How often each method moves a behaviour furthest, at the one loss increase that is drawn."""
    drawn = [one for one in results.best if _is_drawn(one.place)]
    there = [one for one in drawn if one.reached]
    if drawn and not there:
        return ["No two methods that move a behaviour furthest reach the same loss increase."]
    if not there:
        return ["There is nothing to compare: no behaviour is moved by one of two methods at the same loss increase."]
    first, clear = Counter(one.method for one in there), Counter(one.method for one in there if one.holm < CLEAR)
    told = []
    for method, count in first.most_common():
        times = f"in {count} of {len(there)} places" if len(there) > 1 else "in the one place compared"
        told.append(f"{method} moves the behaviour furthest {times}, and clearly so in {clear[method]}.")
    if reference not in first:
        told.append(f"{reference} is first nowhere.")
    return told


def _is_drawn(place: Place) -> bool:
    return place.cost == COSTS[0].name and place.level == COMPARED_AT


def _drawn(values: Sequence[Value], recipe: str, key: MetricKey) -> list[dict[str, Any]]:
    """Points of one behaviour's chart: a mean with its error, and the mean of each seed."""
    there = [v for v in values if v.place.recipe == recipe and v.place.key == key and _is_drawn(v.place)]
    points = []
    for value in there:
        error = value.estimate.stderr if math.isfinite(value.estimate.stderr) else 0.0
        mean = value.estimate.mean
        shared = {"method": value.method, "side": SIDES[value.place.side], "reached": value.reached, "k": value.k}
        points.append({**shared, "value": mean, "low": mean - error, "high": mean + error, "kind": "mean"})
        points += [{**shared, "value": one, "kind": "seed"} for one in value.by_seed if len(value.by_seed) > 1]
    return points


def best_table(report: StudyReport) -> Table:
    """One line a behaviour, side and level: the method that moves it furthest, and by how much it is ahead."""
    heads = [
        Head("Recipe"),
        Head("Behaviour"),
        Head("Side", "more: k above 0; less: k below 0"),
        Head("At", f"the cost that all methods are set equal in: {UNITS}"),
        Head("Furthest"),
        Head("Change", "from k = 0, mean over seeds"),
        Head("Next"),
        Head("Ahead by", "paired, seed by seed and item by item"),
        Head("p, Holm", "two-sided, corrected for all lines at this level"),
    ]
    at = {(value.place, value.method): value for value in report.results.values}
    lines = []
    for one in report.results.best:
        place, value = one.place, at[one.place, one.method]
        lines.append(
            [
                Cell(place.recipe),
                Cell(title_of(report.metrics[place.recipe], place.key)),
                Cell(SIDE_NAMES[place.side]),
                _level(place),
                Cell(one.method),
                _estimate(value.estimate.mean, value.estimate.stderr, value.reached),
                Cell(one.other),
                _estimate(one.estimate.mean, one.estimate.stderr, one.reached),
                _p(one),
            ]
        )
    return Table("furthest", heads, lines)


def values_table(report: StudyReport, recipe: str, name: str) -> Table:
    """One line a method, side and level; its k, what it paid, and every metric's change."""
    values = [value for value in report.results.values if value.place.recipe == recipe]
    keys = list(dict.fromkeys(value.place.key for value in values))
    lines: dict[tuple[Any, ...], dict[MetricKey, Value]] = {}
    for value in values:
        place = value.place
        lines.setdefault((value.method, place.side, place.cost, place.level), {})[place.key] = value
    heads = [
        Head("Method"),
        Head("Side", "more: k above 0; less: k below 0"),
        Head("At", f"the cost that all methods are set equal in: {UNITS}"),
        Head("k", "mean over seeds"),
        Head("Paid", "that cost at this k, mean over seeds"),
        *(Head(title_of(report.metrics[recipe], key, change=True)) for key in keys),
    ]
    rows = []
    for (method, side, _, _), found in lines.items():
        first = next(iter(found.values()))
        start = [Cell(method), Cell(SIDE_NAMES[side]), _level(first.place), number(first.k, ".3g")]
        cells = [
            _estimate(v.estimate.mean, v.estimate.stderr, v.reached) if (v := found.get(key)) else Cell("")
            for key in keys
        ]
        rows.append([*start, number(first.paid, ".3f"), *cells])
    return Table(name, heads, rows)


def differences_table(report: StudyReport, recipe: str, name: str) -> Table | None:
    """One line a method, metric, side and level: its change minus that of the reference."""
    found = [one for one in report.results.differences if one.place.recipe == recipe]
    heads = [
        Head("Method"),
        Head("Metric"),
        Head("Side", "more: k above 0; less: k below 0"),
        Head("At", f"the cost that both are set equal in: {UNITS}"),
        Head(f"Minus {report.reference}", "paired, seed by seed and item by item"),
        Head("95 % interval"),
        Head("Seeds"),
        Head("Items", "that count for both"),
        Head("p, Holm", "two-sided, corrected for all differences of the study at this level"),
    ]
    lines = [
        [
            Cell(one.method),
            Cell(title_of(report.metrics[recipe], one.place.key, change=True)),
            Cell(SIDE_NAMES[one.place.side]),
            _level(one.place),
            _estimate(one.estimate.mean, one.estimate.stderr, one.reached),
            Cell(f"{one.estimate.low:+.3f} to {one.estimate.high:+.3f}" if math.isfinite(one.estimate.low) else ""),
            number(one.estimate.seeds),
            number(one.estimate.items),
            _p(one),
        ]
        for one in found
    ]
    return Table(name, heads, lines) if lines else None


def _level(place: Place) -> Cell:
    return Cell(f"{place.cost} {place.level:g}", place.level)


def _p(one: Difference) -> Cell:
    return number(one.holm, ".2g") if math.isfinite(one.holm) else Cell("")


def _estimate(mean: float, error: float, reached: bool) -> Cell:
    """In brackets where even the strongest k costs less than the level."""
    cell = estimate(mean, error, "+.3f")
    return cell if reached else Cell(f"({cell.text})", cell.value, cell.error)
