"""Two-way training and the terms beside the loss on answers, by identities on the tiny model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import tiny_lm
from weightsteer.behavior import ContrastPair, sides_of
from weightsteer.errors import SteerError
from weightsteer.files import sha256_of
from weightsteer.lm import LM
from weightsteer.run_card import RunCard
from weightsteer.scoring import mean_kl, prompt_log_probs, score_choices
from weightsteer.training import TrainSettings, neutral, train_side, train_two_way, two_way_vector
from weightsteer.training.defaults import resolve
from weightsteer.training.job import Job
from weightsteer.training.neutral import draw, neutral_rows
from weightsteer.training.settings import identity_of
from weightsteer.training.sft import encode
from weightsteer.training.trainables import trainable
from weightsteer.training.two_way import encode_pairs
from weightsteer.training.weighted_trainer import make_weighted_trainer
from weightsteer.vectors.low_rank import LowRank
from weightsteer.vectors.weight_vector import WeightVector

ADAPTER = "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def fewer_neutral_replies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short replies to a few prompts."""
    monkeypatch.setattr(neutral, "PROMPTS", 6)
    monkeypatch.setattr(neutral, "REPLY_TOKENS", 6)


def swapped(pairs: Sequence[ContrastPair]) -> list[ContrastPair]:
    return [replace(pair, positive=pair.negative, negative=pair.positive) for pair in pairs]


def margins(lm: LM, pairs: Sequence[ContrastPair]) -> torch.Tensor:
    scores = score_choices(lm, [p.prompt for p in pairs], [(p.positive, p.negative) for p in pairs])
    return torch.tensor([positive.mean - negative.mean for positive, negative in scores])


def odd_and_even(lm: LM, w: WeightVector, pairs: Sequence[ContrastPair], k: float = 1.0) -> tuple[float, float]:
    """Mean over pairs of the odd part, and of the even part's size."""
    base = margins(lm, pairs)
    with w.applied(lm, k) as handle:
        up = margins(lm, pairs)
        handle.k = -k
        down = margins(lm, pairs)
    return float((up - down).mean() / 2), float(((up + down) / 2 - base).abs().mean())


@pytest.mark.parametrize("weights", [{}, {"even_weight": 1.0, "kl_weight": 0.5}])
def test_swapped_sides_give_minus_w(
    lm: LM, pairs: list[ContrastPair], quick: TrainSettings, tmp_path: Path, weights: dict[str, float]
) -> None:
    settings = replace(quick, epochs=2.0, **weights)
    before = {name: p.clone() for name, p in lm.model.state_dict().items()}
    w = two_way_vector(train_two_way(lm, pairs, tmp_path / "w", settings=settings))
    assert all(torch.equal(lm.model.state_dict()[name], value) for name, value in before.items())
    other = two_way_vector(train_two_way(lm, swapped(pairs), tmp_path / "other", settings=settings))
    assert (w + other).norm() < 1e-5 * w.norm()
    assert {delta.rank for delta in w.deltas.values() if isinstance(delta, LowRank)} == {quick.rank}
    odd, _ = odd_and_even(lm, w, pairs)
    assert odd > 0.1


def test_the_penalty_holds_the_even_part_down(
    lm: LM, pairs: list[ContrastPair], quick: TrainSettings, tmp_path: Path
) -> None:
    long = replace(quick, epochs=6.0, learning_rates=(2e-2,))
    plain, held = (
        two_way_vector(train_two_way(lm, pairs, tmp_path / f"{weight:g}", settings=replace(long, even_weight=weight)))
        for weight in (0.0, 10.0)
    )
    ratios = [even / odd for odd, even in (odd_and_even(lm, w, pairs) for w in (plain, held))]
    assert ratios[1] < ratios[0]
    assert RunCard.load(tmp_path / "10").settings["even_weight"] == 10.0


