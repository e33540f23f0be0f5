from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from weightsteer.evaluation.bootstrap import bootstrap, holm
from weightsteer.evaluation.metrics import Metric
from weightsteer.evaluation.results import BASE, Key, Measurement
from weightsteer.evaluation.study import KL, LOSS, Cost, Value, study_results

COUNT = 40  # items, of which every other one is a test item
SPLITS = tuple(("validation", "test")[i % 2] for i in range(COUNT))
MARGIN = Metric("margin", "Margin", "nats", better=None)
METRICS = {("preference", "margin"): MARGIN, ("prose", "nll"): Metric("nll", "Loss")}


def test_the_error_over_items_is_that_of_the_mean() -> None:
    row = np.random.default_rng(1).normal(size=200)
    found = bootstrap(row[None])
    assert found.mean == pytest.approx(row.mean())
    assert found.stderr == pytest.approx(row.std(ddof=1) / math.sqrt(200), rel=0.03)
    assert found.low == pytest.approx(row.mean() - 1.96 * row.std(ddof=1) / math.sqrt(200), abs=0.01)
    assert (found.seeds, found.items) == (1, 200)


def test_the_error_over_seeds_is_that_of_their_mean_also_with_few() -> None:
    seeds = np.array([0.1, 0.4, 0.7])
    found = bootstrap(np.repeat(seeds[:, None], 50, axis=1), draws=20_000)
    assert found.stderr == pytest.approx(seeds.std(ddof=1) / math.sqrt(3), rel=0.02)


def test_errors_over_seeds_and_items_add_up() -> None:
    rng = np.random.default_rng(2)
    seeds, items = rng.normal(size=(8, 1)), rng.normal(size=(1, 100))
    both = seeds.var(ddof=1) / 8 + items.var(ddof=1) / 100
    assert bootstrap(seeds + items, draws=20_000).stderr == pytest.approx(math.sqrt(both), rel=0.03)


def test_p_and_the_interval_are_those_of_a_t_test() -> None:
    row = np.random.default_rng(3).normal(size=12) + 0.5
    found, known = bootstrap(row[None], draws=40_000), ttest_1samp(row, 0.0)
    assert found.p == pytest.approx(known.pvalue, rel=0.1)
    low, high = known.confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(low, abs=0.02), pytest.approx(high, abs=0.02))
    seeds = np.array([0.9, 1.1, 1.3])
    over_seeds = bootstrap(np.repeat(seeds[:, None], 30, axis=1), draws=40_000)
    assert over_seeds.p == pytest.approx(ttest_1samp(seeds, 0.0).pvalue, rel=0.1)  # two degrees of freedom
    assert bootstrap(np.zeros((3, 5))).p == 1.0


@pytest.mark.parametrize("wobble", [0.0, 1e-17])
@pytest.mark.parametrize("shape", [(1, 2), (2, 1), (3, 40)])
def test_numbers_that_are_all_the_same_are_no_proof(shape: tuple[int, int], wobble: float) -> None:
    table = np.full(shape, 0.3)
    table[0, 0] += wobble
    found = bootstrap(table)
    assert found.mean == pytest.approx(0.3)
    assert math.isnan(found.p)
    assert math.isnan(found.low)


def test_items_that_do_not_count_are_left_out_and_pairs_cancel_what_they_share() -> None:
    table = np.array([[1.0, math.nan, 3.0], [2.0, math.nan, math.nan]])
    found = bootstrap(table)
    assert found.mean == pytest.approx(2.0)
    assert (found.seeds, found.items) == (2, 2)
    rng = np.random.default_rng(4)
    hard = rng.normal(size=(3, 200)) * 5  # what makes an item hard for both methods
    mine, other = hard + 0.2 + rng.normal(size=(3, 200)) * 0.1, hard + rng.normal(size=(3, 200)) * 0.1
    paired = bootstrap(mine - other)
    assert paired.stderr < bootstrap(mine).stderr / 10
    assert paired.p < 0.01
    with pytest.raises(ValueError, match="without numbers"):
        bootstrap(np.full((2, 2), math.nan))
    assert math.isnan(bootstrap(np.array([[1.5]])).stderr)


