from __future__ import annotations

import json
import tempfile
import uuid
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import save_file

from conftest import random_vector, tiny_lm
from weightsteer.checkpoints.adapted import adapted_model
from weightsteer.checkpoints.safetensors_file import SafeFile
from weightsteer.checkpoints.whole import is_whole
from weightsteer.errors import SteerError
from weightsteer.run_card import RunCard, StrengthRange
from weightsteer.vectors.delta import Delta, Streamed, to_dense
from weightsteer.vectors.difference import task_vector
from weightsteer.vectors.low_rank import LowRank
from weightsteer.vectors.weight_vector import WeightVector
from weightsteer.vllm.limits import require_servable

CARD = RunCard("vector", base_model="tiny", base_revision="one")


def streamed(folder: Path, name: str, shape: tuple[int, ...], g: torch.Generator) -> Streamed:
    """The difference of two tensors of two dtypes that lie in a file."""
    parts = {"positive": torch.randn(shape, generator=g).bfloat16(), "negative": torch.randn(shape, generator=g)}
    path = folder / f"{uuid.uuid4()}.safetensors"
    save_file(parts, path)
    file = SafeFile(path)
    path.unlink()  # an open file stays readable
    return Streamed(((1.0, file.tensors["positive"]), (-1.0, file.tensors["negative"])), shape)


