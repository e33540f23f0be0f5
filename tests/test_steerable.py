from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from architectures import IDS, tiny
from conftest import random_vector, tiny_lm, tiny_model
from weightsteer.errors import SteerError
from weightsteer.lm import LM
from weightsteer.run_card import RunCard
from weightsteer.vectors.delta import Delta
from weightsteer.vectors.low_rank import LowRank
from weightsteer.vectors.steerable import model_of
from weightsteer.vectors.weight_vector import WeightVector


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(IDS).logits
    return found


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """torch.compile as a user finds it, hooks unguarded; as it was afterwards."""
    config = torch._dynamo.config
    before, config.skip_nnmodule_hook_guards = config.skip_nnmodule_hook_guards, True
    torch._dynamo.reset()
    yield
    config.skip_nnmodule_hook_guards = before
    torch._dynamo.reset()


@pytest.mark.parametrize("dense", [False, True])
def test_a_compiled_model_is_steered_whenever_it_was_compiled(fresh_compiler: None, dense: bool) -> None:
    lm = tiny_lm(layers=1)
    vector = random_vector(lm)
    if dense:
        vector = WeightVector({"model.norm.weight": torch.linspace(-1, 1, 32)}, RunCard("vector"))
    base = logits(lm.model)
    expected = {}
    for k in (1.0, -2.0):
        with vector.applied(lm, k):
            expected[k] = logits(lm.model)
    compiled = torch.compile(lm.model, backend="eager")
    assert isinstance(compiled, nn.Module)
    first = logits(compiled)
    for target in (lm, compiled):
        with vector.applied(target, 1.0) as handle:
            torch.testing.assert_close(logits(compiled), expected[1.0])
            handle.k = -2.0
            torch.testing.assert_close(logits(compiled), expected[-2.0])
            handle.k = 0.0
            assert torch.equal(logits(compiled), first)
        assert torch.equal(logits(compiled), first)
    torch.testing.assert_close(first, base)


def test_a_model_that_is_compiled_inside_the_block_forgets_the_vector(fresh_compiler: None) -> None:
    lm = tiny_lm(layers=1)
    base = logits(lm.model)
    with random_vector(lm).applied(lm, 1.0):
        steered = logits(lm.model)
        lm.model.compile(backend="eager")
        torch.testing.assert_close(logits(lm.model), steered)
    torch.testing.assert_close(logits(lm.model), base)


