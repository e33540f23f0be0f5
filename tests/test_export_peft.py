from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from conftest import random_vector, tiny_lm
from weightsteer.errors import SteerError
from weightsteer.run_card import RunCard
from weightsteer.vectors.weight_vector import WeightVector

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def test_exported_adapter_at_scale_one_is_the_vector_at_k(tmp_path: Path) -> None:
    lm = tiny_lm()
    vector = random_vector(lm)
    vector.export_peft(tmp_path / "a", k=-2.0)
    with torch.no_grad():
        served = PeftModel.from_pretrained(tiny_lm().model, tmp_path / "a")(IDS).logits
        with vector.applied(lm, -2.0):
            torch.testing.assert_close(served, lm.model(IDS).logits, atol=1e-5, rtol=1e-5)


def test_dense_parts_do_not_fit_an_adapter(tmp_path: Path) -> None:
    vector = WeightVector({"model.norm.weight": torch.ones(32)}, RunCard("vector"))
    with pytest.raises(SteerError, match=r"model\.norm\.weight.*export merged"):
        vector.export_peft(tmp_path / "a", k=1.0)


def test_a_rank_above_the_engines_is_cut_and_the_error_told(tmp_path: Path) -> None:
    vector = random_vector(tiny_lm(), rank=6)
    error = vector.export_peft(tmp_path / "a", k=1.0, max_rank=4)
    cut = WeightVector.load(tmp_path / "a")
    assert error == pytest.approx((cut - vector).norm() / vector.norm(), rel=1e-5)
    assert 0.1 < error < 1.0
    assert vector.export_peft(tmp_path / "b", k=1.0, max_rank=6) == 0.0
