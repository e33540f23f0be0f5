from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import random_vector, tiny_lm
from weightsteer.errors import SteerError
from weightsteer.vectors.expression import combine

LM = tiny_lm()
VECTORS = {"honest": random_vector(LM, seed=1), "rude": random_vector(LM, seed=2)}
numbers = st.floats(-5, 5).map(lambda x: round(x, 2))


@given(numbers, numbers)
def test_text_is_the_same_as_the_algebra(a: float, b: float) -> None:
    x, y = VECTORS["honest"], VECTORS["rude"]
    expected = a * x - (y * b) * 0.5
    found = combine(f"{a} * honest - ({b} * rude) / 2", VECTORS)
    assert (found - expected).norm() == pytest.approx(0.0, abs=1e-4)
    assert combine("-honest + honest", VECTORS).norm() == pytest.approx(0.0, abs=1e-5)
    assert combine("honest - honest", VECTORS).norm() == 0.0


def test_a_vectors_methods_are_functions() -> None:
    honest, rude = VECTORS["honest"], VECTORS["rude"]
    for text, expected in [
        ("project_out(honest, rude)", honest.project_out(rude)),
        ("truncate(honest - rude, rank=1)", (honest - rude).truncate(rank=1)),
        ("2 * scale_by_depth(honest, alpha=0.5, beta=-1)", 2 * honest.scale_by_depth(0.5, -1.0)),
        ("boost_subspace(honest, beta=0.5)", honest.boost_subspace(0.5)),
    ]:
        assert (combine(text, VECTORS) - expected).norm() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("honest +", "cannot be read"),
        ("kind", "unknown vector 'kind'; known: honest, rude"),
        ("2 * 3", "gives a number"),
        ("honest * rude", "multiplied or divided by numbers"),
        ("honest / 0", "multiplied or divided by numbers"),
        ("honest + 1", "multiplied or divided by numbers"),
        ("__import__('os')", "only names, numbers"),
        ("honest ** 2", "multiplied or divided by numbers"),
        ("True * honest", "only names, numbers"),
        ("save(honest)", "save cannot be called so; expected filter, truncate"),
        ("truncate(honest, 3)", r"expected truncate\(vector, rank, energy\)"),
        ("truncate(honest, size=3)", "options of truncate: rank, energy"),
        ("truncate(honest)", "expected one of rank= and energy="),
        ("scale_by_depth(honest, alpha=1)", "misses an option"),
        ("project_out(honest)", "cannot be called so"),
        ("filter(honest, layers='x')", "numbers and ranges"),
    ],
)
def test_everything_else_is_refused(text: str, message: str) -> None:
    with pytest.raises(SteerError, match=message):
        combine(text, VECTORS)


def test_options_may_be_numbers_of_either_kind() -> None:
    honest = VECTORS["honest"]
    for text, expected in [
        ("truncate(honest, rank=1.0)", honest.truncate(rank=1)),
        ("truncate(honest, rank=4 / 2)", honest.truncate(rank=2)),
        ("filter(honest, layers=0)", honest.filter(layers=[0])),
        ("+honest", honest),
    ]:
        assert (combine(text, VECTORS) - expected).norm() == pytest.approx(0.0, abs=1e-5)
