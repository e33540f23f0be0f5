"""Vectors and strengths as a model's name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightsteer.errors import SteerError
from weightsteer.strength_names import is_name, on_grid, parse_strengths, strength_name

NAMES = ("syc", "gloomy", "a.b-c_1")


@given(st.dictionaries(st.sampled_from(NAMES), st.floats(-100, 100), min_size=1))
def test_a_name_is_read_back_on_the_grid(strengths: dict[str, float]) -> None:
    wanted = {name: on_grid(k) for name, k in strengths.items() if on_grid(k)}
    written = strength_name(strengths)
    assert (parse_strengths(written, NAMES) if written else {}) == wanted
    assert strength_name(wanted) == written


def test_a_vector_without_a_strength_and_signs() -> None:
    assert parse_strengths("syc", NAMES) == {"syc": None}
    assert parse_strengths("syc@-0.72+gloomy@+.3", NAMES) == {"syc": -0.72, "gloomy": 0.3}
    assert parse_strengths("syc@-0", NAMES) == {"syc": 0.0}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected a vector"),
        ("syc@", "expected a vector"),
        ("syc@1e5", "expected a vector"),
        ("syc@nan", "expected a vector"),
        ("syc@0.5+", "expected a vector"),
        ("../syc@1", "expected a vector"),
        ("sycc@1", "is .syc. meant"),
        ("syc@1+syc@2", "stands twice"),
        ("syc@" + "9" * 60, "finite"),
        ("syc@" + "9" * 4000, "expected a vector"),
    ],
)
def test_a_malformed_name_is_refused(text: str, said: str) -> None:
    with pytest.raises(SteerError, match=said):
        parse_strengths(text, NAMES)


def test_which_names_a_vector_may_have() -> None:
    assert is_name("syc.v2")
    assert not any(map(is_name, ["", "a@b", "a+b", ".hidden", "a/b", "a b", "é"]))
