"""Adapters as other tools and versions write them, against what PEFT makes of them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from architectures import IDS, tiny
from conftest import tiny_model
from weightsteer.errors import SteerError
from weightsteer.vectors.delta import to_dense
from weightsteer.vectors.difference import subtract_finetunes, task_vector
from weightsteer.vectors.weight_vector import WeightVector

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def llama(tied: bool = False) -> LlamaForCausalLM:
    config = tiny_model().config
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def adapter(folder: Path, model: PreTrainedModel, seed: int = 1, base: Path | None = None, **options: Any) -> Path:
    """A random adapter as PEFT saves it."""
    if base is not None:
        model.config._name_or_path = model.name_or_path = str(base)
    peft = get_peft_model(model, LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": "all-linear", **options}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    peft.save_pretrained(str(folder))
    return folder


def rewrite(source: Path, target: Path, rename: Callable[[str], str]) -> Path:
    """A copy of an adapter whose keys went through `rename`."""
    shutil.copytree(source, target)
    save_file({rename(name): t.clone() for name, t in load_file(source / FILE).items()}, target / FILE)
    return target


def configure(source: Path, target: Path, **fields: Any) -> Path:
    """A copy of an adapter with other fields in its config."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    config = json.loads((target / CONFIG).read_text())
    (target / CONFIG).write_text(json.dumps({**config, **fields}))
    return target


def merged(make: Callable[[], PreTrainedModel], folder: Path) -> dict[str, Tensor]:
    """PEFT's own merge in float64, by parameter."""
    model = PeftModel.from_pretrained(make().double(), str(folder)).merge_and_unload()
    return dict(model.named_parameters())


def assert_change(tau: WeightVector, make: Callable[[], PreTrainedModel], folder: Path) -> None:
    """The task vector is PEFT's merge minus the base, in float64, for every parameter of the model."""
    found = {name: to_dense(tau.deltas[name]).double() for name in tau.deltas}
    for name, after in merged(make, folder).items():
        change = after - make().get_parameter(name).double()
        torch.testing.assert_close(found.pop(name, torch.zeros_like(change)), change, atol=1e-7, rtol=1e-5, msg=name)
    assert not found


@pytest.fixture
def base(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: f"_orig_mod.{key}",
        lambda key: f"module.{key}",
        lambda key: key.replace(".mlp", "._fsdp_wrapped_module.mlp"),
        lambda key: key.replace(".self_attn", "._checkpoint_wrapped_module.self_attn"),
        lambda key: key.replace(".weight", ".default.weight"),
        lambda key: key.replace(".weight", ".my_adapter.weight"),
        lambda key: key.replace(".weight", ".my-adapter.v1.weight"),
        lambda key: f"_forward_module.{key}",
        lambda key: f"policy.module.{key}",
        lambda key: key.removeprefix("base_model.model."),
        lambda key: f"base_model.model.{key}",
        lambda key: key.replace("base_model.model.model.", "base_model.model."),
        lambda key: key.replace("base_model.model.model.", "base_model.model.model.model."),
        lambda key: key.replace("base_model.model.", "base_model.model.pretrained_model."),
    ],
)
def test_keys_of_other_tools_mean_the_same_modules(rename: Callable[[str], str], base: Path, tmp_path: Path) -> None:
    plain = adapter(tmp_path / "plain", llama(), base=base)
    other = rewrite(plain, tmp_path / "other", rename)
    assert subtract_finetunes(plain, other).norm() == 0.0
    assert task_vector(plain).cosine(task_vector(other)) == pytest.approx(1.0, abs=1e-6)


def test_two_spellings_without_a_base_are_refused(tmp_path: Path) -> None:
    plain = adapter(tmp_path / "plain", llama())
    other = rewrite(plain, tmp_path / "other", lambda key: key.replace("model.model.", "model.language_model.model."))
    with pytest.raises(SteerError, match="one parameter under two names; give the base"):
        subtract_finetunes(plain, other)
    with pytest.raises(SteerError, match="one parameter under two names"):
        task_vector(plain).cosine(task_vector(other))
    with pytest.raises(SteerError, match="one parameter under two names"):
        task_vector(plain) + task_vector(other)


