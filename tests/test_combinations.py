"""What a training would refuse is refused before any model: by the plan, and at the start of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from typer.testing import CliRunner

from weightsteer.cli import app
from weightsteer.errors import SteerError
from weightsteer.planning.devices import DEVICES
from weightsteer.planning.plan import plan_recipe
from weightsteer.runs.recipe import Recipe
from weightsteer.runs.trainings import all_settings, train_fields
from weightsteer.runs.validate import check_alone
from weightsteer.steering.methods import SNAPSHOT_COUNT

TWO = {"processes": 2}
FSDP = {**TWO, "shard": "fsdp"}


def recipe_with(**fields: Any) -> dict[str, Any]:
    """A recipe whose model is nowhere: whoever loads it fails otherwise."""
    methods = fields.pop("methods", ["contrastive"])
    return {
        "name": "odd",
        "model": "/nowhere/model",
        "architecture": "llama",  # of the dry run's tiny model
        "tasks": [{"task": "preference"}, {"task": "prose"}],
        "sweep": {"methods": {name: [1.0] for name in methods}},
        "plot": ["preference/margin"],
        "budget": {"prose/nll": 0.1},
        **fields,
    }


REFUSED: Mapping[str, tuple[dict[str, Any], str]] = {
    "packed and spread": (
        {"load": {"quantize": "nf4"}, "train": FSDP},
        "quantize nf4: shard fsdp does not split weights that are packed",
    ),
    "one process and spread": ({"train": {"shard": "fsdp"}}, "shard fsdp: spreads a model over several processes"),
    "on several devices already": ({"load": {"device_map": "auto"}, "train": TWO}, "spread the model of one process"),
    "two-way": ({"methods": ["contrastive", "two-way"], "train": TWO}, "two-way training runs in one process, found 2"),
    "KL": ({"methods": ["contrastive", "contrastive KL"], "train": FSDP}, "a training with kl_weight runs in one"),
    "KL by itself": ({"train": {**TWO, "kl_weight": 1.0}}, "a training with kl_weight runs in one process"),
    "even part of one side": ({"train": {"even_weight": 1.0}}, "even_weight: training on one side has no such term"),
    "DPO with a KL": (
        {"methods": ["contrastive", "DPO"], "train_of": {"DPO": {"kl_weight": 1.0}}},
        "kl_weight: preference tuning has no such term",
    ),
    "biases of a packed base": (
        {"methods": ["contrastive", "bias-only"], "load": {"quantize": "int8"}},
        "kind bias: trains weights of the model itself, and those of /nowhere/model are quantised",
    ),
    "a first fine-tune": (
        {"first_finetune": {"data": ["gloomy:negative"], "train": {"shard": "fsdp"}}},
        "shard fsdp: spreads a model over several processes",
    ),
    "fewer steps than snapshots": (
        {"methods": ["contrastive", "fine-tuned"], "train": {"max_steps": 3}},
        "snapshots: expected at most one a step, found 4 for the 3 steps",
    ),
    "a mean of snapshots": (
        {"methods": ["contrastive", "fine-tuned"], "train": {"finetunes": 3}},
        "method 'fine-tuned' steers with snapshots of one fine-tune, .* mean of 3; leave it out",
    ),
    "a mean of DPO's snapshots": (
        {"methods": ["contrastive", "DPO"], "train": {"finetunes": 3}},
        "method 'DPO' steers with snapshots.*train_of: {DPO: {finetunes: 1}}",
    ),
    "more processes than rows": ({"train": {**TWO, "batch_size": 1}}, "expected at most 1, the rows of a batch"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_recipe_is_refused_in_the_words_of_the_training(name: str) -> None:
    fields, reason = REFUSED[name]
    with pytest.raises(SteerError, match=reason):
        check_alone(Recipe.model_validate(recipe_with(**fields)))


def odd(**fields: Any) -> dict[str, Any]:
    recipe = recipe_with()
    return {**recipe, **fields, "sweep": {**recipe["sweep"], **fields.get("sweep", {})}}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"sweep": {"methods": {}}}, "needs 'contrastive'"),
        ({"sweep": {"methods": {"contrastive": [0.0]}}}, "needs a list of k"),
        ({"sweep": {"methods": {"contrastive": [1, 1.0]}}}, "a k is given twice"),
        ({"sweep": {"sides": [1, 1]}}, "a side is given twice"),
        ({"sweep": {"fractions": []}}, "must not be empty"),
        ({"sweep": {"behavior": "nope"}}, "expected task/metric"),
        ({"sweep": {"behavior": "preference/zz"}}, "has no such metric; it has margin"),
        ({"sweep": {"variants": {"x": "w*w"}}}, "vectors add and subtract"),
        ({"budget": {"zz/q": 1}}, "needs a task 'zz'"),
        ({"plot": ["zz/q"]}, "needs a task 'zz'"),
        ({"tasks": [{"task": "facts"}, {"task": "facts"}]}, "two tasks have one name"),
    ],
)
def test_what_the_recipe_tells_by_itself_is_checked_before_a_plan(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(SteerError, match=reason):
        plan_recipe(Recipe.model_validate(odd(**fields)), DEVICES["h100"])


def test_a_budget_is_not_negative() -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        Recipe.model_validate(odd(budget={"prose/nll": -1}))


@pytest.mark.parametrize("words", [["--plan"], [], ["--dry-run"]], ids=["plan", "run", "dry run"])
def test_the_command_refuses_before_any_model(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fields, reason = REFUSED["packed and spread"]
    judge = {"model": "/nowhere/judge"}  # a local judge, which is loaded first of all
    Path("odd.yaml").write_text(yaml.safe_dump(recipe_with(**fields, judge=judge)))
    done = CliRunner().invoke(app, ["run", "odd.yaml", *words])
    assert done.exit_code == 1
    assert isinstance(done.exception, SteerError)
    assert reason in str(done.exception)
    assert not list(Path().glob("runs/odd*/**/*.jsonl"))  # nothing but the dry run's tiny model


def test_a_setting_of_its_own_lets_a_method_train_in_one_process() -> None:
    own = {"two-way": {"processes": 1, "shard": "ddp"}}
    fields = recipe_with(methods=["contrastive", "two-way"], train=FSDP, train_of=own)
    recipe = Recipe.model_validate(fields)
    check_alone(recipe)
    assert [(way, made.processes) for way, made in all_settings(recipe)] == [("side", 2), ("two-way", 1)]


def test_a_setting_of_its_own_lets_a_method_keep_snapshots() -> None:
    fields = recipe_with(methods=["contrastive", "DPO"], train={"finetunes": 3}, train_of={"DPO": {"finetunes": 1}})
    check_alone(Recipe.model_validate(fields))


def test_the_settings_of_a_training_come_from_recipe_method_and_its_own() -> None:
    methods = ["contrastive", "bias-only", "contrastive KL", "fine-tuned", "DPO"]
    own = {"bias-only": {"gradient_checkpointing": True}, "contrastive KL": {"kl_weight": 0.5}}
    recipe = Recipe.model_validate(recipe_with(methods=methods, train={"rank": 4}, train_of=own, dtype="bfloat16"))
    assert train_fields(recipe, "lora") == {"rank": 4, "snapshots": SNAPSHOT_COUNT}
    assert train_fields(recipe, "bias") == {"rank": 4, "kind": "bias", "bf16": True, "gradient_checkpointing": True}
    assert train_fields(recipe, "kl") == {"rank": 4, "kl_weight": 0.5}
    assert train_fields(recipe, "DPO") == {"rank": 4, "snapshots": SNAPSHOT_COUNT}
