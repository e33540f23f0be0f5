from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightsteer.errors import SteerError
from weightsteer.evaluation.compare import compare_at_loss
from weightsteer.evaluation.resampled_curves import Curve, Sample
from weightsteer.evaluation.results import BASE, Measurement, measurements_by_key
from weightsteer.files import read_jsonl
from weightsteer.reporting.result_tables import comparison_table

BEHAVIOR, CAPABILITY = ("beliefs", "follows"), ("prose", "nll")


def cell(method: str, k: float, task: str, metric: str, values: Sequence[float | None], test: int = 0) -> Measurement:
    """A cell whose first `test` items are of validation."""
    splits = tuple("validation" if i < test else "test" for i in range(len(values)))
    return Measurement(method, k, task, tuple(range(len(values))), splits, {metric: values})


def write_run(
    folder: Path, methods: dict[str, tuple[Sequence[float], Callable[[float], float]]], items: int = 8
) -> Path:
    """A run in which item i of a method at k is i + effect(k), and the loss k^2 / 10 on each of 3 texts."""
    cells = [
        cell(BASE, 0.0, *BEHAVIOR, [float(i) for i in range(items)]),
        cell(BASE, 0.0, *CAPABILITY, [3.0, 3.1, 3.2]),
    ]
    for method, (ks, effect) in methods.items():
        for k in ks:
            cells.append(cell(method, k, *BEHAVIOR, [i + effect(k) for i in range(items)]))
            cells.append(cell(method, k, *CAPABILITY, [x + k * k / 10 for x in (3.0, 3.1, 3.2)]))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "measurements.jsonl").write_text("".join(json.dumps(asdict(c)) + "\n" for c in cells))
    return folder


def test_the_value_is_read_off_between_two_strengths(tmp_path: Path) -> None:
    run = write_run(tmp_path, {"contrastive": ([-1, 1, 2], lambda k: k), "weak": ([0.5, 1.0], lambda k: k / 2)})
    found = {
        (m.method, m.side, m.loss_increase): m
        for m in compare_at_loss([run], BEHAVIOR, loss_increases=[0.05, 0.1, 0.25], draws=20)
    }
    assert found["contrastive", 1, 0.05].value == pytest.approx(math.sqrt(0.5))  # where k^2 / 10 is 0.05
    assert found["contrastive", 1, 0.25].value == pytest.approx(math.sqrt(2.5))
    assert found["contrastive", -1, 0.1].value == pytest.approx(-1.0)
    weak = found["weak", 1, 0.25]
    assert (weak.value, weak.reached) == (pytest.approx(0.5), False)
    assert weak.against == pytest.approx(0.5 - math.sqrt(2.5))
    assert (weak.against_n, weak.against_reached) == (8, False)
    assert found["contrastive", 1, 0.1].against == found["contrastive", 1, 0.1].against_stderr == 0.0
    line = next(row for row in comparison_table(list(found.values())) if row["method"] == "weak")
    assert line["cells"][0.25] == "(+0.500 ± 0.000)"  # every item moves alike: no error
    assert line["against"][0.25] == "(-1.081 ± 0.000)"


