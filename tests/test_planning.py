"""A plan without weights counts what a real, tiny model has and does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from conftest import random_vector, tiny_lm, tiny_model
from weightsteer.behavior import ContrastPair, Example, sides_of
from weightsteer.cli import app
from weightsteer.errors import SteerError
from weightsteer.lm import LM
from weightsteer.planning.counting import CountingModel
from weightsteer.planning.devices import DEVICES
from weightsteer.planning.named_device import device_named
from weightsteer.planning.numbers import Choices
from weightsteer.planning.passes import Passes, Reading, Step
from weightsteer.planning.plan import plan_recipe
from weightsteer.planning.shaped_model import ShapedModel
from weightsteer.planning.trainings import encoded, plan_training
from weightsteer.planning.weighted import activation_work, coefficient_work, longer_rows
from weightsteer.run_card import RunCard
from weightsteer.runs.recipe import Recipe
from weightsteer.runs.recipe_fields import DialRecipe
from weightsteer.runs.tiny_model import byte_tokenizer
from weightsteer.steering.activations import activation_vector
from weightsteer.steering.trained_activation import train_activation
from weightsteer.training import TrainSettings, train_side
from weightsteer.training.defaults import resolve
from weightsteer.training.learned_dial import DialSettings, learn_dial
from weightsteer.training.neutral import REPLY_TOKENS
from weightsteer.training.two_way import train_two_way
from weightsteer.vectors.difference import task_vector
from weightsteer.vectors.low_rank import LowRank

H100 = DEVICES["h100"]


def shaped(layers: int = 2, *, tied: bool = True) -> ShapedModel:
    return ShapedModel("tiny", tiny_model(layers=layers, tied=tied).config, torch.float32)


def passes(layers: int = 2) -> Passes:
    return Passes(shaped(layers), byte_tokenizer(), H100)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder with a config and a tokenizer, and no weights."""
    model = tmp_path / "model"
    tiny_model().config.save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_and_bytes_are_those_of_the_model(tied: bool, tmp_path: Path) -> None:
    real = tiny_model(tied=tied)
    found = shaped(tied=tied)
    assert found.parameters == sum(p.numel() for p in real.parameters())
    real.save_pretrained(tmp_path)
    stored = (tmp_path / "model.safetensors").stat().st_size
    header = 8 + int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    assert found.weight_bytes() == stored - header
    assert found.weight_bytes("nf4") < found.weight_bytes("int8") < found.weight_bytes()


def test_what_a_training_trains_and_sees_is_what_it_records(
    lm: LM, pairs: list[ContrastPair], quick: TrainSettings, tmp_path: Path
) -> None:
    examples = [Example(pair.prompt, pair.positive) for pair in pairs]
    for kind in ("lora", "bias", "full"):
        settings = replace(quick, kind=kind)
        planned = plan_training(lm, encoded(lm, examples, settings), settings, examples=12, checkpointing=False)
        out = train_side(lm, examples, tmp_path / kind, settings=settings)
        measured = RunCard.load(out).measured
        assert planned.work.trained == measured["search_tokens"]
        assert passes().trained_parameters(kind, settings.rank) == measured["parameters"]
    stored = sum(p.stat().st_size for p in (tmp_path / "lora").glob("*.safetensors"))
    assert 0 <= stored - 4 * passes().trained_parameters("lora", quick.rank) < 8192  # the header


@pytest.fixture
def whole_replies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neutral replies of their full length: the tiny model's bytes make other text than they were."""
    monkeypatch.setattr(LM, "generate", lambda _lm, prompts, **_given: ["x" * (REPLY_TOKENS - 1) for _ in prompts])