def mixed(seed: int, d: int = 3) -> WeightVector:
    """Factored, dense, streamed, empty and missing parts, by seed; d sets the shapes."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (4, d), "b.weight": (d, 3), "b.bias": (d,), "c.weight": (2, 6), "empty.weight": (0, d)}
    deltas: dict[str, Delta] = {}
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, shape) in enumerate(shapes.items()):
            form = (seed >> (2 * i)) % 4 if i < 4 else 1 + seed % 3
            if form == 1 and len(shape) == 2:
                rank = 1 + seed % 3
                deltas[name] = LowRank(
                    torch.randn(shape[0], rank, generator=g), torch.randn(rank, shape[1], generator=g)
                )
            elif form == 2:
                deltas[name] = streamed(Path(folder), name, shape, g)
            elif form:
                deltas[name] = torch.randn(shape, generator=g)
    return WeightVector(deltas, CARD)


def flat(v: WeightVector) -> dict[str, torch.Tensor]:
    return {
        n: d.B.double() @ d.A.double() if isinstance(d, LowRank) else to_dense(d).double() for n, d in v.deltas.items()
    }


def dense_dot(x: WeightVector, y: WeightVector) -> float:
    a, b = flat(x), flat(y)
    return sum(float((a[n] * b[n]).sum()) for n in a if n in b)


seeds = st.integers(0, 255)


@given(seeds, seeds, st.floats(-3, 3), st.integers(0, 8))
def test_algebra_equals_dense(s1: int, s2: int, k: float, d: int) -> None:
    x, y = mixed(s1, d), mixed(s2, d)
    for combined, sign in ((x + y, 1.0), (x - y, -1.0)):
        for name in {*x.deltas, *y.deltas}:
            zero = torch.zeros((), dtype=torch.float64)
            expected = flat(x).get(name, zero) + sign * flat(y).get(name, zero)
            torch.testing.assert_close(
                flat(combined).get(name, torch.zeros_like(expected)), expected, atol=1e-5, rtol=1e-5
            )
    assert x.dot(y) == pytest.approx(dense_dot(x, y), abs=1e-9)
    assert (k * x).norm() == pytest.approx(abs(k) * x.norm(), rel=1e-5, abs=1e-6)
    assert (-x).dot(y) == pytest.approx(-x.dot(y), abs=1e-9)


@given(seeds)
def test_a_vector_minus_itself_is_zero(seed: int) -> None:
    x = mixed(seed)
    assert (x - x).norm() == 0.0
    assert not any((x - x).norms().values())


@given(st.integers(1, 255))
def test_cosine_of_a_vector_with_itself_and_its_opposite(seed: int) -> None:
    x = mixed(seed)
    if x.norm():
        assert x.cosine(x) == pytest.approx(1.0)
        assert x.cosine(-2.0 * x) == pytest.approx(-1.0)
    else:
        with pytest.raises(SteerError, match="zero"):
            x.cosine(x)


@given(seeds)
def test_save_and_load_round_trip(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    folder = tmp_path_factory.mktemp("v") / "w"
    strength = StrengthRange(2.0, -3.0, -4.0, 4.0, {"prose nll": 0.1})
    x = WeightVector(mixed(seed).deltas, CARD.with_strength(strength))
    x.save(folder)
    y = WeightVector.load(folder)
    assert y.card == x.card
    assert y.deltas.keys() == x.deltas.keys()
    for name, delta in x.deltas.items():
        other = y.deltas[name]
        if isinstance(delta, LowRank):
            assert isinstance(other, LowRank)
            assert torch.equal(delta.B, other.B[:, : delta.rank])
            assert torch.equal(delta.A, other.A[: delta.rank])
            assert not other.B[:, delta.rank :].any()  # lower ranks are padded with zeros
        else:
            assert isinstance(other, Streamed)
            assert torch.equal(to_dense(delta), other.dense())


def test_saved_vector_loads_in_plain_peft_and_equals_the_hook(tmp_path: Path) -> None:
    lm = tiny_lm()
    vector = random_vector(lm, rank=3)
    first = next(iter(vector.deltas))
    uneven = dict(vector.deltas)
    uneven[first] = uneven[first] + uneven[first] * 0.5  # type: ignore[operator]
    vector = WeightVector(uneven, vector.card)  # one module at another rank
    vector.save(tmp_path / "w")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        with vector.applied(lm, 1.0):
            hooked = lm.model(ids).logits
        plain = PeftModel.from_pretrained(tiny_lm().model, tmp_path / "w")
        served = plain(ids).logits
        for layer in plain.modules():
            if hasattr(layer, "set_scale"):
                layer.set_scale("default", -2.0)
        scaled = plain(ids).logits
        with vector.applied(lm, -2.0):
            torch.testing.assert_close(scaled, lm.model(ids).logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(served, hooked, atol=1e-5, rtol=0)


def test_cosine_survives_factors_that_cancel() -> None:
    """x + y - y is x, in factors of three times the rank whose products are much larger than what is left."""
    g = torch.Generator().manual_seed(0)

    def low(scale: float) -> WeightVector:
        factors = LowRank(torch.randn(60, 8, generator=g) * scale, torch.randn(8, 50, generator=g))
        return WeightVector({"a.weight": factors}, CARD)

    x, y, z = low(1.0), low(1e4), low(1.0)
    assert (x + y - y).cosine(z + x) == pytest.approx(x.cosine(z + x), abs=1e-6)
    a, b = (torch.randn(60, 50, dtype=torch.float64, generator=g) for _ in range(2))
    dense_pair = [WeightVector({"a": m.float()}, CARD) for m in (a, b)]
    assert dense_pair[0].cosine(dense_pair[1]) == pytest.approx(float((a * b).sum() / (a.norm() * b.norm())), abs=1e-6)


@given(seeds, seeds)
def test_cosine_is_the_dense_one(s1: int, s2: int) -> None:
    x, y = mixed(s1), mixed(s2)
    scale = (dense_dot(x, x) * dense_dot(y, y)) ** 0.5
    if scale:
        assert x.cosine(y) == pytest.approx(dense_dot(x, y) / scale, abs=1e-6)


def test_vectors_of_different_bases_do_not_mix(lm: object) -> None:
    x, y = mixed(1), WeightVector(mixed(2).deltas, RunCard("vector", base_model="other", base_revision="two"))
    for operation in (lambda: x + y, lambda: x - y, lambda: x.cosine(y)):
        with pytest.raises(SteerError, match="different bases"):
            operation()


def test_a_changed_vector_forgets_the_measured_range() -> None:
    x = WeightVector(mixed(1).deltas, CARD.with_strength(StrengthRange(1, -1, -2, 2)))
    assert (2.0 * x).card.strength is None


def test_nan_is_refused_by_name(tmp_path: Path) -> None:
    bad = LowRank(torch.full((2, 1), float("nan")), torch.ones(1, 2))
    with pytest.raises(SteerError, match=r"x\.weight \(lora_B\)"):
        WeightVector({"x.weight": bad}, CARD).save(tmp_path / "w")
    assert not list(tmp_path.iterdir())


def test_damaged_folders_are_clear_errors(tmp_path: Path, vector: WeightVector) -> None:
    with pytest.raises(SteerError, match="not a saved weight vector"):
        WeightVector.load(tmp_path)
    folder = vector.save(tmp_path / "w")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(SteerError, match="damaged"):
        WeightVector.load(folder)


def test_output_is_not_written_over_something_else(tmp_path: Path, vector: WeightVector) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SteerError, match="not made by weightsteer"):
        vector.save(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_adapter_config_has_scale_one(tmp_path: Path, vector: WeightVector) -> None:
    config = json.loads((vector.save(tmp_path / "w") / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == 3
    assert config["use_rslora"] is False


@given(st.integers(0, 99), st.floats(0.1, 9.0))
def test_dividing_is_multiplying_by_the_inverse(seed: int, number: float) -> None:
    w = mixed(seed)
    assert ((w / number) * number - w).norm() == pytest.approx(0.0, abs=1e-5)
    assert (w / 1.0 - w).norm() == 0.0


def test_a_vector_says_what_it_is(tmp_path: Path) -> None:
    vector = random_vector(tiny_lm(), rank=3)
    assert repr(vector) == f"WeightVector(base='tiny', parameters=14, rank=3, norm={vector.norm():.4g})"
    card = vector.card.with_strength(StrengthRange(2.0, -1.5, -4.0, 4.0))
    loaded = WeightVector.load(WeightVector(vector.deltas, card).save(tmp_path / "candour" / "vector"))
    assert loaded.name == "candour"
    assert repr(loaded).startswith("WeightVector('candour', base='tiny', ")
    assert repr(loaded).endswith("recommended_k=2 or -1.5)")
    dense = WeightVector({"a.bias": torch.ones(4)}, CARD)
    assert "dense" in repr(dense)


def test_paths_may_be_texts(tmp_path: Path) -> None:
    vector = random_vector(tiny_lm())
    assert (WeightVector.load(str(vector.save(str(tmp_path / "w")))) - vector).norm() == 0.0
    assert vector.export_peft(str(tmp_path / "a"), k=2.0) == 0.0


def test_a_lost_file_is_missed(tmp_path: Path) -> None:
    lm = tiny_lm()
    both = {**random_vector(lm).deltas, "lm_head.weight": torch.ones(lm.model.get_output_embeddings().weight.shape)}
    card = RunCard("vector")
    for lost in ("adapter_model.safetensors", "delta.safetensors"):
        folder = WeightVector(both, card).save(tmp_path / lost)
        assert WeightVector.load(folder).norm() > 0
        assert is_whole(folder)
        (folder / lost).unlink()
        for read in (WeightVector.load, task_vector, require_servable, lambda it: adapted_model(str(it)), card.save):
            with pytest.raises(SteerError, match=f"{lost}: is missing"):
                read(folder)
        with pytest.warns(UserWarning, match="it is made again"):
            assert not is_whole(folder)


@pytest.mark.parametrize("kept", ["adapter_config.json", None])
def test_a_lost_file_is_missed_by_older_cards_too(kept: str | None, tmp_path: Path) -> None:
    folder = random_vector(tiny_lm()).save(tmp_path / "w")
    card = json.loads((folder / "weightsteer.json").read_text())
    del card["files"]
    (folder / "weightsteer.json").write_text(json.dumps(card))
    assert WeightVector.load(folder).norm() > 0
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        if name != kept:
            (folder / name).unlink()
    with pytest.raises(SteerError, match=r"adapter_model.safetensors: is missing"):
        WeightVector.load(folder)


def test_operands_that_are_no_numbers_are_refused_at_once() -> None:
    w = mixed(1)
    assert (sum([w, w]) - w * 2).norm() == pytest.approx(0.0, abs=1e-5)
    assert (w * torch.tensor(0.5) - w / 2).norm() == 0.0
    for wrong in ("a", w, None):
        with pytest.raises(TypeError):
            w * wrong
        with pytest.raises(TypeError):
            w / wrong
    for wrong in (1, "a"):
        with pytest.raises(TypeError):
            w + wrong
        with pytest.raises(TypeError):
            wrong + w
    for factor in (float("nan"), float("inf"), 10**400):
        with pytest.raises(SteerError, match="multiplied by finite numbers"):
            w * factor
        with pytest.raises(SteerError, match="divided by finite numbers other than 0"):
            w / factor
    with pytest.raises(SteerError, match="divided by finite numbers other than 0, found 0"):
        w / 0
