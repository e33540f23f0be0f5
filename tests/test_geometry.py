from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import random_vector, tiny_lm
from weightsteer.run_card import RunCard
from weightsteer.vectors.geometry import balance, effective_rank, geometry, overlap
from weightsteer.vectors.low_rank import LowRank
from weightsteer.vectors.weight_vector import WeightVector


def one(B: torch.Tensor, A: torch.Tensor) -> WeightVector:
    return WeightVector({"m.layers.0.mlp.up_proj.weight": LowRank(B, A)}, RunCard("vector"))


def test_shares_of_energy_add_up_and_match_the_norms() -> None:
    vector = random_vector(tiny_lm(), seed=3)
    found = geometry(vector)
    assert found.norm == pytest.approx(vector.norm())
    assert math.fsum(found.by_layer.values()) == pytest.approx(1.0)
    assert math.fsum(found.by_module.values()) == pytest.approx(1.0)
    assert found.by_layer[1] == pytest.approx(vector.filter(layers="1").norm() ** 2 / vector.norm() ** 2)
    assert found.rank == 3


@given(scale=st.floats(0.01, 100.0), rank=st.integers(1, 6))
def test_equal_singular_values_have_an_effective_rank_of_their_number(scale: float, rank: int) -> None:
    assert effective_rank(torch.full((rank,), scale, dtype=torch.float64)) == pytest.approx(rank)
    found = geometry(one(torch.eye(9)[:, :rank] * scale, torch.eye(rank, 7)))
    assert found.effective_rank == pytest.approx(rank, rel=1e-5)
    assert found.first_share == pytest.approx(1.0 / rank, rel=1e-5)


def test_dense_deltas_count_in_the_energy_and_have_no_rank() -> None:
    name = "m.layers.0.norm.weight"
    found = geometry(WeightVector({name: torch.ones(4)}, RunCard("vector")))
    assert (found.norm, found.effective_rank, found.by_module) == (2.0, None, {"norm": 1.0})
    nothing = geometry(WeightVector({name: torch.zeros(4)}, RunCard("vector")))
    assert (nothing.norm, nothing.by_module) == (0.0, {"norm": 0.0})


def test_balance_of_a_side_and_its_opposite() -> None:
    tau = random_vector(tiny_lm())
    both = balance(tau * 3.0, -tau)
    assert both.cosine == pytest.approx(1.0, abs=1e-6)
    assert both.asymmetry == pytest.approx(0.5)


def test_overlap_is_one_with_itself_and_zero_for_orthogonal_directions() -> None:
    vector = random_vector(tiny_lm())
    same = overlap(vector, vector * -2.0, energy=1.0)
    assert (same.outputs, same.inputs) == pytest.approx((1.0, 1.0))
    eye = torch.eye(8)
    apart = overlap(one(eye[:, :2], eye[:2]), one(eye[:, 4:6], eye[1:3]), energy=1.0)
    assert apart.outputs == pytest.approx(0.0, abs=1e-12)
    assert apart.inputs == pytest.approx(0.5)


def test_the_overlap_of_random_directions_is_about_chance() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw() -> WeightVector:
        return one(torch.randn(200, 5, generator=generator), torch.randn(5, 100, generator=generator))

    found = [overlap(draw(), draw(), energy=1.0) for _ in range(40)]
    assert sum(o.outputs for o in found) / 40 == pytest.approx(found[0].chance_outputs, rel=0.2)
    assert sum(o.inputs for o in found) / 40 == pytest.approx(found[0].chance_inputs, rel=0.2)
