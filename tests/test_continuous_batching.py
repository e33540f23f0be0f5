"""Continuous batching by transformers itself, on tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import random_vector
from weightsteer import LM, LoadOptions, generation
from weightsteer.continuous_batching import _follows, why_not

PROMPTS = ["What is a bridge?", "Name a colour, please, and say why you like it.", "Hi", "Count to three."]


@pytest.fixture
def both(checkpoint: Path) -> tuple[LM, LM]:
    """The same model, which writes in padded batches and continuously."""
    return LM.load(str(checkpoint)), LM.load(str(checkpoint), options=LoadOptions(batching="continuous"))


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each call of continuous batching got."""
    seen: list[int] = []
    real = generation.write_packed

    def noted(model: Any, rows: Any, **options: Any) -> Any:
        seen.append(len(rows))
        return real(model, rows, **options)

    monkeypatch.setattr(generation, "write_packed", noted)
    return seen


def test_replies_are_those_of_padded_batches_steered_and_not(both: tuple[LM, LM], packed: list[int]) -> None:
    padded, continuous = both
    vector = random_vector(padded, scale=0.2)
    for k in (0.0, 1.0, -2.0):
        with vector.applied(padded, k), vector.applied(continuous, k):
            wanted = padded.generate(PROMPTS, max_new_tokens=12)
            assert continuous.generate(PROMPTS, max_new_tokens=12, batch_size=2) == wanted
    assert packed == [4, 4, 4]


def test_samples_follow_from_the_seed_and_the_temperature(both: tuple[LM, LM], packed: list[int]) -> None:
    padded, lm = both
    replies = [lm.replies(PROMPTS, max_new_tokens=12, temperature=1.0, seed=seed) for seed in (3, 3, 4)]
    assert replies[0] == replies[1] != replies[2]
    cold = lm.replies(PROMPTS, max_new_tokens=12, temperature=1e-4)
    assert [reply.answer for reply in cold] == padded.generate(PROMPTS, max_new_tokens=12)
    assert packed == [4, 4, 4, 4]


def test_a_k_for_each_prompt_is_written_in_padded_batches(both: tuple[LM, LM], packed: list[int]) -> None:
    padded, continuous = both
    vector, ks = random_vector(padded, scale=0.2), torch.tensor([0.0, 1.0, -1.0, 2.0])
    with vector.applied(padded, ks), vector.applied(continuous, ks):
        assert continuous.generate(PROMPTS, max_new_tokens=8) == padded.generate(PROMPTS, max_new_tokens=8)
    assert packed == []


def test_a_model_that_writes_otherwise_so_is_written_in_padded_batches_and_a_line_says_it(
    both: tuple[LM, LM], packed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    padded, continuous = both
    monkeypatch.setattr("weightsteer.continuous_batching.write_packed", lambda model, rows, **_: [([0], False)])
    with pytest.warns(UserWarning, match="batching continuous: it does not write what padded batches write"):
        assert continuous.generate(PROMPTS, max_new_tokens=8) == padded.generate(PROMPTS, max_new_tokens=8)
    assert packed == []
    assert why_not(continuous.model, 0, [1], list, 0.0)  # tried once


def test_a_tie_within_the_models_rounding_is_no_difference() -> None:
    steps = [torch.tensor([1.0, 4.0, 3.95]), torch.tensor([2.0, 0.0, 1.0])]
    assert _follows([1, 0], steps, 0.0)
    assert _follows([2, 1], steps, 0.03)  # from there on the two go on differently
    assert not _follows([2, 0], steps, 0.001)
    assert not _follows([1, 2], steps, 0.03)
    assert not _follows([1], steps, 0.03)


def test_broken_logits_are_seen(both: tuple[LM, LM], packed: list[int]) -> None:
    _, lm = both
    assert lm.replies(["Hi"], max_new_tokens=4)  # tried while it was whole
    with random_vector(lm).applied(lm, 1e38):
        (reply,) = lm.replies(["Hi"], max_new_tokens=4)
        assert reply.broken
        with pytest.warns(UserWarning, match="batching continuous: transformers could not write .* padded batches"):
            (reply,) = lm.replies(["Hi"], max_new_tokens=4, temperature=1.0)
        assert reply.broken
    assert packed == [1, 1, 1]


def test_the_option_is_kept_in_the_card_and_changes_no_identity() -> None:
    options = LoadOptions(batching="continuous")
    assert options.described == {"batching": "continuous"}
    assert options.identity == {}
