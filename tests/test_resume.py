from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

from weightsteer.behavior import ContrastPair, Example
from weightsteer.errors import SteerError
from weightsteer.lm import LM
from weightsteer.run_card import RunCard
from weightsteer.training import TrainSettings, one_training, train_side
from weightsteer.training.together import TRAINED

WEIGHTS = "adapter_model.safetensors"
DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


class StopError(Exception):
    """Ends a training from inside, as a kill would."""


def stop_at(step: int) -> Callable[..., None]:
    def progress(done: float, total: float, note: str = "") -> None:
        if done >= step:
            raise StopError

    return progress


@pytest.fixture
def examples(pairs: list[ContrastPair]) -> list[Example]:
    return [Example(pair.prompt, pair.positive) for pair in pairs]


@pytest.fixture
def settings(quick: TrainSettings) -> TrainSettings:
    return replace(quick, batch_size=2, max_steps=8, evaluations=4)


def counts(folder: Path) -> dict[str, Any]:
    measured = RunCard.load(folder).measured
    return {name: value for name, value in measured.items() if "seconds" not in name}


OF_CHECKPOINTS = ("optimizer.pt", "scheduler.pt", "rng_state.pth", TRAINED, "trainer_state.json", "whole.json")


@pytest.mark.parametrize(
    ("how", "names"),
    [("cut", ("optimizer.pt",)), *(pytest.param(how, OF_CHECKPOINTS, marks=pytest.mark.slow) for how in DAMAGES)],
)
def test_a_damaged_checkpoint_is_passed_over(
    how: str, names: tuple[str, ...], lm: LM, examples: list[Example], settings: TrainSettings, tmp_path: Path
) -> None:
    whole = train_side(lm, examples, tmp_path / "whole", settings=settings)
    for name in names:
        out = tmp_path / name.replace(".", "-")
        with pytest.raises(StopError):
            train_side(lm, examples, out, settings=settings, progress=stop_at(7))
        (work,) = out.with_name(f"{out.name}.work").glob("lr-*")
        newest = max(work.glob("checkpoint-*"))
        DAMAGES[how](newest / name)
        with pytest.warns(UserWarning, match=f"{newest.name} was cut off or is damaged; the training goes on from"):
            train_side(lm, examples, out, settings=settings)
        assert (out / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes(), name
        assert counts(out) == counts(whole)


def test_without_a_whole_checkpoint_the_training_begins_anew(
    lm: LM, examples: list[Example], settings: TrainSettings, tmp_path: Path
) -> None:
    whole = train_side(lm, examples, tmp_path / "whole", settings=settings)
    with pytest.raises(StopError):
        train_side(lm, examples, tmp_path / "a", settings=settings, progress=stop_at(7))
    for checkpoint in (tmp_path / "a.work").glob("lr-*/checkpoint-*"):
        DAMAGES["emptied"](checkpoint / "optimizer.pt")
    with pytest.warns(UserWarning, match="the training begins anew"):
        train_side(lm, examples, tmp_path / "a", settings=settings)
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert counts(tmp_path / "a") == counts(whole)


@pytest.mark.parametrize("rate", [1e-2, 2.0])  # the second gets worse and is stopped early
def test_a_stop_between_the_last_checkpoint_and_the_result_changes_nothing(
    rate: float,
    lm: LM,
    examples: list[Example],
    settings: TrainSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = replace(settings, learning_rates=(rate,), max_steps=24, evaluations=24, patience=2)
    whole = train_side(lm, examples, tmp_path / "whole", settings=settings)
    assert (counts(whole)["steps"] < 24) == (rate > 1)

    def stop(trainer: Trainer, model: object) -> None:
        raise StopError

    for _ in range(2):
        with monkeypatch.context() as patched, pytest.raises(StopError):
            patched.setattr(one_training, "_outcome", stop)
            train_side(lm, examples, tmp_path / "a", settings=settings)
    train_side(lm, examples, tmp_path / "a", settings=settings)
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert counts(tmp_path / "a") == counts(whole)


@pytest.mark.slow
def test_a_training_goes_on_in_a_folder_that_was_moved(
    lm: LM, examples: list[Example], settings: TrainSettings, tmp_path: Path
) -> None:
    settings = replace(settings, learning_rates=(2.0,), max_steps=24, evaluations=24, patience=4)  # its best is early
    whole = train_side(lm, examples, tmp_path / "whole", settings=settings)
    with pytest.raises(StopError):
        train_side(lm, examples, tmp_path / "a" / "b", settings=settings, progress=stop_at(counts(whole)["steps"] - 1))
    (tmp_path / "a").rename(tmp_path / "c")
    train_side(lm, examples, tmp_path / "c" / "b", settings=settings)
    assert (tmp_path / "c" / "b" / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


def test_a_folder_of_the_users_own_is_never_removed(
    lm: LM, examples: list[Example], settings: TrainSettings, tmp_path: Path
) -> None:
    own = tmp_path / "a.work" / "thesis.txt"
    own.parent.mkdir()
    own.write_text("mine")
    with pytest.raises(SteerError, match=r"a\.work: is in the way of the checkpoints, and not from a training"):
        train_side(lm, examples, tmp_path / "a", settings=settings)
    shutil.move(own.parent, tmp_path / "aside")
    train_side(lm, examples, tmp_path / "a", settings=settings)
    shutil.move(tmp_path / "aside", own.parent)
    train_side(lm, examples, tmp_path / "a", settings=settings)  # it is finished, and looks for what it left
    (own.parent / "job.json").write_text(json.dumps({"title": "another job"}))
    train_side(lm, examples, tmp_path / "a", settings=settings)
    assert own.read_text() == "mine"


def test_a_refused_training_leaves_nothing(
    lm: LM, examples: list[Example], settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SteerError, match="the validation loss stayed at the base's"):
        train_side(lm, examples, tmp_path / "a", settings=replace(settings, learning_rates=(1e-30,)))
    assert list(tmp_path.iterdir()) == []

    def too_large(*args: object, **options: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Trainer, "training_step", too_large)
    with pytest.raises(SteerError, match="does not suffice"):
        train_side(lm, examples, tmp_path / "a", settings=settings)
    assert list(tmp_path.iterdir()) == []


def test_a_kill_while_the_work_is_cleared_blocks_nothing(
    lm: LM, examples: list[Example], settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StopError):
        train_side(lm, examples, tmp_path / "a", settings=settings, progress=stop_at(5))

    def stop(*args: object, **options: object) -> None:
        raise StopError

    other = replace(settings, seed=1)
    with monkeypatch.context() as patched, pytest.raises(StopError):
        patched.setattr(shutil, "rmtree", stop)
        train_side(lm, examples, tmp_path / "a", settings=other)
    with pytest.warns(UserWarning, match="unfinished work on another fine-tune"):
        train_side(lm, examples, tmp_path / "a", settings=other)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("name", [WEIGHTS, "weightsteer.json", "adapter_config.json"])
def test_a_finished_fine_tune_that_is_damaged_is_made_again(
    name: str, lm: LM, examples: list[Example], settings: TrainSettings, tmp_path: Path
) -> None:
    out = train_side(lm, examples, tmp_path / "a", settings=settings)
    before = (out / WEIGHTS).read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_side(lm, examples, out, settings=settings)
    DAMAGES["emptied"](out / name)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train_side(lm, examples, out, settings=settings)
    assert name == "weightsteer.json" or any("it is made again" in str(one.message) for one in said)
    assert (out / WEIGHTS).read_bytes() == before


@pytest.mark.slow
def test_a_damaged_result_is_made_again(
    lm: LM, examples: list[Example], settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(settings, learning_rates=(1e-2, 2e-2))
    whole = train_side(lm, examples, tmp_path / "whole", settings=settings)
    for name in ("result.json", f"best/{WEIGHTS}"):
        with pytest.raises(StopError):
            train_side(lm, examples, tmp_path / "a", settings=settings, progress=stop_at(12))  # in the second rate
        DAMAGES["emptied"](tmp_path / "a.work" / "lr-0.01" / name)
        with pytest.warns(UserWarning, match=r"lr-0.01: its result is damaged; the training begins anew"):
            train_side(lm, examples, tmp_path / "a", settings=settings)
        assert counts(tmp_path / "a") == counts(whole)
        assert (tmp_path / "a" / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
        shutil.rmtree(tmp_path / "a")