def test_the_kl_term_keeps_a_side_near_the_base(
    lm: LM, pairs: list[ContrastPair], quick: TrainSettings, tmp_path: Path
) -> None:
    from weightsteer.vectors.difference import task_vector

    examples, prompts = sides_of(pairs)[0], ["Tell me about rivers.", "What is bread?"]
    reference, found = prompt_log_probs(lm, prompts), []
    for weight in (0.0, 20.0):
        settings = replace(quick, epochs=4.0, kl_weight=weight)
        folder = train_side(lm, examples, tmp_path / f"{weight:g}", settings=settings)
        with task_vector(folder).applied(lm, 1.0):
            found.append(mean_kl(reference, lm, prompts))
    assert found[1] < 0.7 * found[0]


def test_weights_of_zero_are_the_plain_training_bit_for_bit(
    lm: LM, pairs: list[ContrastPair], quick: TrainSettings, tmp_path: Path
) -> None:
    examples = sides_of(pairs)[0]
    zero = replace(quick, kl_weight=0.0, even_weight=0.0)
    assert identity_of(zero) == identity_of(quick)
    assert "kl_weight" not in identity_of(zero)  # so that a fine-tune that an older version made is known as the same
    folders = [train_side(lm, examples, tmp_path / n, settings=s) for n, s in (("a", quick), ("b", zero))]
    assert len({sha256_of(folder / ADAPTER) for folder in folders}) == 1
    assert len({str(RunCard.load(folder).settings) for folder in folders}) == 1


def test_a_small_kl_weight_is_close_to_none(
    lm: LM, pairs: list[ContrastPair], quick: TrainSettings, tmp_path: Path
) -> None:
    """The weighted trainer's own loss on the answers is that of the plain one."""
    from weightsteer.vectors.difference import task_vector

    examples = sides_of(pairs)[0]
    folders = [
        train_side(lm, examples, tmp_path / f"{weight:g}", settings=replace(quick, kl_weight=weight))
        for weight in (0.0, 1e-9)
    ]
    plain, weighted = map(task_vector, folders)
    assert (plain - weighted).norm() < 1e-3 * plain.norm()


@pytest.mark.parametrize("two_way", [False, True])
def test_the_loss_of_a_step_is_that_of_its_examples(two_way: bool, lm: LM, pairs: list[ContrastPair]) -> None:
    """In one pass or several, as memory asks for."""
    settings = resolve(TrainSettings(rank=2, batch_size=4, kl_weight=1.0), examples=len(pairs), width=32)
    rows = encode_pairs(lm, pairs[:4], 512) if two_way else encode(lm, sides_of(pairs[:4])[0], 512)
    card = RunCard("finetune")
    with trainable(lm, settings) as ready:
        for parameter in ready.model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        job = Job(lm, rows, rows, settings, 1e-2, Path("unused"), card)
        trainer = make_weighted_trainer(job, ready.model, [], neutral=neutral_rows(lm))
        parts = [rows, rows[:1], rows[1:3], rows[3:]]
        losses, counts = [], []
        for part in parts:
            inputs = trainer.data_collator(part)
            losses.append(trainer.compute_loss(ready.model, inputs))
            counts.append(trainer.weight_of(inputs))
        whole, *rest = [float(loss) * count for loss, count in zip(losses, counts, strict=True)]
        assert whole == pytest.approx(sum(rest), rel=1e-5)


def test_what_has_no_such_term_refuses_its_weight(lm: LM, pairs: list[ContrastPair], tmp_path: Path) -> None:
    examples = sides_of(pairs)[0]
    with pytest.raises(SteerError, match="even_weight: training on one side has no such term"):
        train_side(lm, examples, tmp_path / "a", settings=TrainSettings(even_weight=1.0))
    with pytest.raises(SteerError, match="kl_weight: needs kind lora"):
        train_side(lm, examples, tmp_path / "a", settings=TrainSettings(kind="bias", kl_weight=1.0))
    with pytest.raises(SteerError, match="two-way training trains lora, found 'full'"):
        train_two_way(lm, pairs, tmp_path / "a", settings=TrainSettings(kind="full"))
    with pytest.raises(SteerError, match="expected a finite number of at least 0"):
        TrainSettings(kl_weight=-1.0)


def test_a_step_that_is_made_again_sees_the_same_neutral_replies() -> None:
    rows = neutral_rows(tiny_lm())
    assert draw(rows, 3, 17) == draw(rows, 3, 17)
    assert len(rows) == 6
    for row in rows:
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["attention_mask"])
