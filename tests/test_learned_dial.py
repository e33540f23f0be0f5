"""Coefficients of a vector: identities of their algebra, and that learning them helps on the pairs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from conftest import random_vector, tiny_lm
from weightsteer.behavior import ContrastPair
from weightsteer.errors import SteerError
from weightsteer.lm import LM
from weightsteer.training import neutral
from weightsteer.training.learned_dial import UNMOVED, DialSettings, learn_dial
from weightsteer.vectors.coefficients import CoefficientForm, weigh
from weightsteer.vectors.delta import Streamed, layout_of
from weightsteer.vectors.difference import subtract_finetunes, task_vector
from weightsteer.vectors.low_rank import LowRank
from weightsteer.vectors.random_like import random_like
from weightsteer.vectors.weight_vector import WeightVector


@pytest.fixture(autouse=True)
def fewer_neutral_replies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short replies to a few prompts."""
    monkeypatch.setattr(neutral, "PROMPTS", 6)
    monkeypatch.setattr(neutral, "REPLY_TOKENS", 6)


def test_at_the_start_the_weighed_vector_is_w(sides: tuple[Path, Path]) -> None:
    positive, negative = map(task_vector, sides)
    w = subtract_finetunes(*sides)
    form = CoefficientForm(list(w.deltas), two_sides=True)
    assert (weigh(positive, negative, form.start(), form) - w).norm() == 0.0
    alone = CoefficientForm(list(w.deltas), two_sides=False)
    assert (weigh(w, None, alone.start(), alone) - w).norm() == 0.0
    assert form.count <= 60


def test_the_plane_of_w_and_what_the_sides_share(sides: tuple[Path, Path]) -> None:
    """tau+ = w / 2 + c and tau- = c - w / 2."""
    positive, negative = map(task_vector, sides)
    form = CoefficientForm(list(positive.deltas), two_sides=True)
    for own, sign in ((positive, 0.5), (negative, -0.5)):
        numbers = form.start()
        numbers[:2] = torch.tensor([sign, 1.0])
        assert (weigh(positive, negative, numbers, form) - own).norm() < 1e-6 * own.norm()


def test_a_curve_over_depth_and_kinds_is_the_vectors_own_algebra() -> None:
    """A straight line over depth is LiNeS; a kind at 0 is taken out."""
    lm = tiny_lm(layers=5)
    w = random_vector(lm)
    form = CoefficientForm(list(w.deltas), two_sides=False, knots=3)
    numbers = form.start()
    numbers[1:4] = torch.tensor([1.0, 1.5, 2.0])
    assert (weigh(w, None, numbers, form) - w.scale_by_depth(1.0, 1.0)).norm() < 1e-5 * w.norm()
    numbers = form.start()
    numbers[1 + 3 + form.kinds.index("mlp.up_proj")] = 0.0
    rest = w.filter(modules=[kind for kind in form.kinds if kind != "mlp.up_proj"])
    assert (weigh(w, None, numbers, form) - rest).norm() == 0.0


def test_learned_coefficients_move_the_pairs_both_ways_and_are_a_vector(
    lm: LM, pairs: list[ContrastPair], sides: tuple[Path, Path], tmp_path: Path
) -> None:
    positive, negative = map(task_vector, sides)
    before = {name: (p.clone(), p.requires_grad) for name, p in lm.model.named_parameters()}
    settings = DialSettings(steps=8, batch_size=4, neutral=2, kl=0.02, learning_rate=0.1)
    dial = learn_dial(lm, positive, negative, pairs[:6], settings=settings)
    for name, parameter in lm.model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]
    dial.save(tmp_path / "dial")
    kept = WeightVector.load(tmp_path / "dial")
    found = kept.card.measured["dial"]
    # margins grow with k and the KL with k^2, so that this does not depend on the vector's size
    odd, odd_before = (found[f"margin at k{when}"] - found[f"margin at -k{when}"] for when in ("", " at the start"))
    assert odd**2 / found["kl"] > odd_before**2 / found["kl at the start"], found
    assert kept.card.measured["parameters"] == CoefficientForm(list(kept.deltas), two_sides=True).count
    assert kept.card.measured["search_tokens"] > 0
    told = kept.card.settings["coefficients"]
    assert told["w"] != 1.0
    assert set(told) == {"w", "common", "depth", "kinds"}
    assert {delta.rank for delta in kept.deltas.values() if isinstance(delta, LowRank)} == {4}  # w's, of 2 + 2