class Wrapper(nn.Module):
    """Has the model under the name that DDP gives it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_wrappers_are_looked_through(lm: LM) -> None:
    model = lm.model
    vector, base = random_vector(lm), logits(model)
    with vector.applied(lm, 1.0):
        expected = logits(model)
    compiled = torch.compile(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    for wrapped in (Wrapper(model), compiled, adapted, Wrapper(adapted)):
        assert isinstance(wrapped, nn.Module)
        assert model_of(wrapped) is model
        with vector.applied(wrapped, 1.0):
            torch.testing.assert_close(logits(model), expected)
    adapted.unload()
    blocks = model.get_submodule("model.layers")
    assert isinstance(blocks, nn.ModuleList)
    blocks[0] = torch.compile(blocks[0], backend="eager")  # type: ignore[assignment]  # its parameters get `_orig_mod`
    with vector.applied(model, 1.0):
        torch.testing.assert_close(logits(model), expected)
    torch.testing.assert_close(logits(model), base)


def test_both_copies_of_a_module_that_peft_trains_are_steered() -> None:
    model = tiny_model(tied=False)
    deltas: dict[str, Delta] = {"lm_head.weight": LowRank(torch.ones(259, 1), torch.ones(1, 32))}
    vector = WeightVector(deltas, RunCard("vector"))
    with vector.applied(model, 0.1):
        expected = logits(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with vector.applied(adapted, 0.1):
        torch.testing.assert_close(logits(adapted), expected)
        with adapted.disable_adapter():
            torch.testing.assert_close(logits(adapted), expected)


def test_two_names_of_one_parameter_are_an_error(lm: LM) -> None:
    (name, delta), *_ = random_vector(lm).deltas.items()
    shared = tiny_lm()
    layers = shared.model.get_submodule("model.layers")
    assert isinstance(layers, nn.ModuleList)
    layers[1] = layers[0]
    twice: dict[str, Delta] = {name: delta, name.replace("layers.0", "layers.1"): delta}
    with pytest.raises(SteerError, match="are one parameter"), WeightVector(twice, RunCard("v")).applied(shared, 1.0):
        pass


def test_another_thread_may_not_steer_the_same_model(lm: LM, vector: WeightVector) -> None:
    found: list[str] = []

    def steer_too() -> None:
        try:
            with vector.applied(lm, 1.0):
                found.append("steered")
        except SteerError as error:
            found.append(str(error))

    base = logits(lm.model)
    with vector.applied(lm, 1.0):
        alone = logits(lm.model)
        with vector.applied(lm, -1.0):  # nested in one thread, blocks add up
            torch.testing.assert_close(logits(lm.model), base, atol=1e-4, rtol=1e-4)
        thread = threading.Thread(target=steer_too)
        thread.start()
        thread.join()
        assert torch.equal(logits(lm.model), alone)
    thread = threading.Thread(target=steer_too)
    thread.start()
    thread.join()
    assert "another thread" in found[0]
    assert found[1:] == ["steered"]


def test_offloaded_layers_are_hooked_and_offloaded_norms_refused(lm: LM, vector: WeightVector) -> None:
    with vector.applied(lm, 1.0):
        expected = logits(lm.model)
    offloaded = cpu_offload(tiny_model(), torch.device("cpu"))
    with vector.applied(offloaded, 1.0):
        torch.testing.assert_close(logits(offloaded), expected)
    norm = WeightVector({"model.norm.weight": torch.ones(32)}, RunCard("vector"))
    with pytest.raises(SteerError, match=r"model\.norm\.weight: can only be changed in its place.*offloaded"):
        norm.applied(offloaded, 1.0).__enter__()


@pytest.mark.parametrize("family", ["opt", "llama4", "qwen2-moe", "deepseek-v3", "bloom"])
def test_one_k_per_row_where_layers_see_all_tokens_as_one_list(family: str) -> None:
    model = tiny(family)
    g = torch.Generator().manual_seed(5)
    called = {
        name: LowRank(0.1 * torch.randn(p.shape[0], 2, generator=g), torch.randn(2, p.shape[1], generator=g))
        for name, p in model.named_parameters()
        if p.ndim == 2
        and name.endswith(("fc1.weight", "fc2.weight", "up_proj.weight", "q_proj.weight", "h_to_4h.weight"))
    }
    assert called
    vector = WeightVector(called, RunCard("vector"))
    with vector.applied(model, torch.tensor([-1.0, 2.0])) as handle:
        both = logits(model)
        for row, k in enumerate((-1.0, 2.0)):
            handle.k = k
            torch.testing.assert_close(both[row], logits(model)[row], atol=1e-4, rtol=1e-4)
        handle.k = torch.ones(IDS.numel())  # as many as there are tokens
        with pytest.raises(SteerError, match="2 rows"):
            logits(model)


def test_one_k_per_row_is_refused_where_rows_are_mixed() -> None:
    experts = "model.layers.0.mlp.experts.gate_up_proj"
    model = tiny("mixtral")
    change = WeightVector({experts: torch.ones(model.get_parameter(experts).shape)}, RunCard("vector"))
    with pytest.raises(SteerError, match="one k per row is not possible"), change.applied(model, torch.ones(2)):
        pass
    lm = tiny_lm(tied=False)
    head = WeightVector({"lm_head.weight": LowRank(torch.ones(259, 1), torch.ones(1, 32))}, RunCard("vector"))
    with head.applied(lm, torch.ones(2)):
        assert lm.model(IDS).logits.shape[0] == 2
        with pytest.raises(SteerError, match="give one number"):  # beams: more rows than ks
            lm.model.generate(IDS, num_beams=2, max_new_tokens=2, do_sample=False)  # type: ignore[operator]


@pytest.mark.parametrize("k", [float("nan"), float("inf"), torch.tensor([0.0, float("nan")]), torch.ones(2, 2)])
def test_a_strength_is_a_finite_number_or_one_for_each_row(lm: LM, vector: WeightVector, k: float | Tensor) -> None:
    with pytest.raises(SteerError, match=r"expected (a )?finite number|give one number"), vector.applied(lm, k):
        pass


def test_factors_are_turned_to_fit_the_module() -> None:
    """PEFT goes by the module's kind: fan_in_fan_out of a plain linear layer means nothing."""
    lm, gpt2 = tiny_lm(), tiny("gpt2")
    A, B = torch.randn(2, 32), torch.randn(32, 2)
    name = "model.layers.0.self_attn.q_proj.weight"
    with WeightVector({name: LowRank(B, A)}, RunCard("vector")).applied(lm, 1.0):
        expected = logits(lm.model)
    with WeightVector({name: LowRank(A.T, B.T, "conv1d")}, RunCard("vector")).applied(lm, 1.0):
        torch.testing.assert_close(logits(lm.model), expected)
    wide, name = torch.randn(96, 2), "transformer.h.0.attn.c_attn.weight"
    with WeightVector({name: LowRank(A.T, wide.T, "conv1d")}, RunCard("vector")).applied(gpt2, 1.0):
        expected = logits(gpt2)
    with WeightVector({name: LowRank(wide, A)}, RunCard("vector")).applied(gpt2, 1.0):
        torch.testing.assert_close(logits(gpt2), expected)