@pytest.mark.usefixtures("whole_replies")
@pytest.mark.parametrize(
    ("two_way", "added"),
    [
        (False, {"kl_weight": 0.5}),
        (True, {"kl_weight": 0.5}),
        (True, {"even_weight": 0.5}),
        (True, {"kl_weight": 0.5, "even_weight": 0.5}),
        (False, {"finetunes": 2, "learning_rates": (1e-3, 1e-2)}),
    ],
)
def test_what_settings_add_is_counted(
    two_way: bool, added: dict[str, Any], lm: LM, pairs: list[ContrastPair], quick: TrainSettings, tmp_path: Path
) -> None:
    settings = replace(quick, **added)
    sides = [encoded(lm, side, settings) for side in sides_of(pairs)]
    rows = longer_rows(*sides) if two_way else sides[0]
    planned = plan_training(lm, rows, settings, examples=len(pairs), two_way=two_way, checkpointing=False)
    if two_way:
        out = train_two_way(lm, pairs, tmp_path / "out", settings=settings)
    else:
        out = train_side(lm, sides_of(pairs)[0], tmp_path / "out", settings=settings)
    recorded = RunCard.load(out).measured["search_tokens"]
    assert planned.work.trained == pytest.approx(recorded, rel=0.1)  # neutral prompts are drawn; pairs and parts differ


@pytest.mark.usefixtures("whole_replies")
def test_what_is_learned_on_pairs_is_counted(
    lm: LM, pairs: list[ContrastPair], sides: tuple[Path, Path], quick: TrainSettings
) -> None:
    dial = learn_dial(
        lm, *map(task_vector, sides), pairs[:4], unmoved=pairs[4:6], settings=DialSettings(steps=3, batch_size=2)
    )
    planned = coefficient_work(lm, pairs[:4], pairs[4:6], DialRecipe(steps=3, batch_size=2))
    assert planned.trained == pytest.approx(dial.card.measured["search_tokens"], rel=0.1)
    activation = train_activation(lm, activation_vector(lm, *sides_of(pairs)).only(0), pairs, batch_size=4)
    work = activation_work(lm, pairs, resolve(quick, examples=len(pairs), width=16))
    assert work.trained == pytest.approx(activation.card.measured["search_tokens"], rel=0.05)


def test_deeper_models_follow_from_two_depths() -> None:
    """What is traced with one block and with two, and what all blocks say."""
    made = Step(2, 24, 20, rank=2)
    deep = passes(6)
    assert deep.model.depths == (1, 2)
    followed = deep.cost(made).trace
    deep.model.__dict__["depths"] = (6,)
    traced = Passes(deep.model, byte_tokenizer(), H100).cost(made).trace
    assert followed.peak == pytest.approx(traced.peak, rel=0.02)
    assert followed.kept == pytest.approx(traced.kept, rel=1e-6)
    assert followed.flops == pytest.approx(traced.flops, rel=1e-6)


def test_kept_activations_are_what_autograd_saves() -> None:
    """The bytes that are alive before the head are about those of the real tensors that autograd keeps."""
    real, saved = tiny_model(), {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in real.parameters()}
    mask = torch.ones(2, 1, 32, 32, dtype=torch.bool)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        real.model(input_ids=torch.zeros(2, 32, dtype=torch.long), attention_mask=mask, use_cache=False)
    kept = sum(size for place, size in saved.items() if place not in weights)
    planned = passes().cost(Step(2, 32, 8, kind="full")).trace.kept
    assert planned == pytest.approx(kept, rel=0.1)


def test_checkpointing_keeps_less_and_computes_more() -> None:
    plain, again = (passes(4).cost(Step(2, 64, 8, rank=2, checkpointing=c)).trace for c in (False, True))
    assert again.kept < plain.kept / 4
    assert plain.flops < again.flops < 1.6 * plain.flops


def test_the_cache_has_keys_and_values_of_every_token() -> None:
    found = passes(4).cost(Reading(3, 1, 15, 3, cached=True))
    assert found.cache == 4 * 2 * 3 * 16 * 2 * 8 * 4  # blocks, keys and values, rows, tokens, heads, width, bytes


