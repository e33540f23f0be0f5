from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import random_vector, tiny_lm
from weightsteer.errors import SteerError
from weightsteer.run_card import RunCard
from weightsteer.vectors.delta import to_dense
from weightsteer.vectors.low_rank import LowRank
from weightsteer.vectors.reshape import truncate_deltas
from weightsteer.vectors.weight_vector import WeightVector

seeds = st.integers(0, 50)


def random_deltas(seed: int) -> WeightVector:
    """Factored and dense parts in three layers and outside the blocks."""
    g = torch.Generator().manual_seed(seed)
    low = {
        f"model.layers.{i}.mlp.up_proj.weight": LowRank(torch.randn(7, 4, generator=g), torch.randn(4, 5, generator=g))
        for i in range(3)
    }
    whole = {
        "model.layers.1.self_attn.q_proj.weight": torch.randn(6, 5, generator=g),
        "model.layers.2.input_layernorm.weight": torch.randn(5, generator=g),
        "model.embed_tokens.weight": torch.randn(9, 5, generator=g),
    }
    return WeightVector({**low, **whole}, RunCard("vector"))


def test_filter_keeps_layers_and_modules() -> None:
    w = random_deltas(0)
    assert list(w.filter(layers="1-2", modules="mlp").deltas) == [
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.2.mlp.up_proj.weight",
    ]
    assert list(w.filter(layers={1}).deltas) == list(w.filter(layers="1").deltas)
    assert list(w.filter(modules=["self_attn.q_proj"]).deltas) == ["model.layers.1.self_attn.q_proj.weight"]
    assert list(w.filter(modules="embed_tokens").deltas) == ["model.embed_tokens.weight"]
    with pytest.raises(SteerError, match="no parameter.*layers 0 to 2"):
        w.filter(layers="7")
    with pytest.raises(SteerError, match="numbers and ranges"):
        w.filter(layers="a-b")


@given(seeds, st.integers(0, 2))
def test_the_parts_of_a_filter_add_up(seed: int, layer: int) -> None:
    w = random_deltas(seed)
    part = w.filter(layers={layer})
    assert part.dot(w - part) == pytest.approx(0.0, abs=1e-9)
    assert ((w - part) + part - w).norm() == pytest.approx(0.0, abs=1e-6)


@given(seeds, st.integers(1, 5))
def test_truncation_is_the_best_of_its_rank_and_tells_its_error(seed: int, rank: int) -> None:
    w = random_deltas(seed)
    short = w.truncate(rank=rank)
    lost = 0.0
    for name, delta in w.deltas.items():
        if len(delta.shape) == 2 and "layers" in name:
            assert isinstance(short.deltas[name], LowRank)
            lost += float(torch.linalg.svdvals(to_dense(delta).double())[rank:].square().sum())
        else:
            assert torch.equal(to_dense(short.deltas[name]), to_dense(delta))
    assert (short - w).norm() == pytest.approx(math.sqrt(lost), abs=1e-4)
    assert short.card.measured["truncation_error"] == pytest.approx(math.sqrt(lost) / w.norm(), abs=1e-6)


@given(seeds, st.floats(0.05, 1.0))
def test_truncation_by_energy_holds_it_with_the_smallest_rank(seed: int, energy: float) -> None:
    delta = random_deltas(seed).deltas["model.layers.0.mlp.up_proj.weight"]
    kept, _ = truncate_deltas({"layers.0.weight": delta}, None, energy)
    short = kept["layers.0.weight"]
    assert isinstance(short, LowRank)
    s = torch.linalg.svdvals(to_dense(delta).double()).square()
    assert float(s[: short.rank].sum() / s.sum()) >= energy - 1e-6
    assert float(s[: short.rank - 1].sum() / s.sum()) < energy


@pytest.mark.parametrize("options", [{}, {"rank": 1, "energy": 0.5}, {"rank": 0}, {"energy": 0.0}, {"energy": 1.5}])
def test_truncation_by_nonsense_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(SteerError, match="truncate"):
        random_deltas(0).truncate(**options)  # type: ignore[arg-type]


@given(seeds, seeds)
def test_what_is_projected_out_is_gone(s1: int, s2: int) -> None:
    x, y = random_deltas(s1), random_deltas(s2)
    left = x.project_out(y)
    assert left.dot(y) == pytest.approx(0.0, abs=1e-4 * x.norm() * y.norm())
    assert left.norm() ** 2 == pytest.approx(x.norm() ** 2 - (x.dot(y) / y.norm()) ** 2, abs=1e-3 * x.norm() ** 2)
    with pytest.raises(SteerError, match="zero"):
        x.project_out(x - x)


@given(seeds, st.floats(-2, 2), st.floats(-2, 2))
def test_lines_grows_with_depth(seed: int, alpha: float, beta: float) -> None:
    w = random_deltas(seed)
    scaled = w.scale_by_depth(alpha, beta)
    factors = {"layers.0": alpha, "layers.1": alpha + beta / 2, "layers.2": alpha + beta, "embed": alpha}
    for name, delta in w.deltas.items():
        factor = next(f for part, f in factors.items() if part in name)
        torch.testing.assert_close(to_dense(scaled.deltas[name]), to_dense(delta) * factor, atol=1e-5, rtol=1e-5)


@given(seeds, st.floats(0, 1))
def test_boosting_raises_the_tail_of_the_spectrum(seed: int, beta: float) -> None:
    w = random_deltas(seed)
    for name, delta in w.boost_subspace(beta).deltas.items():
        if len(delta.shape) != 2:
            assert torch.equal(to_dense(delta), to_dense(w.deltas[name]))
            continue
        before, after = (torch.linalg.svdvals(to_dense(d).double()) for d in (w.deltas[name], delta))
        cut = int((torch.cumsum(before, 0) / before.sum() >= beta - 1e-9).nonzero()[0])
        present = before > 1e-5  # a factored delta's rank does not grow
        expected = torch.where(present, before.clamp(min=float(before[cut])), before)
        torch.testing.assert_close(after, expected, atol=1e-4, rtol=1e-3)


@given(seeds)
def test_boosting_by_everything_changes_nothing(seed: int) -> None:
    """beta = 1 reaches the last singular value, even where the shares add up to a little less than 1."""
    w = random_deltas(seed)
    assert (w.boost_subspace(1.0) - w).norm() == pytest.approx(0.0, abs=1e-4)


def test_boost_keeps_what_is_zero_at_zero() -> None:
    zero = WeightVector({"a.weight": LowRank(torch.zeros(3, 2), torch.zeros(2, 3))}, RunCard("vector"))
    assert zero.boost_subspace(0.5).norm() == 0.0
    with pytest.raises(SteerError, match="beta"):
        zero.boost_subspace(2.0)


def test_reshaped_vectors_steer() -> None:
    lm = tiny_lm()
    w = random_vector(lm)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        base = lm.model(ids).logits
        for changed in (w.truncate(rank=1), w.filter(layers="0"), w.scale_by_depth(0.5, 1.0), w.boost_subspace(0.2)):
            with changed.applied(lm, 1.0):
                assert not torch.equal(lm.model(ids).logits, base)
        assert torch.equal(lm.model(ids).logits, base)


def test_what_is_no_number_is_named_by_its_parameter() -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    broken = WeightVector({name: torch.full((4, 3), math.nan)}, RunCard("vector"))
    with pytest.raises(SteerError, match=rf"{name}.*(NaN|finite)"):
        truncate_deltas(broken.deltas, 1, None)
    with pytest.raises(SteerError, match=rf"{name}.*(NaN|finite)"):
        to_dense(broken.boost_subspace(0.5).deltas[name])
