"""What a training takes where the user says nothing, and when a vector is too small to see."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import random_vector, tiny_lm
from test_cli import run
from weightsteer.behavior import ContrastPair, Example
from weightsteer.lm import LM
from weightsteer.run_card import RunCard
from weightsteer.training import PAPER, TrainSettings, encode, split_validation, train_side, train_vector
from weightsteer.training.defaults import LEAST_STEPS, held_out, learning_rates, resolve
from weightsteer.training.lora_targets import base_norm
from weightsteer.training.settings import WholeSettings, filled, identity_of
from weightsteer.vectors.visibility import SEEN, relative_norm, why_unseen
from weightsteer.vectors.weight_vector import WeightVector


def steps_of(found: WholeSettings, examples: int) -> int:
    trained = examples - held_out(examples, found.validation)
    return round(-(-trained // found.batch_size) * found.epochs)


def test_twenty_pairs_make_enough_steps() -> None:
    found = resolve(TrainSettings(), examples=20, width=576)
    assert (found.batch_size, found.epochs, found.warmup_steps, found.validation) == (4, 8, 3, 0.2)
    assert found.learning_rates == (1.4e-3,)
    assert LEAST_STEPS <= steps_of(found, 20) < LEAST_STEPS + 4


def test_thousands_of_examples_are_seen_once() -> None:
    found = resolve(TrainSettings(), examples=4000, width=4096)
    assert (found.batch_size, found.epochs, found.validation) == (8, 1, 0.05)
    assert found.warmup_steps == 48
    assert found.learning_rates == (2.9e-4,)


@given(examples=st.integers(2, 5000), width=st.integers(8, 16384))
def test_what_is_found_is_sound_for_any_data(examples: int, width: int) -> None:
    found = resolve(TrainSettings(), examples=examples, width=width)
    held = held_out(examples, found.validation)
    assert 1 <= held < examples
    assert held >= min(4, examples // 5)
    assert steps_of(found, examples) >= (LEAST_STEPS if examples > 10 else 1)
    assert 0 < found.warmup_steps <= max(1, steps_of(found, examples) // 2)
    assert resolve(found, examples=7, width=99) == found, "what is given stays"


@given(examples=st.integers(30, 5000), finetunes=st.integers(2, 5))
def test_each_fine_tune_of_a_mean_is_trained_as_one_on_its_part(examples: int, finetunes: int) -> None:
    found = resolve(TrainSettings(finetunes=finetunes), examples=examples, width=576)
    part = (examples - held_out(examples, found.validation)) // finetunes
    steps = round(-(-part // found.batch_size) * found.epochs)
    assert steps >= (LEAST_STEPS if part > 4 else 1)
    assert 0 < found.warmup_steps <= max(1, steps // 2)


def test_the_rate_falls_with_the_width_for_lora_alone() -> None:
    rates = [learning_rates("lora", width)[0] for width in (576, 896, 2048, 4096)]
    assert rates == sorted(rates, reverse=True)
    assert rates[2] == 5e-4
    for kind in ("bias", "full"):
        assert learning_rates(kind, 576) == PAPER.learning_rates
    assert learning_rates("lora", 576, preferences=True) == PAPER.learning_rates


def test_the_card_keeps_what_was_found_and_both_sides_hold_out_the_same(
    pairs: list[ContrastPair], tmp_path: Path
) -> None:
    lm = tiny_lm()
    settings = TrainSettings(rank=2, learning_rates=(1e-2,))
    vector = train_vector(lm, pairs, out=tmp_path / "a", settings=settings)
    found = resolve(settings, examples=len(pairs), width=lm.model.config.hidden_size)
    assert vector.card.settings == {**identity_of(found), "learning_rates": [1e-2], "dtype": "float32"}
    held = []
    for side in ("positive", "negative"):
        rows = encode(lm, [Example(pair.prompt, getattr(pair, side)) for pair in pairs], found.max_length)
        held.append([rows.index(row) for row in split_validation(rows, found)[1]])
    assert held[0] == held[1]
    assert len(held[0]) == 2


def test_what_was_begun_by_the_papers_numbers_goes_on_by_them(
    lm: LM, pairs: list[ContrastPair], tmp_path: Path
) -> None:
    """As a version did that took them for what the user left open."""
    examples = [Example(pair.prompt, pair.positive) for pair in pairs]
    settings = TrainSettings(rank=2, learning_rates=(1e-2,), batch_size=4)
    former = filled(settings, PAPER)
    made = train_side(lm, examples, tmp_path / "a", settings=former)
    before = (made / "adapter_model.safetensors").stat().st_mtime_ns
    train_side(lm, examples, made, settings=settings)
    assert (made / "adapter_model.safetensors").stat().st_mtime_ns == before
    assert RunCard.load(made).settings["warmup_steps"] == 5


def test_a_vector_is_told_beside_the_weights_that_it_changes() -> None:
    lm = tiny_lm()
    vector = random_vector(lm)
    assert relative_norm(vector) is None
    assert why_unseen(vector, [1.0]) is None, "nothing is known of the base"
    norm = base_norm(lm.model)
    sized = WeightVector(vector.deltas, replace(vector.card, measured={"sides": [{"base_norm": norm}, {}]}))
    share = vector.norm() / norm
    assert relative_norm(sized) == pytest.approx(share)
    large, small = 2 * SEEN / share, 0.5 * SEEN / share
    assert why_unseen(sized, [-large, 0.0]) is None
    assert "too small to see" in str(why_unseen(sized, [-small, small]))
    assert why_unseen(sized, [0.0]) is None


@pytest.mark.slow
def test_a_training_that_moves_nothing_is_told(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path
) -> None:
    out, model = tmp_path / "a", ("--model", checkpoint, "--device", "cpu")
    code, _, err = run(capsys, "train", "--pairs", "formal", "--lr", "1e-5", "--max-steps", "2", "-o", out, *model)
    assert code == 0, err
    assert "too small to see at k = 1" in err
    code, shown, err = run(capsys, "show", made(out))
    assert code == 0, err
    assert "too small to see" in err
    assert "of the norm of the base's linear layers" in shown


def made(out: Path) -> Path:
    from weightsteer.vectors.difference import subtract_finetunes

    return subtract_finetunes(out / "positive", out / "negative").save(out / "vector")


def test_help_shows_what_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(run(capsys, "train", "--help")[1].split())
    for default in (
        "Default: lora",
        "Default: 32",
        "Default: 16",
        "hidden size",
        f"as make {LEAST_STEPS} steps",
        "Default: 0",
    ):
        assert default in text
