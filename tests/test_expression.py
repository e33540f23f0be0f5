from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import random_vector, tiny_lm
from weightsteer.errors import SteerError
from weightsteer.expression import combine

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
    ],
)
def test_everything_else_is_refused(text: str, message: str) -> None:
    with pytest.raises(SteerError, match=message):
        combine(text, VECTORS)