def test_two_towers_of_one_model_are_two_modules(tmp_path: Path) -> None:
    text = adapter(tmp_path / "text", llama())
    image = rewrite(text, tmp_path / "image", lambda key: key.replace("model.model.", "model.vision_tower.encoder."))
    both = subtract_finetunes(text, image)
    assert both.norm() == pytest.approx(2**0.5 * task_vector(text).norm())
    assert (task_vector(text) - task_vector(image) - both).norm() == 0.0


def test_a_module_that_the_base_lacks_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    plain = adapter(tmp_path / "plain", llama(), base=base)
    other = rewrite(plain, tmp_path / "other", lambda key: key.replace("q_proj", "query"))
    with pytest.raises(
        SteerError, match=r"self_attn\.query\.weight, which its base \(LlamaForCausalLM\) does not have"
    ):
        task_vector(other)


@pytest.mark.parametrize(("family", "module", "flag"), [("llama", "q_proj", True), ("gpt2", "attn.c_proj", False)])
def test_the_modules_class_decides_how_a_square_matrix_is_stored(
    family: str, module: str, flag: bool, tmp_path: Path
) -> None:
    tiny(family).save_pretrained(tmp_path / "base")
    plain = adapter(tmp_path / "plain", tiny(family), base=tmp_path / "base", target_modules=[module])
    wrong = configure(plain, tmp_path / "wrong", fan_in_fan_out=flag)
    assert_change(task_vector(wrong), lambda: tiny(family), wrong)


def test_tokens_added_and_whole_modules_saved(base: Path, tmp_path: Path) -> None:
    def resized() -> LlamaForCausalLM:
        model = llama()
        torch.manual_seed(5)
        model.resize_token_embeddings(model.config.vocab_size + 4)
        return model

    saved: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    sides = [adapter(tmp_path / str(seed), resized(), seed, base, **saved) for seed in (1, 2)]
    assert any("original_module" in key for key in load_file(sides[0] / FILE))
    w = subtract_finetunes(*sides)
    ours, theirs = (merged(resized, side) for side in sides)
    for name in w.deltas:
        torch.testing.assert_close(to_dense(w.deltas[name]).double(), ours[name] - theirs[name], atol=1e-7, rtol=1e-5)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= w.deltas.keys()


def test_embeddings_that_are_trained_tied_count_once(tmp_path: Path) -> None:
    base = tmp_path / "base"
    llama(tied=True).save_pretrained(base)
    saved: dict[str, Any] = {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    }
    sides = [adapter(tmp_path / str(seed), llama(tied=True), seed, base, **saved) for seed in (1, 2)]
    w = subtract_finetunes(*sides)
    ours, theirs = (merged(lambda: llama(tied=True), side) for side in sides)
    true = sum(float((ours[name] - theirs[name]).square().sum()) for name in ours) ** 0.5
    assert w.norm() == pytest.approx(true, rel=1e-6)
    assert "lm_head.weight" not in w.deltas


def test_a_head_that_one_side_of_a_tied_model_saved_is_the_heads_alone(tmp_path: Path) -> None:
    base = tmp_path / "base"
    llama(tied=True).save_pretrained(base)
    head = adapter(tmp_path / "head", llama(tied=True), 1, base, target_modules=["q_proj"], modules_to_save=["lm_head"])
    plain = adapter(tmp_path / "plain", llama(tied=True), 2, base, target_modules=["q_proj"])
    w = subtract_finetunes(head, plain)
    embedding = llama(tied=True).model.embed_tokens.weight
    key = next(key for key in load_file(head / FILE) if key.endswith("lm_head.weight"))
    torch.testing.assert_close(to_dense(w.deltas["lm_head.weight"]), load_file(head / FILE)[key] - embedding)


def tied_logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return PeftModel.from_pretrained(llama(tied=True), str(folder)).eval()(IDS).logits


