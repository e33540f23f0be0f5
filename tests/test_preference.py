from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

from weightsteer.behavior import ContrastPair, Example
from weightsteer.cli import app
from weightsteer.errors import SteerError
from weightsteer.lm import LM
from weightsteer.run_card import RunCard
from weightsteer.scoring import score_choices
from weightsteer.training import (
    Preference,
    TrainSettings,
    encode,
    list_snapshots,
    preferences_of,
    train_preference,
    train_side,
)
from weightsteer.vectors.difference import subtract_finetunes, task_vector

pytest.importorskip("trl")
ADAPTER = "adapter_model.safetensors"


@pytest.fixture
def preferences(pairs: list[ContrastPair]) -> list[Preference]:
    return preferences_of(pairs, "positive")


def margin(lm: LM, preferences: Sequence[Preference]) -> float:
    """Mean of log p(chosen) - log p(rejected), in nats."""
    scores = score_choices(lm, [p.prompt for p in preferences], [[p.chosen, p.rejected] for p in preferences])
    return sum(chosen.total - rejected.total for chosen, rejected in scores) / len(scores)


def state_of(model: nn.Module) -> list[Any]:
    """All that a training might leave behind in a model."""
    inside = {name: (sorted(vars(module)), getattr(module, "p", None)) for name, module in model.named_modules()}
    config, generation = model.config, model.generation_config
    return [inside, config.to_dict(), generation.to_dict(), [p.requires_grad for p in model.parameters()]]


def test_tuning_raises_the_margin_and_leaves_the_base_alone(
    lm: LM, preferences: list[Preference], quick: TrainSettings, tmp_path: Path
) -> None:
    lm.model.config.pad_token_id = None  # which TRL would set
    parameters, state = {name: p.clone() for name, p in lm.model.state_dict().items()}, state_of(lm.model)
    before = margin(lm, preferences)
    folder = train_preference(lm, preferences, tmp_path / "a", settings=replace(quick, epochs=4, snapshots=2))
    assert state_of(lm.model) == state
    assert all(torch.equal(lm.model.state_dict()[name], value) for name, value in parameters.items())
    assert margin(lm, preferences) == before
    margins = []
    for path in (*list_snapshots(folder).values(), folder):
        with task_vector(path).applied(lm, 1.0):
            margins.append(margin(lm, preferences))
    assert before + 5 < margins[0] < margins[1]
    assert before + 5 < margins[2]
    card = RunCard.load(folder)
    assert (card.kind, card.settings["method"], card.settings["beta"]) == ("finetune", "dpo", 0.1)
    assert not (tmp_path / "a.work").exists()
    assert not (folder / "ref").exists()


def test_the_model_sees_the_tokens_of_sft_and_the_costs_count_them(
    lm: LM, preferences: list[Preference], quick: TrainSettings, tmp_path: Path
) -> None:
    seen: set[tuple[int, ...]] = set()

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.update(tuple(row[: int((row != lm.pad_id).sum())].tolist()) for row in args[0])

    handle = lm.model.get_input_embeddings().register_forward_pre_hook(look)
    folder = train_preference(lm, preferences, tmp_path / "a", settings=quick)
    handle.remove()
    answers = [Example(p.prompt, text) for p in preferences for text in (p.chosen, p.rejected)]
    rows = [tuple(row["input_ids"]) for row in encode(lm, answers, 1024)]
    assert seen == set(rows)
    held_out = sum(len(row) for row in rows) - RunCard.load(folder).measured["tokens"]
    assert held_out in {len(rows[i]) + len(rows[i + 1]) for i in range(0, len(rows), 2)}, "one preference in twelve"
    cut = train_preference(lm, preferences, tmp_path / "cut", settings=replace(quick, max_length=70))
    assert RunCard.load(cut).measured["tokens"] == 11 * 2 * 70
    with pytest.raises(SteerError, match="raise max_length"):
        train_preference(lm, preferences, tmp_path / "no", settings=replace(quick, max_length=20))


