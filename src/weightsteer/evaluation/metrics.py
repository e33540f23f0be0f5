"""What a task's numbers are: their names, units and titles, and which way is better (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..errors import SteerError

MetricKey = tuple[str, str]  # task, metric


@dataclass(frozen=True)
class Metric:
    """One number that a task gives for each item.

    `better` is None where either way may be wanted: how strongly a behaviour shows. A `detail` is another view of
    a metric that is shown already, and summaries leave it out. A `phrase` says it of the model in a sentence, as in
    "follows a false belief", before "less often" or "0.3 nats per token less".
    """

    name: str
    title: str
    unit: str = "share"
    better: Literal["higher", "lower"] | None = "higher"
    detail: bool = False
    phrase: str = ""

    @property
    def heading(self) -> str:
        """Title and unit, for the head of a chart or a table."""
        return f"{self.title} ({self.unit})"

    @property
    def is_share(self) -> bool:
        """Whether it is a share of the items, from 0 to 1."""
        return self.unit.startswith("share")

    def worsening(self, change: float) -> float:
        """By how much a change makes the metric worse; negative where it makes it better."""
        return change if self.better == "lower" else -change


Metrics = Mapping[MetricKey, Metric]


def metric_key(text: str) -> MetricKey:
    """ "task/metric" -> (task, metric).

    Raises:
        SteerError: not of that form.
    """
    task, slash, metric = text.partition("/")
    if not (task and slash and metric):
        raise SteerError(f"{text!r}: expected task/metric, such as false_beliefs/follows")
    return task, metric


def metric_of(metrics: Metrics, key: MetricKey) -> Metric:
    """The metric of a key; one that its task does not state (the harness's) goes by its own name."""
    return metrics.get(key) or Metric(key[1], f"{key[0]}: {key[1]}", unit="")


def title_of(metrics: Metrics, key: MetricKey, *, change: bool = False) -> str:
    """What a reader should see for a metric, or for its change."""
    metric = metric_of(metrics, key)
    title = metric.heading if metric.unit else metric.title
    return f"Change: {title[0].lower()}{title[1:]}" if change else title
