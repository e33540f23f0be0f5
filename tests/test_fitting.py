"""Batches that memory decides: what comes out is what one whole batch gives."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import tiny_lm
from weightsteer import fitting
from weightsteer.behavior import ContrastPair, Example
from weightsteer.checkpoints.safetensors_file import load_tensors
from weightsteer.errors import SteerError
from weightsteer.fitting import bytes_per_token, in_parts, is_out_of_memory, kept_in
from weightsteer.lm import LM
from weightsteer.steering.activations import activation_vector
from weightsteer.training import TrainSettings, preferences_of, train_preference, train_side
from weightsteer.vectors.weight_vector import WeightVector

PROMPTS = [f"Is plan {'very ' * i}good?" for i in range(7)]
CHOICES = [["Yes, it is.", "No."]] * 7


@contextmanager
def little_memory(model: nn.Module, tokens: int) -> Iterator[list[int]]:
    """A model that raises above so many tokens a pass, those in its cache too; yields the rows that passed."""
    passed: list[int] = []

    def refuse(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        rows, length = kwargs["input_ids"].shape
        cache = kwargs.get("past_key_values", kwargs.get("cache"))
        size = rows * (length + (cache.get_seq_length() if cache is not None else 0))
        if size > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        passed.append(rows)

    handle = model.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        yield passed
    finally:
        handle.remove()


def test_scores_replies_and_activations_come_out_the_same_in_parts(pairs: list[ContrastPair]) -> None:
    lm, small = tiny_lm(), tiny_lm()
    sides = [Example(p.prompt, p.positive) for p in pairs], [Example(p.prompt, p.negative) for p in pairs]
    expected = lm.score_choices(PROMPTS, CHOICES, batch_size=8)
    texts = lm.score_texts(PROMPTS, batch_size=8)
    replies = lm.generate(PROMPTS, max_new_tokens=6, batch_size=8)
    activations = activation_vector(lm, *sides)
    with little_memory(small.model, 400) as passed:
        for found, wanted in zip(small.score_choices(PROMPTS, CHOICES, batch_size=8), expected, strict=True):
            assert [score.total for score in found] == pytest.approx([score.total for score in wanted], abs=1e-4)
        assert [s.total for s in small.score_texts(PROMPTS, batch_size=8)] == pytest.approx(
            [s.total for s in texts], abs=1e-4
        )
        assert small.generate(PROMPTS, max_new_tokens=6, batch_size=8) == replies
        for layer, direction in activation_vector(small, *sides).layers.items():
            torch.testing.assert_close(direction, activations.layers[layer], rtol=0, atol=1e-6)
    assert max(passed) > 1  # halved, and not at once down to one row


def test_what_worked_is_kept_for_the_next_call(tmp_path: Path) -> None:
    path, calls = tmp_path / "batches.json", []

    def compute(rows: list[int]) -> list[int]:
        calls.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return rows

    for lm in (tiny_lm(), tiny_lm()):
        calls.clear()
        with kept_in(path):
            assert in_parts(lm.model, "score", range(8), [10] * 8, compute) == list(range(8))
    assert calls == [2, 2, 2, 2]
    assert json.loads(path.read_text()) == {"score": 20}


def test_an_estimate_is_where_it_begins(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "free_bytes", lambda device: 3.2 * 10 * bytes_per_token(lm.model, "generate") / 0.8)
    calls: list[int] = []
    in_parts(lm.model, "generate", range(8), [10] * 8, lambda rows: calls.append(len(rows)) or rows)  # type: ignore[func-returns-value]
    assert calls == [3, 3, 2]


def test_one_row_that_is_too_large_says_what_to_do(lm: LM) -> None:
    with little_memory(lm.model, 5), pytest.raises(SteerError, match="score one text of .* tokens; load .* nf4"):
        lm.score_texts(PROMPTS)


def test_other_errors_are_not_taken_for_a_lack_of_memory(lm: LM) -> None:
    def fail(rows: list[int]) -> list[int]:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        in_parts(lm.model, "score", range(2), [1, 1], fail)
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert not is_out_of_memory(ValueError("x"))


def adapter(folder: Path) -> dict[str, Tensor]:
    return load_tensors(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_training_in_parts_gives_the_same_adapter(
    accumulation: int, pairs: list[ContrastPair], tmp_path: Path
) -> None:
    settings = TrainSettings(
        rank=2, learning_rates=(1e-2,), epochs=2, batch_size=4, accumulation=accumulation, evaluations=2, seed=3
    )
    examples = [Example(p.prompt + "?" * (7 * i), p.positive) for i, p in enumerate(pairs)]
    whole = train_side(tiny_lm(), examples, tmp_path / "whole", settings=settings)
    small = tiny_lm()
    with little_memory(small.model, 330) as passed:
        parts = train_side(small, examples, tmp_path / "parts", settings=settings)
    assert 1 < max(passed) < 4
    for name, tensor in adapter(whole).items():
        torch.testing.assert_close(adapter(parts)[name], tensor, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["lora", "bias"])
def test_checkpointing_gives_the_same_fine_tune(
    kind: str, lm: LM, pairs: list[ContrastPair], quick: TrainSettings, tmp_path: Path
) -> None:
    examples = [Example(p.prompt, p.positive) for p in pairs]
    settings = replace(quick, kind=kind)
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    plain = train_side(lm, examples, tmp_path / "plain", settings=settings)
    passes: list[bool] = []
    counting = lm.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    train_side(lm, examples, tmp_path / "counted", settings=settings)
    once, _ = passes.count(True), passes.clear()
    saving = train_side(lm, examples, tmp_path / "saving", settings=replace(settings, gradient_checkpointing=True))
    assert passes.count(True) == 2 * once  # each block was computed again
    counting.remove()
    name = "adapter_model.safetensors" if kind == "lora" else "delta.safetensors"
    found, expected = load_tensors(saving / name), load_tensors(plain / name)
    assert all(tensor.abs().max() > 0 for tensor in expected.values())
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-6)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in lm.model.modules())
    assert all(torch.equal(before[key], value) for key, value in lm.model.state_dict().items())
    assert json.loads((saving / "weightsteer.json").read_text())["measured"]["gradient_checkpointing"] is True
    assert train_side(lm, examples, tmp_path / "plain", settings=settings) == plain  # one identity with and without
    assert (
        train_side(lm, examples, tmp_path / "plain", settings=replace(settings, gradient_checkpointing=True)) == plain
    )


def test_checkpointing_computes_again_what_a_hook_adds(
    lm: LM, vector: WeightVector, pairs: list[ContrastPair], quick: TrainSettings, tmp_path: Path
) -> None:
    examples = [Example(p.prompt, p.positive) for p in pairs]
    with vector.applied(lm, 0.5):
        plain = train_side(lm, examples, tmp_path / "plain", settings=quick)
        saving = train_side(lm, examples, tmp_path / "saving", settings=replace(quick, gradient_checkpointing=True))
    unsteered = adapter(train_side(lm, examples, tmp_path / "unsteered", settings=quick))
    for name, tensor in adapter(plain).items():
        torch.testing.assert_close(adapter(saving)[name], tensor, rtol=0, atol=1e-6)
    assert any(not torch.allclose(tensor, unsteered[name]) for name, tensor in adapter(plain).items())


@pytest.mark.slow
def test_dpo_checkpoints_and_halves_too(pairs: list[ContrastPair], quick: TrainSettings, tmp_path: Path) -> None:
    wanted, found = preferences_of(pairs, "positive"), {}
    for name, settings in (("plain", quick), ("saving", replace(quick, gradient_checkpointing=True))):
        found[name] = adapter(train_preference(tiny_lm(), wanted, tmp_path / name, settings=settings))
    small = tiny_lm()
    with little_memory(small.model, 400) as passed:
        found["halved"] = adapter(train_preference(small, wanted, tmp_path / "halved", settings=quick))
    assert passed
    for name, tensor in found["plain"].items():
        torch.testing.assert_close(found["saving"][name], tensor, rtol=0, atol=1e-5)
        torch.testing.assert_close(found["halved"][name], tensor, rtol=0, atol=1e-4)
