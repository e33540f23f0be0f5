"""Methods over several seeds at the same cost: every metric, its error over seeds and items, and paired differences.

The cost is the rise of the loss on ordinary text, or the token KL to the base where a run measured it. On each seed and
each side of k, a method's changes are read off, item by item, between the two measured strengths around a stated cost:
costs grow about with k^2, changes about with k. Where it is read off follows from all texts and is held fixed while
items and seeds are drawn; `compare_at_loss` draws the texts too.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np

from .bootstrap import DRAWS, Estimate, Table, bootstrap, holm
from .compare import LOSS_INCREASES
from .metrics import MetricKey, Metrics, metric_of
from .resampled_curves import crossings
from .results import BASE, Key, Measurement

Seed = Mapping[Key, Measurement]  # what one run measured


@dataclass(frozen=True)
class Cost:
    """What methods are set equal in, and at which levels."""

    name: str
    key: MetricKey
    unit: str
    levels: tuple[float, ...]


LOSS = Cost("loss increase", ("prose", "nll"), "nats per token", LOSS_INCREASES)
KL = Cost("token KL", ("token_kl", "p95"), "nats, 95th percentile", (0.2, 0.5, 1.0))
COSTS = (LOSS, KL)


@dataclass(frozen=True)
class Place:
    """Where methods are compared: a recipe's metric, a side of k, and a level of a cost."""

    recipe: str
    task: str
    metric: str
    side: int  # 1: k above 0, -1: below
    cost: str
    level: float

    @property
    def key(self) -> MetricKey:
        """The metric."""
        return self.task, self.metric


@dataclass(frozen=True)
class Value:
    """A method's change from the base at one place; `k` and `paid` are means over seeds.

    `reached` is False where, in some seed, the strongest k that was measured costs less than the level; the value is
    that at the strongest k then. `by_seed` has the mean of each seed.
    """

    place: Place
    method: str
    estimate: Estimate
    by_seed: tuple[float, ...]
    k: float
    paid: float
    reached: bool


@dataclass(frozen=True)
class Difference:
    """A method's change minus another's at one place, on the items that count for both, seed by seed.

    `holm` is p corrected for all differences of its kind in the study at that level of that cost.
    """

    place: Place
    method: str
    other: str
    estimate: Estimate
    holm: float
    reached: bool


@dataclass(frozen=True)
class StudyResults:
    """All that a study says."""

    values: tuple[Value, ...]
    differences: tuple[Difference, ...]  # of every method to the reference
    best: tuple[Difference, ...]  # of the method that moves a behaviour furthest to the next one


@dataclass(frozen=True)
class _Reading:
    """Where one run's method is read off."""

    near: float  # k on the base's side; 0 is the base
    far: float
    share: float  # of the way from near to far, in k
    paid: float
    reached: bool

    @property
    def k(self) -> float:
        return self.near + self.share * (self.far - self.near)


@dataclass(frozen=True, eq=False)
class _Sample:
    """One method at one place: seeds x items, and where each seed was read off."""

    method: str
    table: Table
    readings: Sequence[_Reading]

    @property
    def reached(self) -> bool:
        return all(reading.reached for reading in self.readings)


def study_results(
    runs: Mapping[str, Sequence[Seed]],
    metrics: Mapping[str, Metrics],
    behaviors: Mapping[str, Collection[MetricKey]],
    *,
    reference: str = "contrastive",
    costs: Sequence[Cost] = COSTS,
    draws: int = DRAWS,
    seed: int = 0,
) -> StudyResults:
    """Compare the methods of each recipe over its seeds.

    Args:
        runs: recipe -> what each of its runs measured; methods and metrics that not all of them have are left out.
        metrics: recipe -> what its tasks say of their metrics; details are left out, unless they are a behaviour.
        behaviors: recipe -> the metrics that steering is to move.
        reference: the method that the others are compared with.
    """
    values: list[Value] = []
    differences: list[Difference | None] = []
    best: list[Difference | None] = []
    for recipe, seeds in runs.items():
        for place in _places(recipe, seeds, metrics[recipe], behaviors[recipe], costs):
            cost = next(cost for cost in costs if cost.name == place.cost)
            samples = _samples(seeds, place, cost)
            values += [_value(place, sample, draws, seed) for sample in samples]
            known = {sample.method: sample for sample in samples}
            if reference in known:
                others = [sample for sample in samples if sample.method != reference]
                differences += [_difference(place, other, known[reference], draws, seed) for other in others]
            if place.key in behaviors[recipe] and len(samples) > 1:
                way = metric_of(metrics[recipe], place.key).way
                best.append(_best(place, samples, way, draws, seed))
    return StudyResults(tuple(values), _corrected(differences), _corrected(best))


