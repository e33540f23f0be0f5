"""Every recipe, end to end, on a tiny random model of its architecture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from test_cli import run
from weightsteer.errors import SteerError
from weightsteer.lm import LM
from weightsteer.runs.dry_run import shrink_recipe
from weightsteer.runs.recipe import Recipe
from weightsteer.runs.tiny_model import make_tiny_model
from weightsteer.runs.trainings import refuse_few_rows

RECIPES = Path(__file__).parents[1] / "recipes"
PAPER = sorted((RECIPES / "paper").glob("*.yaml"))
QUICK = "refusal_from_evil"  # it samples, judges, repairs and asks lm-evaluation-harness, with the fewest methods
MARKED = [path if path.stem == QUICK else pytest.param(path, marks=pytest.mark.slow) for path in PAPER]


@pytest.mark.parametrize("path", MARKED, ids=lambda path: path.stem)
def test_the_papers_recipes(capsys: pytest.CaptureFixture[str], path: Path, tmp_path: Path) -> None:
    code, _, err = run(capsys, "run", path, "--dry-run", "-o", tmp_path / "run")
    assert code == 0, err
    recipe = Recipe.load(path)
    rows = [json.loads(line) for line in (tmp_path / "run" / "rows.jsonl").read_text().splitlines()]
    assert {row["method"] for row in rows} == {"base", *recipe.sweep.methods}
    measured = {row["task"] for row in rows}
    judged = {spec.name or spec.task for spec in recipe.tasks if recipe.judge}  # rubbish verdicts may leave no item
    assert {spec.name or spec.task for spec in recipe.tasks} - measured <= judged
    costs = [json.loads(line) for line in (tmp_path / "run" / "costs.jsonl").read_text().splitlines()]
    assert {row["method"] for row in costs} == set(recipe.sweep.methods)
    assert (tmp_path / "run" / "report.html").exists()
    assert AutoConfig.from_pretrained(tmp_path / "run-model").model_type == recipe.architecture


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gemma2", "gemma3_text", "gpt2", "mistral"])
def test_tiny_models_of_any_architecture(architecture: str, tmp_path: Path) -> None:
    recipe = Recipe.load(PAPER[0]).model_copy(update={"architecture": architecture})
    lm = LM.load(str(make_tiny_model(recipe, tmp_path / "model")), device="cpu")
    assert sum(p.numel() for p in lm.model.parameters()) < 1e6
    with torch.no_grad():
        assert lm.model(torch.tensor([lm.chat_ids("Hi")])).logits.isfinite().all()


@pytest.mark.parametrize("architecture", ["qwenn2", "vit", "gemma3"])
def test_an_architecture_that_is_no_language_model(architecture: str, tmp_path: Path) -> None:
    recipe = Recipe.load(PAPER[0]).model_copy(update={"architecture": architecture})
    with pytest.raises(SteerError, match="no small model can be made of it"):
        make_tiny_model(recipe, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_model_whose_architecture_is_not_known(tmp_path: Path) -> None:
    recipe = Recipe.load(PAPER[0]).model_copy(update={"architecture": None})
    with pytest.raises(SteerError, match="name its 'architecture' in the recipe"):
        make_tiny_model(recipe, tmp_path / "model")


def test_every_stage_stays_and_what_is_not_here_is_replaced(tmp_path: Path) -> None:
    recipe = Recipe.load(RECIPES / "paper" / "refusal.yaml")
    small = shrink_recipe(recipe, tmp_path)
    assert list(small.sweep.methods) == list(recipe.sweep.methods)
    assert [task.task for task in small.tasks] == [task.task for task in recipe.tasks]
    assert small.data.pairs == "sycophancy"  # the two sides' files are not here
    assert small.repair_target is not None
    assert small.repair_target.generate is not None
    assert small.repair_target.desired_side == "positive"
    assert small.judge is not None
    assert small.judge.url is None


def test_a_mean_has_as_many_parts_as_so_few_rows_make(tmp_path: Path) -> None:
    recipe = Recipe.load(RECIPES / "bench" / "sycophancy-few-parts.yaml")
    with pytest.raises(SteerError, match="finetunes: expected at most 3, .*found 5"):
        refuse_few_rows(recipe, 4)
    small = shrink_recipe(recipe, tmp_path)
    assert small.data.limit == 4
    refuse_few_rows(small, 4)


def test_a_layer_is_left_to_choose(tmp_path: Path) -> None:
    recipe = Recipe.load(RECIPES / "demo.yaml")
    assert recipe.sweep.layer_step > 2  # more than the tiny model has layers
    assert shrink_recipe(recipe, tmp_path).sweep.layer_step == 1
