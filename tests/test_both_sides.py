from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conftest import tiny_lm
from weightsteer import SteerError, subtract_finetunes, train_vector
from weightsteer.behavior import ContrastPair
from weightsteer.files import write_jsonl
from weightsteer.training import TrainSettings


def test_one_call_trains_both_sides_and_subtracts_them(
    pairs: list[ContrastPair], quick: TrainSettings, tmp_path: Path
) -> None:
    lm = tiny_lm()
    ids = torch.tensor([[4, 5, 6]])
    with torch.no_grad():
        before = lm.model(ids).logits
    seen: list[str] = []
    out = tmp_path / "mine"
    w = train_vector(lm, pairs, out=out, settings=quick, progress=lambda done, total, note="": seen.append(note))
    assert (w - subtract_finetunes(out / "positive", out / "negative")).norm() == 0.0
    assert w.norm() > 0.0
    assert {note.split()[0] for note in seen} == {"positive", "negative"}
    with torch.no_grad():
        assert torch.equal(lm.model(ids).logits, before)


def test_a_second_call_with_the_same_pairs_only_loads_the_vector(
    pairs: list[ContrastPair], quick: TrainSettings, tmp_path: Path
) -> None:
    lm, out, file = tiny_lm(), tmp_path / "mine", tmp_path / "pairs.jsonl"
    write_jsonl(file, [vars(pair) for pair in pairs])
    first = train_vector(lm, str(file), out=str(out), settings=quick)
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    again = train_vector(lm, pairs, out=out, settings=quick)
    assert (again - first).norm() == 0.0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == stamps
    with pytest.raises(SteerError, match="other examples"):
        train_vector(lm, pairs[:6], out=out, settings=quick)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == stamps


def test_pairs_that_are_not_there_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(SteerError, match="none.jsonl: cannot be read"):
        train_vector(tiny_lm(), tmp_path / "none.jsonl", out=tmp_path / "mine")
