"""Several processes train as one does; the identities are on the CPU, with gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from ranks_of_two import run_together
from weightsteer.behavior import Example
from weightsteer.lm import LM
from weightsteer.run_card import RunCard
from weightsteer.training import TrainSettings, list_snapshots, train_side

WEIGHTS = {"lora": "adapter_model.safetensors", "bias": "", "full": "model.safetensors"}
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