def test_a_low_budget_of_kl_is_kept_where_a_high_one_is_spent(
    lm: LM, pairs: list[ContrastPair], sides: tuple[Path, Path]
) -> None:
    positive, negative = map(task_vector, sides)
    kls = []
    for kl in (0.002, 0.05):
        settings = DialSettings(steps=6, batch_size=4, neutral=4, kl=kl)
        kls.append(learn_dial(lm, positive, negative, pairs[:6], settings=settings).card.measured["dial"]["kl"])
    assert kls[0] < 0.3 * kls[1]


def test_margins_that_are_to_stay_move_less_where_they_have_a_budget(
    lm: LM, pairs: list[ContrastPair], sides: tuple[Path, Path]
) -> None:
    positive, negative = map(task_vector, sides)
    settings = DialSettings(steps=12, batch_size=4, neutral=2, kl=0.05, learning_rate=0.1, unmoved_margin=0.001)
    found = learn_dial(lm, positive, negative, pairs[:4], unmoved=pairs[4:8], settings=settings).card
    kept = found.measured["dial"]
    sizes = [
        abs(kept[f"unmoved margin at k{when}"]) + abs(kept[f"unmoved margin at -k{when}"])
        for when in ("", " at the start")
    ]
    assert sizes[0] < 0.7 * sizes[1], kept
    assert "unmoved pairs" in found.data_sha256
    free = learn_dial(lm, positive, negative, pairs[:4], settings=settings).card
    assert "unmoved margin at k" not in free.measured["dial"]
    assert "unmoved pairs" not in free.data_sha256


@pytest.mark.parametrize("unmoved_margin", [1e-5, 0.02])
def test_learning_that_turns_the_vector_off_keeps_the_best_within_its_budgets(
    unmoved_margin: float, lm: LM, pairs: list[ContrastPair], sides: tuple[Path, Path]
) -> None:
    """The same margins are to move and to stay, so that only a smaller vector keeps the budget."""
    positive, negative = map(task_vector, sides)
    settings = DialSettings(steps=12, batch_size=4, neutral=2, learning_rate=0.3, unmoved_margin=unmoved_margin)
    dial = learn_dial(lm, positive, negative, pairs[:4], unmoved=pairs[:4], settings=settings)
    found = dial.card.measured["dial"]
    odd, odd_before = (
        (found[f"margin at k{when}"] - found[f"margin at -k{when}"]) / 2 for when in ("", " at the start")
    )
    spent, spent_before = (found[f"{UNMOVED}{when}"] for when in ("", " at the start"))
    assert 0.5 * unmoved_margin < spent < 1.5 * unmoved_margin, found
    assert odd / spent > 0.9 * odd_before / spent_before, found
    assert dial.norm() > 0.0
    assert 0 <= found["step"] <= settings.steps


def test_coefficients_need_pairs_and_factors(lm: LM, pairs: list[ContrastPair], vector: WeightVector) -> None:
    with pytest.raises(SteerError, match="at least 2 pairs to learn on, found 1"):
        learn_dial(lm, vector, None, pairs[:1])
    dense = WeightVector({name: delta.dense() for name, delta in vector.deltas.items()}, vector.card)  # type: ignore[union-attr]
    with pytest.raises(SteerError, match="is dense; coefficients are learned for LoRA vectors"):
        learn_dial(lm, dense, None, pairs)
    with pytest.raises(SteerError, match="made for other parameters"):
        form = CoefficientForm(["model.layers.0.mlp.up_proj.weight"], two_sides=False)
        weigh(vector, None, form.start(), form)


def test_a_random_vector_has_the_norms_of_the_other_and_no_direction_of_it(vector: WeightVector) -> None:
    drawn = random_like(vector, seed=1)
    norms = vector.norms()
    assert all(math.isclose(norm, norms[name], rel_tol=1e-4) for name, norm in drawn.norms().items())
    assert abs(drawn.cosine(vector)) < 0.1
    assert (drawn - random_like(vector, seed=1)).norm() == 0.0
    assert (drawn - random_like(vector, seed=2)).norm() > 0.0
    dense = Streamed(((1.0, torch.ones(4, 3)),), (4, 3), "module")
    found = random_like(WeightVector({"lm_head.weight": dense}, vector.card)).deltas["lm_head.weight"]
    assert layout_of(found) == "module"  # it changes the same places


def test_sides_may_change_other_parameters(lm: LM, pairs: list[ContrastPair], vector: WeightVector) -> None:
    attention, mlp = (vector.filter(modules=kind) for kind in ("self_attn", "mlp"))
    dial = learn_dial(lm, mlp, attention, pairs, settings=DialSettings(steps=1, batch_size=2, neutral=1))
    assert set(dial.deltas) == set(attention.deltas) | set(mlp.deltas)