APART: list[dict[str, Any]] = [
    {"modules_to_save": ["embed_tokens", "lm_head"]},
    {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    {"modules_to_save": ["embed_tokens"]},
    {"modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    {"target_modules": ["q_proj", "lm_head"]},
]


@pytest.mark.parametrize("first", range(len(APART)))
@pytest.mark.parametrize("second", range(len(APART)))
def test_any_two_ways_to_train_tied_embeddings_add_up(first: int, second: int, tmp_path: Path) -> None:
    """base + (A - B) + B is A, as PEFT serves it, whatever A and B trained of the two places; or it is refused."""
    base = tmp_path / "base"
    llama(tied=True).save_pretrained(base)
    options = [{"target_modules": ["q_proj"], **APART[number]} for number in (first, second)]
    one, other = (
        adapter(tmp_path / str(seed), llama(tied=True), seed, base, **chosen) for seed, chosen in enumerate(options)
    )
    model = llama(tied=True)
    before = model(IDS).logits
    with torch.no_grad():
        for source in (one, other):
            with task_vector(source).applied(model, 1.0):
                torch.testing.assert_close(model(IDS).logits, tied_logits(source), atol=2e-5, rtol=1e-4)
        w = subtract_finetunes(one, other)
        if second == 1 and first != 1:
            with pytest.raises(SteerError, match="changes the input embedding alone"):
                to_dense((w + task_vector(other)).deltas["model.embed_tokens.weight"])
            return
        with (w + task_vector(other)).applied(model, 1.0):
            torch.testing.assert_close(model(IDS).logits, tied_logits(one), atol=2e-5, rtol=1e-4)
        assert torch.equal(model(IDS).logits, before)


def test_a_base_of_another_size_is_refused(base: Path, tmp_path: Path) -> None:
    config = tiny_model().config
    config.intermediate_size += 8
    LlamaForCausalLM(config).save_pretrained(tmp_path / "wide")
    plain = adapter(tmp_path / "plain", llama(), base=base)
    with pytest.raises(SteerError, match=r"was trained on a base of shape .*this one has .*--base"):
        task_vector(plain, base=tmp_path / "wide")


EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mixtral", {}),
        ("mixtral", EXPERTS),
        ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}),
        ("qwen3-moe", {"use_rslora": True}),
        ("gpt-oss", EXPERTS),
        ("llama4", EXPERTS),
        ("jamba", {}),
    ],
)
def test_experts_are_read_as_peft_merges_them(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    tiny(family).save_pretrained(tmp_path / "base")
    folder = adapter(tmp_path / "adapter", tiny(family), base=tmp_path / "base", **options)
    tau = task_vector(folder)
    assert_change(tau, lambda: tiny(family), folder)
    tau.save(tmp_path / "vector")
    assert_change(WeightVector.load(tmp_path / "vector"), lambda: tiny(family), folder)


def test_experts_of_older_versions_lie_one_by_one(tmp_path: Path) -> None:
    tiny("mixtral").save_pretrained(tmp_path / "base")
    generator = torch.Generator().manual_seed(3)
    model = tiny("mixtral")
    hidden, inner = model.config.hidden_size, model.config.intermediate_size
    tensors, expected = {}, {}
    for name, (rows, columns) in {"w1": (inner, hidden), "w2": (hidden, inner), "w3": (inner, hidden)}.items():
        for expert in range(4):
            key = f"base_model.model.model.layers.0.block_sparse_moe.experts.{expert}.{name}"
            A, B = torch.randn(2, columns, generator=generator), torch.randn(rows, 2, generator=generator)
            tensors |= {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}
            expected[name, expert] = 1.5 * B @ A
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(tensors, folder / FILE)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "base_model_name_or_path": str(tmp_path / "base")}
    (folder / CONFIG).write_text(json.dumps(config))
    tau = task_vector(folder)
    fused = to_dense(tau.deltas["model.layers.0.mlp.experts.gate_up_proj"])
    down = to_dense(tau.deltas["model.layers.0.mlp.experts.down_proj"])
    for expert in range(4):
        torch.testing.assert_close(fused[expert], torch.cat([expected["w1", expert], expected["w3", expert]]))
        torch.testing.assert_close(down[expert], expected["w2", expert])


