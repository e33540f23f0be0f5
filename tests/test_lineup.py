"""Each method of a recipe is what its name says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from test_recipe import mute, small_recipe
from weightsteer.behavior import Example
from weightsteer.extract import contrast_vector, task_vector
from weightsteer.finetune import list_snapshots
from weightsteer.lineup import Lineup, pairs_of
from weightsteer.lm import LM
from weightsteer.methods import Direction
from weightsteer.recipe import Recipe
from weightsteer.road import Road

IDS = torch.tensor([[4, 5, 6, 7]])


@pytest.fixture
def lineup(tmp_path: Path) -> Lineup:
    """A drifted tiny model and the methods that repair it."""
    source = small_recipe(
        tmp_path,
        train={"rank": 2, "learning_rates": [1e-2], "batch_size": 2, "evaluations": 2, "warmup_steps": 1},
        drift={
            "generate": {"family": "addition", "count": 8},
            "train": {"rank": 2, "learning_rates": [1e-2], "batch_size": 4, "max_steps": 4},
            "joint_side": "negative",
            "joint_examples": 3,
        },
        sweep={
            "methods": {
                "contrastive": [1.0],
                "contrastive half": [1.0],
                "fine-tuned": [-1.0, 0.5],
                "joint": [1, 2],
                "undo": [-1.0],
                "full": [1.0],
            },
            "probe_items": 1,
        },
    )
    road = Road(Recipe.load(source), tmp_path / "run", show=mute)
    assert road.shop.lm is not road.shop.base
    return road.lineup


def logits(lm: LM) -> Tensor:
    with torch.no_grad():
        return lm.model(IDS).logits


def test_undo_goes_the_way_of_repair_and_at_one_is_the_model_before_its_drift(lineup: Lineup) -> None:
    before, after = logits(lineup.shop.base), logits(lineup.shop.lm)
    assert not torch.allclose(before, after, atol=1e-2)
    with lineup.steering("undo").applied(lineup.shop.lm, -1.0) as lm:
        torch.testing.assert_close(logits(lm), before, atol=1e-4, rtol=1e-4)
    assert torch.equal(logits(lineup.shop.lm), after)


def test_joint_replaces_the_drift_by_the_fine_tune_on_mixed_data(lineup: Lineup) -> None:
    method = lineup.steering("joint")
    for copies in (1.0, 2.0):
        with task_vector(lineup.folder / "joint" / f"{copies:g}").applied(lineup.shop.base, 1.0):
            expected = logits(lineup.shop.base)
        with method.applied(lineup.shop.lm, -copies) as lm:  # the desired examples are D-
            torch.testing.assert_close(logits(lm), expected, atol=1e-4, rtol=1e-4)
    assert lineup.trainings("joint", -2.0) == [(lineup.folder / "joint" / "2", 1.0)]


def test_contrasts_and_checkpoints_are_made_of_both_sides(lineup: Lineup) -> None:
    plus, minus = (lineup.folder / side for side in ("plus", "minus"))
    lineup.steering("fine-tuned")
    with contrast_vector(plus, minus).applied(lineup.shop.base, 0.7):
        expected = logits(lineup.shop.base)
    with lineup.steering("contrastive").applied(lineup.shop.base, 0.7) as lm:
        torch.testing.assert_close(logits(lm), expected)
    for side, path in ((1.0, plus), (-1.0, minus)):
        shares = list(list_snapshots(path))
        assert len(shares) == 4
        with task_vector(list_snapshots(path)[shares[1]]).applied(lineup.shop.base, 1.0):
            expected = logits(lineup.shop.base)
        with lineup.steering("fine-tuned").applied(lineup.shop.base, side * 0.5) as lm:
            torch.testing.assert_close(logits(lm), expected)
    half = lineup.steering("contrastive half")
    assert isinstance(half, Direction)
    assert half.vector.card.base_revision == lineup.shop.base.revision


def test_a_contrast_of_whole_models_is_their_difference(lineup: Lineup) -> None:
    method = lineup.steering("full")
    plus, minus = (LM.load(str(lineup.folder / "full" / side), device="cpu") for side in ("plus", "minus"))
    with method.applied(minus, 1.0) as lm:
        torch.testing.assert_close(logits(lm), logits(plus), atol=1e-4, rtol=1e-4)


def test_sides_that_were_filtered_apart_pair_question_by_question() -> None:
    positive = [Example(q, a) for q, a in (("one", "p1"), ("one", "p2"), ("two", "p3"), ("three", "p4"))]
    negative = [Example(q, a) for q, a in (("two", "n1"), ("one", "n2"), ("one", "n3"), ("one", "n4"))]
    pairs = [(p.prompt, p.positive, p.negative) for p in pairs_of(positive, negative)]
    assert pairs == [("one", "p1", "n2"), ("one", "p2", "n3"), ("two", "p3", "n1")]
