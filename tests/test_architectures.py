from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from architectures import EXPERTS, FAMILIES, GPT, IDS, tiny
from weightsteer.run_card import RunCard
from weightsteer.training.lora_targets import lora_targets
from weightsteer.vectors.delta import Delta, to_dense
from weightsteer.vectors.difference import task_vector
from weightsteer.vectors.low_rank import LowRank
from weightsteer.vectors.weight_vector import WeightVector


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(IDS).logits


def shifted(family: str, deltas: dict[str, Delta], k: float) -> Tensor:
    """Logits of another copy of the model, with k delta added to its parameters."""
    model = tiny(family)
    with torch.no_grad():
        for name, delta in deltas.items():
            model.get_parameter(name).add_(k * to_dense(delta))
    return logits(model)


def dense_changes(model: PreTrainedModel) -> dict[str, Delta]:
    """A random change of every parameter, about as large as a twentieth of it."""
    g = torch.Generator().manual_seed(1)
    return {
        name: 0.05 * parameter.abs().mean().clamp(min=0.1) * torch.randn(parameter.shape, generator=g)
        for name, parameter in model.named_parameters()
    }


def factored_changes(model: PreTrainedModel) -> dict[str, Delta]:
    """Random factors for every matrix."""
    g = torch.Generator().manual_seed(2)
    found: dict[str, Delta] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and name.endswith(".weight"):
            turned = isinstance(model.get_submodule(name.removesuffix(".weight")), Conv1D)
            B, A = (torch.randn(size, generator=g) for size in ((parameter.shape[0], 2), (2, parameter.shape[1])))
            found[name] = LowRank(0.05 * B, 0.2 * A, "conv1d" if turned else "linear")
    return found


def close(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_steered_as_if_it_had_been_changed(family: str) -> None:
    """Attention, MLPs, norms, biases, embeddings, heads, experts, routers, convolutions, decays: all at once."""
    model = tiny(family)
    before = logits(model)
    weights = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    for deltas in (dense_changes(model), factored_changes(model)):
        vector = WeightVector(deltas, RunCard("vector"))
        with vector.applied(model, 0.0) as handle:
            assert torch.equal(logits(model), before)
            handle.k = 1.5
            steered = logits(model)
        assert close(steered, shifted(family, deltas, 1.5))
        assert not close(steered, before)
        assert torch.equal(logits(model), before)
    for name, parameter in model.named_parameters():
        same, values = weights[name]
        assert parameter is same
        assert torch.equal(parameter, values)


@pytest.mark.parametrize(
    "family", ["gemma3", "bloom", "llama4", "phimoe", "deepseek-v3", "mamba", "jamba", "falcon-mamba"]
)
def test_each_matrix_alone_is_steered_as_if_it_had_been_changed(family: str) -> None:
    """A layer whose weight is read without a call, a router that gives a tuple: none hides behind the others."""
    model = tiny(family)
    for name, delta in factored_changes(model).items():
        with WeightVector({name: delta}, RunCard("vector")).applied(model, 1.5):
            assert close(logits(model), shifted(family, {name: delta}, 1.5)), name


PARTLY = ("deepseek-v2", "qwen3-next", "mamba", "mamba2", "falcon-mamba", "falcon-h1")  # experts, and what PEFT refuses


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in (*EXPERTS, *PARTLY)])
def test_without_experts_lora_trains_all_linear_layers(family: str) -> None:
    assert lora_targets(tiny(family)) == "all-linear"


@pytest.mark.parametrize("family", EXPERTS)
def test_on_experts_lora_trains_plain_linear_layers_alone(family: str) -> None:
    """What is trained has the form B A for one layer, and changes the model as PEFT's adapter does."""
    model = tiny(family)
    with pytest.warns(UserWarning, match=r"LoRA leaves out .*experts\.gate_up_proj"):
        targets = lora_targets(model)
    before = logits(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    trained = {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    assert trained
    assert all(type(layer.get_base_layer()) is torch.nn.Linear for layer in trained.values())
    expected = logits(adapted)
    deltas: dict[str, Delta] = {
        f"{name}.weight": LowRank(
            layer.lora_B["default"].weight.detach() * layer.scaling["default"], layer.lora_A["default"].weight.detach()
        )
        for name, layer in trained.items()
    }
    plain = adapted.unload()
    assert torch.equal(logits(plain), before)
    with WeightVector(deltas, RunCard("vector")).applied(plain, 1.0):
        assert close(logits(plain), expected)


def test_conv1d_beside_linear_is_read_as_it_was_saved(tmp_path: Path) -> None:
    """GPT-2 with a head of its own: the config has one flag for both kinds of module."""
    base: PreTrainedModel = GPT2LMHeadModel(GPT2Config(**GPT, tie_word_embeddings=False))
    base.save_pretrained(tmp_path / "base")
    peft = get_peft_model(base, LoraConfig(r=2, target_modules=["c_attn", "lm_head"]))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.1)
    peft.save_pretrained(tmp_path / "a")
    tau = task_vector(tmp_path / "a", base=tmp_path / "base")
    tau.save(tmp_path / "v")
    assert (WeightVector.load(tmp_path / "v") - tau).norm() == 0.0


def test_a_square_copy_of_conv1d_keeps_its_orientation(tmp_path: Path) -> None:
    base = tiny("gpt2")
    base.save_pretrained(tmp_path / "base")
    peft = get_peft_model(base, LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["attn.c_proj"]))
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    peft.save_pretrained(tmp_path / "a")
    tau = task_vector(tmp_path / "a", base=tmp_path / "base")
    whole = tau.truncate(energy=1.0)
    whole.save(tmp_path / "v")
    assert (WeightVector.load(tmp_path / "v") - tau).norm() < 1e-5 * tau.norm()
