from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from test_weight_vector import mixed
from weightsteer.errors import SteerError
from weightsteer.run_card import RunCard
from weightsteer.vectors.delta import LazyDeltas
from weightsteer.vectors.low_rank import LowRank
from weightsteer.vectors.similarity import PANEL, labels, similarities, table
from weightsteer.vectors.weight_vector import WeightVector


@given(st.lists(st.integers(0, 255), min_size=1, max_size=6), st.sampled_from([1, 1 << 10, 1 << 29]))
def test_the_table_is_every_pairs_own_product(seeds: list[int], budget: int) -> None:
    vectors = {str(i): mixed(seed) for i, seed in enumerate(seeds)}
    found = similarities(vectors, budget=budget)
    for i, x in enumerate(vectors.values()):
        for j, y in enumerate(vectors.values()):
            assert found.dots[i, j] == pytest.approx(x.dot(y), abs=1e-5)
    assert np.array_equal(found.dots, found.dots.T)


def test_many_ranks_over_several_panels() -> None:
    g = torch.Generator().manual_seed(0)
    vectors = {
        str(i): WeightVector(
            {
                "a.weight": LowRank(
                    torch.randn(40, 30 * (i + 1), generator=g), torch.randn(30 * (i + 1), 50, generator=g)
                )
            },
            RunCard("vector"),
        )
        for i in range(12)
    }
    found = similarities(vectors)
    for i, x in enumerate(vectors.values()):
        for j, y in enumerate(vectors.values()):
            assert found.dots[i, j] == pytest.approx(x.dot(y), abs=1e-5 * x.norm() * y.norm())
            assert found.cosines[i, j] == pytest.approx(x.cosine(y), abs=1e-5)


@pytest.mark.parametrize("panels", [12, 3, 1])
def test_what_does_not_fit_the_budget_is_read_as_seldom_as_it_can_be(panels: int) -> None:
    """12 vectors that fill a panel each: once for their shapes, then once for each part of the others that fits."""
    g = torch.Generator().manual_seed(0)
    factors = [LowRank(torch.randn(20, PANEL, generator=g), torch.randn(PANEL, 30, generator=g)) for _ in range(12)]
    counts = [0] * 12

    def read(number: int) -> LowRank:
        counts[number] += 1
        return factors[number]

    vectors = {
        str(i): WeightVector(LazyDeltas({"a": lambda number=i: read(number)}), RunCard("vector")) for i in range(12)
    }
    found = similarities(vectors, budget=2 * panels * 50 * PANEL * 4, device="cpu")
    held = panels == 12  # then what was read for the shapes is kept
    assert sum(counts) == (12 if held else 12 + sum(12 - start for start in range(0, 12, panels)))
    expected = similarities(vectors, device="cpu")
    assert np.allclose(found.dots, expected.dots, rtol=0, atol=1e-6 * expected.norms.max() ** 2)


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(SteerError, match="device 'tpu': is not on this machine"):
        similarities({"a": mixed(85)}, device="tpu")


def test_factors_that_cancel_are_multiplied_in_float64() -> None:
    g = torch.Generator().manual_seed(0)
    x, y, z = (
        WeightVector(
            {"a": LowRank(torch.randn(60, 8, generator=g) * s, torch.randn(8, 50, generator=g))}, RunCard("vector")
        )
        for s in (1.0, 1e4, 1.0)
    )
    found = similarities({"x": x + y - y, "z": z + x})
    assert found.cosines[0, 1] == pytest.approx(x.cosine(z + x), abs=1e-6)


def test_files_are_labelled_and_hold_no_pickle(tmp_path: Path) -> None:
    found = similarities({"one": mixed(85), "two": mixed(90), "zero": mixed(0)})
    found.save(tmp_path / "out")
    with np.load(tmp_path / "out.npz", allow_pickle=False) as stored:
        assert stored["names"].tolist() == ["one", "two", "zero"]
        assert np.array_equal(stored["dots"], found.dots)
        assert np.isnan(stored["cosines"][2]).all()
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert lines[0] == ",one,two,zero"
    assert float(lines[1].split(",")[1]) == pytest.approx(1.0)
    assert "1.0000" in table(found.names, found.cosines)


def test_two_bases_and_two_shapes_are_refused() -> None:
    other = WeightVector(mixed(85).deltas, RunCard("vector", base_model="other", base_revision="two"))
    with pytest.raises(SteerError, match="different bases"):
        similarities({"a": mixed(85), "b": other})
    x, y = (WeightVector({"a": torch.ones(n)}, RunCard("vector")) for n in (2, 3))
    with pytest.raises(SteerError, match=r"a: shapes differ, \(2,\) and \(3,\)"):
        similarities({"x": x, "y": y})
    bad = WeightVector({"a": torch.tensor([1.0, float("nan")])}, RunCard("vector"))
    with pytest.raises(SteerError, match="a: holds NaN"):
        similarities({"x": x, "bad": bad})


def test_labels_are_as_short_as_they_can_be() -> None:
    assert labels(["runs/a/vector", "runs/b/vector"]) == ["a/vector", "b/vector"]
    assert labels(["x/a", "x/b"]) == ["a", "b"]
    assert labels(["a", "a"]) == ["a (1)", "a (2)"]
