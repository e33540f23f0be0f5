from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weightsteer.rounding import rounded

NARROW = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", NARROW)
@given(st.integers(0, 99), st.floats(-8, 2))
def test_stochastic_rounding_gives_a_neighbour_and_keeps_what_fits(
    dtype: torch.dtype, seed: int, magnitude: float
) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(200, generator=g) * 10**magnitude
    found = rounded(x, dtype, "stochastic", g)
    near = x.to(dtype)
    spacing = torch.maximum(near.float().abs() * torch.finfo(dtype).eps, torch.tensor(6e-8))
    assert bool(((found.float() - x).abs() <= spacing).all())
    assert torch.equal(rounded(near.float(), dtype, "stochastic", g), near)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("value", [1.001, -0.0203, 3e-5, 1e-7, -513.37])
def test_stochastic_rounding_is_right_on_average(dtype: torch.dtype, value: float) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.full((40_000,), value)
    found = rounded(x, dtype, "stochastic", g).double()
    assert len(found.unique()) <= 2
    spread = float(found.std()) / 200
    assert float(found.mean()) == pytest.approx(float(x[0].double()), abs=5 * spread + 1e-12)


@pytest.mark.parametrize("dtype", [*NARROW, torch.float32])
def test_nearest_is_torchs_own_and_needs_no_generator(dtype: torch.dtype) -> None:
    x = torch.linspace(-3, 3, 1001)
    assert torch.equal(rounded(x, dtype, "nearest", None), x.to(dtype))
    assert torch.equal(rounded(x, torch.float32, "stochastic", None), x)


def test_stochastic_rounding_never_overflows() -> None:
    largest = torch.full((1000,), torch.finfo(torch.float16).max)
    assert bool(torch.isfinite(rounded(largest, torch.float16, "stochastic", torch.Generator())).all())
