"""GGUF files: written here with the gguf library, so that every weight is known."""

from __future__ import annotations

import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import Qwen2Config, Qwen2ForCausalLM

from conftest import TEMPLATE
from weightsteer.behavior import ContrastPair, Example
from weightsteer.checkpoints import gguf as unpacking
from weightsteer.checkpoints.gguf import hash_of, unpacked
from weightsteer.checkpoints.locate import checkpoint_folder, locate_config, locate_model, source_folder
from weightsteer.errors import SteerError
from weightsteer.export.llama_cpp import model_type_of
from weightsteer.export.merge import export_merged
from weightsteer.lm import LM
from weightsteer.run_card import RunCard
from weightsteer.training import TrainSettings, train_side
from weightsteer.vectors.difference import subtract_finetunes, task_vector

QUANTISED = gguf.GGMLQuantizationType.Q8_0
PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def tiny_qwen(seed: int = 0) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2Config(
        **sizes, vocab_size=260, num_key_value_heads=2, initializer_range=0.2, tie_word_embeddings=True
    )
    return Qwen2ForCausalLM(config)


def gguf_name(name: str) -> str:
    """llama.cpp's name of one of Qwen2's parameters."""
    outer = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in outer:
        return outer[name]
    _, _, layer, rest = name.split(".", 3)
    part, _, end = rest.rpartition(".")
    return f"blk.{layer}.{PARTS[part]}.{end}"