@given(st.integers(0, 1000))
def test_errors_are_those_of_the_items(seed: int) -> None:
    """The bootstrap error of a mean is the standard error of the mean, nearly."""
    import random
    import statistics
    import tempfile

    rng = random.Random(seed)
    moves = [float(rng.random() < 0.5) for _ in range(40)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cells = [
            cell(BASE, 0.0, *BEHAVIOR, [0.0] * 40),
            cell(BASE, 0.0, *CAPABILITY, [3.0]),
            cell("contrastive", 1.0, *BEHAVIOR, moves),
            cell("contrastive", 1.0, *CAPABILITY, [3.1]),
        ]
        (folder / "measurements.jsonl").write_text("".join(json.dumps(asdict(c)) + "\n" for c in cells))
        (found,) = compare_at_loss([folder], BEHAVIOR, loss_increases=[0.1], draws=400)
    assert found.value == pytest.approx(statistics.fmean(moves))
    assert found.stderr == pytest.approx(statistics.stdev(moves) / math.sqrt(40), rel=0.25, abs=1e-6)


def test_the_error_over_few_runs_is_that_of_their_mean(tmp_path: Path) -> None:
    """0, 1 and 2 in three runs: a bootstrap that drew three of three would say 0.47."""
    runs = [write_run(tmp_path / str(n), {"contrastive": ([1.0], lambda k, n=n: float(n))}) for n in range(3)]
    (found,) = compare_at_loss(runs, BEHAVIOR, loss_increases=[0.1], draws=4000)
    assert found.stderr == pytest.approx(1 / math.sqrt(3), rel=0.03)
    (alone,) = compare_at_loss(
        [write_run(tmp_path / "a", {"contrastive": ([1.0], abs)}, items=1)], BEHAVIOR, loss_increases=[0.1]
    )
    assert math.isnan(alone.stderr)


def test_runs_of_other_items_are_not_compared_and_n_counts_what_they_share(tmp_path: Path) -> None:
    def numbered(name: str, ids: Sequence[int]) -> Path:
        run = write_run(tmp_path / name, {"contrastive": ([1.0], abs)}, items=3)
        rows = [json.loads(line) for line in (run / "measurements.jsonl").read_text().splitlines()]
        rows = [{**row, "ids": ids} if row["task"] == BEHAVIOR[0] else row for row in rows]
        (run / "measurements.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return run

    first = numbered("first", [0, 1, 2])
    (found,) = compare_at_loss([first, numbered("near", [2, 3, 4])], BEHAVIOR, loss_increases=[0.1], draws=9)
    assert found.n == found.against_n == 1
    with pytest.raises(SteerError, match="no test items in common; compare runs of one recipe"):
        compare_at_loss([first, numbered("far", [3, 4, 5])], BEHAVIOR)


def test_a_method_whose_first_strength_breaks_the_model_has_no_value(tmp_path: Path) -> None:
    run = write_run(tmp_path, {"contrastive": ([1.0], abs), "broken": ([1.0, 2.0], abs)})
    rows = [json.loads(line) for line in (run / "measurements.jsonl").read_text().splitlines()]
    for row in rows:
        if (row["method"], row["task"]) == ("broken", CAPABILITY[0]):
            row["values"] = {CAPABILITY[1]: [math.inf] * 3}
    (run / "measurements.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert {found.method for found in compare_at_loss([run], BEHAVIOR, draws=9)} == {"contrastive"}


def test_the_same_run_several_times_is_no_more_certain_than_once(tmp_path: Path) -> None:
    cells = [
        cell(BASE, 0.0, *BEHAVIOR, [0.0] * 40),
        cell(BASE, 0.0, *CAPABILITY, [3.0]),
        cell("contrastive", 1.0, *BEHAVIOR, [float(i % 2) for i in range(40)]),
        cell("contrastive", 1.0, *CAPABILITY, [3.1]),
    ]
    (tmp_path / "measurements.jsonl").write_text("".join(json.dumps(asdict(c)) + "\n" for c in cells))
    errors = [compare_at_loss([tmp_path] * times, BEHAVIOR, loss_increases=[0.1])[0].stderr for times in (1, 3)]
    assert errors[1] == pytest.approx(errors[0], rel=0.15)


def test_a_loss_that_overflowed_is_far_too_much(tmp_path: Path) -> None:
    cells = [
        cell(BASE, 0.0, *BEHAVIOR, [0.0] * 4),
        cell(BASE, 0.0, *CAPABILITY, [3.0]),
        cell("contrastive", 1.0, *BEHAVIOR, [1.0] * 4),
        cell("contrastive", 1.0, *CAPABILITY, [3.01]),
        cell("contrastive", 2.0, *BEHAVIOR, [-9.0] * 4),
        cell("contrastive", 2.0, *CAPABILITY, [math.nan]),
    ]
    (tmp_path / "measurements.jsonl").write_text("".join(json.dumps(asdict(c)) + "\n" for c in cells))
    (found,) = compare_at_loss([tmp_path], BEHAVIOR, loss_increases=[0.1], draws=5)
    assert (found.value, found.reached) == (1.0, False)  # what a cheaper strength gives


def test_a_strength_at_which_no_item_counts_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path, {"contrastive": ([1, 2], lambda k: k), "lost": ([1], lambda k: k)})
    cells = list(measurements_by_key(read_jsonl(run / "measurements.jsonl"), "file").values())
    gone = {("contrastive", 2), ("lost", 1)}
    cells = [
        replace(c, values={"follows": [None] * 8}) if (c.method, c.k) in gone and c.task == "beliefs" else c
        for c in cells
    ]
    (run / "measurements.jsonl").write_text("".join(json.dumps(asdict(c)) + "\n" for c in cells))
    (found,) = compare_at_loss([run], BEHAVIOR, loss_increases=[0.25], draws=20)  # of the other method nothing is known
    assert (found.method, found.value, found.reached, found.n) == ("contrastive", 1.0, False, 8)


def test_a_reference_on_the_other_side_only_gives_no_difference(tmp_path: Path) -> None:
    run = write_run(tmp_path, {"contrastive": ([-1], lambda k: k), "negated task vector": ([1], lambda k: 3 * k)})
    found = {m.method: m for m in compare_at_loss([run], BEHAVIOR, loss_increases=[0.1], draws=5)}
    assert found["negated task vector"].against is found["negated task vector"].against_stderr is None
    assert comparison_table([found["negated task vector"]])[0]["against"][0.1] == ""
    with pytest.raises(SteerError, match="reference 'contrast': expected one of"):
        compare_at_loss([run], BEHAVIOR, reference="contrast")


def test_seeds_are_averaged_and_methods_that_one_of_them_lacks_are_left_out(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a", {"contrastive": ([1], lambda k: k), "extra": ([1], lambda k: k)})
    two = write_run(tmp_path / "b", {"contrastive": ([1], lambda k: 3 * k)})
    found = compare_at_loss([one, two], BEHAVIOR, loss_increases=[0.1], draws=50)
    assert [m.method for m in found] == ["contrastive"]
    assert found[0].value == pytest.approx(2.0)
    assert found[0].stderr > 0.3  # the seeds differ


def test_items_that_do_not_count_and_validation_items_are_left_out(tmp_path: Path) -> None:
    cells = [
        cell(BASE, 0.0, *BEHAVIOR, [9.0, 1.0, None, 1.0], test=1),
        cell("contrastive", 1.0, *BEHAVIOR, [0.0, 2.0, 5.0, None], test=1),
        cell(BASE, 0.0, *CAPABILITY, [3.0]),
        cell("contrastive", 1.0, *CAPABILITY, [3.5]),
    ]
    (tmp_path / "measurements.jsonl").write_text("".join(json.dumps(asdict(c)) + "\n" for c in cells))
    (found,) = compare_at_loss([tmp_path], BEHAVIOR, loss_increases=[0.5], draws=10)
    assert (found.value, found.n) == (pytest.approx(1.0), 1)
    rows = {(r.metric, r.change, r.split): r for r in cells[1].rows(cells[0])}
    assert rows["follows", False, "test"].n == 2
    assert rows["follows", True, "test"].n == 1
    assert measurements_by_key([json.loads(json.dumps(asdict(cells[1])))], "file") == {cells[1].key: cells[1]}


def test_a_run_without_the_task_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path, {"contrastive": ([1], lambda k: k)})
    with pytest.raises(SteerError, match="no measurements of the base on task 'chess'"):
        compare_at_loss([run], ("chess", "won"))
    with pytest.raises(SteerError, match="expected one of its metrics, follows; found 'folows'"):
        compare_at_loss([run], ("beliefs", "folows"))
    with pytest.raises(SteerError, match="expected numbers above 0"):
        compare_at_loss([run], BEHAVIOR, loss_increases=[0.1, 0.0])
    with pytest.raises(SteerError, match="no run with measurements"):
        compare_at_loss([tmp_path / "none"], BEHAVIOR)


def drawn_one_by_one(curves: Sequence[Curve], level: float, draws: int, seed: int) -> list[float]:
    """What `Sample.drawn` computes at once, draw by draw and item by item."""
    rng, found = np.random.default_rng(seed), []
    items, texts = curves[0].changes.shape[1], curves[0].loss_increase.shape[1]
    for _ in range(draws):
        chosen, read = rng.integers(items, size=items - 1), rng.integers(texts, size=texts - 1)
        runs = [curves[run] for run in rng.integers(len(curves), size=max(1, len(curves) - 1))]
        found.append(float(np.mean([read_off_plainly(curve, chosen.tolist(), read.tolist(), level) for curve in runs])))
    return found


def read_off_plainly(curve: Curve, items: list[int], texts: list[int], level: float) -> float:
    means, losses = [], []
    for row, rises in zip(curve.changes.tolist(), curve.loss_increase.tolist(), strict=True):
        counted = [row[i] for i in items if not math.isnan(row[i])]
        means.append(sum(counted) / len(counted) if counted else math.nan)
        loss = sum(rises[i] for i in texts) / len(texts)
        losses.append(math.inf if math.isnan(loss) else loss)
    step = next((i for i in range(1, len(losses)) if losses[i] >= level), 0)
    if not step:
        return means[-1]
    if math.isinf(losses[step]):
        return means[step - 1]
    near, far = curve.strengths[step - 1], curve.strengths[step]
    part = (level - losses[step - 1]) / (losses[step] - losses[step - 1])
    share = (math.sqrt(near**2 + part * (far**2 - near**2)) - near) / (far - near)
    return float((1 - share) * means[step - 1] + share * means[step])


@given(st.integers(0, 10_000))
def test_all_draws_at_once_are_the_draws_one_by_one(seed: int) -> None:
    """With items that do not count, losses that overflow, and levels that some draws reach and others do not."""
    rng = np.random.default_rng(seed)
    curves = []
    for _ in range(rng.integers(1, 4)):
        changes = np.vstack([np.zeros(6), rng.normal(size=(3, 6)).cumsum(axis=0)])
        changes[1:][rng.random((3, 6)) < 0.2] = math.nan
        losses = np.vstack([np.zeros(5), np.abs(rng.normal(size=(3, 5))).cumsum(axis=0)])
        losses[3][rng.random(5) < 0.2] = rng.choice([math.nan, math.inf])
        curves.append(Curve(np.array([0.0, 0.5, 1.0, 3.0]), tuple(range(6)), changes, losses))
    sample = Sample([curve.ids for curve in curves], curves, draws=30, seed=seed)
    for level in (0.5, 2.0):
        expected = drawn_one_by_one(curves, level, 30, seed)
        assert np.allclose(sample.drawn(curves, level), expected, rtol=0, atol=1e-12, equal_nan=True)
