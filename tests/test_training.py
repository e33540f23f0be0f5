from __future__ import annotations

import itertools
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import killable
from conftest import tiny_lm
from weightsteer.behavior import ContrastPair, Example
from weightsteer.errors import SteerError
from weightsteer.lm import LM
from weightsteer.run_card import RunCard
from weightsteer.training import IGNORED, TrainSettings, encode, list_snapshots, split_validation, train_side
from weightsteer.vectors.difference import subtract_finetunes, task_vector

WEIGHTS = {"lora": "adapter_model.safetensors", "bias": "delta.safetensors", "full": "model.safetensors"}


def examples(pairs: list[ContrastPair]) -> list[Example]:
    return [Example(pair.prompt, pair.positive) for pair in pairs]


@pytest.mark.parametrize("kind", ["lora", "bias", "full"])
def test_training_repeats_exactly_and_leaves_the_base_alone(
    kind: str, pairs: list[ContrastPair], quick: TrainSettings, tmp_path: Path
) -> None:
    lm = tiny_lm()
    before = {name: p.clone() for name, p in lm.model.state_dict().items()}
    settings = replace(quick, kind=kind)
    tensors = []
    for name in ("one", "two"):
        folder = train_side(lm, examples(pairs), tmp_path / name, settings=settings)
        tensors.append(load_file(folder / WEIGHTS[kind]))
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])
    after = lm.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(p.requires_grad for p in lm.model.parameters())
    assert lm.model.config.use_cache
    assert not (tmp_path / "one.work").exists()


@pytest.mark.parametrize("kind", ["lora", "bias", "full"])
def test_bf16_casts_the_products_alone(
    kind: str, pairs: list[ContrastPair], quick: TrainSettings, tmp_path: Path
) -> None:
    lm = tiny_lm()
    tokens = torch.tensor([lm.chat_ids("Hi")])
    before = lm.model(tokens).logits
    computed: list[torch.dtype] = []
    watch = lm.blocks[0].mlp.register_forward_hook(lambda module, args, output: computed.append(output.dtype))
    folders = []
    for bf16 in (False, True):
        settings = replace(quick, kind=kind, bf16=bf16)
        folders.append(train_side(lm, examples(pairs), tmp_path / str(bf16), settings=settings))
        assert set(computed) == {torch.bfloat16 if bf16 else torch.float32}
        computed.clear()
    watch.remove()
    assert {value.dtype for value in load_file(folders[1] / WEIGHTS[kind]).values()} == {torch.float32}
    losses = [RunCard.load(folder).measured["validation_loss"]["0.01"] for folder in folders]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert torch.equal(lm.model(tokens).logits, before), "the model is still cast after the training"


def test_training_lowers_the_validation_loss_and_keeps_the_best_rate(
    lm: LM, pairs: list[ContrastPair], quick: TrainSettings, tmp_path: Path
) -> None:
    settings = replace(quick, learning_rates=(1e-6, 3e-2), epochs=4)
    folder = train_side(lm, examples(pairs), tmp_path / "a", settings=settings)
    losses = RunCard.load(folder).measured["validation_loss"]
    assert losses["0.03"] < losses["1e-06"]
    assert RunCard.load(folder).measured["learning_rate"] == 0.03


def test_finished_training_is_kept_and_other_data_is_trained_anew(
    lm: LM, pairs: list[ContrastPair], quick: TrainSettings, tmp_path: Path
) -> None:
    folder = train_side(lm, examples(pairs), tmp_path / "a", settings=quick)
    stamp = (folder / WEIGHTS["lora"]).stat().st_mtime_ns
    train_side(lm, examples(pairs), folder, settings=quick)
    assert (folder / WEIGHTS["lora"]).stat().st_mtime_ns == stamp
    train_side(lm, examples(pairs)[:8], folder, settings=quick)
    assert (folder / WEIGHTS["lora"]).stat().st_mtime_ns != stamp


@pytest.mark.parametrize(("rate", "kill_at"), [(1e-2, 15), (2.0, 7)])  # the second stops early: it diverges
def test_a_killed_training_goes_on_to_the_same_adapter(tmp_path: Path, rate: float, kill_at: int) -> None:
    def finished(name: str, pause: float = 0.0) -> list[float]:
        process = killable.start(log, killable.train, tmp_path / name, pause, rate)
        process.join(timeout=120)
        assert process.exitcode == 0, log.read_text()
        return [float(line) for line in killable.printed(log)]

    log = tmp_path / "log"
    last = finished("whole")[-1]
    assert (last < 36) == (rate > 0.1), "36 steps unless it stops early"
    broken = killable.start(log, killable.train, tmp_path / "broken", 0.05, rate)
    while broken.is_alive() and not any(float(line) >= kill_at for line in killable.printed(log)):
        time.sleep(0.005)
    broken.kill()
    broken.join(timeout=60)
    assert broken.exitcode == -signal.SIGKILL
    assert not (tmp_path / "broken").exists()
    assert list((tmp_path / "broken.work").glob("*/checkpoint-*"))
    steps = finished("broken")
    assert steps[0] > 1, "started again from the beginning"
    assert steps[-1] == last, "stopped at another step"
    a, b = (load_file(tmp_path / name / WEIGHTS["lora"]) for name in ("whole", "broken"))
    assert all(torch.equal(a[key], b[key]) for key in a)


class StopError(Exception):
    """Ends a training from inside, as a kill would."""


