from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from weightsteer.export.rounding import Dither, default_rounding, dither_

NARROW = [torch.bfloat16, torch.float16]


def stochastic(x: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    return dither_(x.clone(), dtype, Dither(seed)).to(dtype)


@pytest.mark.parametrize("dtype", NARROW)
@given(st.integers(0, 99), st.floats(-8, 2))
def test_stochastic_rounding_gives_a_neighbour_and_keeps_what_fits(
    dtype: torch.dtype, seed: int, magnitude: float
) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(200, generator=g) * 10**magnitude
    found = stochastic(x, dtype, seed)
    near = x.to(dtype)
    spacing = torch.maximum(near.float().abs() * torch.finfo(dtype).eps, torch.tensor(6e-8))
    assert bool(((found.float() - x).abs() <= spacing).all())
    assert torch.equal(stochastic(near.float(), dtype, seed), near)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("value", [1.001, -0.0203, 3e-5, 1e-7, -513.37])
def test_stochastic_rounding_is_right_on_average(dtype: torch.dtype, value: float) -> None:
    x = torch.full((40_000,), value)
    found = stochastic(x, dtype, 0).double()
    assert len(found.unique()) <= 2
    spread = float(found.std()) / 200
    assert float(found.mean()) == pytest.approx(float(x[0].double()), abs=5 * spread + 1e-12)


def test_float32_needs_no_rounding_and_defaults_are_the_measured_ones() -> None:
    x = torch.linspace(-3, 3, 1001)
    assert torch.equal(dither_(x.clone(), torch.float32, Dither(0)), x)
    assert default_rounding(torch.bfloat16, torch.bfloat16) == "stochastic"
    assert {default_rounding(torch.float32, d) for d in (*NARROW, torch.float32)} == {"nearest"}


def test_stochastic_rounding_never_overflows_float16() -> None:
    largest = torch.full((1000,), torch.finfo(torch.float16).max)
    assert bool(torch.isfinite(stochastic(largest, torch.float16, 0)).all())


def test_more_entries_than_random_bits() -> None:
    assert Dither(1).take(5_000_000).shape == (5_000_000,)
