"""The registry of methods: each entry says all that recipes, costs and docs need to know of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from conftest import random_vector, tiny_lm
from test_runs import mute, small_recipe
from weightsteer.evaluation.results import read_rows
from weightsteer.run_folder import RunFolder
from weightsteer.runs.pipeline import Run
from weightsteer.runs.recipe import Recipe
from weightsteer.steering import methods
from weightsteer.steering.methods import BOTH_SIDES, METHODS, SHARES, KRule, Method, MethodSources, costs_of
from weightsteer.steering.steering import Direction, Steering


def test_the_registry_needs_no_torch() -> None:
    code = "import sys, weightsteer.runs.recipe, weightsteer.steering.methods; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", METHODS)
def test_costs_are_fine_tunes_of_the_run_and_shares_of_them(name: str, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for k in (1.0, -1.0):
        for path, share in costs_of(name, run, k):
            assert path.is_relative_to(tmp_path)
            assert 0.0 < share <= 1.0
    assert METHODS[name].summary


def test_the_strengths_that_methods_take() -> None:
    shares = METHODS["fine-tuned"].ks
    assert all(shares.allows(sign * share) for share in SHARES for sign in (1, -1))
    assert not shares.allows(0.3)
    prompt, joint = METHODS["system prompt"].ks, METHODS["joint training"].ks
    assert [prompt.allows(k) for k in (-1.0, 0.0, 1.0, 2.0)] == [True, True, True, False]
    assert [joint.allows(k) for k in (1.0, 4.0, 0.0, 1.5)] == [True, True, False, False]
    assert [name for name, method in METHODS.items() if method.ks.must_be_listed] == ["system prompt", "joint training"]


def test_a_variant_costs_what_the_contrastive_method_does(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert costs_of("later layers", run, 1.0) == costs_of("contrastive", run, -2.0)


def test_a_method_is_added_by_its_entry_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worked example of CONTRIBUTING: the contrastive vector without its attention part."""

    def mlp_only(name: str, sources: MethodSources) -> Steering:
        return Direction(name, sources.difference().filter(modules="mlp"))

    entry = Method("the contrastive vector within the MLPs", mlp_only, BOTH_SIDES, KRule("k above 0", lambda k: k > 0))
    monkeypatch.setattr(methods, "METHODS", METHODS)
    monkeypatch.setitem(METHODS, "MLP only", entry)  # type: ignore[arg-type]
    source = small_recipe(tmp_path, sweep={"methods": {"contrastive": [1.0], "MLP only": [1.0]}, "search_items": 1})
    Run(Recipe.load(source), tmp_path / "run", show=mute).run()
    run = RunFolder(tmp_path / "run")
    assert {row.method for row in read_rows(run.rows)} == {"base", "contrastive", "MLP only"}
    costs = {(row.method, row.metric): row.value for row in read_rows(run.costs)}
    assert costs["MLP only", "training tokens"] == costs["contrastive", "training tokens"] > 0


def test_every_handle_gives_the_model_and_the_strength() -> None:
    lm = tiny_lm()
    with Direction("contrastive", random_vector(lm)).applied(lm, 0.5) as handle:
        assert handle.lm is lm
        assert handle.k == 0.5
