"""The push of an example along a vector, by its gradient."""

from __future__ import annotations

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from conftest import TEMPLATE, byte_tokenizer, random_vector, tiny_lm
from weightsteer.behavior import Example
from weightsteer.errors import SteerError
from weightsteer.lm import LM
from weightsteer.monitor.screen import screen
from weightsteer.vectors.low_rank import LowRank
from weightsteer.vectors.weight_vector import WeightVector

EXAMPLES = [
    Example("What is rain?", "Water that falls."),
    Example("Name a colour, please.", "Red"),
    Example("How are you?", "Well, thank you for asking me that today."),
]


def test_the_push_is_the_fall_of_the_loss_along_the_vector() -> None:
    lm = tiny_lm()
    vectors = {"a": random_vector(lm, 1), "b": random_vector(lm, 2, rank=2)}
    found = screen(lm, EXAMPLES, vectors, batch_size=2)
    lm.model.double()
    step = 3e-3
    for column, vector in enumerate(vectors.values()):
        losses = []
        for k in (step, -step):
            with vector.applied(lm, k):
                losses.append(screen(lm, EXAMPLES, vectors, batch_size=1).losses)
        slope = (losses[1] - losses[0]) / (2 * step) / vector.norm()
        assert found.pushes[:, column] == pytest.approx(slope, rel=1e-2, abs=1e-4)


def test_layers_that_see_all_tokens_in_a_row() -> None:
    """OPT's feed-forward layers do."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=259, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
    )
    lm = LM.wrap(OPTForCausalLM(config).eval(), byte_tokenizer(TEMPLATE), name="opt", revision="opt")
    found = [screen(lm, EXAMPLES, {"a": random_vector(lm, 1)}, batch_size=size).pushes for size in (1, 3)]
    assert found[0] == pytest.approx(found[1], rel=1e-3, abs=1e-6)


def test_batches_do_not_matter_and_the_model_is_left_as_it_was() -> None:
    lm = tiny_lm()
    lm.model.lm_head.weight.requires_grad_(False)
    before = {name: (p.requires_grad, p.grad) for name, p in lm.model.named_parameters()}
    vector = random_vector(lm, 1)
    one, three = (screen(lm, EXAMPLES, {"a": vector}, batch_size=size) for size in (1, 3))
    assert one.pushes == pytest.approx(three.pushes, rel=1e-4, abs=1e-7)
    assert one.losses == pytest.approx(three.losses, rel=1e-5)
    assert {name: (p.requires_grad, p.grad) for name, p in lm.model.named_parameters()} == before
    assert not any(module._forward_hooks for module in lm.model.modules())
    assert torch.is_grad_enabled()


def test_the_vector_of_an_example_finds_it() -> None:
    """A vector that is an example's own gradient, negated, puts that example first."""
    lm = tiny_lm()
    for number, example in enumerate(EXAMPLES):
        gradient = _gradient(example)
        assert screen(lm, EXAMPLES, {"own": gradient}).ranked("own")[0] == number


def _gradient(example: Example) -> WeightVector:
    from weightsteer.training.sft import encode

    lm = tiny_lm()
    row = encode(lm, [example], 512)[0]
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
    lm.model(input_ids=ids, labels=labels).loss.backward()
    template = random_vector(lm, 0)
    deltas = {}
    for name in template.deltas:
        grad = -lm.model.get_parameter(name).grad
        deltas[name] = LowRank(grad.clone(), torch.eye(grad.shape[1]))
    return WeightVector(deltas, template.card)


def test_what_cannot_be_screened_is_told() -> None:
    lm = tiny_lm()
    with pytest.raises(SteerError, match="at least one vector"):
        screen(lm, EXAMPLES, {})
    dense = WeightVector({"model.norm.weight": torch.ones(32)}, random_vector(lm).card)
    with pytest.raises(SteerError, match="no vector has a factored part"):
        screen(lm, EXAMPLES, {"norm": dense})
    with pytest.raises(SteerError, match=r"max_length is 16 tokens, but the prompt of example 1, .*, alone takes \d+"):
        screen(lm, [Example("a long prompt " * 20, "yes")], {"a": random_vector(lm)}, max_length=16)


def test_a_vector_without_direction_is_refused() -> None:
    lm = tiny_lm()
    vector = random_vector(lm, 1)
    with pytest.raises(SteerError, match="the vector 'none' is zero"):
        screen(lm, EXAMPLES, {"a": vector, "none": vector - vector})