def test_holm_of_a_worked_example() -> None:
    """0.005 x 4, 0.01 x 3, then 0.03 x 2 and 0.04 x 1, which may not fall below the one before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []
    found = holm([0.02, math.nan, 0.03])
    assert found[0] == pytest.approx(0.04)
    assert math.isnan(found[1])
    assert found[2] == pytest.approx(0.04)


def a_run(slopes: dict[str, float], *, noise: int, kl: bool = False) -> dict[Key, Measurement]:
    """The loss rises by k^2 / 10 and the KL by k^2, the margin by slope x k; k = -2, -1, 1, 2."""
    rng = np.random.default_rng(noise)
    item = rng.normal(size=COUNT)

    def row(method: str, k: float, task: str, metric: str, values: np.ndarray) -> Measurement:
        return Measurement(method, k, task, tuple(range(COUNT)), SPLITS, {metric: values.tolist()})

    found: list[Measurement] = []
    for method, k in [(BASE, 0.0), *((m, k) for m in slopes for k in (-2.0, -1.0, 1.0, 2.0))]:
        wobble = rng.normal(size=COUNT) * 0.01 * abs(k)
        found.append(row(method, k, "preference", "margin", item + slopes.get(method, 0.0) * k + wobble))
        found.append(row(method, k, "prose", "nll", 3 + item / 10 + k**2 / 10))
        if kl:
            found.append(row(method, k, "token_kl", "p95", np.full(COUNT, k**2)))
    return {one.key: one for one in found}


def the_value(found: list[Value], method: str, level: float, side: int = 1, cost: str = LOSS.name) -> Value:
    places = [v for v in found if v.method == method and v.place.cost == cost and v.place.key[0] == "preference"]
    return next(v for v in places if v.place.level == level and v.place.side == side)


def test_methods_are_read_off_at_the_same_cost_and_the_steeper_one_wins() -> None:
    seeds = [a_run({"contrastive": 1.0, "tau+": 0.5}, noise=n, kl=True) for n in range(3)]
    behavior = ("preference", "margin")
    found = study_results({"r": seeds}, {"r": METRICS}, {"r": [behavior]}, draws=2000)
    at = the_value(list(found.values), "contrastive", 0.1)
    assert at.k == pytest.approx(1.0)
    assert at.paid == pytest.approx(0.1)
    assert at.estimate.mean == pytest.approx(1.0, abs=0.01)
    assert (at.estimate.seeds, at.estimate.items, len(at.by_seed)) == (3, COUNT // 2, 3)
    assert the_value(list(found.values), "contrastive", 0.05).k == pytest.approx(math.sqrt(0.5))
    assert the_value(list(found.values), "contrastive", 0.2, -1).k == pytest.approx(-math.sqrt(2))
    by_kl = the_value(list(found.values), "tau+", 0.5, cost=KL.name)
    assert by_kl.k == pytest.approx(math.sqrt(0.5))
    assert by_kl.estimate.mean == pytest.approx(0.5 * math.sqrt(0.5), abs=0.01)
    differences = [d for d in found.differences if d.place.key == behavior and d.place.level == 0.1]
    assert {(d.method, d.other) for d in differences} == {("tau+", "contrastive")}
    assert {round(d.estimate.mean * d.place.side, 1) for d in differences} == {-0.5}
    assert all(d.estimate.p < 0.01 and d.holm >= d.estimate.p for d in differences)
    best = [d for d in found.best if d.place.level == 0.1]
    assert {(d.method, d.other) for d in best} == {("contrastive", "tau+")}
    assert len(best) == 2  # both sides


@pytest.mark.parametrize(("way", "first"), [(1, "contrastive"), (-1, "tau+"), (0, None)])
def test_the_first_is_the_one_that_moves_the_behaviour_its_way(way: Literal[1, 0, -1], first: str | None) -> None:
    """tau+ lowers with k what shows less of the behaviour; in what does not show it, none is first."""
    seeds = [a_run({"contrastive": 1.0, "tau+": -0.5}, noise=n) for n in range(3)]
    key = ("preference", "margin")
    metrics = {**METRICS, key: replace(MARGIN, better="higher", toward=way)}
    found = study_results({"r": seeds}, {"r": metrics}, {"r": [key]}, draws=200)
    assert {d.method for d in found.best} == ({first} if first else set())


def test_what_is_measured_on_fewer_texts_pays_as_much() -> None:
    """The loss rises by k^2 / 10 on each text but the last; a method on the first ones alone is no cheaper."""
    run = a_run({"contrastive": 1.0, "tau+": 1.0}, noise=0)
    for (method, k, task), cell in list(run.items()):
        if task == "prose" and k:
            values = list(cell.values["nll"])
            run[method, k, task] = replace(cell, values={"nll": [*values[:-1], values[-1] + 9.0]})
            if method == "tau+":
                run[method, k, task] = replace(cell, ids=cell.ids[:10], splits=SPLITS[:10], values={"nll": values[:10]})
    found = list(study_results({"r": [run]}, {"r": METRICS}, {"r": []}, draws=50).values)
    assert (
        the_value(found, "contrastive", 0.1).k == pytest.approx(the_value(found, "tau+", 0.1).k) == pytest.approx(1.0)
    )


def test_a_cheaper_strength_before_one_that_breaks_the_model_is_said_to_be_cheaper() -> None:
    run = a_run({"contrastive": 1.0}, noise=0)
    for k in (-2.0, 2.0):
        run["contrastive", k, "prose"] = replace(run["contrastive", k, "prose"], values={"nll": [math.inf] * COUNT})
    found = the_value(list(study_results({"r": [run]}, {"r": METRICS}, {"r": []}, draws=50).values), "contrastive", 0.2)
    assert (found.k, found.reached) == (1.0, False)


def test_what_is_never_reached_is_said_and_what_not_every_seed_has_is_left_out() -> None:
    seeds = [a_run({"contrastive": 1.0, "tau+": 0.5}, noise=0), a_run({"contrastive": 1.0}, noise=1, kl=True)]
    found = study_results({"r": seeds}, {"r": METRICS}, {"r": []}, costs=[replace_levels(0.1, 9.0), KL], draws=200)
    assert {value.method for value in found.values} == {"contrastive"}
    assert {value.place.cost for value in found.values} == {LOSS.name}
    assert {value.reached for value in found.values if value.place.level == 9.0} == {False}
    far = the_value(list(found.values), "contrastive", 9.0)
    assert (far.k, far.paid) == (2.0, pytest.approx(0.4))
    assert not found.best


def replace_levels(*levels: float) -> Cost:
    return replace(LOSS, levels=levels)
