from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conftest import tiny_lm
from weightsteer.behavior import ContrastPair, sides_of
from weightsteer.errors import SteerError
from weightsteer.lm import LM
from weightsteer.run_card import RunCard
from weightsteer.steering.activations import ActivationVector, activation_vector

IDS = torch.tensor([[5, 6, 7, 8]])


@torch.no_grad()
def naive(lm: LM, pairs: list[ContrastPair], layer: int) -> torch.Tensor:
    """From the plain hidden states, one example at a time."""
    means = []
    for side in ("positive", "negative"):
        rows = []
        for pair in pairs:
            head, tail = lm.chat_ids(pair.prompt), lm.answer_ids(getattr(pair, side))
            seen: list[torch.Tensor] = []
            listening = lm.blocks[layer].register_forward_hook(lambda m, a, o, seen=seen: seen.append(o))
            lm.model(torch.tensor([head + tail]))
            listening.remove()
            rows.append(seen[0][0, len(head) :])
        means.append(torch.cat(rows).double().mean(0))
    return means[0] - means[1]


def test_vector_is_the_difference_of_mean_answer_activations(pairs: list[ContrastPair]) -> None:
    lm = tiny_lm()
    vector = activation_vector(lm, *sides_of(pairs[:4]), batch_size=3)
    for layer in (0, 1):
        torch.testing.assert_close(vector.layers[layer].double(), naive(lm, pairs[:4], layer), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_applying_adds_and_leaving_restores(pairs: list[ContrastPair]) -> None:
    lm = tiny_lm()
    vector = activation_vector(lm, *sides_of(pairs[:4])).only(1)
    before = lm.model(IDS).logits
    with vector.applied(lm, 0.0) as handle:
        assert torch.equal(lm.model(IDS).logits, before)
        handle.k = 2.0
        inner = lm.model.model
        hidden: list[torch.Tensor] = []
        listening = inner.norm.register_forward_pre_hook(lambda m, a: hidden.append(a[0]))
        steered = lm.model(IDS).logits
        handle.k = 0.0
        lm.model(IDS)
        listening.remove()
        torch.testing.assert_close(hidden[0] - hidden[1], (2.0 * vector.layers[1]).expand_as(hidden[0]))
        assert not torch.equal(steered, before)
    assert torch.equal(lm.model(IDS).logits, before)


def test_save_and_load(tmp_path: Path, pairs: list[ContrastPair], lm: LM) -> None:
    vector = activation_vector(lm, *sides_of(pairs[:2]))
    loaded = ActivationVector.load(vector.save(tmp_path / "a"))
    assert loaded.card == vector.card
    assert all(torch.equal(loaded.layers[layer], a) for layer, a in vector.layers.items())


def test_layers_that_do_not_exist(pairs: list[ContrastPair], lm: LM) -> None:
    vector = activation_vector(lm, *sides_of(pairs[:2]))
    with pytest.raises(SteerError, match="layers 0 to 1"):
        vector.only(5)
    with pytest.raises(SteerError, match="this model 1 blocks"), vector.applied(tiny_lm(layers=1), 1.0):
        pass


def test_a_model_of_another_width_is_refused(lm: LM) -> None:
    wide = ActivationVector({0: torch.ones(48)}, RunCard("activations", base_model="a/wider"))
    with pytest.raises(SteerError, match="is 48 wide, this model 32; it was made on a/wider"), wide.applied(lm, 1.0):
        pass


def test_a_side_without_examples_is_refused(pairs: list[ContrastPair], lm: LM) -> None:
    with pytest.raises(SteerError, match="expected examples of both sides, found 0 and 2"):
        activation_vector(lm, [], sides_of(pairs[:2])[1])