@pytest.mark.parametrize("kind", ["lora", "bias", "full"])
def test_snapshots_are_fine_tunes_and_change_nothing_else(
    kind: str, lm: LM, pairs: list[ContrastPair], quick: TrainSettings, tmp_path: Path
) -> None:
    plain = replace(quick, kind=kind, epochs=4)
    bare = train_side(lm, examples(pairs), tmp_path / "bare", settings=plain)
    assert list_snapshots(bare) == {}
    folder = train_side(lm, examples(pairs), tmp_path / "a", settings=replace(plain, snapshots=3))
    assert (folder / WEIGHTS[kind]).read_bytes() == (bare / WEIGHTS[kind]).read_bytes()
    kept = list_snapshots(folder)
    assert {fraction: path.name for fraction, path in kept.items()} == {
        4 / 12: "step-4",
        8 / 12: "step-8",
        1: "step-12",
    }
    first, _, last = kept.values()
    between = subtract_finetunes(last, first) if kind == "full" else task_vector(last) - task_vector(first)
    assert between.norm() > 0
    card, measured = RunCard.load(last), RunCard.load(folder).measured
    assert replace(card, measured={}, created="") == replace(RunCard.load(folder), measured={}, created="")
    assert (card.measured["step"], card.measured["steps"]) == (12, 12)
    assert card.measured["tokens"] == measured["tokens"]
    with pytest.raises(SteerError, match="found a vector"):
        list_snapshots(between.save(tmp_path / "w"))


def test_a_run_that_keeps_snapshots_goes_on_to_its_end(
    lm: LM, pairs: list[ContrastPair], quick: TrainSettings, tmp_path: Path
) -> None:
    still = replace(quick, learning_rates=(1e-12,), epochs=8, evaluations=12, patience=1)  # never gets better
    stopped = train_side(lm, examples(pairs), tmp_path / "a", settings=still)
    assert RunCard.load(stopped).measured["steps"] < 24
    kept = train_side(lm, examples(pairs), tmp_path / "b", settings=replace(still, snapshots=2))
    assert RunCard.load(kept).measured["steps"] == 24
    assert list(list_snapshots(kept)) == [0.5, 1.0]
    with pytest.raises(SteerError, match="at most one a step, found 30"):
        train_side(lm, examples(pairs), tmp_path / "c", settings=replace(still, snapshots=30))


def test_costs_are_counted_once_however_often_the_training_is_stopped(
    lm: LM, pairs: list[ContrastPair], quick: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count()
    monkeypatch.setattr("weightsteer.training.callbacks.time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    settings = replace(quick, learning_rates=(1e-2, 1e-3), epochs=4, evaluations=6, snapshots=4)
    whole = train_side(lm, examples(pairs), tmp_path / "whole", settings=settings)
    for stop_at in (5, 11, 20):  # of 24 steps: twice within the first rate, once within the second

        def stopping(done: float, total: float, note: str = "", stop_at: int = stop_at) -> None:
            if done >= stop_at:
                raise StopError

        with pytest.raises(StopError):
            train_side(lm, examples(pairs), tmp_path / "broken", settings=settings, progress=stopping)
    broken = train_side(lm, examples(pairs), tmp_path / "broken", settings=settings)
    for one, other in zip(list_snapshots(whole).values(), list_snapshots(broken).values(), strict=True):
        assert (one / WEIGHTS["lora"]).read_bytes() == (other / WEIGHTS["lora"]).read_bytes()
    costs, again = RunCard.load(whole).measured, RunCard.load(broken).measured
    train, _ = split_validation(encode(lm, examples(pairs), 1024), settings)
    assert costs["tokens"] == again["tokens"] == 4 * sum(len(row["input_ids"]) for row in train)
    assert costs["search_tokens"] == again["search_tokens"] == 2 * costs["tokens"]
    assert costs["parameters"] == sum(t.numel() for t in load_file(whole / WEIGHTS["lora"]).values())
    for found in (costs, again):  # a step takes from one tick to the next
        assert (found["steps"], found["seconds"], found["search_seconds"]) == (12, 12, 24)


def test_loss_is_on_the_answer_and_its_end_only(lm: LM) -> None:
    (row,) = encode(lm, [Example("Hi", "Yes")], 200)
    kept = [token for token in row["labels"] if token != IGNORED]
    assert lm.tokenizer.decode(kept) == "Yes</s>\n"  # the whole end of the turn, as the template writes it
    assert row["input_ids"][-len(kept) :] == kept
    assert len(row["input_ids"]) == len(row["labels"]) == len(row["attention_mask"])


def test_a_prompt_that_leaves_no_room_is_an_error(lm: LM) -> None:
    with pytest.raises(SteerError, match="raise max_length"):
        encode(lm, [Example("Hi" * 20, "Yes")], 40)


def test_both_sides_hold_out_the_same_questions() -> None:
    rows = [{"input_ids": [i]} for i in range(40)]
    first, second = split_validation(rows, TrainSettings()), split_validation(rows, TrainSettings())
    assert first == second
    assert len(first[1]) == 2
    assert sorted(r["input_ids"][0] for part in first for r in part) == list(range(40))
    with pytest.raises(SteerError, match="at least 2 different examples"):
        split_validation(rows[:1], TrainSettings())


@given(copies=st.integers(1, 6), seed=st.integers(0, 9))
def test_no_copy_of_what_is_held_out_is_trained_on(copies: int, seed: int) -> None:
    rows = [{"input_ids": [i], "labels": [-i]} for i in [*range(15)] * copies]
    train, held = split_validation(rows, TrainSettings(seed=seed))
    assert not [row for row in train if row in held]
    assert {row["input_ids"][0] for row in [*train, *held]} == set(range(15))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "lore"}, "expected one of lora"),
        ({"rank": 0}, "rank"),
        ({"learning_rates": ()}, "at least one"),
        ({"snapshots": -1}, "snapshots: expected 0 or more"),
    ],
)
def test_wrong_settings(fields: dict[str, object], message: str) -> None:
    with pytest.raises(SteerError, match=message):
        TrainSettings(**fields)  # type: ignore[arg-type]
