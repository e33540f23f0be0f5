from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from conftest import random_vector, tiny_lm
from weightsteer.errors import SteerError
from weightsteer.lm import LM
from weightsteer.run_card import RunCard
from weightsteer.vectors.low_rank import LowRank
from weightsteer.vectors.weight_vector import WeightVector

IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5], [3, 3, 3, 4, 4]])


@torch.no_grad()
def logits(lm: LM, ids: torch.Tensor = IDS) -> torch.Tensor:
    return lm.model(ids).logits


def merged(lm: LM, vector: WeightVector, k: float) -> LM:
    """theta + k w by the definition, in float64 before the one rounding."""
    copy = tiny_lm()
    copy.model.load_state_dict(lm.model.state_dict())
    with torch.no_grad():
        for name, delta in vector.deltas.items():
            full = delta.B.double() @ delta.A.double() if isinstance(delta, LowRank) else delta.double()
            parameter = copy.model.get_parameter(name)
            parameter.copy_(parameter.double() + k * full)
    return copy


def dense_everywhere(lm: LM, seed: int = 1) -> WeightVector:
    """Dense changes on norms, embeddings and linear layers."""
    g = torch.Generator().manual_seed(seed)
    deltas = {n: 0.02 * torch.randn(p.shape, generator=g) for n, p in lm.model.named_parameters()}
    return WeightVector(deltas, RunCard("vector"))


@pytest.mark.parametrize("make", [random_vector, dense_everywhere])
def test_zero_is_the_base_bit_for_bit_and_leaving_restores_every_bit(make) -> None:  # type: ignore[no-untyped-def]
    lm = tiny_lm()
    vector, before = make(lm), logits(lm)
    weights = {n: (p, p.clone()) for n, p in lm.model.named_parameters()}
    with vector.applied(lm, 0.0) as handle:
        assert torch.equal(logits(lm), before)
        handle.k = 1.5
        assert not torch.equal(logits(lm), before)
        handle.k = 0.0
        assert torch.equal(logits(lm), before)
    with pytest.raises(RuntimeError, match="inside"), vector.applied(lm, 2.0):
        raise RuntimeError("inside")
    assert torch.equal(logits(lm), before)
    for name, parameter in lm.model.named_parameters():
        same, values = weights[name]
        assert parameter is same
        assert torch.equal(parameter, values)
    assert not any(m._forward_hooks for m in lm.model.modules())


@pytest.mark.parametrize("make", [random_vector, dense_everywhere])
@pytest.mark.parametrize("k", [-2.0, 0.5, 3.0])
def test_hook_equals_merged_weights(make, k: float) -> None:  # type: ignore[no-untyped-def]
    lm = tiny_lm()
    vector = make(lm)
    expected = logits(merged(lm, vector, k))
    with vector.applied(lm, k):
        torch.testing.assert_close(logits(lm), expected, atol=2e-4, rtol=1e-4)


@given(st.lists(st.floats(-3, 3), min_size=3, max_size=3))
def test_one_k_per_row_equals_each_row_alone(ks: list[float]) -> None:
    lm = tiny_lm()
    vector = random_vector(lm)
    with vector.applied(lm, torch.tensor(ks)) as handle:
        fan = logits(lm)
        for row, k in enumerate(ks):
            handle.k = k
            torch.testing.assert_close(fan[row], logits(lm, IDS[row : row + 1])[0], atol=1e-4, rtol=1e-4)


def test_wrong_number_of_rows_is_an_error(lm: LM, vector: WeightVector) -> None:
    with vector.applied(lm, torch.tensor([1.0, 2.0])), pytest.raises(SteerError, match="3 rows"):
        logits(lm)
    norms = WeightVector({"model.norm.weight": torch.ones(32)}, RunCard("vector"))
    with pytest.raises(SteerError, match="one k per row"), norms.applied(lm, torch.tensor([1.0, 2.0, 3.0])):
        pass


def test_two_vectors_at_once_are_their_sum(lm: LM) -> None:
    x, y = random_vector(lm, seed=1), random_vector(lm, seed=2)
    with x.applied(lm, 0.8), y.applied(lm, -0.5):
        both = logits(lm)
    with (0.8 * x - 0.5 * y).applied(lm, 1.0):
        torch.testing.assert_close(both, logits(lm), atol=1e-4, rtol=1e-4)


def test_a_bias_that_the_base_lacks_is_added(lm: LM) -> None:
    bias = torch.linspace(-1, 1, 32)
    vector = WeightVector({"model.layers.0.mlp.down_proj.bias": bias}, RunCard("vector"))
    other = tiny_lm()
    other.model.model.layers[0].mlp.down_proj.bias = torch.nn.Parameter(2.0 * bias)
    with vector.applied(lm, 2.0):
        torch.testing.assert_close(logits(lm), logits(other), atol=1e-5, rtol=1e-5)


