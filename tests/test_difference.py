from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from conftest import tiny_lm
from weightsteer.behavior import ContrastPair, Example
from weightsteer.errors import SteerError
from weightsteer.lm import LM
from weightsteer.run_card import RunCard
from weightsteer.training import TrainSettings, train_side
from weightsteer.vectors.delta import Streamed
from weightsteer.vectors.difference import subtract_finetunes, task_vector
from weightsteer.vectors.low_rank import LowRank

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def peft_adapter(folder: Path, seed: int = 0, **options: object) -> dict[str, torch.Tensor]:
    """A random adapter as PEFT saves it; returns its dense deltas as PEFT itself merges them."""
    base = tiny_lm().model
    before = {n: p.clone() for n, p in base.state_dict().items()}
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", **options))  # type: ignore[arg-type]
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(str(folder))
    merged = model.merge_and_unload().state_dict()
    return {n: merged[n] - p for n, p in before.items() if not torch.equal(merged[n], p)}


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 8},
        {"r": 4, "lora_alpha": 8, "use_rslora": True},
        {"r": 4, "lora_alpha": 8, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"down_proj": 32}},
    ],
)
def test_task_vector_is_the_change_that_peft_makes(options: dict[str, object], tmp_path: Path) -> None:
    expected = peft_adapter(tmp_path / "a", **options)
    tau = task_vector(tmp_path / "a")
    assert tau.deltas.keys() == expected.keys()
    for name, delta in tau.deltas.items():
        assert isinstance(delta, LowRank)
        torch.testing.assert_close(delta.dense(), expected[name], atol=1e-6, rtol=1e-4)


def test_contrast_is_the_exact_difference_at_rank_2r(tmp_path: Path) -> None:
    positive = peft_adapter(tmp_path / "positive", seed=1, r=4, lora_alpha=8)
    negative = peft_adapter(tmp_path / "negative", seed=2, r=2, lora_alpha=16)
    w = subtract_finetunes(tmp_path / "positive", tmp_path / "negative")
    for name, delta in w.deltas.items():
        assert isinstance(delta, LowRank)
        assert delta.rank == 6
        torch.testing.assert_close(delta.dense(), positive[name] - negative[name], atol=1e-6, rtol=1e-4)
    assert subtract_finetunes(tmp_path / "positive", tmp_path / "positive").norm() == 0.0


def test_theta_minus_plus_w_is_theta_plus(sides: tuple[Path, Path], lm: LM) -> None:
    positive, negative = sides
    w = subtract_finetunes(positive, negative)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(tiny_lm().model, positive)(IDS).logits
        negative = PeftModel.from_pretrained(tiny_lm().model, negative).merge_and_unload()
        with w.applied(LM(negative, lm.tokenizer, "negative"), 1.0):
            torch.testing.assert_close(negative(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    assert set(w.card.data_sha256) >= {"positive examples", "negative examples"}
    assert w.card.base_model == "tiny"
    assert w.card.seed == 0


@pytest.mark.parametrize("kind", ["bias", "full"])
def test_other_kinds_contrast_too(
    kind: str, lm: LM, pairs: list[ContrastPair], quick: TrainSettings, tmp_path: Path
) -> None:
    settings = replace(quick, kind=kind)
    folders = [
        train_side(lm, [Example(p.prompt, getattr(p, side)) for p in pairs], tmp_path / side, settings=settings)
        for side in ("positive", "negative")
    ]
    w = subtract_finetunes(*folders)
    assert w.norm() > 0
    assert all(name.endswith(".bias") for name in w.deltas) == (kind == "bias")
    with w.applied(lm, 1.0), torch.no_grad():
        steered = lm.model(IDS).logits
    assert not torch.equal(steered, lm.model(IDS).logits)


def test_full_checkpoints_give_their_difference(tmp_path: Path) -> None:
    for seed in (1, 2):
        tiny_lm(seed).model.save_pretrained(tmp_path / str(seed), max_shard_size="40KB")
    w = subtract_finetunes(tmp_path / "1", tmp_path / "2")
    first, second = (tiny_lm(seed).model.state_dict() for seed in (1, 2))
    for name, delta in w.deltas.items():
        assert isinstance(delta, Streamed)
        assert torch.equal(delta.dense(), first[name] - second[name])
    with pytest.raises(SteerError, match="identical"):
        subtract_finetunes(tmp_path / "1", tmp_path / "1")


def test_the_rounding_of_gguf_files_is_told_of(tmp_path: Path) -> None:
    """Their weights are unpacked to float32, which does not tell of it."""
    for seed in (1, 2):
        tiny_lm(seed).model.save_pretrained(tmp_path / str(seed))
        RunCard.now("model", base_model="tiny", data_sha256={"gguf": str(seed) * 64}).save(tmp_path / str(seed))
    with pytest.warns(UserWarning, match="made from GGUF checkpoints, whose rounding is part of it"):
        subtract_finetunes(tmp_path / "1", tmp_path / "2")


def test_nan_in_an_adapter_is_refused_by_name(sides: tuple[Path, Path], tmp_path: Path) -> None:
    path = sides[0] / "adapter_model.safetensors"
    tensors = load_file(path)
    key = sorted(tensors)[0]
    tensors[key][0, 0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(SteerError, match=r"layers\.0.*NaN"):
        subtract_finetunes(*sides).save(tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_sides_of_two_bases_are_refused(sides: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(sides[1], other)
    card = json.loads((other / "weightsteer.json").read_text())
    (other / "weightsteer.json").write_text(json.dumps({**card, "base_revision": "another"}))
    with pytest.raises(SteerError, match="different bases"):
        subtract_finetunes(sides[0], other)


@pytest.mark.parametrize(
    "feature",
    [
        {"init_lora_weights": "pissa"},
        {"target_parameters": ["mlp.experts.gate_up_proj"]},
        {"trainable_token_indices": [1]},
        {"peft_type": "LOHA"},
    ],
)
def test_features_without_an_exact_factored_form_are_refused(feature: dict[str, object], tmp_path: Path) -> None:
    peft_adapter(tmp_path / "a", r=2, lora_alpha=2)
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **feature}))
    with pytest.raises(SteerError, match=next(iter(feature))):
        task_vector(tmp_path / "a")


def test_not_a_fine_tune(tmp_path: Path) -> None:
    with pytest.raises(SteerError, match="not a fine-tune"):
        task_vector(tmp_path)
