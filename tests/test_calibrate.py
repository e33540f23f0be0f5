from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch

from conftest import random_vector, tiny_lm
from test_cli import run
from weightsteer import calibrate
from weightsteer.behavior import ContrastPair, pair_rows
from weightsteer.errors import SteerError
from weightsteer.evaluation import dial
from weightsteer.evaluation.calibration import Calibration, CalibrationRow, choose_strengths, explain, table
from weightsteer.evaluation.search import search_k
from weightsteer.evaluation.task_spec import TaskSpec
from weightsteer.evaluation.tasks.capability import load_prose
from weightsteer.files import sha256_of, write_jsonl
from weightsteer.lm import LM
from weightsteer.looping import breaks_more, broken_share
from weightsteer.run_card import RunCard, StrengthRange
from weightsteer.scoring import score_texts, text_kls, text_log_probs
from weightsteer.steering.several_k import generate_at_strengths, replies_at_strengths
from weightsteer.training import TrainSettings, train_vector
from weightsteer.training.sft import MOST_KEPT
from weightsteer.vectors.weight_vector import WeightVector

LOOP = "on and on and on and on and on and on and on and on"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A calibration of a tiny model in a second: few texts, short replies."""
    for name, value in {"TEXTS": 1, "PROMPTS": 2, "NEW_TOKENS": 6, "FRACTIONS": (0.5, 1.0)}.items():
        monkeypatch.setattr(dial, name, value)


@pytest.fixture
def with_pairs(vector: WeightVector, pairs: list[ContrastPair]) -> WeightVector:
    return replace(vector, card=replace(vector.card, held_out=tuple(pair_rows(pairs[:2]))))


@pytest.mark.usefixtures("small")
def test_the_row_of_the_base_is_no_change_and_the_choice_lies_in_the_range(lm: LM, with_pairs: WeightVector) -> None:
    ids = torch.tensor([[4, 5, 6]])
    before = lm.model(ids).logits
    seen: list[float] = []
    found = calibrate(with_pairs, lm, progress=lambda done, total, note="": seen.append(done / total))
    (base,) = [row for row in found.rows if row.k == 0]
    assert (base.loss_change, base.kl, base.behavior, base.stderr) == (0.0, 0.0, 0.0, 0.0)
    assert found.pairs == 2
    strength = found.strength
    assert strength.low <= strength.negative <= 0 <= strength.recommended <= strength.high
    assert strength.low < 0 < strength.high
    for k in (strength.negative, strength.recommended):
        row = next(row for row in found.rows if row.k == k)
        assert row.loss_change <= 0.1
        assert not breaks_more(found.replies[k], found.replies[0.0])
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    assert torch.equal(lm.model(ids).logits, before)
    assert len(table(found)) == 1 + len(found.rows)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("seed", [0, 7])
def test_the_choice_is_that_of_replies_at_every_k(lm: LM, with_pairs: WeightVector, seed: int) -> None:
    found = calibrate(replace(random_vector(lm, seed=seed), card=with_pairs.card), lm)
    ks = [row.k for row in found.rows]
    assert {0.0, found.strength.negative, found.strength.recommended} <= found.replies.keys()
    written = replies_at_strengths(with_pairs, lm, found.prompts, ks, max_new_tokens=dial.NEW_TOKENS)
    whole = {k: broken_share(replies) for k, replies in zip(ks, written, strict=True)}
    every = [replace(row, broken=whole[row.k] if row.broken is None else row.broken) for row in found.rows]
    assert choose_strengths(every, 0.1) == found.strength


def test_replies_that_nobody_wrote_are_taken_to_be_whole_until_they_are() -> None:
    unread = [replace(r, repeated=None, loops=None, broken=None) for r in (row(-1), row(1, 0.2), row(2))]
    assert [one.is_allowed(row(0), 0.1) for one in unread] == [True, False, True]
    assert [line[4] for line in table(Calibration(StrengthRange(0, 0, -1, 2, {}), tuple(unread), 0, (), {}))[1:]] == [
        ""
    ] * 3


@pytest.mark.usefixtures("small")
def test_what_text_costs_is_the_loss_and_the_kl_of_running_text(lm: LM, vector: WeightVector) -> None:
    found = calibrate(vector, lm)
    texts = load_prose(TaskSpec("prose")).first(dial.TEXTS).items
    base, reference = [score.mean for score in score_texts(lm, texts)], text_log_probs(lm, texts)
    for row in found.rows[::3]:
        with vector.applied(lm, row.k):
            loss = fmean(base) - fmean(score.mean for score in score_texts(lm, texts))
            kl = torch.cat(text_kls(reference, lm, texts)).mean()
        assert row.loss_change == pytest.approx(loss, abs=1e-5)
        assert row.kl == pytest.approx(float(kl), abs=1e-5)


def test_a_search_begins_where_it_is_told_and_ends_at_the_same_k() -> None:
    tried: list[float] = []

    def rise(k: float) -> float:
        tried.append(k)
        return 0.5 * k**2

    far = search_k(rise, 0.1, -1)
    steps = len(tried)
    assert search_k(rise, 0.1, 1, start=-far) == -far == pytest.approx(0.2**0.5, rel=0.05)
    assert len(tried) == steps + 1


@pytest.mark.parametrize(
    ("breaks", "beyond", "start"), [(0.8, math.nan, 1.0), (0.8, 15.0, 1.0), (7.0, math.inf, 8.0), (0.5, math.nan, 8.0)]
)
def test_a_search_comes_back_from_where_the_model_breaks(breaks: float, beyond: float, start: float) -> None:
    k = search_k(lambda k: beyond if k > breaks else 0.9 * k**2, 0.2, 1, start=start)
    assert 0.9 * k**2 == pytest.approx(0.2, rel=0.16)


def test_a_search_that_ends_far_away_says_so() -> None:
    with pytest.warns(
        UserWarning, match="expected a rise of about 0.2 nats there; at .* is no number, and 6 tries came no"
    ):
        assert 0 < search_k(lambda k: math.nan if k > 1e-6 else 0.0, 0.2, 1) < 1e-3


@pytest.mark.usefixtures("small")
def test_without_pairs_it_says_so(lm: LM, vector: WeightVector) -> None:
    found = calibrate(vector, lm)
    assert all(row.behavior is None for row in found.rows)
    assert any("no held-out pairs" in note for note in found.notes)


@pytest.mark.usefixtures("small")
def test_a_vector_that_costs_nothing_ends_at_the_largest_k(lm: LM, vector: WeightVector) -> None:
    found = calibrate(vector * 1e-6, lm)
    assert (found.strength.low, found.strength.high) == (-dial.MOST_K, dial.MOST_K)
    assert any("train longer" in note for note in found.notes)


def test_what_is_no_budget_is_refused(lm: LM, vector: WeightVector) -> None:
    for budget in (0.0, -1.0, float("nan")):
        with pytest.raises(SteerError, match="budget: expected"):
            calibrate(vector, lm, budget=budget)


def row(k: float, loss: float = 0.0, behavior: float | None = 0.0, broken: float = 0.0) -> CalibrationRow:
    return CalibrationRow(k, loss, abs(k), behavior, 0.1, broken, broken, broken)


def test_looping_and_dear_strengths_are_never_recommended() -> None:
    rows = [
        row(-2, 0.05, -2.0, broken=0.25),
        row(-1, 0.02, -1.0),
        row(0),
        row(1, 0.02, 1.0),
        row(2, 0.11, 2.0),
        row(3, 0.01, 3.0, broken=1.0),
    ]
    found = choose_strengths(rows, 0.1)
    assert (found.negative, found.recommended, found.low, found.high) == (-1, 1, -2, 3)
    one_of_eight = [replace(r, broken=r.broken / 2) for r in rows]  # may be chance
    assert choose_strengths(one_of_eight, 0.1).negative == -2
    everywhere = [replace(r, broken=r.broken + 0.5) for r in rows]  # the base's own loops are no damage
    assert choose_strengths(everywhere, 0.1) == found


def test_a_side_that_does_not_help_gets_0_and_the_reason() -> None:
    rows = [row(-1, behavior=0.5), row(0), row(1, behavior=1.0, broken=0.5)]
    found = choose_strengths(rows, 0.1)
    assert (found.negative, found.recommended) == (0, 0)
    reasons = explain(rows, found)
    assert "replies loop" in reasons[0]
    assert "held-out pairs" in reasons[1]
    assert choose_strengths([row(-1, behavior=None), row(0, behavior=None)], 0.1).negative == -1
    broken = [row(0), row(1, behavior=0.6), row(2, behavior=None)]
    assert choose_strengths(broken, 0.1).recommended == 1  # what is not known is not chosen


def test_broken_replies_are_counted_against_the_base() -> None:
    assert breaks_more([LOOP, "a b c"], ["a b", "c"])
    assert breaks_more(["", "a"], ["a", "b"])
    assert not breaks_more([LOOP, "a"], ["", "b"])
    assert not breaks_more([], [])


def test_replies_of_many_prompts_are_those_of_one(lm: LM, vector: WeightVector) -> None:
    prompts, ks = ["Is it good?", "Is it far away?", "Why?"], [-1.0, 0.0, 2.0]
    found = replies_at_strengths(vector, lm, prompts, ks, max_new_tokens=6, batch_size=4)
    for number, prompt in enumerate(prompts):
        assert [replies[number] for replies in found] == generate_at_strengths(vector, lm, prompt, ks, max_new_tokens=6)


@pytest.mark.usefixtures("small")
def test_the_command_writes_the_card_and_no_weights(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, pairs: list[ContrastPair], tmp_path: Path
) -> None:
    lm = LM.load(str(checkpoint), device="cpu")
    card = RunCard.now("vector", base_model=str(checkpoint), base_revision=lm.revision)
    folder = WeightVector(random_vector(lm).deltas, card).save(tmp_path / "w")
    write_jsonl(tmp_path / "mine.jsonl", pair_rows(pairs[:2]))
    weights = sha256_of(folder / "adapter_model.safetensors")
    code, out, err = run(capsys, "calibrate", folder, "--pairs", tmp_path / "mine.jsonl", "--budget", "0.05")
    assert code == 0, err
    assert "recommended k:" in out
    assert "loss change" in out
    found = RunCard.load(folder)
    assert found.strength is not None
    assert found.strength.budget == {"prose nll": 0.05}
    kept = found.measured["calibration"]
    assert [r["k"] for r in kept["rows"]] == sorted(r["k"] for r in kept["rows"])
    assert kept["pairs"] == 2
    assert sha256_of(folder / "adapter_model.safetensors") == weights
    assert str(tmp_path) not in (folder / "weightsteer.json").read_text()
    code, again, _ = run(capsys, "calibrate", folder, "--pairs", tmp_path / "mine.jsonl", "--budget", "0.05")
    assert again == out
    assert RunCard.load(folder) == found


@pytest.mark.usefixtures("small")
def test_what_holds_on_a_fine_tune_stands_beside_what_holds_on_the_base(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, pairs: list[ContrastPair], tmp_path: Path
) -> None:
    lm = LM.load(str(checkpoint), device="cpu")
    on_base = StrengthRange(0.5, -0.5, -1.0, 1.0)
    card = RunCard.now("vector", base_model=str(checkpoint), base_revision=lm.revision, strength=on_base)
    w = WeightVector(random_vector(lm).deltas, card)
    other = WeightVector(random_vector(lm, seed=3).deltas, card)
    folder, tuned = w.save(tmp_path / "w"), tmp_path / "tuned"
    other.export_peft(tuned, k=1.0)
    write_jsonl(tmp_path / "mine.jsonl", pair_rows(pairs[:2]))
    steer = ("steer", folder, "Hi", "-m", tuned, "--max-new-tokens", "2", "--k", "0,9")
    assert "`weightsteer calibrate" in run(capsys, *steer)[2]
    code, out, err = run(capsys, "calibrate", folder, "-m", tuned, "--pairs", tmp_path / "mine.jsonl")
    assert code == 0, err
    assert "kept in the card for" in out
    found = RunCard.load(folder)
    assert found.strength == on_base
    (there,) = found.strengths.values()
    assert f"{there.low:g} to {there.high:g}" in (said := run(capsys, *steer)[2])
    assert "`weightsteer calibrate" not in said
    assert "-1 to 1" in run(capsys, "steer", folder, "Hi", "--max-new-tokens", "2", "--k", "0,9")[2]
    assert (2.0 * WeightVector.load(folder)).card.strengths == {}


def test_what_both_sides_held_out_is_in_the_vectors_card(
    pairs: list[ContrastPair], quick: TrainSettings, tmp_path: Path
) -> None:
    settings = replace(quick, validation=0.25, max_steps=2)
    w = train_vector(tiny_lm(), pairs, out=tmp_path, settings=settings)
    assert len(w.card.held_out) == 3
    assert all(held in pair_rows(pairs) for held in w.card.held_out)
    side = RunCard.load(tmp_path / "positive")
    assert [held["prompt"] for held in side.held_out] == [held["prompt"] for held in w.card.held_out]
    assert [held["answer"] for held in side.held_out] == [held["positive"] for held in w.card.held_out]
    assert (w * 2.0).card.held_out == w.card.held_out == w.filter(layers="0").card.held_out
    other = replace(w, card=replace(w.card, held_out=()))
    assert (w + other).card.held_out == ()
    w.export_peft(tmp_path / "exported", k=1.0)
    assert not RunCard.load(tmp_path / "exported").held_out


def test_a_card_without_held_out_rows_loads(vector: WeightVector, tmp_path: Path) -> None:
    vector.card.save(tmp_path)
    path = tmp_path / "weightsteer.json"
    fields = json.loads(path.read_text())
    del fields["held_out"]
    path.write_text(json.dumps(fields))
    assert RunCard.load(tmp_path).held_out == ()
    assert MOST_KEPT == 32