def test_another_model_is_an_error_that_names_the_tensor(vector: WeightVector) -> None:
    shallow = tiny_lm(layers=1)
    with pytest.raises(SteerError, match=r"model\.layers\.1\..*no such parameter"), vector.applied(shallow, 1.0):
        pass
    name = next(iter(vector.deltas))
    wrong = WeightVector({name: LowRank(torch.ones(7, 1), torch.ones(1, 5))}, vector.card)
    with pytest.raises(SteerError, match=r"shape \(7, 5\), this model has"), wrong.applied(tiny_lm(), 1.0):
        pass
    assert not any(m._forward_hooks for m in shallow.model.modules())


def test_quantised_weights_are_steered_as_the_same_change(lm: LM, vector: WeightVector) -> None:
    quantised = tiny_lm()
    model = torch.ao.quantization.quantize_dynamic(quantised.model, {torch.nn.Linear}, dtype=torch.qint8)
    holder = LM(model, lm.tokenizer, "quantised")
    name = "model.layers.1.mlp.down_proj"
    delta = vector.deltas[f"{name}.weight"]
    assert isinstance(delta, LowRank)
    layer, x = model.get_submodule(name), torch.randn(2, 48)
    plain = layer(x)
    with vector.applied(holder, 1.5):
        torch.testing.assert_close(layer(x), plain + 1.5 * x @ delta.A.T @ delta.B.T)
    assert torch.equal(layer(x), plain)


def test_gradients_through_the_hook_are_those_of_merged_weights(lm: LM, vector: WeightVector) -> None:
    other = merged(lm, vector, 1.5)
    other.model(IDS).logits.square().mean().backward()
    with vector.applied(lm, 1.5):
        lm.model(IDS).logits.square().mean().backward()
    for name, parameter in lm.model.named_parameters():
        torch.testing.assert_close(parameter.grad, other.model.get_parameter(name).grad, atol=1e-4, rtol=1e-3)


def test_norms_and_embeddings_take_one_vector_at_a_time(lm: LM) -> None:
    dense = WeightVector({"model.norm.weight": torch.ones(32)}, RunCard("vector"))
    before = logits(lm)
    for k in (0.0, 1.0):
        with dense.applied(lm, k), pytest.raises(SteerError, match="apply the sum"), dense.applied(lm, 1.0):
            pass
        assert torch.equal(logits(lm), before)


def test_a_bias_of_another_shape_is_an_error(lm: LM) -> None:
    wrong = WeightVector({"model.layers.0.mlp.down_proj.bias": torch.ones(7)}, RunCard("vector"))
    with pytest.raises(SteerError, match=r"shape \(7,\), this model has \(32,\)"), wrong.applied(lm, 1.0):
        pass


def test_an_lm_its_model_and_a_peft_model_are_steered_alike(lm: LM, vector: WeightVector) -> None:
    """The same logits whatever is passed; adapters of a PeftModel stay in effect, under k = 0 bit for bit."""
    ids = torch.tensor([[4, 5, 6, 7]])
    with torch.no_grad():
        with vector.applied(lm, k=1.5):
            expected = lm.model(ids).logits
        with vector.applied(lm.model, k=1.5) as handle:
            assert torch.equal(lm.model(ids).logits, expected)
            assert handle.k == 1.5
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        adapted = get_peft_model(lm.model, config)
        alone = adapted(ids).logits
        with vector.applied(adapted, k=0.0) as handle:
            assert torch.equal(adapted(ids).logits, alone)
            handle.k = 1.5
            steered = adapted(ids).logits
            with adapted.disable_adapter():
                torch.testing.assert_close(adapted(ids).logits, expected)
        assert not torch.allclose(steered, alone)
        assert not torch.allclose(steered, expected)
        assert torch.equal(adapted(ids).logits, alone)
        merged = adapted.merge_and_unload()
        with vector.applied(merged, k=1.5):
            torch.testing.assert_close(merged(ids).logits, steered, atol=1e-4, rtol=1e-4)


def test_a_model_of_another_kind_is_named() -> None:
    with pytest.raises(SteerError, match=r"this model \(Linear\) has no such parameter"):
        random_vector(tiny_lm()).applied(torch.nn.Linear(2, 2), 1.0).__enter__()


@pytest.mark.parametrize("wrong", ["x", None, [1, 2], torch.ones(2).numpy()])
def test_a_k_of_another_kind_is_refused_and_changes_nothing(wrong: object) -> None:
    lm = tiny_lm()
    with random_vector(lm).applied(lm, 2.0) as handle:
        before = logits(lm)
        with pytest.raises(SteerError, match="k: expected a number, or a tensor"):
            handle.k = wrong  # type: ignore[assignment]
        assert handle.k == 2.0
        assert torch.equal(logits(lm), before)
