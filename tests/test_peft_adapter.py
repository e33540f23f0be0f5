"""Every kind of fine-tune and every mix of two, against what PEFT and transformers themselves make of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from conftest import tiny_lm, tiny_model
from weightsteer.checkpoints.checkpoint import fingerprint
from weightsteer.errors import SteerError
from weightsteer.export.merge import export_merged
from weightsteer.lm import LM
from weightsteer.run_card import RunCard
from weightsteer.vectors.delta import Streamed, to_dense
from weightsteer.vectors.difference import subtract_finetunes, task_vector
from weightsteer.vectors.weight_vector import WeightVector

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = GPT2Config(vocab_size=60, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(sizes).eval()


def adapter(folder: Path, base: PreTrainedModel, seed: int = 0, **options: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Save a random adapter as PEFT does; returns the merged parameters and the logits, both PEFT's own."""
    model = get_peft_model(base, LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": "all-linear", **options}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name or (name.endswith(".bias") and parameter.requires_grad):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        model.eval()
        logits = model(IDS).logits
        model.save_pretrained(str(folder))
        merged = model.merge_and_unload().state_dict()
    return {name: tensor.clone() for name, tensor in merged.items()}, logits


def base_folder(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder, max_shard_size="40KB")
    return folder


def assert_difference(w: WeightVector, positive: dict[str, Tensor], negative: dict[str, Tensor]) -> None:
    for name in positive:
        found = to_dense(w.deltas[name]) if name in w.deltas else torch.zeros_like(positive[name])
        torch.testing.assert_close(found, positive[name] - negative[name], atol=2e-6, rtol=1e-4, msg=name)


OPTIONS: list[dict[str, Any]] = [
    {"use_dora": True},
    {"use_dora": True, "use_rslora": True},
    {"modules_to_save": ["lm_head", "norm"]},
    {"target_modules": ["embed_tokens", "q_proj"]},
    {"target_modules": ["lm_head", "down_proj"]},
    {"target_modules": ["down_proj"], "r": 5, "alpha_pattern": {"layers.1.mlp.down_proj": 1}},
    {"rank_pattern": {"q_proj": 7, "layers.0.mlp.up_proj": 1}, "use_rslora": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_two_adapters_of_any_kind(options: dict[str, Any], tmp_path: Path) -> None:
    base = base_folder(tiny_model(tied=False), tmp_path / "base")
    positive, steered = adapter(tmp_path / "positive", tiny_model(tied=False), 1, **options)
    negative, _ = adapter(tmp_path / "negative", tiny_model(tied=False), 2)
    w = subtract_finetunes(tmp_path / "positive", tmp_path / "negative", base=base)
    assert_difference(w, positive, negative)
    assert (w - w).norm() == 0.0
    saved = WeightVector.load(w.save(tmp_path / "w"))
    assert_difference(saved, positive, negative)
    tau = task_vector(tmp_path / "positive", base=base)
    lm = tiny_lm(tied=False)
    with torch.no_grad(), tau.applied(lm, 1.0):
        torch.testing.assert_close(lm.model(IDS).logits, steered, atol=2e-5, rtol=1e-4)


def test_trained_biases_and_lora_bias(tmp_path: Path) -> None:
    base = base_folder(gpt2(), tmp_path / "base")
    for options in ({"bias": "all"}, {"bias": "lora_only"}, {"lora_bias": True, "target_modules": ["c_fc"]}):
        positive, _ = adapter(tmp_path / "positive", gpt2(), 1, fan_in_fan_out=True, **options)
        before = gpt2().state_dict()
        assert_difference(task_vector(tmp_path / "positive", base=base), positive, before)


def test_conv1d_is_transposed_for_the_hook_the_merge_and_the_adapter(tmp_path: Path) -> None:
    base = base_folder(gpt2(), tmp_path / "base")
    positive, steered = adapter(tmp_path / "positive", gpt2(), 1, fan_in_fan_out=True)
    tau = task_vector(tmp_path / "positive")
    lm = LM(gpt2(), None, "gpt2")  # type: ignore[arg-type]
    assert_difference(tau, positive, lm.model.state_dict())
    with torch.no_grad():
        with tau.applied(lm, 1.0):
            torch.testing.assert_close(lm.model(IDS).logits, steered, atol=1e-5, rtol=1e-5)
        with tau.applied(lm, torch.tensor([1.0])):
            torch.testing.assert_close(lm.model(IDS).logits, steered, atol=1e-5, rtol=1e-5)
        tau.save(tmp_path / "w")
        served = PeftModel.from_pretrained(gpt2(), tmp_path / "w").eval()
        torch.testing.assert_close(served(IDS).logits, steered, atol=1e-5, rtol=1e-5)
        export_merged(tau, base, tmp_path / "out", k=1.0)
        merged = GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
        torch.testing.assert_close(merged(IDS).logits, steered, atol=1e-5, rtol=1e-5)
    full = base_folder(merged, tmp_path / "full")  # two whole checkpoints, cut to the adapter's rank
    cut = subtract_finetunes(full, base).truncate(rank=3)
    cut.save(tmp_path / "cut")
    with torch.no_grad():
        served = PeftModel.from_pretrained(gpt2(), tmp_path / "cut").eval()
        torch.testing.assert_close(served(IDS).logits, steered, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "options", [{"target_modules": ["embed_tokens", "q_proj"]}, {"modules_to_save": ["embed_tokens"]}]
)
def test_what_is_trained_on_the_input_embedding_changes_it_alone(
    tied: bool, options: dict[str, Any], tmp_path: Path
) -> None:
    base = base_folder(tiny_model(tied=tied), tmp_path / "base")
    _, steered = adapter(tmp_path / "positive", tiny_model(tied=tied), 1, **options)
    tau = task_vector(tmp_path / "positive", base=base)
    saved = WeightVector.load(tau.save(tmp_path / "w"))
    lm = tiny_lm(tied=tied)
    before = lm.model(IDS).logits
    for vector in (tau, saved):
        with torch.no_grad(), vector.applied(lm, 1.0):
            torch.testing.assert_close(lm.model(IDS).logits, steered, atol=1e-5, rtol=1e-5)
        assert torch.equal(lm.model(IDS).logits, before)
        assert (lm.model.lm_head.weight is lm.model.model.embed_tokens.weight) is tied
    if tied:
        with pytest.raises(SteerError, match="ties input and output"):
            export_merged(tau, base, tmp_path / "out", k=1.0)


@pytest.mark.parametrize("style", ["modules_to_save.", "modules_to_save.default.", ""])
def test_whole_modules_cancel_the_base_in_either_key_style(style: str, tmp_path: Path) -> None:
    sides = []
    for seed in (1, 2):
        merged, _ = adapter(tmp_path / str(seed), tiny_model(tied=False), seed, modules_to_save=["lm_head"])
        path = tmp_path / str(seed) / "adapter_model.safetensors"
        tensors = load_file(path)
        tensors[f"base_model.model.lm_head.{style}weight"] = tensors.pop("base_model.model.lm_head.weight")
        save_file(tensors, path)
        sides.append(merged)
    assert_difference(subtract_finetunes(tmp_path / "1", tmp_path / "2"), sides[0], sides[1])


def test_a_whole_module_of_a_tied_model_is_its_own_place(tmp_path: Path) -> None:
    """PEFT trains a copy of the output head, and the input embedding stays as it is."""
    adapter(tmp_path / "negative", tiny_model(), 2)
    _, steered = adapter(tmp_path / "head", tiny_model(), 1, modules_to_save=["lm_head"])
    lm = tiny_lm()
    negative = task_vector(tmp_path / "negative")
    path = tmp_path / "negative" / "adapter_model.safetensors"
    untrained = lm.model.lm_head.weight.detach().clone()
    save_file({**load_file(path), "base_model.model.lm_head.weight": untrained}, path)
    w = subtract_finetunes(tmp_path / "head", tmp_path / "negative")
    with torch.no_grad(), w.applied(lm, 1.0), negative.applied(lm, 1.0):
        torch.testing.assert_close(lm.model(IDS).logits, steered, atol=2e-5, rtol=1e-4)


def test_a_base_that_was_not_trained_is_refused(tmp_path: Path) -> None:
    base = base_folder(tiny_model(tied=False), tmp_path / "base")
    adapter(tmp_path / "positive", tiny_model(tied=False), 1, use_dora=True)
    card = RunCard("finetune", base_model=str(base), base_revision=fingerprint(base))
    card.save(tmp_path / "positive")
    assert task_vector(tmp_path / "positive").norm() > 0  # the card names the base
    other = base_folder(tiny_model(5, tied=False), tmp_path / "other")
    with pytest.raises(SteerError, match="not the base that was trained"):
        task_vector(tmp_path / "positive", base=other)
    (tmp_path / "positive" / "weightsteer.json").unlink()
    wide = LlamaForCausalLM(LlamaConfig(**{**tiny_model(tied=False).config.to_dict(), "intermediate_size": 40}))
    with pytest.raises(SteerError, match="was trained on a base of shape"):
        task_vector(tmp_path / "positive", base=base_folder(wide, tmp_path / "wide")).norm()


def test_what_an_adapter_and_a_checkpoint_hold_alike_is_left_out(tmp_path: Path) -> None:
    base = base_folder(tiny_model(), tmp_path / "base")
    adapter(tmp_path / "positive", tiny_model(), 1, target_modules=["q_proj"])
    model = PeftModel.from_pretrained(tiny_model(), tmp_path / "positive").merge_and_unload()
    full = base_folder(model, tmp_path / "full")
    w = task_vector(full, base=base)
    assert sorted(w.deltas) == [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)]
    assert (w - task_vector(tmp_path / "positive")).norm() < 1e-5 * w.norm()
    with pytest.raises(SteerError, match="identical"):
        task_vector(base, base=base)


def test_an_adapter_and_a_checkpoint(tmp_path: Path) -> None:
    base = base_folder(tiny_model(), tmp_path / "base")
    positive, _ = adapter(tmp_path / "positive", tiny_model(), 1)
    full = base_folder(tiny_model(3), tmp_path / "full")
    negative = tiny_model(3).state_dict()
    del positive["lm_head.weight"], negative["lm_head.weight"]  # tied
    assert_difference(subtract_finetunes(tmp_path / "positive", full, base=base), positive, negative)
    assert_difference(subtract_finetunes(full, tmp_path / "positive", base=base), negative, positive)
    with pytest.raises(SteerError, match=r"takes the base model; give it as base"):
        subtract_finetunes(tmp_path / "positive", full)
    tau = task_vector(full, base=base)
    again = subtract_finetunes(tmp_path / "positive", base, base=base) - tau
    assert_difference(again, positive, negative)


def test_a_saved_vector_is_a_source_too(tmp_path: Path) -> None:
    adapter(tmp_path / "positive", tiny_model(), 1)
    adapter(tmp_path / "negative", tiny_model(), 2)
    w = subtract_finetunes(tmp_path / "positive", tmp_path / "negative")
    w.save(tmp_path / "w")
    both = subtract_finetunes(tmp_path / "w", tmp_path / "negative")
    expected = w - task_vector(tmp_path / "negative")
    assert (both - expected).norm() < 1e-6 * expected.norm()


def test_checkpoints_of_two_dtypes_and_shardings(tmp_path: Path) -> None:
    base_folder(tiny_model(1).bfloat16(), tmp_path / "positive")
    tiny_model(2).save_pretrained(tmp_path / "negative")
    with pytest.warns(UserWarning, match="BF16 checkpoints, whose rounding"):
        w = subtract_finetunes(tmp_path / "positive", tmp_path / "negative")
    positive, negative = tiny_model(1).bfloat16().float().state_dict(), tiny_model(2).state_dict()
    assert all(isinstance(delta, Streamed) for delta in w.deltas.values())
    for name, delta in w.deltas.items():
        assert torch.equal(to_dense(delta), positive[name] - negative[name])
    assert (w - w).norm() == 0.0


def test_what_cannot_be_subtracted_is_named(tmp_path: Path) -> None:
    base_folder(tiny_model(1), tmp_path / "a")
    base_folder(tiny_model(2, layers=3), tmp_path / "b")
    with pytest.raises(SteerError, match=r"layers\.2\..*in one of"):
        subtract_finetunes(tmp_path / "a", tmp_path / "b")
    grown = tiny_model(3)
    grown.resize_token_embeddings(270)
    base_folder(grown, tmp_path / "c")
    with pytest.raises(SteerError, match=r"embed_tokens.*\(270, 32\).*vocabulary of one size"):
        subtract_finetunes(tmp_path / "c", tmp_path / "a")
    adapter(tmp_path / "d", tiny_model(), 1)
    path = tmp_path / "d" / "adapter_model.safetensors"
    save_file({**load_file(path), "base_model.model.model.layers.0.mlp.up_proj.lora_C.weight": torch.ones(2)}, path)
    with pytest.raises(SteerError, match="lora_C.*not part of a plain LoRA"):
        task_vector(tmp_path / "d")


def test_quantised_checkpoints_are_no_source(tmp_path: Path) -> None:
    for side in ("a", "b"):
        folder = base_folder(tiny_model(1), tmp_path / side)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(SteerError, match="quantised"):
        subtract_finetunes(tmp_path / "a", tmp_path / "b")
