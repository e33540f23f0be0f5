from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

import pytest

from conftest import random_vector, tiny_lm
from weightsteer.evaluation.cost import costs_still_of, measure_costs
from weightsteer.run_card import RunCard
from weightsteer.run_folder import RunFolder
from weightsteer.steering.steering import Direction


def fine_tune(folder: Path, tokens: int) -> Path:
    folder.mkdir()
    measured = {"search_tokens": tokens, "search_seconds": tokens / 100, "parameters": 64}
    RunCard.now("finetune", measured=measured).save(folder)
    return folder


def test_costs_are_summed_over_the_fine_tunes_and_measured_once(tmp_path: Path) -> None:
    lm = tiny_lm()
    names = ("contrastive", "contrastive half", "activation")
    methods = [(Direction(name, random_vector(lm)), [-1.0, 0.5]) for name in names]
    sides = [fine_tune(tmp_path / "positive", 1000), fine_tune(tmp_path / "negative", 500)]

    def trainings(name: str, run: RunFolder, k: float) -> list[tuple[Path, float]]:
        shares = {"contrastive": 1.0, "contrastive half": 0.5}
        return [(side, shares[name]) for side in sides if name in shares]

    rows = measure_costs(lm, methods, trainings, RunFolder(tmp_path))
    table = {(row.method, row.metric): row for row in rows}
    assert {row.k for row in rows if row.metric == "training tokens"} == {-1.0, 0.5}
    assert table["contrastive", "training tokens"].value == 1500
    assert table["contrastive half", "training tokens"].value == 750
    assert table["activation", "training tokens"].value == 0
    assert table["contrastive", "parameters"].value == 64
    time = table["contrastive", "time per token"]
    assert time.n == 3
    assert time.k == -1.0  # the strongest
    assert time.value > 0
    assert math.isfinite(time.stderr)
    again = measure_costs(lm, methods, trainings, RunFolder(tmp_path))
    assert [asdict(row) for row in again] == [asdict(row) for row in rows]
    listed = [(method, [-2.0, 0.5] if method.name == "activation" else ks) for method, ks in methods]
    changed = measure_costs(lm, listed, trainings, RunFolder(tmp_path))
    assert {row.k for row in changed if row.method == "activation"} == {-2.0, 0.5}
    assert [row for row in changed if row.method != "activation"] == [row for row in rows if row.method != "activation"]
    assert [row.method for row in costs_still_of(RunFolder(tmp_path), {})] == [row.method for row in changed]


def test_a_fine_tune_without_a_card_is_an_error(tmp_path: Path) -> None:
    from weightsteer.errors import SteerError

    lm = tiny_lm()
    methods = [(Direction("contrastive", random_vector(lm)), [1.0])]
    with pytest.raises(SteerError, match="weightsteer.json: cannot be read"):
        measure_costs(lm, methods, lambda name, run, k: [(tmp_path / "none", 1.0)], RunFolder(tmp_path))