OLD_NAMES: dict[str, Callable[[str], str]] = {
    "gemma3-vision": lambda key: key.replace("model.model.language_model.", "model.language_model.model."),
    "llava": lambda key: key.replace("model.model.language_model.", "model.language_model.model."),
    "qwen2-vl": lambda key: key.replace("model.model.language_model.", "model.model."),
    "qwen2.5-vl": lambda key: key.replace("model.model.language_model.", "model.model."),
}


@pytest.mark.parametrize("family", OLD_NAMES)
def test_vision_language_adapters_of_before_and_after_the_renaming_are_one(family: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny(family).save_pretrained(base)
    targets = r".*language_model.*(q_proj|down_proj)"
    new = adapter(tmp_path / "new", tiny(family), base=base, target_modules=targets)
    assert_change(task_vector(new), lambda: tiny(family), new)
    old = rewrite(new, tmp_path / "old", OLD_NAMES[family])
    assert load_file(old / FILE).keys() != load_file(new / FILE).keys()
    assert subtract_finetunes(new, old).norm() == 0.0
    whole = PeftModel.from_pretrained(tiny(family), str(new)).merge_and_unload()
    whole.save_pretrained(tmp_path / "whole")
    assert subtract_finetunes(new, tmp_path / "whole", base=base).norm() < 1e-5
    assert task_vector(new).cosine(task_vector(tmp_path / "whole", base=base)) == pytest.approx(1.0, abs=1e-5)


def test_experts_without_their_base_are_refused(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", tiny("mixtral"), **EXPERTS)
    with pytest.raises(SteerError, match=r"target_parameters .*give the base"):
        task_vector(folder)


def test_mlx_adapters_are_exact(base: Path, tmp_path: Path) -> None:
    plain = adapter(tmp_path / "plain", llama(), base=base)
    tensors = {}
    for key, tensor in load_file(plain / FILE).items():
        name = (
            key.removeprefix("base_model.model.")
            .replace(".lora_A.weight", ".lora_a")
            .replace(".lora_B.weight", ".lora_b")
        )
        tensors[name] = tensor.T.contiguous()
    folder = tmp_path / "mlx"
    folder.mkdir()
    save_file(tensors, folder / "adapters.safetensors")
    config: dict[str, Any] = {
        "fine_tune_type": "lora",
        "lora_parameters": {"rank": 2, "scale": 1.5},
        "model": str(base),
    }
    (folder / CONFIG).write_text(json.dumps(config))
    assert subtract_finetunes(plain, folder).norm() < 1e-6
    (folder / CONFIG).write_text(json.dumps({**config, "fine_tune_type": "dora"}))
    with pytest.raises(SteerError, match="fine_tune_type is dora"):
        task_vector(folder)
    (folder / CONFIG).write_text(json.dumps({**config, "lora_parameters": {"rank": 2}}))
    with pytest.raises(SteerError, match="a number scale"):
        task_vector(folder)


def test_mlx_adapters_on_the_embedding_are_not_transposed(base: Path, tmp_path: Path) -> None:
    rows, columns = llama().model.embed_tokens.weight.shape
    a, b = torch.randn(rows, 2), torch.randn(2, columns)
    save_file({"model.embed_tokens.lora_a": a, "model.embed_tokens.lora_b": b}, tmp_path / "adapters.safetensors")
    config = {"fine_tune_type": "lora", "lora_parameters": {"scale": 2.0}, "model": str(base)}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    torch.testing.assert_close(to_dense(task_vector(tmp_path).deltas["model.embed_tokens.weight"]), 2.0 * a @ b)


def test_empty_adapters_are_refused(tmp_path: Path) -> None:
    full = adapter(tmp_path / "full", llama())
    changes: dict[str, Callable[[str, Tensor], Tensor]] = {
        "nothing": lambda key, tensor: torch.zeros(0),
        "rank0": lambda key, tensor: tensor[:0] if "lora_A" in key else tensor[:, :0],
    }
    for name, change in changes.items():
        shutil.copytree(full, tmp_path / name)
        tensors = {key: change(key, tensor).clone() for key, tensor in load_file(full / FILE).items()}
        save_file(tensors, tmp_path / name / FILE)
        with pytest.raises(SteerError, match="ZeRO-3"):
            subtract_finetunes(tmp_path / name, full)
    save_file({}, tmp_path / "rank0" / FILE)
    with pytest.raises(SteerError, match="holds no tensors"):
        subtract_finetunes(full, tmp_path / "rank0")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_alpha": None}, "field lora_alpha: expected a number above 0, found null"),
        ({"lora_alpha": "16"}, "field lora_alpha"),
        ({"lora_alpha": True}, "field lora_alpha"),
        ({"alpha_pattern": {"(": 3}}, r"alpha_pattern: expected module patterns"),
        ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern, 'q_proj'"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern: expected an object"),
        ({"use_rslora": "true"}, "field use_rslora: expected true or false"),
        ({"fan_in_fan_out": 1}, "field fan_in_fan_out"),
        ({"alpha_patern": {"q_proj": 8}}, "has alpha_patern=.*not known here"),
        ({"peft_type": "LOHA"}, "peft_type is LOHA, expected LORA .Hadamard|a Hadamard"),
        ({"use_qalora": True}, "use_qalora"),
        ({"init_lora_weights": "pissa"}, "changes the base weights"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters"),
    ],
)
def test_a_config_that_changes_the_tensors_meaning_is_read_strictly(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = configure(adapter(tmp_path / "plain", llama()), tmp_path / "other", **fields)
    with pytest.raises(SteerError, match=message):
        task_vector(folder)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"text"'])
def test_a_config_that_is_no_object_is_refused(text: str, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "plain", llama())
    (folder / CONFIG).write_text(text)
    with pytest.raises(SteerError, match="expected a JSON object"):
        task_vector(folder)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["adapter_config.json", "adapter_model.bin"], "adapter as a pickle"),
        (["adapter_config.json", "adapter_0.pt"], "torchtune"),
        (["adapter_config.json", "adapter_model-00001-of-00002.safetensors"], "adapter in several files"),
        (["adapter_model.safetensors"], "without adapter_config.json"),
        (["checkpoint-10/adapter_config.json", "checkpoint-20/adapter_config.json"], "give one of checkpoint-10"),
        (["default/adapter_config.json"], "give one of default"),
        (["adapter_model/adapter_config.json", "trainer_state.json"], "give one of adapter_model"),
        (["refs/main", "snapshots/abc/adapter_config.json"], "hub cache's folder: give .*snapshots/abc"),
        (["models--a--b/refs/main"], "hub cache: give the model's id"),
        (["global_step10/mp_rank_00_model_states.pt", "zero_to_fp32.py"], "DeepSpeed"),
        (["pytorch_model_fsdp_0/__0_0.distcp"], "FSDP"),
        (["config.json", "pytorch_model.bin"], "checkpoint as a pickle"),
        (["params.json", "consolidated.safetensors"], "maker's own form"),
        (["config.json", "model.fp16.safetensors"], "variant"),
        (["config.json", "weights.gguf"], "GGUF"),
        (["config.json", "tf_model.h5"], "another framework"),
        (["config.json"], "config without weights"),
        (["optimizer.pt"], "pickle"),
        (["notes.txt"], "it holds notes.txt"),
        ([], "it is empty"),
    ],
)
def test_a_folder_that_is_no_fine_tune_is_named_for_what_it_is(files: list[str], message: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises(SteerError, match=f"not a fine-tune.*{message}"):
        task_vector(tmp_path)


def test_a_git_lfs_pointer_is_named(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "plain", llama())
    (folder / FILE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    with pytest.raises(SteerError, match=re.compile("git-lfs.*git lfs pull", re.DOTALL)):
        task_vector(folder)
