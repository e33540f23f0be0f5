from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import random_vector, tiny_lm
from weightsteer.behavior import Behavior, ContrastPair, sides_of
from weightsteer.errors import SteerError
from weightsteer.evaluation.choose_k import recommend
from weightsteer.evaluation.results import Measurement, MetricRow, summary
from weightsteer.evaluation.search import best_layer, k_at_loss_increase
from weightsteer.evaluation.sweep import run_sweep
from weightsteer.evaluation.tasks import TaskSpec, load_task, metrics_of
from weightsteer.lm import LM
from weightsteer.run_folder import RunFolder
from weightsteer.steering.activations import activation_vector
from weightsteer.steering.steering import Direction, SystemPrompt, TrainedCheckpoints

floats = st.floats(-100, 100)


@given(st.lists(floats, min_size=2, max_size=20))
def test_summary_is_mean_and_standard_error(values: list[float]) -> None:
    middle, n, error = summary(values)
    assert n == len(values)
    assert middle == pytest.approx(statistics.fmean(values), abs=1e-9)
    assert error == pytest.approx(statistics.stdev(values) / math.sqrt(n), abs=1e-6)


def test_sweep_measures_every_cell_once_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    lm = tiny_lm()
    tasks = [load_task(TaskSpec("facts")).first(2), load_task(TaskSpec("prose")).first(1)]
    method = Direction("contrastive", random_vector(lm))
    rows = run_sweep(lm, [(method, [-1.0, 0.0, 1.0])], tasks, RunFolder(tmp_path))
    cells = (tmp_path / "measurements.jsonl").read_text()
    keys = [(c["method"], c["k"], c["task"]) for c in map(json.loads, cells.splitlines())]
    assert len(keys) == len(set(keys)) == 6
    assert {row.n for row in rows if row.task == "facts"} == {2}
    assert run_sweep(lm, [(method, [-1.0, 0.0, 1.0])], tasks, RunFolder(tmp_path)) == rows
    table = {(r.k, r.task, r.metric, r.split, r.change): r for r in rows}
    for (k, task, metric, split, change), row in table.items():
        if change:
            difference = table[k, task, metric, split, False].value - table[0.0, task, metric, split, False].value
            assert row.value == pytest.approx(difference, abs=1e-6)
    assert (tmp_path / "measurements.jsonl").read_text() == cells
    (tmp_path / "measurements.jsonl").write_text(cells[: len(cells) // 2])
    again = run_sweep(lm, [(method, [-1.0, 1.0])], tasks, RunFolder(tmp_path))
    assert [r.value for r in again] == pytest.approx([r.value for r in rows], nan_ok=True)


def test_open_replies_are_kept_as_the_model_gave_them(tmp_path: Path) -> None:
    lm = tiny_lm()
    task = load_task(TaskSpec("refusal", max_new_tokens=3)).of_split("test").first(2)
    method = SystemPrompt("system prompt", Behavior.load("gloomy"))
    run_sweep(lm, [(method, [1.0])], [task], RunFolder(tmp_path))
    kept = [json.loads(line) for line in (tmp_path / "replies.jsonl").read_text().splitlines()]
    prompts = [item.prompt for item in task.items]
    for name, steered in (("base", lm), ("system prompt", lm.with_system_prompt(method.behavior.positive_prompts[0]))):
        found = [(row["prompt"], row["reply"]) for row in kept if row["method"] == name]
        assert found == list(zip(prompts, steered.generate(prompts, max_new_tokens=3), strict=True))
    cells = (tmp_path / "measurements.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "measurements.jsonl").write_text(cells[0])  # as a kill leaves it, after the last cell's replies
    for _ in range(2):
        run_sweep(lm, [(method, [1.0])], [task], RunFolder(tmp_path))
        assert [json.loads(line) for line in (tmp_path / "replies.jsonl").read_text().splitlines()] == kept


def test_methods_with_nothing_to_choose_are_measured_on_test_items_only(tmp_path: Path) -> None:
    lm = tiny_lm()
    tasks = [load_task(TaskSpec("facts")).first(3)]
    vector = random_vector(lm)
    methods = [(Direction(name, vector), [1.0]) for name in ("contrastive", "tau+")]
    rows = run_sweep(lm, methods, tasks, RunFolder(tmp_path), validated=("contrastive",))
    splits = {name: {row.split for row in rows if row.method == name} for name in ("base", "contrastive", "tau+")}
    assert splits == {"base": {"validation", "test"}, "contrastive": {"validation", "test"}, "tau+": {"test"}}
    table = {(row.method, row.metric, row.change): row for row in rows if row.split == "test"}
    for metric in (("accuracy", False), ("margin", True)):  # one vector under two names
        one, two = table["contrastive", *metric], table["tau+", *metric]
        assert (one.value, one.n, one.stderr) == pytest.approx((two.value, two.n, two.stderr), abs=1e-5)


def test_every_method_is_the_base_at_zero_and_restores(pairs: list[ContrastPair]) -> None:
    lm = tiny_lm()
    ids = torch.tensor([[4, 5, 6]])
    methods = [
        Direction("contrastive", random_vector(lm)),
        Direction("activation", activation_vector(lm, *sides_of(pairs[:2])).only(0)),
        SystemPrompt("system prompt", Behavior.load("gloomy")),
    ]
    with torch.no_grad():
        before = lm.model(ids).logits
        for method in methods:
            with method.applied(lm, 0.0) as handle:
                assert torch.equal(handle.lm.model(ids).logits, before)
                assert handle.lm.chat_ids("Hi") == lm.chat_ids("Hi")
            with method.applied(lm, 1.0) as handle:
                changed = handle.lm.chat_ids("Hi") != lm.chat_ids("Hi")
                assert changed or not torch.equal(handle.lm.model(ids).logits, before)
            assert torch.equal(lm.model(ids).logits, before)


def test_a_prompt_has_no_strength(lm: LM) -> None:
    with pytest.raises(SteerError, match="-1, 0 or 1"), SystemPrompt("p", Behavior.load("gloomy")).applied(lm, 2.0):
        pass


def test_the_layer_with_the_largest_span_is_chosen(pairs: list[ContrastPair]) -> None:
    lm = tiny_lm(layers=3)
    vector = activation_vector(lm, *sides_of(pairs[:3]))
    boosted = type(vector)({**vector.layers, 1: vector.layers[1] * 50}, vector.card)
    task = load_task(TaskSpec("preference", "sycophancy")).first(2)
    spans = {}
    for layer in range(3):
        with boosted.only(layer).applied(lm, 1.0) as handle:
            up = statistics.fmean(task.measure(lm)["margin"])
            handle.k = -1.0
            spans[layer] = up - statistics.fmean(task.measure(lm)["margin"])
    assert best_layer(lm, boosted, task) == max(spans, key=lambda layer: spans[layer])


@pytest.mark.parametrize("sign", [-1, 1])
def test_search_finds_the_strength_of_a_given_loss_increase(sign: int) -> None:
    lm = tiny_lm()
    method = Direction("contrastive", random_vector(lm, scale=0.01))
    task = load_task(TaskSpec("prose")).first(2)
    base = statistics.fmean(task.measure(lm)["nll"])
    k = k_at_loss_increase(lm, method, task, loss_increase=0.1, sign=sign)
    with method.applied(lm, k):
        increase = statistics.fmean(task.measure(lm)["nll"]) - base
    assert math.copysign(1, k) == sign
    assert increase == pytest.approx(0.1, abs=0.03)


METRICS = metrics_of([TaskSpec(name) for name in ("preference", "facts", "prose")])


def rows_of(ks: dict[float, tuple[float, float, float]]) -> list[MetricRow]:
    """k -> (preference, accuracy, nll), on validation items."""
    metrics = (("preference", "margin"), ("facts", "accuracy"), ("prose", "nll"))
    return [
        MetricRow("contrastive" if k else "base", k, task, metric, shown, 10, 0.1, "validation", change)
        for k, values in ks.items()
        for (task, metric), value, start in zip(metrics, values, ks[0.0], strict=True)
        for change, shown in ((False, value), (True, value - start))
    ]


def test_the_largest_change_within_the_budget_is_recommended() -> None:
    table = {
        0.0: (0.0, 0.90, 3.00),
        1.0: (0.5, 0.90, 3.02),
        2.0: (0.9, 0.88, 3.09),
        4.0: (1.5, 0.90, 3.20),  # too much loss
        -1.0: (-0.4, 0.89, 3.01),
        -2.0: (-0.9, 0.80, 3.05),  # too few correct
    }
    chosen = recommend(rows_of(table), metrics=METRICS)
    assert (chosen.recommended, chosen.negative) == (2.0, -1.0)
    assert (chosen.low, chosen.high) == (-2.0, 4.0)
    generous = recommend(rows_of(table), metrics=METRICS, budget={("prose", "nll"): 1.0})
    assert (generous.recommended, generous.negative) == (4.0, -2.0)


def test_a_side_that_does_not_move_its_way_gets_zero() -> None:
    chosen = recommend(rows_of({0.0: (0.0, 0.9, 3.0), 1.0: (-0.1, 0.9, 3.0), -1.0: (-0.2, 0.9, 3.0)}), metrics=METRICS)
    assert chosen.recommended == 0.0
    assert chosen.negative == -1.0


def test_a_behaviour_that_lowers_its_metric_is_chosen_by_that() -> None:
    """Right despite a wrong solution: more sycophancy is less of it."""
    key = ("gcd", "correctness")
    rows = [
        MetricRow("contrastive" if k else "base", k, *key, value, 10, 0.1, "validation", change)
        for k, value in ((0.0, 0.0), (1.0, -0.2), (2.0, 0.1), (-1.0, 0.3), (-2.0, -0.4))
        for change in (False, True)
    ]
    metrics = metrics_of([TaskSpec("arithmetic_choice", name="gcd")])
    chosen = recommend(rows, metrics=metrics, behavior=key, budget={})
    assert (chosen.recommended, chosen.negative) == (1.0, -1.0)


@pytest.mark.parametrize(("metric", "allowed"), [("acc,none", 2.0), ("perplexity", 1.0), ("pct_stereotype", 1.0)])
def test_a_budget_of_the_harness_knows_which_way_is_worse(metric: str, allowed: float) -> None:
    """Where it is not known, no change beyond the budget is allowed, whichever way."""
    found = rows_of({0.0: (0.0, 0.9, 3.0), 1.0: (0.2, 0.9, 3.0), 2.0: (0.4, 0.9, 3.0)})
    found += [
        MetricRow("contrastive" if k else "base", k, "harness", metric, value, 10, 0.1, "validation", change)
        for k, value in ((0.0, 0.0), (1.0, 0.01), (2.0, 0.5))
        for change in (False, True)
    ]
    assert recommend(found, metrics=METRICS, budget={("harness", metric): 0.03}).recommended == allowed


def test_a_strength_at_which_no_item_counts_is_passed_over() -> None:
    rows = rows_of({0.0: (0.0, 0.9, 3.0), 1.0: (0.2, 0.9, 3.0), 2.0: (0.4, 0.9, 3.0)})
    lacking = [row for row in rows if (row.k, row.metric) != (2.0, "margin")]
    assert recommend(lacking, metrics=METRICS).recommended == 1.0


def test_a_choice_pairs_items() -> None:
    """A method on the first two of four items, which the base finds hard: no loss, though the means differ."""
    texts, splits = (0, 1, 2, 3), ("validation",) * 4
    found: list[MetricRow] = []
    for task, metric in (("preference", "margin"), ("facts", "accuracy"), ("prose", "nll")):
        base = Measurement("base", 0.0, task, texts, splits, {metric: (0.0, 0.0, 1.0, 1.0)})
        moved = (0.5, 0.5) if task == "preference" else (0.0, 0.0)
        found += base.rows(base) + Measurement("contrastive", 1.0, task, texts[:2], splits[:2], {metric: moved}).rows(
            base
        )
    assert recommend(found, metrics=METRICS).recommended == 1.0


def test_a_metric_that_overflows_is_passed_over() -> None:
    assert math.isnan(summary([1.0, math.nan])[0])
    assert summary([1.0, math.inf])[0] == math.inf
    assert math.isnan(summary([-math.inf, math.inf])[0])
    assert all(math.isnan(summary([1.0, value])[2]) for value in (math.nan, math.inf))
    chosen = recommend(
        rows_of({0.0: (0.0, 0.9, 3.0), 1.0: (0.2, 0.9, 3.0), 2.0: (0.4, 0.9, math.inf)}), metrics=METRICS
    )
    assert chosen.recommended == 1.0


def test_choosing_without_the_rows_says_which_are_missing() -> None:
    with pytest.raises(SteerError, match="preference / margin"):
        recommend([], metrics=METRICS)


def test_steps_apply_what_was_trained_for_just_that_k() -> None:
    lm = tiny_lm()
    vectors = {0.5: random_vector(lm, 1), -1.0: random_vector(lm, 2)}
    ids = torch.tensor([[4, 5, 6]])
    method = TrainedCheckpoints("fine-tuned", vectors)
    with torch.no_grad():
        base = lm.model(ids).logits
        for k, vector in vectors.items():
            with vector.applied(lm, 1.0):
                expected = lm.model(ids).logits
            with method.applied(lm, k):
                assert torch.equal(lm.model(ids).logits, expected)
        with method.applied(lm, 0.0):
            assert torch.equal(lm.model(ids).logits, base)
    with pytest.raises(SteerError, match=r"was trained for k of -1, 0.5; found 1"), method.applied(lm, 1.0):
        pass


def test_increments_sum_up_to_the_vector_at_every_layer() -> None:
    lm = tiny_lm(layers=3)
    vector = activation_vector(lm, *sides_of([ContrastPair("Hi?", "Yes!", "No.")]))
    total = torch.zeros_like(vector.layers[0])
    for layer, gain in vector.increments().layers.items():
        total = total + gain
        torch.testing.assert_close(total, vector.layers[layer])


def test_a_method_may_be_measured_on_fewer_items_that_pair_with_the_base(tmp_path: Path) -> None:
    lm = tiny_lm()
    task = load_task(TaskSpec("facts")).first(4)
    methods = [(Direction(name, random_vector(lm)), [1.0]) for name in ("few", "all")]
    rows = run_sweep(lm, methods, [task], RunFolder(tmp_path), validated=(), items_of={"few": 2})
    table = {(r.method, r.metric): r for r in rows if r.split == "test" and not r.change}
    changes = {(r.method, r.metric): r for r in rows if r.split == "test" and r.change}
    assert (table["few", "margin"].n, table["all", "margin"].n, table["base", "margin"].n) == (2, 4, 4)
    cells = {(c["method"]): c for c in map(json.loads, (tmp_path / "measurements.jsonl").read_text().splitlines())}
    assert cells["few"]["ids"] == cells["all"]["ids"][:2] == [1, 3]
    assert cells["few"]["values"]["margin"] == pytest.approx(cells["all"]["values"]["margin"][:2], abs=1e-4)
    kept = [v for v, s in zip(cells["base"]["values"]["margin"], cells["base"]["splits"], strict=True) if s == "test"]
    expected = statistics.fmean(a - b for a, b in zip(cells["few"]["values"]["margin"], kept[:2], strict=True))
    assert changes["few", "margin"].value == pytest.approx(expected)
