from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weightsteer.vectors.low_rank import LowRank

sizes = st.integers(1, 9)
ranks = st.integers(0, 6)


def factors(d_out: int, d_in: int, rank: int, seed: int) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(d_out, rank, generator=g), torch.randn(rank, d_in, generator=g))


def dense(x: LowRank) -> torch.Tensor:
    return x.B.double() @ x.A.double()


@given(sizes, sizes, ranks, ranks, st.integers(0, 99))
def test_factored_equals_dense(d_out: int, d_in: int, r1: int, r2: int, seed: int) -> None:
    x, y = factors(d_out, d_in, r1, seed), factors(d_out, d_in, r2, seed + 1)
    assert (x + y).rank == r1 + r2
    torch.testing.assert_close(dense(x + y), dense(x) + dense(y))
    torch.testing.assert_close(dense(x * -2.5), dense(x) * -2.5, atol=1e-5, rtol=1e-5)
    expected = float((dense(x) * dense(y)).sum())
    assert x.dot(y) == pytest.approx(expected, abs=1e-9)
    assert x.spectrum().norm() == pytest.approx(float(dense(x).norm()), abs=1e-6)


@given(sizes, sizes, ranks, st.integers(0, 7), st.integers(0, 99))
def test_truncation_is_the_nearest_of_its_rank(d_out: int, d_in: int, r: int, keep: int, seed: int) -> None:
    x = factors(d_out, d_in, r, seed)
    best = torch.linalg.svdvals(dense(x))[keep:].square().sum().sqrt()
    short = x.truncate(keep)
    assert short.rank <= max(keep, min(r, keep))
    torch.testing.assert_close((dense(short) - dense(x)).norm(), best, atol=1e-4, rtol=1e-4)


def test_factors_must_chain() -> None:
    with pytest.raises(ValueError, match="do not chain"):
        LowRank(torch.zeros(3, 2), torch.zeros(1, 3))
