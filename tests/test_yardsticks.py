"""Token KL and looping as tasks, the k at a stated KL, and the odd and even parts of a method."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from test_compare import BEHAVIOR, write_run
from weightsteer.behavior import ContrastPair, sides_of
from weightsteer.errors import SteerError
from weightsteer.evaluation.odd_even import odd_and_even
from weightsteer.evaluation.search import k_at_kl
from weightsteer.evaluation.task_spec import TaskSpec
from weightsteer.evaluation.tasks import load_task
from weightsteer.evaluation.tasks.loops import LoopScorer, load_loops
from weightsteer.evaluation.tasks.token_kl import TokenKLTask, load_token_kl
from weightsteer.lm import LM
from weightsteer.scoring import text_kls, text_log_probs
from weightsteer.steering.activations import activation_vector
from weightsteer.steering.steering import Direction
from weightsteer.steering.trained_activation import train_activation
from weightsteer.vectors.weight_vector import WeightVector


def few_texts() -> TokenKLTask:
    return load_token_kl(TaskSpec("token_kl")).of_split("validation").first(2)


def test_the_kl_is_zero_of_the_base_and_a_plain_sum_else(lm: LM, vector: WeightVector) -> None:
    texts = ["A lock allows boats to pass.", "Bread keeps well."]
    reference = text_log_probs(lm, texts)
    assert all(float(row.max()) == 0.0 for row in text_kls(reference, lm, texts))
    with vector.applied(lm, 1.0):
        found = text_kls(reference, lm, texts)
        moved = text_log_probs(lm, texts)
    for kl, log_p, log_q in zip(found, reference, moved, strict=True):
        p, q = log_p.double().exp(), log_q.double().exp()
        assert torch.allclose(kl.double(), (p * (p.log() - q.log())).sum(-1), atol=1e-5)


def test_the_task_compares_with_the_unsteered_model_and_says_so_if_it_cannot(lm: LM, vector: WeightVector) -> None:
    task = few_texts()
    with pytest.raises(SteerError, match="compares a model in memory with itself unsteered"):
        task.measure(lm)
    held = task.against(lm)
    assert held.sha256 == task.sha256
    assert held.measure(lm)["p95"] == [0.0, 0.0]
    with vector.applied(lm, 0.5):
        values = held.measure(lm)
    assert all(mean < p95 for mean, p95 in zip(values["mean"], values["p95"], strict=True))
    assert len(held.first(1).reference) == 1


@pytest.mark.parametrize("sign", [1, -1])
def test_the_k_at_a_stated_kl_is_within_the_search_tolerance(lm: LM, vector: WeightVector, sign: int) -> None:
    method, task = Direction("w", vector), few_texts()
    for aim in (0.02, 0.3):
        k = k_at_kl(lm, method, task, kl=aim, sign=sign, tries=10)
        held = task.against(lm)
        with method.applied(lm, k):
            p95 = held.measure(lm)["p95"]
        assert k * sign > 0
        assert sum(v or 0.0 for v in p95) / len(p95) == pytest.approx(aim, rel=0.2)


def test_replies_that_loop_are_counted(lm: LM) -> None:
    again, fine = "the river and the sea " * 8, "A river flows from the hills down to the sea, slowly at the end."
    assert LoopScorer()([], [again, fine, " "])["loops"] == [1.0, 0.0, 1.0]
    task = load_loops(TaskSpec("loops", max_new_tokens=6)).first(1)
    assert set(task.measure(lm)) == {"loops", "repeated"}
    assert not {item.prompt for item in load_task(TaskSpec("loops")).items} & _neutral()  # type: ignore[attr-defined]


def _neutral() -> set[str]:
    """The prompts on which trainings and dials are held near the base."""
    import weightsteer

    path = Path(weightsteer.__file__).parent / "data" / "training" / "neutral.jsonl"
    return {json.loads(line)["prompt"] for line in path.read_text().splitlines()}


def test_odd_and_even_parts_of_a_known_effect(tmp_path: Path) -> None:
    """f(k) = 3 k + k^2 at measured strengths; between them an item's change is linear in k."""

    def effect(k: float) -> float:
        return 3 * k + k * k

    methods = {"contrastive": ([-1.0, -2.0, 1.0, 2.0], effect), "up": ([1.0], effect), "apart": ([-1.0, 2.0], effect)}
    run = write_run(tmp_path, methods)
    found = {row.method: row for row in odd_and_even([run, run], BEHAVIOR, draws=20)}
    assert set(found) == {"contrastive", "apart"}  # one sign alone has no parts
    whole = found["contrastive"]
    assert (whole.k, whole.odd, whole.even, whole.n) == (2.0, pytest.approx(6.0), pytest.approx(4.0), 8)
    assert whole.odd_stderr == pytest.approx(0.0, abs=1e-12)
    apart = found["apart"]  # up: half of 10 at k = 2; down: -2
    assert (apart.k, apart.odd, apart.even) == (1.0, pytest.approx(3.5), pytest.approx(1.5))
    with pytest.raises(SteerError, match="no measurements of the base for beliefs/nothing"):
        odd_and_even([run], ("beliefs", "nothing"))
    assert json.dumps([asdict(row) for row in found.values()])


def test_a_trained_activation_moves_the_pairs_both_ways(lm: LM, pairs: list[ContrastPair]) -> None:
    from test_two_way import margins

    start = activation_vector(lm, *sides_of(pairs)).only(0)
    before = {name: p.requires_grad for name, p in lm.model.named_parameters()}
    trained = train_activation(lm, start, pairs, epochs=4)
    assert {name: p.requires_grad for name, p in lm.model.named_parameters()} == before
    spans = []
    for vector in (start, trained):
        with vector.applied(lm, 1.0) as handle:
            up = margins(lm, pairs)
            handle.k = -1.0
            spans.append(float((up - margins(lm, pairs)).mean()))
    assert spans[1] > spans[0]
    assert trained.card.measured["parameters"] == 32
    assert trained.card.measured["search_tokens"] > 0
    with pytest.raises(SteerError, match="a vector of one layer, found 2"):
        train_activation(lm, activation_vector(lm, *sides_of(pairs)), pairs)