def test_tokens_that_are_asked_for_are_counted() -> None:
    lm = tiny_lm()
    model = CountingModel(lm)
    model.replies(["Hello", "Hi"], max_new_tokens=5)
    model.score_choices(["Hello"], [["abc", "de"]])
    model.score_texts(["one text"])
    assert model.work.generated == 10
    lengths = [len(lm.exchange("Hello", text).answer) for text in ("abc", "de")]
    assert model.work.scored == sum(lengths) + len(lm.tokenizer("one text")["input_ids"]) - 1


def recipe_with(model: Path, **fields: object) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "planned",
            "model": str(model),
            "data": {"pairs": "sycophancy", "limit": 8},
            "train": {"max_steps": 2, "batch_size": 2, "rank": 2},
            "tasks": [{"task": "preference", "limit": 2}, {"task": "prose", "limit": 2}],
            "sweep": {"methods": {"contrastive": [1.0]}},
            "samples": {"count": 1, "max_new_tokens": 4},
            "plot": ["preference/margin"],
            "budget": {"prose/nll": 0.1},
            **fields,
        }
    )


@pytest.mark.slow
def test_a_recipe_is_planned_from_a_config_alone(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe_with(folder).model_dump(mode="json", exclude_defaults=True)))
    done = CliRunner().invoke(app, ["run", str(file), "--plan", "--device", "h100", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    names = [stage["name"] for stage in found["stages"]]
    assert names[:3] == ["load the model", "train positive", "train negative"]
    assert found["parameters"] == sum(p.numel() for p in tiny_model().parameters())
    assert all(stage["fits"] and stage["total"] == sum(stage["memory"].values()) for stage in found["stages"])


@pytest.mark.slow
def test_what_does_not_fit_is_told_with_what_to_set(folder: Path) -> None:
    small = replace(H100, memory=2.2e5, reserved=0.0)
    plan = plan_recipe(recipe_with(folder), small, Choices())
    misfits = [stage for stage in plan.stages if not stage.fits]
    assert misfits
    assert all(stage.advice for stage in misfits)


def test_an_unknown_device_and_options_without_a_plan_are_refused(folder: Path) -> None:
    with pytest.raises(SteerError, match="expected one of h200"):
        device_named("h10")
    done = CliRunner().invoke(app, ["run", "demo", "--device", "h100"])
    assert isinstance(done.exception, SteerError) or done.exit_code


@pytest.mark.slow
def test_what_cannot_be_learned_on_pairs_yet_is_told(folder: Path) -> None:
    methods = dict.fromkeys(("contrastive", "learned dial", "dial pairs", "activation trained"))
    fields = {"data": {"positive": "data/no.jsonl", "negative": "data/none.jsonl"}, "behavior": "sycophancy"}
    plan = plan_recipe(recipe_with(folder, sweep={"methods": methods}, **fields), H100)
    assert any("learned dial, activation trained: what is learned on pairs is not counted" in n for n in plan.notes)


@pytest.mark.slow
def test_missing_data_and_models_are_assumed_in_words() -> None:
    fields = {"data": {"positive": "data/no.jsonl", "negative": "data/none.jsonl"}, "behavior": "sycophancy"}
    plan = plan_recipe(recipe_with(Path("meta-llama/Llama-2-7b-chat-hf"), **fields), H100)
    assert plan.parameters == 6_738_415_616
    assert any("data/no.jsonl" in note for note in plan.notes)


def test_a_plan_counts_the_vector_beside_its_fine_tunes(folder: Path) -> None:
    """Both sides of rank 2 in float32, and their vector of rank 4, which is as large as the two."""
    plan = plan_recipe(recipe_with(folder), H100)
    factors = [delta for delta in random_vector(tiny_lm(), rank=4).deltas.values() if isinstance(delta, LowRank)]
    vector = sum(4 * (delta.B.numel() + delta.A.numel()) for delta in factors)
    assert sum(stage.disk for stage in plan.stages) == 2 * vector