def test_a_finished_tuning_is_kept_and_a_stopped_one_goes_on(
    lm: LM, preferences: list[Preference], quick: TrainSettings, tmp_path: Path
) -> None:
    settings = replace(quick, epochs=3, evaluations=4, snapshots=3, learning_rates=(1e-3, 1e-2))

    def stopping(done: float, total: float, note: str = "") -> None:
        if done == 5:
            raise KeyboardInterrupt

    whole = train_preference(lm, preferences, tmp_path / "whole", settings=settings)
    with pytest.raises(KeyboardInterrupt):
        train_preference(lm, preferences, tmp_path / "broken", settings=settings, progress=stopping)
    steps: list[float] = []
    broken = train_preference(
        lm,
        preferences,
        tmp_path / "broken",
        settings=settings,
        progress=lambda done, total, note="": steps.append(done),
    )
    assert (steps[0], steps[-1]) == (5, 18), "goes on after the checkpoint at step 4"
    folders = [[path, *list_snapshots(path).values()] for path in (whole, broken)]
    for one, other in zip(*folders, strict=True):
        assert (one / ADAPTER).read_bytes() == (other / ADAPTER).read_bytes()
    assert RunCard.load(whole).measured["tokens"] == RunCard.load(broken).measured["tokens"]
    assert RunCard.load(whole).measured["learning_rate"] == 1e-2
    stamp = (whole / ADAPTER).stat().st_mtime_ns
    train_preference(lm, preferences, whole, settings=settings)
    assert (whole / ADAPTER).stat().st_mtime_ns == stamp
    with pytest.raises(SteerError, match=r"\(beta: 0.1 there, 0.5 asked\)"):
        train_preference(lm, preferences, whole, settings=settings, beta=0.5)
    with pytest.raises(SteerError, match="other examples; other preferences; method: None there, dpo asked; beta"):
        sft = train_side(lm, [Example(p.prompt, p.chosen) for p in preferences], tmp_path / "sft", settings=settings)
        train_preference(lm, preferences, sft, settings=settings)
    assert (whole / ADAPTER).stat().st_mtime_ns == stamp


def test_the_base_is_at_ln_2_and_what_stays_there_is_refused(
    lm: LM, preferences: list[Preference], quick: TrainSettings, tmp_path: Path
) -> None:
    folder = train_preference(lm, preferences, tmp_path / "a", settings=quick)
    measured = RunCard.load(folder).measured
    assert measured["base_validation_loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert measured["validation_loss"]["0.01"] < math.log(2)
    with pytest.raises(SteerError, match="stayed at the base's, 0.6931, with learning rate 1e-30; nothing moved"):
        train_preference(lm, preferences, tmp_path / "b", settings=replace(quick, learning_rates=(1e-30,)))


def test_the_two_directions_are_mirrored(lm: LM, pairs: list[ContrastPair]) -> None:
    toward, away = preferences_of(pairs, "positive"), preferences_of(pairs, "negative")
    assert [(p.prompt, p.chosen, p.rejected) for p in toward] == [(p.prompt, p.rejected, p.chosen) for p in away]
    assert toward[0] == Preference(pairs[0].prompt, pairs[0].positive, pairs[0].negative)
    with pytest.raises(SteerError, match="preferred"):
        preferences_of(pairs, "up")  # type: ignore[arg-type]


def test_mistakes(
    lm: LM, preferences: list[Preference], quick: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SteerError, match="trains lora, found 'bias'"):
        train_preference(lm, preferences, tmp_path / "a", settings=replace(quick, kind="bias"))
    with pytest.raises(SteerError, match="beta"):
        train_preference(lm, preferences, tmp_path / "a", beta=0)
    with pytest.raises(SteerError, match="at least 2"):
        train_preference(lm, preferences[:1], tmp_path / "a", settings=quick)
    monkeypatch.setitem(sys.modules, "weightsteer.training.dpo", None)
    with pytest.raises(SteerError, match=r"pip install 'weightsteer\[dpo\]'"):
        train_preference(lm, preferences, tmp_path / "a", settings=quick)
    assert not list(tmp_path.iterdir())


def test_the_train_verb_tunes_both_ways(checkpoint: Path, pairs: list[ContrastPair], tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(asdict(pair)) + "\n" for pair in pairs))
    common = ["train", "--kind", "dpo", "-o", str(tmp_path / "t"), "-m", str(checkpoint), "--device", "cpu"]
    options = ["--rank", "2", "--lr", "1e-2", "--batch-size", "4", "--snapshots", "1"]
    result = CliRunner().invoke(app, [*common, *options, "--pairs", str(data)])
    assert result.exit_code == 0, result.output
    lm = LM.load(str(checkpoint), device="cpu")
    preferences = preferences_of(pairs, "positive")
    w = subtract_finetunes(tmp_path / "t" / "positive", tmp_path / "t" / "negative")
    before = margin(lm, preferences)
    with w.applied(lm, 1.0):
        assert margin(lm, preferences) > before
    assert list(list_snapshots(tmp_path / "t" / "negative")) == [1.0]
    assert (
        load_file(tmp_path / "t" / "positive" / ADAPTER).keys()
        == load_file(tmp_path / "t" / "negative" / ADAPTER).keys()
    )
    result = CliRunner().invoke(app, [*common, "--positive", str(data), "--negative", str(data)])
    assert "expected --pairs" in str(result.exception)