def _places(
    recipe: str, seeds: Sequence[Seed], metrics: Metrics, behaviors: Collection[MetricKey], costs: Sequence[Cost]
) -> list[Place]:
    """Every metric on both sides at every level of every cost that all seeds have."""
    bases = [{(m.task, metric) for m in run.values() if m.method == BASE for metric in m.values} for run in seeds]
    known = set.intersection(*bases) if bases else set()
    first = {task: list(m.values) for (method, _, task), m in seeds[0].items() if method == BASE} if seeds else {}
    keys = [(task, metric) for task, names in first.items() for metric in names if (task, metric) in known]
    shown = [key for key in keys if key in behaviors or not metric_of(metrics, key).detail]
    return [
        Place(recipe, *key, side, cost.name, level)
        for cost in costs
        if cost.key in known
        for key in shown
        if key != cost.key
        for side in (1, -1)
        for level in cost.levels
    ]


def _samples(seeds: Sequence[Seed], place: Place, cost: Cost) -> list[_Sample]:
    """The methods that every seed has at the place, with the test items of all seeds as columns, so that they pair."""
    items = sorted({i for run in seeds for i in _by_test_item(run[BASE, 0.0, place.task], place.metric)})
    found = []
    for method in dict.fromkeys(m for m, k, _ in seeds[0] if k * place.side > 0):
        readings = [reading for run in seeds if (reading := _reading(run, method, place, cost))]
        if len(readings) < len(seeds) or not items:
            continue
        rows = [_changes(run, method, place.key, r) for run, r in zip(seeds, readings, strict=True)]
        table = np.array([[row.get(item, math.nan) for item in items] for row in rows])
        if not np.isnan(table).all(axis=1).any():  # a seed in which no item counts
            found.append(_Sample(method, table, readings))
    return found


def _reading(run: Seed, method: str, place: Place, cost: Cost) -> _Reading | None:
    """Where the method first costs the level; its strongest k where it never does; None where it has no k."""
    tasks = (place.task, cost.key[0])
    ks = {k for m, k, _ in run if m == method and k * place.side > 0}
    ks = {k for k in ks if all((method, k, task) in run for task in tasks)}
    if not ks:
        return None
    sizes = [0.0, *sorted(ks, key=abs)]
    texts = _shared_texts(run, cost)
    paid = [0.0, *(_paid(run, method, k, cost, texts) for k in sizes[1:])]
    steps, shares = crossings(np.abs(sizes), np.array([paid]), place.level)
    step, share = int(steps[0]), float(shares[0])
    near, far, reached = sizes[step - 1], sizes[step], max(paid) >= place.level
    if not reached:
        return _Reading(far, far, 1.0, paid[step], False)
    if math.isinf(paid[step]):  # the loss overflows: the last strength before, which costs less
        return _Reading(near, far, 0.0, paid[step - 1], False) if near else None
    return _Reading(near, far, share, place.level, True)


def _shared_texts(run: Seed, cost: Cost) -> set[int]:
    """The test items of the cost that every method was measured on: some may be measured on fewer."""
    there = [measurement for (_, k, task), measurement in run.items() if k and task == cost.key[0]]
    return set.intersection(*({i for i, split in zip(m.ids, m.splits, strict=True) if split == "test"} for m in there))


