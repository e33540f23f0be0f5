from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import random_vector, tiny_lm
from weightsteer.batches import batches_by_length
from weightsteer.continuations import common_prefix
from weightsteer.errors import SteerError
from weightsteer.lm import LM
from weightsteer.model_parts import projecting_only
from weightsteer.scoring import mean_kl, prompt_log_probs, score_choices, score_texts

texts = st.text(st.characters(codec="ascii", categories=("L", "P", "Zs")), min_size=1, max_size=12)


@torch.no_grad()
def naive(lm: LM, prompt: str, answer: str) -> float:
    """Summed log-probability from one plain forward pass, no cache, no padding, whole vocabulary."""
    head, tail = lm.chat_ids(prompt), lm.answer_ids(answer)
    log_p = lm.model(torch.tensor([head + tail])).logits[0].double().log_softmax(-1)
    return float(sum(log_p[len(head) + i - 1, token] for i, token in enumerate(tail)))


@given(st.lists(st.tuples(texts, st.lists(texts, min_size=1, max_size=3)), min_size=1, max_size=5), st.integers(1, 4))
def test_cached_batched_scores_equal_the_plain_ones(items: list[tuple[str, list[str]]], batch: int) -> None:
    lm = tiny_lm()
    scores = score_choices(lm, [p for p, _ in items], [c for _, c in items], batch_size=batch)
    for (prompt, choices), row in zip(items, scores, strict=True):
        for answer, score in zip(choices, row, strict=True):
            assert score.tokens == len(lm.answer_ids(answer))
            assert score.total == pytest.approx(naive(lm, prompt, answer), abs=1e-3)


def test_scores_of_a_steered_model_are_steered() -> None:
    lm = tiny_lm()
    vector = random_vector(lm)
    with vector.applied(lm, 2.0):
        ((score,),) = score_choices(lm, ["Hello there"], [["yes indeed"]])
        expected = naive(lm, "Hello there", "yes indeed")
    assert score.total == pytest.approx(expected, abs=1e-3)
    assert score.total != pytest.approx(naive(lm, "Hello there", "yes indeed"), abs=1e-3)


@given(st.lists(texts.filter(lambda t: len(t) > 1), min_size=1, max_size=5), st.integers(1, 3))
def test_text_scores_equal_the_plain_ones(rows: list[str], batch: int) -> None:
    lm = tiny_lm()
    for text, score in zip(rows, score_texts(lm, rows, batch_size=batch), strict=True):
        ids = lm.answer_ids(text)
        with torch.no_grad():
            log_p = lm.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        expected = sum(float(log_p[i, token]) for i, token in enumerate(ids[1:]))
        assert score.tokens == len(ids) - 1
        assert score.total == pytest.approx(expected, abs=1e-3)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=5))
def test_common_prefix_is_shared_and_leaves_a_token(rows: list[list[int]]) -> None:
    shared = common_prefix(rows)
    assert len({tuple(row[:shared]) for row in rows}) == 1
    assert all(len(row) > shared for row in rows)


def test_projection_only_where_wanted(lm: LM) -> None:
    ids = torch.tensor([[4, 5, 6], [7, 8, 9]])
    wanted = torch.tensor([[True, False, False], [False, True, True]])
    with torch.no_grad():
        full = lm.model(ids).logits
        with projecting_only(lm.model, wanted):
            part = lm.model(ids).logits
        assert torch.equal(lm.model(ids).logits, full)
    assert part.shape == (1, 3, full.shape[-1])
    torch.testing.assert_close(part[0], full[wanted])


def test_kl_is_zero_to_itself_and_positive_to_a_steered_model(lm: LM) -> None:
    prompts = ["Hello", "How are you?"]
    reference = prompt_log_probs(lm, prompts)
    assert mean_kl(reference, lm, prompts) == 0.0
    with random_vector(lm).applied(lm, 1.0):
        assert mean_kl(reference, lm, prompts) > 0.0
    other = tiny_lm(seed=3)
    expected = [
        (p.double().exp() * (p.double() - q.double())).sum(-1)
        for p, q in zip(reference, prompt_log_probs(other, prompts), strict=True)
    ]
    assert mean_kl(reference, other, prompts) == pytest.approx(float(torch.cat(expected).mean()), rel=1e-4)


def test_empty_choices_are_errors(lm: LM) -> None:
    with pytest.raises(SteerError, match="no candidate"):
        score_choices(lm, ["Hi"], [[]])
    with pytest.raises(SteerError, match="empty one"):
        score_choices(lm, ["Hi"], [[""]])
    with pytest.raises(SteerError, match="fewer than two tokens"):
        score_texts(lm, ["x"])


@given(st.lists(st.integers(1, 50), max_size=20), st.integers(1, 7))
def test_length_sorted_takes_every_index_once(lengths: list[int], size: int) -> None:
    batches = list(batches_by_length(lengths, size))
    assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
    assert all(len(b) <= size for b in batches)
    taken = [lengths[i] for b in batches for i in b]
    assert taken == sorted(taken, reverse=True)
