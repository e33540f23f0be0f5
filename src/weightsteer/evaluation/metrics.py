"""What a task's numbers are: their names, units and titles, and which way is better (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..errors import SteerError

MetricKey = tuple[str, str]  # task, metric
# The harness's common metrics, as it names them: its own table is there only where it is installed.
HIGHER = {
    "acc",
    "acc_norm",
    "acc_bytes",
    "acc_mutual_info",
    "acc_all",
    "exact_match",
    "em",
    "f1",
    "mcc",
    "bleu",
    "chrf",
}
LOWER = {"perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score", "ter"}


@dataclass(frozen=True)
class Metric:
    """One number that a task gives for each item.

    `better` is None where either way may be wanted: how strongly a behaviour shows. A `detail` is another view of
    a metric that is shown already, and summaries leave it out. A `phrase` says it of the model in a sentence, as in
    "follows a false belief", before "less often" or "0.3 nats per token less". `toward` is where more of the task's
    behaviour moves it: 1 up, -1 down, 0 nowhere, as what steering should leave; None goes by `better`.
    """

    name: str
    title: str
    unit: str = "share"
    better: Literal["higher", "lower"] | None = "higher"
    detail: bool = False
    phrase: str = ""
    toward: Literal[1, 0, -1] | None = None

    @property
    def way(self) -> int:
        """Where more of the task's behaviour moves it: 1 up, -1 down, 0 nowhere, or not known."""
        return int(self.better is None) if self.toward is None else self.toward

    @property
    def heading(self) -> str:
        """Title and unit, for the head of a chart or a table."""
        return f"{self.title} ({self.unit})"

    @property
    def is_share(self) -> bool:
        """Whether it is a share of the items, from 0 to 1."""
        return self.unit.startswith("share")

    def worsening(self, change: float) -> float:
        """By how much a change makes the metric worse; negative where it makes it better.

        Where neither way is known to be better, any change is worse.
        """
        if self.better is None:
            return abs(change)
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
    return metrics.get(key) or Metric(key[1], f"{key[0]}: {key[1]}", "", _better(key[1]), toward=0)


def _better(name: str) -> Literal["higher", "lower"] | None:
    """Which way a metric of the harness is better; None where that is not known. After a comma stands its filter."""
    plain = name.partition(",")[0]
    return "higher" if plain in HIGHER else "lower" if plain in LOWER else None


def title_of(metrics: Metrics, key: MetricKey, *, change: bool = False) -> str:
    """What a reader should see for a metric, or for its change."""
    metric = metric_of(metrics, key)
    title = metric.heading if metric.unit else metric.title
    return f"Change: {title[0].lower()}{title[1:]}" if change else title
