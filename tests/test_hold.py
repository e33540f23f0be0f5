"""Vectors that stay applied while a model trains, and a penalty that pulls tau back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from conftest import random_vector, tiny_lm, tiny_model
from weightsteer import SteerError, task_vector
from weightsteer.monitor import WHOLE, SteeringMonitor
from weightsteer.monitor.hold import Held, Pull
from weightsteer.monitor.training_parameters import live_parameters
from weightsteer.vectors.delta import to_dense
from weightsteer.vectors.weight_vector import WeightVector

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROWS = [{"input_ids": [3 + i, 9, 40, 7], "labels": [3 + i, 9, 40, 7], "attention_mask": [1] * 4} for i in range(8)]


def trained(folder: Path, monitor: SteeringMonitor | None = None, *, merged: WeightVector | None = None) -> Any:
    """The tiny model after a short LoRA run; `merged` is added to its weights first."""
    model: Any = tiny_model()
    if merged is not None:
        with torch.no_grad():
            for name, delta in merged.deltas.items():
                model.get_parameter(name).add_(to_dense(delta))
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=LINEAR))
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, save_strategy="no",
        report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=ROWS)
    if monitor:
        monitor.watch(trainer)
    trainer.train()
    return model


def lora_of(model: Any) -> list[torch.Tensor]:
    return [parameter for name, parameter in model.named_parameters() if "lora_" in name]


@pytest.fixture
def vector() -> WeightVector:
    return random_vector(tiny_lm(), 1)


def test_a_held_vector_is_like_one_merged_before_the_training(vector: WeightVector, tmp_path: Path) -> None:
    held = trained(tmp_path / "a", SteeringMonitor({"w": vector}, hold={"w": -0.5}))
    merged = trained(tmp_path / "b", merged=vector * -0.5)
    for ours, theirs in zip(lora_of(held), lora_of(merged), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_after_the_training_nothing_is_left_of_it(vector: WeightVector, tmp_path: Path) -> None:
    model = trained(tmp_path / "a", SteeringMonitor({"w": vector}, hold={"w": 1.0}))
    before = tiny_model()
    for name, parameter in before.named_parameters():
        stem = name.removesuffix(".weight")
        layer = model.get_base_model().get_submodule(stem)
        assert torch.equal(getattr(layer, "base_layer", layer).weight, parameter)
    with vector.applied(model, 0.5):  # nothing else claims the model
        pass


def test_zero_is_no_hold_and_no_pull(vector: WeightVector, tmp_path: Path) -> None:
    plain = trained(tmp_path / "a")
    zero = trained(tmp_path / "b", SteeringMonitor({"w": vector}, hold={"w": 0.0}, resist={"w": 0.0}))
    assert all(torch.equal(a, b) for a, b in zip(lora_of(plain), lora_of(zero), strict=True))


def test_the_pull_is_the_gradient_of_its_penalty(vector: WeightVector) -> None:
    model: Any = get_peft_model(tiny_model(), LoraConfig(r=3, lora_alpha=6, target_modules=LINEAR))
    with torch.no_grad():
        for parameter in lora_of(model):
            parameter.normal_()
    pull = Pull(model, vector, 2.0)
    pull.add_gradient()
    for parameter in lora_of(model)[:4]:
        slope, step = float(parameter.grad.flatten()[0]), 1e-2
        ends = []
        for side in (step, -step):
            with torch.no_grad():
                parameter.view(-1)[0] += side
                ends.append(2.0 * pull.projection() ** 2)
                parameter.view(-1)[0] -= side
        assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-2, abs=1e-6)


def test_the_pull_keeps_the_projection_small(tmp_path: Path) -> None:
    """Against the direction that the training takes when nothing pulls."""
    trained(tmp_path / "free").save_pretrained(tmp_path / "adapter")
    goal = {"goal": task_vector(tmp_path / "adapter")}
    pulled = SteeringMonitor(goal, every=4, resist={"goal": 30.0})
    trained(tmp_path / "pulled", pulled)
    assert next(r for r in pulled.readings if r.part == WHOLE).projection < 0.5  # without the pull it is 1


def test_names_that_are_not_there(vector: WeightVector) -> None:
    with pytest.raises(SteerError, match="hold: 'x' is not among the vectors, w"):
        SteeringMonitor({"w": vector}, hold={"x": 1.0})
    with pytest.raises(SteerError, match="resist: 'x'"):
        SteeringMonitor({"w": vector}, resist={"x": 1.0})
    with pytest.raises(SteerError, match="controls: 'x'"):
        SteeringMonitor({"w": vector}, controls=("w", "x"))


def test_what_trains_where_the_vector_stands_is_not_held_still(vector: WeightVector) -> None:
    model = tiny_model()
    norms = WeightVector({**vector.deltas, "model.norm.weight": torch.ones(32)}, vector.card)
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    with pytest.raises(SteerError, match=r"hold: the vector changes model\.norm\.weight where it stands"):
        Held(model, {"w": norms}, {"w": 1.0})
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    Held(model, {"w": vector}, {"w": 1.0}).release()
    model.requires_grad_(False)
    Held(model, {"w": norms}, {"w": 1.0}).release()


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_took_a_part_of_the_base_is_refused(init: Any, vector: WeightVector, tmp_path: Path) -> None:
    model: Any = get_peft_model(tiny_model(), LoraConfig(r=3, target_modules=LINEAR, init_lora_weights=init))
    with pytest.raises(SteerError, match=f"init_lora_weights='{init}' moves a part of the base's weights"):
        live_parameters(model)
