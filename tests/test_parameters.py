"""Checkpoints of many architectures, read by the names in memory; the models themselves are the reference."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel

from architectures import FAMILIES, IDS, VISION, tiny
from conftest import tiny_model
from weightsteer.checkpoints.architecture import _architecture, architecture_of
from weightsteer.checkpoints.parameters import Assembled, open_checkpoint, read_parameters, same_values
from weightsteer.errors import SteerError
from weightsteer.export.merge import export_merged
from weightsteer.vectors.delta import to_dense
from weightsteer.vectors.difference import subtract_finetunes, task_vector

Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def llama(seed: int = 0, tied: bool = False) -> LlamaForCausalLM:
    config = tiny_model().config
    config.tie_word_embeddings = tied
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval()


def rewrite(source: Path, target: Path, change: Change) -> Path:
    """A copy of a checkpoint whose tensors went through `change`."""
    shutil.copytree(source, target)
    tensors = change(load_file(target / "model.safetensors"))
    save_file({name: t.clone() for name, t in tensors.items()}, target / "model.safetensors", {"format": "pt"})
    return target


def perturbed(model: PreTrainedModel, seed: int = 1) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("family", [*FAMILIES, *VISION])
def test_a_fine_tune_of_any_architecture_is_named_read_and_merged_exactly(family: str, tmp_path: Path) -> None:
    base, tuned = tiny(family), perturbed(tiny(family))
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    vector = task_vector(tmp_path / "tuned", base=tmp_path / "base")
    own = dict(base.named_parameters())
    assert set(vector.deltas) == set(own)
    for name, parameter in tuned.named_parameters():
        assert torch.equal(to_dense(vector.deltas[name]), parameter - own[name]), name
    export_merged(vector, tmp_path / "base", tmp_path / "merged", k=0.5)
    merged = type(base).from_pretrained(tmp_path / "merged")
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(parameter, own[name] + 0.5 * to_dense(vector.deltas[name]), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("family", ["mixtral", "gpt-neox", *VISION])
def test_a_checkpoint_in_the_form_of_memory_equals_the_same_in_the_hubs_form(family: str, tmp_path: Path) -> None:
    """Experts one by one or fused; names before and after transformers 4.52."""
    model = tiny(family)
    model.save_pretrained(tmp_path / "hub")
    model.save_pretrained(tmp_path / "memory", save_original_format=False)
    hub, memory = read_parameters(tmp_path / "hub"), read_parameters(tmp_path / "memory")
    assert hub.keys() == memory.keys()
    assert any(isinstance(parameter, Assembled) for parameter in hub.values()) is (family == "mixtral")
    assert not any(isinstance(parameter, Assembled) for parameter in memory.values())
    assert all(same_values(hub[name], memory[name]) for name in hub)
    with pytest.raises(SteerError, match="identical"):
        subtract_finetunes(tmp_path / "hub", tmp_path / "memory")


def test_experts_that_are_missing_or_stored_in_two_forms_are_refused(tmp_path: Path) -> None:
    tiny("mixtral").save_pretrained(tmp_path / "hub")
    lost = rewrite(
        tmp_path / "hub", tmp_path / "lost", lambda t: {n: x for n, x in t.items() if "experts.2.w1" not in n}
    )
    with pytest.raises(SteerError, match=r"tensors of model\.layers\.0\.mlp\.experts\.gate_up_proj do not make up"):
        read_parameters(lost)


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "_fsdp_wrapped_module.", "pretrained_model.", "module._orig_mod.", "model."]
)
def test_wrappers_and_prefixes_do_not_make_another_parameter(prefix: str, tmp_path: Path) -> None:
    llama(1).save_pretrained(tmp_path / "plain")
    wrapped = rewrite(tmp_path / "plain", tmp_path / "wrapped", lambda t: {prefix + n: x for n, x in t.items()})
    inner = rewrite(
        tmp_path / "plain",
        tmp_path / "inner",
        lambda t: {n.replace(".mlp.", "._checkpoint_wrapped_module.mlp._orig_mod."): x for n, x in t.items()},
    )
    for other in (wrapped, inner):
        with pytest.raises(SteerError, match="identical"):
            subtract_finetunes(tmp_path / "plain", other)


def test_gpt2_of_the_hub_without_prefix_and_with_masks(tmp_path: Path) -> None:
    model: GPT2LMHeadModel = tiny("gpt2")
    perturbed(model).save_pretrained(tmp_path / "tuned")
    masks = {f"h.{i}.attn.bias": torch.tril(torch.ones(64, 64))[None, None] for i in range(2)}
    tiny("gpt2").save_pretrained(tmp_path / "base")
    hub = rewrite(
        tmp_path / "base", tmp_path / "hub", lambda t: {n.removeprefix("transformer."): x for n, x in t.items()} | masks
    )
    vector = task_vector(tmp_path / "tuned", base=hub)
    assert set(vector.deltas) == {name for name, _ in model.named_parameters()}
    export_merged(vector, hub, tmp_path / "merged", k=1.0)
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(IDS).logits
        torch.testing.assert_close(found, model(IDS).logits, atol=1e-5, rtol=1e-5)
    assert "h.0.attn.bias" in load_file(tmp_path / "merged" / "model.safetensors")  # kept as it was


def test_buffers_and_strangers_are_no_parameters(tmp_path: Path) -> None:
    for seed in (1, 2):
        llama(seed).save_pretrained(tmp_path / str(seed))
    true = subtract_finetunes(tmp_path / "1", tmp_path / "2").norm()
    extra: Change = lambda t: {  # noqa: E731
        **t,
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.arange(4.0),
        "model.position_ids": torch.arange(8),
    }
    more = rewrite(tmp_path / "1", tmp_path / "more", extra)
    assert subtract_finetunes(more, tmp_path / "2").norm() == true
    head: Change = lambda t: {**t, "v_head.summary.weight": torch.ones(1, 8)}  # noqa: E731
    with pytest.warns(UserWarning, match=r"1 tensors are no parameters of LlamaForCausalLM.*v_head"):
        assert subtract_finetunes(rewrite(tmp_path / "1", tmp_path / "value", head), tmp_path / "2").norm() == true


def test_a_single_file_goes_before_a_stale_index_and_shards_before_what_an_index_says(tmp_path: Path) -> None:
    llama(1).save_pretrained(tmp_path / "new")
    llama(7).save_pretrained(tmp_path / "old", max_shard_size="20KB")
    for path in (tmp_path / "old").glob("model*"):
        shutil.copy(path, tmp_path / "new")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    head = read_parameters(tmp_path / "new")["lm_head.weight"]
    assert torch.equal(head.rows(0, head.shape[0]), loaded.lm_head.weight)
    index = tmp_path / "old" / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    ghost = {**fields["weight_map"], "model.rotary_emb.inv_freq": next(iter(fields["weight_map"].values()))}
    index.write_text(json.dumps({**fields, "weight_map": ghost}))
    assert set(read_parameters(tmp_path / "old")) == {name for name, _ in llama().named_parameters()}


def test_a_tied_head_counts_once_under_either_name(tmp_path: Path) -> None:
    llama(1, tied=True).save_pretrained(tmp_path / "tied")
    only_head = rewrite(
        tmp_path / "tied",
        tmp_path / "head",
        lambda t: {n.replace("model.embed_tokens", "lm_head"): x for n, x in t.items()},
    )
    both = rewrite(
        tmp_path / "tied", tmp_path / "both", lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"]}
    )
    for other in (only_head, both):
        loaded = AutoModelForCausalLM.from_pretrained(other)
        assert torch.equal(loaded.lm_head.weight, llama(1, tied=True).lm_head.weight)
        with pytest.raises(SteerError, match="identical"):
            subtract_finetunes(tmp_path / "tied", other)
    untied = rewrite(
        tmp_path / "tied", tmp_path / "untied", lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"] + 1}
    )
    found = open_checkpoint(untied)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= found.parameters().keys()
    assert not found.tied


def test_a_model_saved_with_its_adapter_inside_is_refused(tmp_path: Path) -> None:
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    model.config.save_pretrained(tmp_path)
    state = {name.removeprefix("base_model.model."): tensor for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(SteerError, match=r"adapter's layers still in it.*merge_and_unload"):
        read_parameters(tmp_path)


def test_empty_shells_and_shapes_that_do_not_fit_the_config_are_refused(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    shell = rewrite(tmp_path / "base", tmp_path / "shell", lambda t: dict.fromkeys(t, torch.zeros(0)))
    with pytest.raises(SteerError, match="ZeRO-3"):
        read_parameters(shell)
    short = rewrite(tmp_path / "base", tmp_path / "short", lambda t: {**t, "lm_head.weight": t["lm_head.weight"][:-1]})
    with pytest.raises(SteerError, match=r"lm_head\.weight has shape .* do not belong together"):
        read_parameters(short)


def test_what_transformers_tells_of_a_config_is_kept_and_made_again_where_it_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEIGHTSTEER_CACHE", str(tmp_path / "cache"))
    tiny("mixtral").save_pretrained(tmp_path / "model")
    first = architecture_of(tmp_path / "model")
    (kept,) = (tmp_path / "cache" / "architectures").iterdir()
    for content in (kept.read_text(), "{", "[]", "{}"):
        kept.write_text(content)
        shutil.copytree(tmp_path / "model", tmp_path / "copy", dirs_exist_ok=True)
        _architecture.cache_clear()
        again = architecture_of(tmp_path / "copy")
        assert first is not None
        assert again is not None
        assert (again.shapes, again.files, again.transposed) == (first.shapes, first.files, first.transposed)
    assert again.places("model.layers.0.block_sparse_moe.gate.weight") == first.places("model.layers.0.mlp.gate.weight")


@pytest.mark.parametrize(
    ("leaf", "replaced"),
    [
        ("weight._data", True),
        ("_weight_qdata", True),
        ("codebooks", True),
        ("centroids.weight", True),
        ("scales", False),
        ("input_scale", False),
        ("qweight", True),
        ("weight_packed", True),
    ],
)
def test_a_layer_that_is_stored_as_something_else_is_quantised(leaf: str, replaced: bool, tmp_path: Path) -> None:
    def pack(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        kept = {n: t for n, t in tensors.items() if not replaced or not n.endswith("q_proj.weight")}
        return kept | {n.replace("weight", leaf): t for n, t in tensors.items() if n.endswith("q_proj.weight")}

    llama().save_pretrained(tmp_path / "base")
    with pytest.raises(SteerError, match=r"its weights are quantised .*export peft"):
        read_parameters(rewrite(tmp_path / "base", tmp_path / "packed", pack))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int32])
def test_weights_of_another_dtype_are_quantised(dtype: torch.dtype, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    packed = rewrite(
        tmp_path / "base", tmp_path / "packed", lambda t: {n: x.to(dtype) if "_proj" in n else x for n, x in t.items()}
    )
    with pytest.raises(SteerError, match="its weights are quantised"):
        read_parameters(packed)


@pytest.mark.parametrize("name", ["hf_quant_config.json", "quantize_config.json", "quant_config.json"])
def test_a_file_beside_the_weights_says_that_they_are_quantised(name: str, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    (tmp_path / name).write_text("{}")
    with pytest.raises(SteerError, match=f"quantised .{name} lies beside them"):
        read_parameters(tmp_path)


def test_a_model_saved_without_its_head_has_the_names_of_the_whole(tmp_path: Path) -> None:
    model = llama(tied=True)
    model.model.save_pretrained(tmp_path / "inner")
    config = json.loads((tmp_path / "inner" / "config.json").read_text())
    assert config["architectures"] == ["LlamaModel"]
    assert set(read_parameters(tmp_path / "inner")) == {name for name, _ in model.named_parameters()}
