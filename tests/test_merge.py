from __future__ import annotations

import json
import os
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import killable
from conftest import random_vector, tiny_lm, tiny_model
from weightsteer.checkpoints.checkpoint import fingerprint, shards_of, stored_tensors
from weightsteer.errors import SteerError
from weightsteer.export.merge import MergeSettings, export_merged
from weightsteer.lm import LM
from weightsteer.run_card import RunCard
from weightsteer.vectors.delta import Delta
from weightsteer.vectors.difference import subtract_finetunes, task_vector
from weightsteer.vectors.low_rank import LowRank
from weightsteer.vectors.weight_vector import WeightVector

IDS = torch.tensor([[5, 6, 7, 8, 9]])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NEAREST = MergeSettings(rounding="nearest")


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor.read() for name, tensor in stored_tensors(folder).items()}


def write_model(folder: Path, tensors: dict[str, Tensor], **config: object) -> Path:
    """A one-file checkpoint of any tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def vector_of(**deltas: Delta) -> WeightVector:
    return WeightVector({name.replace("_", "."): delta for name, delta in deltas.items()}, RunCard("vector"))


def integers(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.randint(-4, 5, shape, generator=g).float()


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.integers(0, 9), st.integers(1, 700), st.integers(0, 3), st.integers(0, 99), st.sampled_from([0.5, -1.0, 2.0]))
def test_every_entry_is_the_float32_sum_rounded_once(
    tmp_path_factory: pytest.TempPathFactory,
    dtype: torch.dtype,
    rows: int,
    columns: int,
    rank: int,
    seed: int,
    k: float,
) -> None:
    """Bit for bit: whole numbers make the float32 sums exact, whatever their order."""
    g, tmp = torch.Generator().manual_seed(seed), tmp_path_factory.mktemp("m")
    theta = torch.randn(rows, columns, generator=g).bfloat16().to(dtype)
    delta = LowRank(integers((rows, rank), g), integers((rank, columns), g))
    base = write_model(tmp / "base", {"a.weight": theta, "b": torch.arange(5)})
    export_merged(vector_of(a_weight=delta), base, tmp / "out", k=k, settings=NEAREST)
    out = load_file(tmp / "out" / "model.safetensors")
    assert torch.equal(out["a.weight"], (theta.float() + k * (delta.B @ delta.A)).to(dtype))
    assert torch.equal(out["b"], torch.arange(5))


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.integers(0, 99), st.floats(-4, 4))
def test_factors_are_rounded_once(
    tmp_path_factory: pytest.TempPathFactory, dtype: torch.dtype, seed: int, k: float
) -> None:
    g, tmp = torch.Generator().manual_seed(seed), tmp_path_factory.mktemp("m")
    theta = torch.randn(6, 5, generator=g).to(dtype)
    delta = LowRank(torch.randn(6, 2, generator=g), torch.randn(2, 5, generator=g))
    base = write_model(tmp / "base", {"a.weight": theta})
    export_merged(vector_of(a_weight=delta), base, tmp / "out", k=k, settings=NEAREST)
    found = load_file(tmp / "out" / "model.safetensors")["a.weight"].double()
    exact = theta.double() + k * (delta.B.double() @ delta.A.double())
    slack = 0.5 if dtype != torch.float32 else 4.0  # half a unit is the best rounding; float32 adds its own sums'
    assert bool(((found - exact).abs() <= slack * torch.finfo(dtype).eps * exact.abs() + 1e-5).all())


@given(st.integers(0, 99), st.floats(-4, 4))
def test_checkpoints_of_any_dtype_merge_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, seed: int, k: float
) -> None:
    g, tmp = torch.Generator().manual_seed(seed), tmp_path_factory.mktemp("m")
    kinds = [DTYPES[(seed // 3**i) % 3] for i in range(3)]
    shapes = {"a.weight": (3, 4), "a.bias": (3,), "n": (2, 3, 4), "empty": (0, 4)}
    models = [{name: torch.randn(shape, generator=g).to(kind) for name, shape in shapes.items()} for kind in kinds]
    theta, positive, negative = (write_model(tmp / str(i), model) for i, model in enumerate(models))
    w = subtract_finetunes(positive, negative)
    export_merged(w, theta, tmp / "out", k=k, settings=NEAREST)
    for name, merged in load_file(tmp / "out" / "model.safetensors").items():
        base, one, two = (model[name] for model in models)
        assert torch.equal(merged, (base.float() + k * (one.float() - two.float())).to(base.dtype)), name


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
    assert names == {p.name for p in checkpoint.iterdir()} | {"weightsteer.json", "README.md"}
    for name in names - {s.name for s in shards_of(checkpoint)} - {"weightsteer.json", "README.md"}:
        assert (tmp_path / "out" / name).read_bytes() == (checkpoint / name).read_bytes()
    base = tensors_of(checkpoint)
    untouched = [n for n in base if n not in vector.deltas]
    assert all(torch.equal(t, base[n]) for n, t in tensors_of(tmp_path / "out").items() if n in untouched)
    card = RunCard.load(tmp_path / "out")
    assert card.measured["delta_error"] == report.delta_error
    assert card.settings["k"] == 1.5
    assert card.data_sha256["vector"] == report.vector_sha256 in (tmp_path / "out" / "README.md").read_text()


def test_merging_at_zero_copies_every_byte(checkpoint: Path, tmp_path: Path, vector: WeightVector) -> None:
    export_merged(vector, checkpoint, tmp_path / "out", k=0.0)
    for shard in shards_of(checkpoint):
        assert (tmp_path / "out" / shard.name).read_bytes() == shard.read_bytes()


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_workers_do_not_change_a_byte_but_the_seed_does(
    rounding: str, checkpoint: Path, tmp_path: Path, vector: WeightVector
) -> None:
    def shards(name: str, **options: object) -> list[bytes]:
        chosen = MergeSettings(dtype="bfloat16", rounding=rounding, **options)  # type: ignore[arg-type]
        export_merged(vector, checkpoint, tmp_path / name, k=0.1, settings=chosen)
        return [shard.read_bytes() for shard in shards_of(tmp_path / name)]

    one = shards("one", workers=1)
    assert one == shards("three", workers=3)
    assert (one == shards("seed", seed=1)) == (rounding == "nearest")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_output_dtype_is_chosen(dtype: str, checkpoint: Path, tmp_path: Path, vector: WeightVector) -> None:
    export_merged(vector, checkpoint, tmp_path / "out", k=1.0, settings=MergeSettings(dtype=dtype))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(tmp_path / "out").values())


@pytest.mark.parametrize("both", [False, True])
def test_tied_embeddings_stay_tied_and_count_once(both: bool, tmp_path: Path) -> None:
    """Whether the checkpoint stores the tied embedding once, or input and output both."""
    models = []
    for seed in (0, 1, 2):
        model = tiny_model(seed)
        tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
        if both:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        models.append(write_model(tmp_path / str(seed), tensors, **model.config.to_dict()))
    w = subtract_finetunes(models[1], models[2])
    assert "lm_head.weight" not in w.deltas
    export_merged(w, models[0], tmp_path / "out", k=0.5)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert ("lm_head.weight" in stored) == both
    if both:
        assert torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"])
        half = MergeSettings(dtype="bfloat16", rounding="stochastic")
        export_merged(w, models[0], tmp_path / "half", k=0.5, settings=half)
        rounded = load_file(tmp_path / "half" / "model.safetensors")
        assert torch.equal(rounded["lm_head.weight"], rounded["model.embed_tokens.weight"])
    lm = LM(tiny_model(0), None, "tiny")  # type: ignore[arg-type]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    with torch.no_grad(), w.applied(lm, 0.5):
        torch.testing.assert_close(merged(IDS).logits, lm.model(IDS).logits, atol=1e-4, rtol=1e-4)


def test_wrong_bases_are_refused(checkpoint: Path, tmp_path: Path, vector: WeightVector) -> None:
    extra = WeightVector({"model.layers.7.mlp.up_proj.weight": torch.ones(48, 32)}, vector.card)
    with pytest.raises(SteerError, match=r"layers\.7.*no such tensor"):
        export_merged(extra, checkpoint, tmp_path / "out", k=1.0)
    wrong = WeightVector({"model.layers.0.mlp.up_proj.weight": torch.ones(4, 4)}, vector.card)
    with pytest.raises(SteerError, match=r"shape \(4, 4\)"):
        export_merged(wrong, checkpoint, tmp_path / "out", k=1.0)
    alone = LowRank(torch.ones(259, 1), torch.ones(1, 32), "embedding")
    output = WeightVector({"model.embed_tokens.weight": alone}, vector.card)
    with pytest.raises(SteerError, match="ties input and output"):
        export_merged(output, checkpoint, tmp_path / "out", k=1.0)
    with pytest.raises(SteerError, match="is an input too|not made by weightsteer"):
        export_merged(vector, checkpoint, checkpoint, k=1.0)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    with pytest.raises(SteerError, match="quantised.*export peft"):
        export_merged(vector, checkpoint, tmp_path / "out", k=1.0)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_a_gguf_or_packed_base_is_refused_with_the_way_out(tmp_path: Path, vector: WeightVector) -> None:
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "model-q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(SteerError, match="quantised.*export peft"):
        export_merged(vector, tmp_path / "g", tmp_path / "out", k=1.0)
    base = write_model(tmp_path / "p", {"a.weight": torch.ones(2, 2, dtype=torch.uint8)})
    with pytest.raises(SteerError, match=r"quantised \(a\.weight has dtype U8"):
        export_merged(vector_of(a_weight=torch.ones(2, 2)), base, tmp_path / "out", k=1.0)


def test_what_is_not_finite_is_refused_by_name(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", {"a.weight": torch.ones(2, 2).half()})
    for bad in (float("nan"), float("inf"), 1e6):  # the last is beyond float16
        with pytest.raises(SteerError, match=r"a\.weight.*infinite or NaN"):
            export_merged(vector_of(a_weight=torch.full((2, 2), bad)), base, tmp_path / "out", k=1.0)
    assert not (tmp_path / "out").exists()


def test_damaged_checkpoints_are_named(checkpoint: Path, tmp_path: Path, vector: WeightVector) -> None:
    shards = shards_of(checkpoint)
    index = checkpoint / "model.safetensors.index.json"
    wrong = json.loads(index.read_text())
    sound = index.read_text()
    for weight_map, message in [
        ({**wrong["weight_map"], "ghost": "../x.safetensors"}, "missing"),
        ({}, "no weight_map"),
    ]:
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(SteerError, match=message):
            export_merged(vector, checkpoint, tmp_path / "out", k=1.0)
    index.write_text(sound)
    content = shards[1].read_bytes()
    shards[1].write_bytes(content[: len(content) // 2])
    with pytest.raises(SteerError, match=shards[1].name):
        export_merged(vector, checkpoint, tmp_path / "out", k=1.0)
    shards[1].unlink()
    with pytest.raises(SteerError, match=f"missing: {shards[1].name}"):
        export_merged(vector, checkpoint, tmp_path / "out", k=1.0)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_output_has_the_permissions_of_the_umask(checkpoint: Path, tmp_path: Path, vector: WeightVector) -> None:
    before = os.umask(0o027)
    try:
        export_merged(vector, checkpoint, tmp_path / "out", k=1.0)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {0o640}, modes
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


@pytest.mark.slow
def test_a_killed_merge_leaves_nothing_that_loads(tmp_path: Path) -> None:
    """Kill -9 at ten moments: the output is whole or absent, what is left has no config, the next merge removes it."""
    g = torch.Generator().manual_seed(0)
    tensors = {f"layers.{i}.weight": torch.randn(1024, 1024, generator=g).bfloat16() for i in range(24)}
    base = write_model(tmp_path / "base", tensors, model_type="llama")
    deltas = {name: LowRank(torch.randn(1024, 8, generator=g), torch.randn(8, 1024, generator=g)) for name in tensors}
    w = WeightVector(deltas, RunCard("vector")).save(tmp_path / "w")
    out = tmp_path / "out"
    log = tmp_path / "log"
    whole = killable.start(log, killable.merge, w, base, out)
    start = time.perf_counter()
    whole.join()
    length = time.perf_counter() - start
    assert whole.exitcode == 0, log.read_text()
    expected = (out / "model.safetensors").read_bytes()
    moments = random.Random(0)
    for _ in range(10):
        shutil.rmtree(out, ignore_errors=True)
        process = killable.start(log, killable.merge, w, base, out)
        time.sleep(moments.random() * length)
        process.kill()
        process.join()
        if out.exists():
            assert (out / "model.safetensors").read_bytes() == expected
        for part in tmp_path.glob(".out.*.part"):
            done = (part / "config.json").exists()
            weights = part / "model.safetensors"  # gone where the kill met the removal of an earlier part
            assert not done or not weights.exists() or weights.read_bytes() == expected
    export_merged(WeightVector.load(w), base, out, k=1.0)
    assert (out / "model.safetensors").read_bytes() == expected
    assert not list(tmp_path.glob(".out.*.part"))


def test_a_later_fine_tune_takes_the_vector_of_its_base(tmp_path: Path) -> None:
    """theta_ft + k (theta+ - theta_pre): the model that is merged into is not the base of the difference."""
    tensors = {seed: {n: p.detach().clone() for n, p in tiny_model(seed).named_parameters()} for seed in range(3)}
    config = tiny_model(0).config.to_dict()
    base, positive, late = (write_model(tmp_path / str(seed), tensors[seed], **config) for seed in range(3))
    export_merged(task_vector(positive, base=base), late, tmp_path / "out", k=0.5, settings=NEAREST)
    for name, merged in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(merged, tensors[2][name] + 0.5 * (tensors[1][name] - tensors[0][name])), name


def test_the_report_of_a_sample_stands_for_the_whole(tmp_path: Path) -> None:
    """A large matrix, measured in part, next to a norm, measured whole, whose rounding is a hundred times coarser."""
    g = torch.Generator().manual_seed(0)
    tensors = {
        "a.weight": (0.02 * torch.randn(4096, 1024, generator=g)).bfloat16(),
        "n.weight": (1 + 0.1 * torch.randn(4096, generator=g)).bfloat16(),
    }
    deltas: dict[str, Delta] = {name: 4e-5 * torch.randn(t.shape, generator=g) for name, t in tensors.items()}
    base = write_model(tmp_path / "base", tensors)
    report = export_merged(WeightVector(deltas, RunCard("vector")), base, tmp_path / "out", k=1.0, settings=NEAREST)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    missed = sum(
        float((merged[n].double() - t.double() - deltas[n].double()).square().sum()) for n, t in tensors.items()
    )
    size = sum(float(delta.double().square().sum()) for delta in deltas.values())
    same = sum(int((merged[n] == t).sum()) for n, t in tensors.items())
    assert report.measured_entries < 0.1 * (4096 * 1024 + 4096)
    assert report.delta_error == pytest.approx((missed / size) ** 0.5, rel=0.02)
    assert report.unchanged_share == pytest.approx(same / (4096 * 1024 + 4096), rel=0.02)


@settings(max_examples=5)
@given(st.integers(0, 99))
def test_the_report_counts_what_rounding_did(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    g, tmp = torch.Generator().manual_seed(seed), tmp_path_factory.mktemp("m")
    theta = torch.randn(40, 50, generator=g).bfloat16()
    delta = LowRank(torch.randn(40, 2, generator=g) * 1e-3, torch.randn(2, 50, generator=g))
    base = write_model(tmp / "base", {"a.weight": theta})
    report = export_merged(vector_of(a_weight=delta), base, tmp / "out", k=1.0, settings=NEAREST)
    merged = load_file(tmp / "out" / "model.safetensors")["a.weight"]
    change = delta.B.double() @ delta.A.double()
    missed = (merged.double() - theta.double() - change).norm() / change.norm()
    assert report.measured_entries == theta.numel()
    assert report.delta_error == pytest.approx(float(missed), rel=1e-4)
    assert report.unchanged_share == pytest.approx(float((merged == theta).double().mean()))
    assert report.other_dtypes["bfloat16"]["delta_error"] == pytest.approx(report.delta_error)
    assert report.other_dtypes["float32"]["delta_error"] < report.other_dtypes["float16"]["delta_error"]


def test_a_merged_model_is_the_difference_to_what_was_merged_into(tmp_path: Path) -> None:
    base, later = tmp_path / "base", tmp_path / "later"
    tiny_model(1).save_pretrained(base)
    tiny_model(2).save_pretrained(later)
    w = replace(random_vector(tiny_lm()), card=RunCard("vector", str(base), fingerprint(base)))
    export_merged(w, later, tmp_path / "merged", k=1.0)
    found = task_vector(tmp_path / "merged", base=later)
    assert found.cosine(replace(w, card=found.card)) == pytest.approx(1.0, abs=1e-4)
    assert (task_vector(tmp_path / "merged") - found).norm() < 1e-5  # the card names it
    export_merged(w, base, tmp_path / "own", k=1.0)
    assert RunCard.load(tmp_path / "own").base_revision == w.card.base_revision


@pytest.mark.parametrize("k", [float("nan"), float("inf")])
def test_a_k_that_is_no_number_is_refused(tmp_path: Path, k: float) -> None:
    tiny_model(1).save_pretrained(tmp_path / "base")
    w = random_vector(tiny_lm())
    with pytest.raises(SteerError, match="k: expected a finite number"):
        export_merged(w, tmp_path / "base", tmp_path / "merged", k=k)
    assert not (tmp_path / "merged").exists()


def test_constants_keep_their_dtype(tmp_path: Path) -> None:
    """Older versions of transformers saved a mask of -1e9, which float16 does not hold."""
    tensors = {"a.weight": torch.ones(4, 4), "h.0.attn.masked_bias": torch.tensor(-1e9), "b.weight": torch.ones(3)}
    base = write_model(tmp_path / "base", tensors)
    w = WeightVector({"a.weight": torch.eye(4)}, RunCard("vector"))
    export_merged(w, base, tmp_path / "half", k=1.0, settings=MergeSettings(dtype="float16"))
    found = tensors_of(tmp_path / "half")
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        "a.weight": torch.float16,
        "b.weight": torch.float16,
        "h.0.attn.masked_bias": torch.float32,
    }
    assert found["h.0.attn.masked_bias"] == -1e9
    large = write_model(tmp_path / "large", {**tensors, "b.weight": torch.full((3,), 1e6)})
    with pytest.raises(
        SteerError, match="b.weight: the vector does not change it, and it holds values that F16 has not"
    ):
        export_merged(w, large, tmp_path / "no", k=1.0, settings=MergeSettings(dtype="float16"))
