from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from test_resume import WEIGHTS, StopError, counts, stop_at
from weightsteer.behavior import ContrastPair, Example
from weightsteer.cli.show_run import finetune_facts
from weightsteer.errors import SteerError
from weightsteer.lm import LM
from weightsteer.run_card import RunCard
from weightsteer.training import TrainSettings, encode, split_validation, train_side
from weightsteer.training.job import Encoded
from weightsteer.training.mean import STRIDE, parts_of, write_mean
from weightsteer.training.settings import identity_of
from weightsteer.training.two_way import train_two_way
from weightsteer.vectors.difference import subtract_finetunes, task_vector
from weightsteer.vectors.weight_vector import WeightVector


@pytest.fixture
def examples(pairs: list[ContrastPair]) -> list[Example]:
    return [Example(pair.prompt, pair.positive) for pair in pairs]


def dense(vector: WeightVector) -> dict[str, torch.Tensor]:
    return {name: delta.dense() for name, delta in vector.deltas.items()}


@settings(max_examples=20, deadline=None)
@given(count=st.integers(2, 5), rank=st.integers(1, 4), seed=st.integers(0, 2**16))
def test_factors_side_by_side_are_the_mean(
    count: int, rank: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, draw, changes = tmp_path_factory.mktemp("mean"), torch.Generator().manual_seed(seed), []
    for number in range(count):
        a, b = torch.randn(rank, 7, generator=draw), torch.randn(5, rank, generator=draw)
        (folder / str(number)).mkdir()
        (folder / str(number) / "adapter_config.json").write_text(json.dumps({"r": rank, "lora_alpha": 16}))
        save_file({"x.lora_A.weight": a, "x.lora_B.weight": b}, folder / str(number) / WEIGHTS)
        changes.append(16 / rank * b.double() @ a.double())
    out = folder / "0"
    write_mean([folder / str(number) for number in range(count)], out)
    found, config = load_file(out / WEIGHTS), json.loads((out / "adapter_config.json").read_text())
    whole = config["lora_alpha"] / config["r"] * found["x.lora_B.weight"].double() @ found["x.lora_A.weight"].double()
    torch.testing.assert_close(whole, sum(changes) / count)


def test_a_side_of_several_is_their_mean(
    lm: LM, examples: list[Example], quick: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    several = replace(quick, finetunes=3, learning_rates=(1e-6, 3e-2))
    mean = train_side(lm, examples, tmp_path / "mean", settings=several)
    card, held = RunCard.load(mean), split_validation
    from weightsteer.training import sft

    alone, (train, validation) = [], held(encode(lm, examples, quick.max_length), quick)
    for number in range(3):  # each alone, on its part of the rows
        split = train[number::3], validation
        monkeypatch.setattr(sft, "split_validation", lambda _rows, _given, split=split: split)
        one = replace(quick, learning_rates=(3e-2,), seed=quick.seed + number * STRIDE)
        alone.append(train_side(lm, examples, tmp_path / str(number), settings=one))
    parts = [dense(task_vector(folder)) for folder in alone]
    assert not torch.equal(next(iter(parts[0].values())), next(iter(parts[1].values())))
    for name, found in dense(task_vector(mean)).items():
        torch.testing.assert_close(found, sum(part[name] for part in parts) / 3)
    assert json.loads((mean / "adapter_config.json").read_text())["r"] == 3 * quick.rank
    made = [RunCard.load(folder).measured for folder in alone]
    assert card.measured["tokens"] == sum(one["tokens"] for one in made)
    assert card.measured["search_tokens"] > card.measured["tokens"]
    assert card.settings["finetunes"] == 3
    assert not (tmp_path / "mean.work").exists()
    assert subtract_finetunes(mean, mean).norm() == 0


def test_a_killed_mean_goes_on_where_it_stopped(
    lm: LM, examples: list[Example], quick: TrainSettings, tmp_path: Path
) -> None:
    given = replace(quick, batch_size=2, max_steps=4, evaluations=12, finetunes=3)
    whole = train_side(lm, examples, tmp_path / "whole", settings=given)
    for step in (2, 10):  # of 12, within the first and the third
        with pytest.raises(StopError):
            train_side(lm, examples, tmp_path / "killed", settings=given, progress=stop_at(step))
    killed = train_side(lm, examples, tmp_path / "killed", settings=given)
    assert counts(killed) == counts(whole)
    tensors = load_file(whole / WEIGHTS)
    assert all(torch.equal(found, tensors[name]) for name, found in load_file(killed / WEIGHTS).items())


@pytest.mark.slow
def test_a_damaged_first_result_leaves_the_others(
    lm: LM, examples: list[Example], quick: TrainSettings, tmp_path: Path
) -> None:
    given, done = replace(quick, max_steps=4, finetunes=3), list[float]()
    whole = train_side(lm, examples, tmp_path / "whole", settings=given)
    with pytest.raises(StopError):
        train_side(lm, examples, tmp_path / "a", settings=given, progress=stop_at(10))  # in the third
    (first,) = (tmp_path / "a.work").glob("lr-*")
    (first / "best" / WEIGHTS).write_bytes(b"")
    with pytest.warns(UserWarning, match="its result is damaged"):
        train_side(lm, examples, tmp_path / "a", settings=given, progress=lambda steps, *_: done.append(steps))
    assert not any(4 < steps < 8 for steps in done), "the second was kept"
    assert counts(tmp_path / "a") == counts(whole)
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


def test_what_is_left_out_of_a_mean_is_not_counted_in_it(
    lm: LM, examples: list[Example], quick: TrainSettings, tmp_path: Path
) -> None:
    given, out = replace(quick, max_steps=4, finetunes=3), tmp_path / "a"
    with pytest.raises(StopError):
        train_side(lm, examples, out, settings=given, progress=stop_at(10))
    (result,) = (tmp_path / "a.work").glob("lr-*/again-1/result.json")
    result.write_text(json.dumps({**json.loads(result.read_text()), "base_loss": 0.1}))
    with pytest.warns(UserWarning, match="1 of 3 never fell below the base's loss"):
        train_side(lm, examples, out, settings=given)
    measured = RunCard.load(out).measured
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 2 * quick.rank
    assert (measured["averaged"], measured["steps"]) == (2, 8)
    assert measured["search_tokens"] > measured["tokens"]
    assert "best points of 2 fine-tunes" in finetune_facts(out)["trained"]


def test_another_number_of_fine_tunes_is_named(
    lm: LM, examples: list[Example], quick: TrainSettings, tmp_path: Path
) -> None:
    train_side(lm, examples, tmp_path / "a", settings=quick)
    with pytest.raises(SteerError, match="finetunes: 1 there, 3 asked"):
        train_side(lm, examples, tmp_path / "a", settings=replace(quick, finetunes=3))


def test_two_way_training_takes_the_mean_too(
    lm: LM, pairs: list[ContrastPair], quick: TrainSettings, tmp_path: Path
) -> None:
    one, mean = (
        train_two_way(lm, pairs, tmp_path / str(count), settings=replace(quick, finetunes=count)) for count in (1, 3)
    )
    ranks = [json.loads((folder / "adapter_config.json").read_text())["r"] for folder in (one, mean)]
    assert ranks == [quick.rank, 3 * quick.rank]
    assert RunCard.load(mean).measured["parameters"] == 3 * RunCard.load(one).measured["parameters"]


def test_one_fine_tune_is_known_as_before(quick: TrainSettings) -> None:
    assert "finetunes" not in identity_of(quick)
    assert identity_of(replace(quick, finetunes=2))["finetunes"] == 2


def test_more_parts_than_rows_are_refused(
    lm: LM, examples: list[Example], quick: TrainSettings, tmp_path: Path
) -> None:
    with pytest.raises(SteerError, match=r"finetunes: expected at most \d+, .*found 90"):
        train_side(lm, examples, tmp_path / "a", settings=replace(quick, finetunes=90))


def test_parts_of_few_rows_are_told_of() -> None:
    rows: list[Encoded] = [{"input_ids": [number]} for number in range(120)]
    with pytest.warns(UserWarning, match="24 rows for each of 5.*with 2 each would have at least 50"):
        parts = parts_of(rows, 5)
    assert sorted(row["input_ids"][0] for part in parts for row in part) == list(range(120))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(parts_of(rows, 2)) == 2
        assert parts_of(rows[:3], 1) == [rows[:3]]
    with pytest.warns(UserWarning, match="on all of them: leave finetunes at 1"):
        parts_of(rows[:99], 2)


@pytest.mark.parametrize("other", [{"kind": "bias"}, {"kind": "full"}, {"snapshots": 1}])
def test_what_has_no_mean_is_refused(
    other: dict[str, object], lm: LM, examples: list[Example], quick: TrainSettings, tmp_path: Path
) -> None:
    with pytest.raises(SteerError, match=r"finetunes: .*set finetunes 1"):
        train_side(lm, examples, tmp_path / "a", settings=replace(quick, finetunes=2, **other))  # type: ignore[arg-type]
