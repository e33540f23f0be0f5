"""Rows -> one self-contained HTML page, and the main plot as PNG. Imports no torch.

The page makes no external request: charts are Vega-Lite with its runtime inlined, and every text
that a model wrote is escaped. It starts with the result in a sentence (`headline.py`), one prompt before and after
(`samples.py`) and one chart; what the run's folder does not hold is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import SteerError
from ..evaluation.compare import ComparisonAtLoss
from ..evaluation.metrics import MetricKey, Metrics, metric_of, title_of
from ..evaluation.results import BASE, MetricRow
from ..files import write_bytes
from ..looping import LOOPING
from ..run_card import RunCard, StrengthRange
from ..run_folder import RunFolder
from . import charts
from .headline import headlines, nothing_recommended, side_left_out
from .pages import write_page
from .palette import method_colours
from .result_tables import all_numbers, comparison_of_methods, cost_table
from .samples import Sample, looping_by_strength, shown_replies, strengths_to_show, telling_first

NO_LIMIT = 1e6  # of a budget: more than any metric can get worse by
FACTS = {  # what `vectors.geometry.facts` names, explained
    "norm": "the length of the change, over all weights",
    "rank": "in how many directions each weight matrix changes; energy is the squared norm",
    "sides": "tau+ and tau- are what the two fine-tunes changed; a cosine of 1 would be exactly opposite ways",
}


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
    meanings: Mapping[str, str] = field(default_factory=dict)  # method -> what it is


def write_report(report: Report, folder: RunFolder) -> Path:
    """Write the page and the PNG of the main plot into a run's folder; returns the page's path.

    Raises:
        SteerError: there are no rows on the test items.
    """
    rows = [row for row in report.rows if row.split == "test"]
    if not any(row.method == BASE for row in rows):
        raise SteerError("the report needs test rows of the base (k = 0) and of the methods; none found")
    measured = {(row.task, row.metric) for row in rows}
    behaviors = [key for key in report.behaviors if key in measured]
    write_bytes(folder.plot, charts.png(charts.behaviour_against_capability(rows, behaviors, report.metrics)))
    drawn = _Drawn(report, rows, behaviors)
    specs = {name: panel.chart.to_dict() for name, panel in drawn.panels.items()}
    content = {**_opening(report, rows, behaviors), **_replies(report), **_tables(report, rows), **_made(report)}
    return write_page(
        folder.page,
        "report.html",
        specs,
        title=report.title,
        report=report,
        panels=drawn.sections(),
        colours=method_colours(charts.methods_of(rows)),
        compared_at=f"{charts.COMPARED_AT:g}",
        **content,
    )


@dataclass(frozen=True)
class Panel:
    """A chart under its title, in a section of the page."""

    section: str
    title: str
    chart: Any


class _Drawn:
    """The page's charts by the id of their place: `first`, then those of each section."""

    def __init__(self, report: Report, rows: Sequence[MetricRow], behaviors: Sequence[MetricKey]) -> None:
        self.panels: dict[str, Panel] = {}
        metrics, colours = report.metrics, method_colours(charts.methods_of(rows))
        keys = charts.main_keys(rows, metrics)
        first = next(iter([*behaviors, *keys]), None)
        for key in dict.fromkeys([*behaviors[:1], *keys]):
            chart = charts.dose_panel(
                rows, report.method, key, metrics, report.strength, height=230 if key == first else 170
            )
            self._add("first" if key == first else "dose", title_of(metrics, key, change=True), chart)
        for key in behaviors:
            curves = charts.capability_panel(rows, key, metrics, colours)
            self._add("curves", title_of(metrics, key), curves)
        for key, found in report.comparisons.items():
            if found:
                known = colours | method_colours(row.method for row in found if row.method not in colours)
                title, metric = title_of(metrics, key, change=True), metric_of(metrics, key)
                self._add("compared", title, charts.comparison_panel(found, metric, known))
                if report.costs:
                    self._add("cost", title, charts.cost_panel(found, report.costs, metric, known))
        if report.norms:
            self._add("composition", "", charts.composition(report.norms))

    def _add(self, section: str, title: str, chart: Any) -> None:
        self.panels[f"{section}{len(self.panels)}"] = Panel(section, title, chart)

    def sections(self) -> dict[str, dict[str, str]]:
        """Section -> id -> title."""
        found: dict[str, dict[str, str]] = {}
        for name, panel in self.panels.items():
            found.setdefault(panel.section, {})[name] = panel.title
        return found


def _opening(report: Report, rows: Sequence[MetricRow], behaviors: Sequence[MetricKey]) -> dict[str, Any]:
    """The result in sentences, and one prompt answered before and after."""
    strength = report.strength
    found = headlines(rows, report.method, strength, behaviors, report.metrics)
    said = [one.text for one in found] or [nothing_recommended(strength)]
    ks = [one.k for one in found]
    example = next(iter(telling_first(report.samples, ks)), None)
    cards = shown_replies(example, [0.0, *ks]) if example and ks else []
    items = next((row.n for row in rows if (row.task, row.metric) in behaviors[:1]), None)
    return {
        "sentences": [*said, *filter(None, [side_left_out(strength)])],
        "example": example,
        "before_and_after": cards,
        "items": items,
        "budget": _budget_in_words(strength, report.metrics),
    }


def _budget_in_words(strength: StrengthRange, metrics: Metrics) -> str:
    """By how much each metric of the budget may get worse."""
    known = {f"{task} {metric}": (task, metric) for task, metric in metrics}
    parts = []
    for name, limit in strength.budget.items():
        if limit >= NO_LIMIT:
            continue
        metric = metric_of(metrics, known[name]) if name in known else None
        if metric is None:
            parts.append(f"{name} by at most {limit:g}")
        else:
            amount = f"{100 * limit:.3g} points" if metric.is_share else f"{limit:g} {metric.unit}"
            parts.append(f"{metric.title[0].lower()}{metric.title[1:]} by at most {amount}")
    return " and ".join(parts)


def _replies(report: Report) -> dict[str, Any]:
    """Whole replies at up to five strengths, the telling prompts first, and how many repeat themselves."""
    ks = strengths_to_show(report.samples, report.strength)
    ordered = telling_first(report.samples, ks)
    return {
        "replies": [(sample.prompt, shown_replies(sample, ks)) for sample in ordered],
        "looping": looping_by_strength(report.samples),
        "looping_rule": f"{LOOPING:.0%}",
    }


def _tables(report: Report, rows: Sequence[MetricRow]) -> dict[str, Any]:
    metrics = report.metrics
    return {
        "numbers": all_numbers(rows, charts.main_keys(rows, metrics), metrics),
        "costs": cost_table(report.costs),
        "comparisons": {
            title_of(metrics, key, change=True): comparison_of_methods(found, report.method, f"methods-{'-'.join(key)}")
            for key, found in report.comparisons.items()
            if found
        },
    }


def _made(report: Report) -> dict[str, Any]:
    """How the vector was made, in few lines, and its whole card."""
    card = report.card
    made = {
        "Base model": f"{card.base_model} {card.base_revision[:12]}".strip(),
        "Made": card.made,
        "Seed": "" if card.seed is None else str(card.seed),
        "Data": ", ".join(f"{name} {sha[:12]}" for name, sha in card.data_sha256.items()),
        "Versions": ", ".join(f"{name} {version}" for name, version in card.versions.items()),
    }
    facts = [(name, FACTS.get(name, ""), text) for name, text in report.geometry.items()]
    return {
        "made": {name: text for name, text in made.items() if text},
        "facts": facts,
        "card": json.dumps(asdict(card), indent=2, sort_keys=True),
    }
