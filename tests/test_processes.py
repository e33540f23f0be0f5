"""Several processes train as one does; the identities are on the CPU, with gloo."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ranks_of_two import run_together, start_together, until
from weightsteer.behavior import ContrastPair, Example
from weightsteer.lm import LM
from weightsteer.run_card import RunCard
from weightsteer.training import (
    Preference,
    TrainSettings,
    list_snapshots,
    preferences_of,
    train_preference,
    train_side,
)

WEIGHTS = {"lora": "adapter_model.safetensors", "bias": "delta.safetensors", "full": "model.safetensors"}
UNEVEN = TrainSettings(
    rank=2,
    alpha=4,
    learning_rates=(1e-2, 3e-3),
    epochs=2,
    batch_size=3,
    accumulation=2,
    warmup_steps=1,
    validation=0.3,
    evaluations=3,
    snapshots=2,
)


def examples() -> list[Example]:
    """Thirteen answers of different lengths, so that the last batch has one row and a process of two has none."""
    return [Example(f"Is plan {i} good?", "Yes" + ", very" * (i % 4) + " good.") for i in range(13)]


def train(base: Path, out: Path, settings: TrainSettings, dtype: str = "float32") -> None:
    from weightsteer.training.order import load_together

    lm = load_together({"name": str(base), "device": "cpu", "dtype": dtype}, shard=settings.shard)
    train_side(lm, examples(), out, settings=settings)


def assert_same(found: Path, wanted: Path, kind: str = "lora", within: float = 1e-6) -> None:
    ours, theirs = load_file(found / WEIGHTS[kind]), load_file(wanted / WEIGHTS[kind])
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert (ours[name].float() - theirs[name].float()).abs().max() <= within, name


def counts(folder: Path) -> dict[str, Any]:
    measured = RunCard.load(folder).measured
    return {name: value for name, value in measured.items() if isinstance(value, int)}


def test_two_processes_train_as_one(checkpoint: Path, tmp_path: Path) -> None:
    """Partial batches, accumulation, two learning rates, snapshots."""
    alone = train_side(LM.load(checkpoint, device="cpu"), examples(), tmp_path / "one", settings=UNEVEN)
    logs = run_together(tmp_path / "logs", train, checkpoint, tmp_path / "two", UNEVEN)
    assert (tmp_path / "two").is_dir(), logs
    assert_same(tmp_path / "two", alone)
    assert counts(tmp_path / "two") == counts(alone)
    for part, one in zip(list_snapshots(tmp_path / "two").values(), list_snapshots(alone).values(), strict=True):
        assert_same(part, one)
    ours, theirs = RunCard.load(tmp_path / "two"), RunCard.load(alone)
    assert ours.settings == theirs.settings
    assert ours.measured["validation_loss"] == pytest.approx(theirs.measured["validation_loss"], rel=1e-6)


def test_processes_that_differ_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    logs = run_together(tmp_path / "logs", _train_with_other_version, checkpoint, tmp_path / "out")
    assert all("process 1 has torch 0.1, process 0 has" in log for log in logs), logs
    assert not (tmp_path / "out").exists()


def _train_with_other_version(base: Path, out: Path) -> None:
    import importlib.metadata

    from weightsteer.ranks import is_first

    known = importlib.metadata.version
    importlib.metadata.version = lambda name: "0.1" if name == "torch" and not is_first() else known(name)
    train(base, out, UNEVEN)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "bias", "full"])
def test_weights_that_are_spread_train_as_whole_ones(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    """FSDP2 by accelerate, on the CPU; LoRA with two learning rates, so that the model is loaded anew once."""
    rates = UNEVEN.learning_rates if kind == "lora" else (1e-3,)
    settings = replace(UNEVEN, kind=kind, learning_rates=rates, snapshots=1, gradient_checkpointing=kind != "bias")
    alone = train_side(LM.load(checkpoint, device="cpu"), examples(), tmp_path / "one", settings=settings)
    logs = run_together(tmp_path / "logs", train, checkpoint, tmp_path / "two", replace(settings, shard="fsdp"))
    assert (tmp_path / "two").is_dir(), logs
    assert_same(tmp_path / "two", alone, kind)
    assert counts(tmp_path / "two") == counts(alone)


@pytest.mark.slow
def test_a_spread_training_goes_on_as_one_process(checkpoint: Path, tmp_path: Path) -> None:
    """SIGKILL of all; a checkpoint of weights that were spread is one of whole ones."""
    settings = replace(UNEVEN, learning_rates=(1e-2,), epochs=12, evaluations=12, patience=12, snapshots=0)
    alone = train_side(LM.load(checkpoint, device="cpu"), examples(), tmp_path / "one", settings=settings)
    out = tmp_path / "two"
    processes = start_together(tmp_path / "logs", train, checkpoint, out, replace(settings, shard="fsdp"))
    until(lambda: any(out.with_name("two.work").glob("lr-*/checkpoint-*/whole.json")), 120)
    for process in processes:
        process.kill()
        process.join()
    assert not out.exists()
    train_side(LM.load(checkpoint, device="cpu"), examples(), out, settings=settings)
    assert_same(out, alone)
    assert counts(out) == counts(alone)


def same_length() -> list[Example]:
    return [Example(f"Is plan {i} good?", f"Yes, plan {i} is good.") for i in range(9)]


@pytest.mark.slow
def test_float32_adapters_over_a_spread_bfloat16_base(checkpoint: Path, tmp_path: Path) -> None:
    """Rows of one length, so that bfloat16 rounds alike in both."""
    settings = replace(UNEVEN, learning_rates=(1e-2,), batch_size=4, accumulation=1, snapshots=0, validation=0.1)
    lm = LM.load(checkpoint, device="cpu", dtype="bfloat16")
    alone = train_side(lm, same_length(), tmp_path / "one", settings=settings)
    spread = replace(settings, shard="fsdp")
    logs = run_together(tmp_path / "logs", _train_same_length, checkpoint, tmp_path / "two", spread)
    assert (tmp_path / "two").is_dir(), logs
    assert_same(tmp_path / "two", alone)
    assert {tensor.dtype for tensor in load_file(tmp_path / "two" / WEIGHTS["lora"]).values()} == {torch.float32}


def _train_same_length(base: Path, out: Path, settings: TrainSettings) -> None:
    from weightsteer.training.order import load_together

    lm = load_together({"name": str(base), "device": "cpu", "dtype": "bfloat16"}, shard=settings.shard)
    train_side(lm, same_length(), out, settings=settings)


@pytest.mark.slow
def test_two_processes_prefer_as_one(checkpoint: Path, pairs: list[ContrastPair], tmp_path: Path) -> None:
    settings = replace(UNEVEN, learning_rates=(1e-2,), snapshots=0)
    wanted = preferences_of(pairs, "positive")
    alone = train_preference(LM.load(checkpoint, device="cpu"), wanted, tmp_path / "one", settings=settings)
    logs = run_together(tmp_path / "logs", _prefer, checkpoint, tmp_path / "two", settings, wanted)
    assert (tmp_path / "two").is_dir(), logs
    assert_same(tmp_path / "two", alone)
    assert counts(tmp_path / "two") == counts(alone)


def _prefer(base: Path, out: Path, settings: TrainSettings, wanted: list[Preference]) -> None:
    from weightsteer.training.order import load_together

    lm = load_together({"name": str(base), "device": "cpu", "dtype": "float32"}, shard=settings.shard)
    train_preference(lm, wanted, out, settings=settings)