def write_gguf(
    path: Path, seed: int = 0, *, quantised: bool = False, drop: str = "", **fields: Callable[[gguf.GGUFWriter], None]
) -> Path:
    """The tiny model as a GGUF file; `fields` are calls that add metadata."""
    model = tiny_qwen(seed)
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    tokens = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * 257)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(TEMPLATE)
    for add in fields.values():
        add(writer)
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        if gguf_name(name) == drop:
            continue
        if quantised and values.ndim == 2:
            writer.add_tensor(gguf_name(name), gguf.quantize(values, QUANTISED), raw_dtype=QUANTISED)
        else:
            writer.add_tensor(gguf_name(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("WEIGHTSTEER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def folders(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.is_dir())


@pytest.mark.parametrize("quantised", [False, True])
def test_every_weight_the_template_and_the_tokens_are_kept(tmp_path: Path, quantised: bool) -> None:
    lm = LM.load(write_gguf(tmp_path / "model.gguf", quantised=quantised), device="cpu")
    reference = tiny_qwen()
    for name, parameter in lm.model.named_parameters():
        wanted = reference.get_parameter(name).detach()
        if quantised and wanted.ndim == 2:
            packed = gguf.quantize(wanted.numpy(), QUANTISED)
            wanted = torch.from_numpy(gguf.dequantize(packed, QUANTISED).astype(np.float32))
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, wanted), name
    assert lm.tokenizer.chat_template == TEMPLATE
    assert lm.tokenizer.decode(lm.chat_ids("Hi")) == "<s>system\nBe brief.</s>\n<s>user\nHi</s>\n<s>assistant\n"
    assert lm.stops == [2]
    assert lm.name == str(tmp_path / "model.gguf")


def test_a_gguf_is_unpacked_once_whatever_it_is_called(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "a.gguf")
    folder = unpacked(path)
    said = capsys.readouterr().err
    assert "unpack a.gguf" in said
    assert f"GB into {folder}" in said
    monkeypatch.setattr(unpacking, "unpack", lambda *args, **kwargs: pytest.fail("unpacked again"))
    (tmp_path / "link.gguf").symlink_to(path)
    (tmp_path / "deep").mkdir()
    shutil.copy(path, tmp_path / "deep" / "COPY.GGUF")
    monkeypatch.chdir(tmp_path)
    for name in ("a.gguf", "./a.gguf", "link.gguf", "deep/COPY.GGUF", str(path)):
        assert locate_model(name) == str(folder)
        assert checkpoint_folder(name) == source_folder(name) == folder
    assert LM.load("link.gguf", device="cpu").revision == LM.load(path, device="cpu").revision
    assert capsys.readouterr().err == ""
    assert folders(cache) == [folder.name]


def test_what_lies_beside_a_gguf_plays_no_part(tmp_path: Path, checkpoint: Path) -> None:
    first = LM.load(write_gguf(tmp_path / "a.gguf", 0), device="cpu")
    folder = tmp_path / "full"
    shutil.copytree(checkpoint, folder)  # another model with its config and tokenizer
    paths = [write_gguf(folder / f"{name}.gguf", seed) for name, seed in (("a", 0), ("b", 1))]
    same, other = (LM.load(path, device="cpu") for path in paths)
    assert first.revision == same.revision != other.revision
    assert same.tokenizer.chat_template == TEMPLATE
    assert type(same.model) is Qwen2ForCausalLM
    tokens = torch.tensor([first.chat_ids("Hi")])
    assert torch.equal(first.model(tokens).logits, same.model(tokens).logits)
    assert model_type_of(str(paths[0])) == "qwen2"


def test_a_changed_file_is_another_model(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", 0)
    before, stat = hash_of(path), path.stat()
    time.sleep(0.02)
    write_gguf(path, 1)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # of the same size, too
    assert path.stat().st_size == stat.st_size
    assert hash_of(path) != before


@pytest.mark.parametrize("kind", ["lora", "bias", "full"])
def test_a_gguf_is_trained_and_merged_into_like_a_folder(kind: str, pairs: list[ContrastPair], tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", quantised=True)
    lm = LM.load(path, device="cpu")
    settings = TrainSettings(kind=kind, rank=2, learning_rates=(1e-2,), batch_size=4, evaluations=2, warmup_steps=1)
    positive, negative = (
        train_side(lm, [Example(p.prompt, getattr(p, side)) for p in pairs], tmp_path / side, settings=settings)
        for side in ("positive", "negative")
    )
    card = RunCard.load(positive)
    assert (card.base_model, card.base_revision) == ("a.gguf", lm.revision)  # no path of this machine
    w = subtract_finetunes(positive, negative)
    assert w.norm() > 0
    if kind == "bias":  # a checkpoint that has no such biases cannot take them
        return
    tau = task_vector(positive, base=str(path))
    merged = tmp_path / "merged"
    export_merged(tau, checkpoint_folder(str(path)), merged, k=1.0)
    tokens = torch.tensor([lm.chat_ids("Hi")])
    with tau.applied(lm, 1.0):
        steered = lm.model(tokens).logits
    torch.testing.assert_close(LM.load(merged, device="cpu").model(tokens).logits, steered, rtol=1e-4, atol=1e-4)


def cut(path: Path) -> Path:
    data = write_gguf(path).read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


def holding(name: str, data: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return write


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda folder: folder / "x.gguf", "x.gguf: no such file"),
    "empty": (holding("x.gguf", b""), "is not a GGUF file"),
    "text": (holding("x.gguf", b"\n"), "is not a GGUF file .*download it again"),
    "pointer": (holding("x.gguf", b"version https://git-lfs.github.com/spec/v1\n"), "git-lfs pointer.*git lfs pull"),
    "magic alone": (holding("x.gguf", b"GGUF"), "damaged or cut short"),
    "absurd counts": (holding("x.gguf", b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60)), "damaged or cut short"),
    "cut": (lambda folder: cut(folder / "x.gguf"), "damaged or cut short.*download it again"),
    "split": (
        lambda folder: write_gguf(folder / "x-00001-of-00003.gguf"),
        "one of 3 parts of a model; merge them with llama.cpp's `llama-gguf-split --merge",
    ),
    "renamed split": (
        lambda folder: write_gguf(folder / "x.gguf", split=lambda writer: writer.add_uint16("split.count", 2)),
        "one of 2 parts",
    ),
    "vision": (lambda folder: write_gguf(folder / "mmproj-x.gguf"), "vision part .*mmproj"),
    "renamed vision": (
        lambda folder: write_gguf(folder / "x.gguf", kind=lambda writer: writer.add_type("mmproj")),
        "vision part",
    ),
    "adapter": (
        lambda folder: write_gguf(folder / "x.gguf", kind=lambda writer: writer.add_type("adapter")),
        "holds no model .*'adapter'",
    ),
    "lacking": (
        lambda folder: write_gguf(folder / "x.gguf", drop="blk.1.ffn_up.weight"),
        "transformers cannot read it .*lacks model.layers.1.mlp.up_proj.weight.*safetensors",
    ),
    "folder": (lambda folder: write_gguf(folder / "x.gguf").parent, "holds GGUF files; name one of them: x.gguf"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_model_is_refused_with_the_way_out(name: str, tmp_path: Path, cache: Path) -> None:
    make, says = REFUSED[name]
    (tmp_path / "there").mkdir()
    path = make(tmp_path / "there")
    with pytest.raises(SteerError, match=says) as caught:
        LM.load(path, device="cpu")
    assert "\n" not in str(caught.value)
    assert not cache.exists() or not folders(cache)


def test_an_architecture_that_transformers_lacks_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "zebra")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(SteerError, match=r"x.gguf: transformers cannot read it \(.*zebra.*safetensors"):
        LM.load(tmp_path / "x.gguf")


def test_a_full_disk_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "a.gguf")
    usage: Any = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    with pytest.raises(SteerError, match=r"unpacked it takes 0\.\d GB.*WEIGHTSTEER_CACHE"):
        LM.load(path)


def test_a_config_is_read_without_unpacking(tmp_path: Path, cache: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf")
    assert locate_config(str(path)) == {"pretrained_model_name_or_path": str(tmp_path), "gguf_file": "a.gguf"}
    assert model_type_of(str(path)) == "qwen2"
    assert not cache.exists()


def test_lost_scaling_is_warned_of(tmp_path: Path) -> None:
    def scale(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", np.ones(8, dtype=np.float32))

    with pytest.warns(UserWarning, match="scaling of positions .* not carried over"):
        unpacked(write_gguf(tmp_path / "a.gguf", scale=scale))
