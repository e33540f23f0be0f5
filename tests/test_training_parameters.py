from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from architectures import tiny
from weightsteer.errors import SteerError
from weightsteer.monitor.live import watched_parameters
from weightsteer.run_card import RunCard
from weightsteer.vectors.delta import Delta
from weightsteer.vectors.weight_vector import WeightVector

ADAPTERS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"target_modules": "all-linear", "use_rslora": True}),
    ("llama", {"target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["lm_head"]}),
    ("gpt2", {"target_modules": "all-linear"}),
    ("qwen2-tied", {"target_modules": ["q_proj"], "bias": "all"}),
    ("mixtral", {"target_modules": "all-linear"}),
    ("qwen3-moe", {"target_modules": "all-linear"}),
    ("gpt-oss", {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    ("llama4", {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}),
]


def adapted(model: PreTrainedModel, options: dict[str, Any]) -> Any:
    """The model with a random adapter on it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, LoraConfig(r=3, lora_alpha=7, **options))


def moved(model: nn.Module) -> None:
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=g))


def merged_change(family: str, trained: Any) -> dict[str, Tensor]:
    """What PEFT's own merge changes of each parameter, in float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        after = dict(copy.deepcopy(trained).double().merge_and_unload().named_parameters())
    before = {name: parameter.double() for name, parameter in tiny(family).named_parameters()}
    change = {name: (after[name] - before[name]).detach() for name in before}
    return {name: tau for name, tau in change.items() if float(tau.abs().max()) > 1e-6}


@pytest.mark.parametrize(("family", "options"), ADAPTERS)
def test_what_trains_has_the_numbers_of_pefts_merge(family: str, options: dict[str, Any]) -> None:
    """<tau, tau> and <tau, v> of every parameter, whatever form the training gives it."""
    g = torch.Generator().manual_seed(4)
    changes: dict[str, Delta] = {name: torch.randn(p.shape, generator=g) for name, p in tiny(family).named_parameters()}
    vectors = {"v": WeightVector(changes, RunCard("vector"))}
    model = adapted(tiny(family), options)
    watched = watched_parameters(model, vectors)
    moved(model)
    expected = merged_change(family, model)
    live = {w.name: w for w in watched if w.live is not None}
    assert expected.keys() <= live.keys()
    for name, one in live.items():
        tau = expected.get(name, torch.zeros(one.shape, dtype=torch.float64))
        assert tuple(one.shape) == tuple(tau.shape)
        square, product = one.products().tolist()
        assert square == pytest.approx(float(tau.square().sum()), rel=1e-4, abs=1e-9)
        delta = changes[name]
        assert isinstance(delta, Tensor)
        assert product == pytest.approx(float((tau * delta.double()).sum()), rel=1e-3, abs=1e-4)


def test_what_no_vector_changes_counts_in_the_norm_alone() -> None:
    model = adapted(tiny("mixtral"), {"target_modules": "all-linear"})
    name = "model.layers.0.self_attn.q_proj.weight"
    watched = watched_parameters(model, {"v": WeightVector({name: torch.ones(32, 32)}, RunCard("vector"))})
    moved(model)
    experts = next(w for w in watched if w.name == "model.layers.0.mlp.experts.down_proj")
    square, product = experts.products().tolist()
    tau = merged_change("mixtral", model)[experts.name]
    assert square == pytest.approx(float(tau.square().sum()), rel=1e-4)
    assert product == 0.0


def test_what_cannot_be_read_is_named_and_left_out() -> None:
    vector = WeightVector({"model.layers.0.self_attn.q_proj.weight": torch.ones(32, 32)}, RunCard("vector"))
    dora = adapted(tiny("llama"), {"target_modules": ["q_proj"], "use_dora": True, "modules_to_save": ["lm_head"]})
    with (
        pytest.warns(UserWarning, match=r"leaves out model\.layers\.0\.self_attn\.q_proj\.weight and 1 more"),
        pytest.raises(SteerError, match=r"no parameter in common"),
    ):
        watched_parameters(dora, {"v": vector})
    alone = adapted(tiny("llama"), {"target_modules": ["q_proj"], "use_dora": True})
    with pytest.warns(UserWarning, match="leaves out"), pytest.raises(SteerError, match="can be read"):
        watched_parameters(alone, {"v": vector})


def test_names_are_the_bases_whatever_wraps_the_model() -> None:
    model = adapted(tiny("llama"), {"target_modules": ["q_proj"]})
    vector = WeightVector({"model.layers.0.self_attn.q_proj.weight": torch.ones(32, 32)}, RunCard("vector"))
    for wrapped in (model, torch.compile(model), nn.Sequential()):
        if isinstance(wrapped, nn.Sequential):
            wrapped.add_module("module", model)
        assert isinstance(wrapped, nn.Module)
        names = {w.name for w in watched_parameters(wrapped, {"v": vector})}
        assert names == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)}