def _paid(run: Seed, method: str, k: float, cost: Cost, texts: Collection[int]) -> float:
    """The mean rise of the cost on these items; infinite where one has none, as of a model that is broken."""
    task, metric = cost.key
    mine = run[method, k, task]
    rises = dict(zip(mine.ids, mine.changes(mine.base_among(run), metric), strict=True))
    test = [rises[i] for i in mine.ids if i in texts]
    numbers = [value for value in test if value is not None]
    if not numbers or len(numbers) < len(test) or not all(map(math.isfinite, numbers)):
        return math.inf
    return fmean(numbers)


def _changes(run: Seed, method: str, key: MetricKey, reading: _Reading) -> dict[int, float]:
    """Item -> change from the base where the method is read off, of the items that count at both strengths."""
    ends = [(reading.near, 1 - reading.share), (reading.far, reading.share)]
    used = [(k, weight) for k, weight in ends if weight]
    rows = [_changes_at(run, method, k, key) if k else None for k, _ in used]
    items = set.intersection(*(set(row) for row in rows if row is not None))
    return {
        item: math.fsum(weight * row[item] for (_, weight), row in zip(used, rows, strict=True) if row is not None)
        for item in items
    }


def _changes_at(run: Seed, method: str, k: float, key: MetricKey) -> dict[int, float]:
    mine = run[method, k, key[0]]
    changes = zip(mine.ids, mine.splits, mine.changes(mine.base_among(run), key[1]), strict=True)
    return {i: v for i, split, v in changes if split == "test" and v is not None and math.isfinite(v)}


def _by_test_item(measurement: Measurement, metric: str) -> dict[int, float | None]:
    rows = zip(measurement.ids, measurement.splits, measurement.values[metric], strict=True)
    return {i: value for i, split, value in rows if split == "test"}


def _value(place: Place, sample: _Sample, draws: int, seed: int) -> Value:
    by_seed = tuple(float(mean) for mean in np.nanmean(sample.table, axis=1))
    k, paid = (fmean(getattr(reading, name) for reading in sample.readings) for name in ("k", "paid"))
    estimate = bootstrap(sample.table, draws=draws, seed=seed)
    return Value(place, sample.method, estimate, by_seed, k, paid, sample.reached)


def _difference(place: Place, mine: _Sample, other: _Sample, draws: int, seed: int) -> Difference | None:
    """None where no item counts for both."""
    table = mine.table - other.table
    if np.isnan(table).all():
        return None
    estimate = bootstrap(table, draws=draws, seed=seed)
    return Difference(place, mine.method, other.method, estimate, math.nan, mine.reached and other.reached)


def _best(place: Place, samples: Sequence[_Sample], way: int, draws: int, seed: int) -> Difference | None:
    """The method that moves the behaviour furthest to the place's side, minus the next one; None if none does.

    Args:
        way: where more of the behaviour moves the metric; 0 for one that does not show it, in which none is first.
    """
    sign = place.side * way
    moved = sorted(samples, key=lambda sample: -sign * float(np.nanmean(sample.table)))
    if sign * float(np.nanmean(moved[0].table)) <= 0:
        return None
    return _difference(place, moved[0], moved[1], draws, seed)


def _corrected(found: Sequence[Difference | None]) -> tuple[Difference, ...]:
    """With p corrected for all at one level of one cost: each level answers the whole question."""
    there = [one for one in found if one is not None]
    families: dict[tuple[str, float], list[int]] = {}
    for number, one in enumerate(there):
        families.setdefault((one.place.cost, one.place.level), []).append(number)
    for numbers in families.values():
        for number, p in zip(numbers, holm([there[i].estimate.p for i in numbers]), strict=True):
            there[number] = replace(there[number], holm=p)
    return tuple(there)


def as_json(results: StudyResults) -> dict[str, list[dict[str, Any]]]:
    """The results as rows of JSON; a number that is not known is null."""
    lists = {name: getattr(results, name) for name in ("values", "differences", "best")}
    return {name: [_flat(asdict(row)) for row in rows] for name, rows in lists.items()}


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """Without the parts that a row is made of; their fields stand in it themselves."""
    place, estimate = row.pop("place"), row.pop("estimate")
    fields = {**place, **row, **estimate}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}
