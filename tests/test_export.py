from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel

from conftest import random_vector, tiny_lm
from weightsteer.checkpoint import shards_of, tensors_of
from weightsteer.errors import SteerError
from weightsteer.export import _Tally, export_adapter, export_merged, merge_tensor
from weightsteer.lm import LM
from weightsteer.lowrank import LowRank
from weightsteer.records import RunCard
from weightsteer.vector import WeightVector

IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(st.integers(0, 99), st.floats(-4, 4))
def test_merging_is_the_exact_sum_rounded_once(dtype: torch.dtype, seed: int, k: float) -> None:
    g = torch.Generator().manual_seed(seed)
    theta = torch.randn(6, 5, generator=g).to(dtype)
    delta = LowRank(torch.randn(6, 2, generator=g), torch.randn(2, 5, generator=g))
    exact = theta.double() + k * (delta.B.double() @ delta.A.double())
    found = merge_tensor("w", theta, delta, k, _Tally())
    assert found.dtype == dtype
    ulp = torch.finfo(dtype).eps * exact.abs()
    slack = 0.5 if dtype != torch.float32 else 4.0  # half a unit is the best rounding; float32 adds its own sums'
    assert bool(((found.double() - exact).abs() <= slack * ulp + 1e-5).all())


def test_merged_checkpoint_equals_the_hook_and_keeps_the_rest(checkpoint: Path, tmp_path: Path) -> None:
    lm = LM.load(str(checkpoint), device="cpu")
    vector = random_vector(lm)
    report = export_merged(vector, checkpoint, tmp_path / "out", k=1.5)
    assert report.changed_tensors == len(vector.deltas)
    assert report.delta_error < 1e-4
    merged = LM.load(str(tmp_path / "out"), device="cpu")
    with torch.no_grad(), vector.applied(lm, 1.5):
        torch.testing.assert_close(merged.model(IDS).logits, lm.model(IDS).logits, atol=1e-4, rtol=1e-4)
    assert [s.name for s in shards_of(tmp_path / "out")] == [s.name for s in shards_of(checkpoint)]
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {p.name for p in checkpoint.iterdir()} | {"weightsteer.json"}
    base = dict(tensors_of(checkpoint))
    untouched = [n for n in base if n not in vector.deltas]
    assert all(torch.equal(t, base[n]) for n, t in tensors_of(tmp_path / "out") if n in untouched)
    assert RunCard.load(tmp_path / "out").measured["delta_error"] == report.delta_error


def test_merging_at_zero_copies_every_tensor(checkpoint: Path, tmp_path: Path, vector: WeightVector) -> None:
    export_merged(vector, checkpoint, tmp_path / "out", k=0.0)
    base = dict(tensors_of(checkpoint))
    assert all(torch.equal(t, base[n]) for n, t in tensors_of(tmp_path / "out"))


def test_exported_adapter_at_scale_one_is_the_vector_at_k(tmp_path: Path) -> None:
    lm = tiny_lm()
    vector = random_vector(lm)
    export_adapter(vector, tmp_path / "a", k=-2.0)
    with torch.no_grad():
        served = PeftModel.from_pretrained(tiny_lm().model, tmp_path / "a")(IDS).logits
        with vector.applied(lm, -2.0):
            torch.testing.assert_close(served, lm.model(IDS).logits, atol=1e-5, rtol=1e-5)


def test_dense_parts_do_not_fit_an_adapter(tmp_path: Path) -> None:
    vector = WeightVector({"model.norm.weight": torch.ones(32)}, RunCard("vector"))
    with pytest.raises(SteerError, match=r"model\.norm\.weight.*--to merged"):
        export_adapter(vector, tmp_path / "a", k=1.0)


def test_wrong_bases_are_refused_before_anything_is_written(
    checkpoint: Path, tmp_path: Path, vector: WeightVector
) -> None:
    extra = WeightVector({"model.layers.7.mlp.up_proj.weight": torch.ones(48, 32)}, vector.card)
    with pytest.raises(SteerError, match=r"layers\.7.*no such tensor"):
        export_merged(extra, checkpoint, tmp_path / "out", k=1.0)
    wrong = WeightVector({"model.layers.0.mlp.up_proj.weight": torch.ones(4, 4)}, vector.card)
    with pytest.raises(SteerError, match=r"shape \(4, 4\)"):
        export_merged(wrong, checkpoint, tmp_path / "out", k=1.0)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    with pytest.raises(SteerError, match="quantised.*--to peft"):
        export_merged(vector, checkpoint, tmp_path / "out", k=1.0)
    assert not (tmp_path / "out").exists()


def test_a_missing_shard_and_a_truncated_one_are_named(checkpoint: Path, tmp_path: Path, vector: WeightVector) -> None:
    shard = shards_of(checkpoint)[1]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(SteerError, match=shard.name):
        export_merged(vector, checkpoint, tmp_path / "out", k=1.0)
    shard.unlink()
    with pytest.raises(SteerError, match=f"missing: {shard.name}"):
        export_merged(vector, checkpoint, tmp_path / "out", k=1.0)
    assert not [p for p in tmp_path.iterdir() if p.name not in ("base",)]
