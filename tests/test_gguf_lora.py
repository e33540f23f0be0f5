"""A LoRA for llama.cpp: the names and the order of its rows, compared with llama.cpp's converter where that is here.

`WEIGHTSTEER_LLAMA_CPP=FOLDER pytest tests/test_gguf_lora.py` compares; FOLDER is a copy of llama.cpp's sources.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize
from torch import Tensor, nn

from architectures import tiny
from conftest import random_vector, tiny_lm, tiny_model
from tiny_gguf import neighbours
from weightsteer import cli
from weightsteer.checkpoints.checkpoint import fingerprint
from weightsteer.errors import SteerError
from weightsteer.export.gguf_lora import DIALECTS, export_gguf_lora
from weightsteer.export.llama_cpp import config_of
from weightsteer.lm import LM
from weightsteer.run_card import RunCard
from weightsteer.vectors.low_rank import LowRank
from weightsteer.vectors.weight_vector import WeightVector
from xllama_server import packaged_gguf

COMPARED = ("llama", "mistral", "mixtral", "smollm3", "granite", "qwen2-tied", "qwen3", "qwen3-moe")
COMPARED += ("gemma", "gemma2", "gemma3", "gemma3-vision", "olmo2", "phi3")


def factors_on(model: nn.Module, rank: int = 3, seed: int = 0) -> WeightVector:
    """Random factors on every linear layer inside the blocks of the language model."""
    generator = torch.Generator().manual_seed(seed)
    deltas = {
        f"{name}.weight": LowRank(
            torch.randn(module.out_features, rank, generator=generator),
            torch.randn(rank, module.in_features, generator=generator),
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name and "vision" not in name
    }
    assert deltas
    return WeightVector(deltas, RunCard("vector", base_model="base"))


def read_back(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: np.array(tensor.data) for tensor in GGUFReader(path).tensors}


def product(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    """What llama.cpp adds to a tensor at scale 1."""
    return tensors[f"{name}.lora_b"].astype(np.float64) @ tensors[f"{name}.lora_a"].astype(np.float64)


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    sys.argv = ["weightsteer", *map(str, args)]
    with pytest.raises(SystemExit) as stop:
        cli.main()
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


CONVERT = """
import json, runpy, sys
script, jobs = sys.argv[1], json.loads(sys.argv[2])
for arguments in jobs:
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
"""


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What llama.cpp's converter makes of the adapters of all families, in one process, as it takes long to start."""
    sources = os.environ.get("WEIGHTSTEER_LLAMA_CPP")
    if not sources:
        pytest.skip("needs WEIGHTSTEER_LLAMA_CPP=FOLDER with llama.cpp's sources")
    folder, jobs = tmp_path_factory.mktemp("theirs"), []
    for family in COMPARED:
        model, here = tiny(family), folder / family
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(here / "base")
        factors_on(model).export_peft(here / "peft", k=1.5)
        options = ["--base", here / "base", "--outfile", here / "lora.gguf"]
        jobs.append([str(argument) for argument in (here / "peft", *options)])
    script = Path(sources).resolve() / "convert_lora_to_gguf.py"
    command = [sys.executable, "-c", CONVERT, str(script), json.dumps(jobs)]
    environment = {**os.environ, "PYTHONPATH": str(script.parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.parametrize("family", COMPARED)
def test_llama_cpps_own_converter_writes_the_same(family: str, theirs: Path, tmp_path: Path) -> None:
    """Tensor by tensor and bit by bit: names, shapes, order of rows, alpha, architecture."""
    model, their_file, our_file = tiny(family), theirs / family / "lora.gguf", tmp_path / "ours.gguf"
    export_gguf_lora(factors_on(model), our_file, config=model.config, k=1.5)
    expected, found = read_back(their_file), read_back(our_file)
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    for field in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"):
        assert GGUFReader(our_file).fields[field].contents() == GGUFReader(their_file).fields[field].contents()


def test_every_known_architecture_was_compared() -> None:
    assert {str(tiny(family).config.model_type) for family in COMPARED} | {"gemma3_text"} == set(DIALECTS)


def test_the_file_holds_k_w_with_the_rows_of_q_and_k_as_in_the_base(tmp_path: Path) -> None:
    """In numbers: the rows that llama.cpp's own base has for transformers' rows, and the scale in B alone."""
    model = tiny_model()
    vector, config = factors_on(model), model.config
    done = export_gguf_lora(vector, tmp_path / "w.gguf", config=config, k=-0.7)
    found, fields = read_back(done.path), GGUFReader(done.path).fields
    assert fields["adapter.lora.alpha"].contents() == done.rank == 3
    assert fields["weightsteer.k"].contents() == "-0.7"
    assert len(found) == 2 * len(vector.deltas)
    for name, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
        delta = vector.deltas[f"model.layers.1.self_attn.{name}_proj.weight"]
        expected = -0.7 * neighbours(delta.dense(), heads).double().numpy()
        np.testing.assert_allclose(product(found, f"blk.1.attn_{name}.weight"), expected, rtol=1e-5, atol=1e-6)
    delta = vector.deltas["model.layers.0.mlp.down_proj.weight"]
    np.testing.assert_array_equal(found["blk.0.ffn_down.weight.lora_a"], delta.A.numpy())
    np.testing.assert_allclose(found["blk.0.ffn_down.weight.lora_b"], -0.7 * delta.B.numpy(), rtol=1e-6)


@pytest.mark.embedded
def test_the_changed_rows_are_those_of_the_embedded_models_own_file(embedded: LM, tmp_path: Path) -> None:
    """q and k of the file that llama.cpp reads, plus B A of ours, are theta + w in its order of rows."""
    vector = factors_on(embedded.model)
    export_gguf_lora(vector, tmp_path / "w.gguf", config=embedded.model.config)
    found = read_back(tmp_path / "w.gguf")
    base = {tensor.name: tensor for tensor in GGUFReader(packaged_gguf()).tensors}
    parameters = dict(embedded.model.named_parameters())
    for name in ("q", "k", "v"):
        parameter, placed = f"model.layers.7.self_attn.{name}_proj.weight", f"blk.7.attn_{name}.weight"
        theirs = dequantize(base[placed].data, base[placed].tensor_type)
        ours = parameters[parameter].detach().cpu().float()
        order = [int((ours - torch.from_numpy(row)).abs().sum(1).argmin()) for row in theirs]
        assert (order == sorted(order)) == (name == "v")
        expected = (ours + vector.deltas[parameter].dense())[order].double().numpy()
        np.testing.assert_allclose(theirs + product(found, placed), expected, rtol=1e-4, atol=1e-4)


def test_ranks_that_differ_are_padded_and_their_scale_is_one(tmp_path: Path) -> None:
    model = tiny_model()
    few, many = factors_on(model, rank=2), factors_on(model, rank=5, seed=1)
    mixed = {name: (few if i % 2 else many).deltas[name] for i, name in enumerate(few.deltas)}
    mixed["model.layers.0.self_attn.v_proj.weight"] = LowRank(torch.zeros(16, 0), torch.zeros(0, 32))
    done = export_gguf_lora(WeightVector(mixed, few.card), tmp_path / "w.gguf", config=model.config)
    found = read_back(done.path)
    assert done.rank == GGUFReader(done.path).fields["adapter.lora.alpha"].contents() == 5
    assert "blk.0.attn_v.weight.lora_a" not in found
    assert {tensor.shape[0] for name, tensor in found.items() if name.endswith("lora_a")} == {5}
    assert {tensor.shape[1] for name, tensor in found.items() if name.endswith("lora_b")} == {5}
    for i in range(2):
        expected = mixed[f"model.layers.{i}.mlp.up_proj.weight"].dense().double().numpy()
        np.testing.assert_allclose(product(found, f"blk.{i}.ffn_up.weight"), expected, rtol=1e-4, atol=1e-4)


def test_an_untied_embedding_and_head_go_in_and_tied_ones_do_not(tmp_path: Path) -> None:
    """llama.cpp takes the factors of the embedding the other way round."""
    change: dict[str, LowRank | Tensor] = {
        "model.embed_tokens.weight": LowRank(torch.randn(259, 2), torch.randn(2, 32), "embedding"),
        "lm_head.weight": LowRank(torch.randn(259, 2), torch.randn(2, 32)),
    }
    vector = WeightVector(change, RunCard("vector", base_model="base"))
    found = read_back(export_gguf_lora(vector, tmp_path / "w.gguf", config=tiny_model(tied=False).config).path)
    assert {name: tensor.shape for name, tensor in found.items()} == {
        "token_embd.weight.lora_a": (259, 2),
        "token_embd.weight.lora_b": (32, 2),
        "output.weight.lora_a": (2, 32),
        "output.weight.lora_b": (259, 2),
    }
    embedded = found["token_embd.weight.lora_a"] @ found["token_embd.weight.lora_b"].T
    np.testing.assert_allclose(embedded, change["model.embed_tokens.weight"].dense().numpy(), rtol=1e-4, atol=1e-5)
    with pytest.raises(SteerError, match="one matrix for input embedding and head"):
        export_gguf_lora(vector, tmp_path / "tied.gguf", config=tiny_model().config)


def test_what_no_lora_can_hold_is_named_and_left_out_only_if_asked(tmp_path: Path) -> None:
    model = tiny_model()
    whole = {
        **factors_on(model).deltas,
        "model.layers.0.input_layernorm.weight": torch.ones(32),
        "model.layers.0.self_attn.o_proj.weight": torch.randn(32, 32),
    }
    vector = WeightVector(whole, RunCard("vector", base_model="base"))
    out = tmp_path / "w.gguf"
    with pytest.raises(
        SteerError, match=r"o_proj.weight: is dense.*1 more such.*--max-rank.*export merged.*--leave-out"
    ):
        export_gguf_lora(vector, out, config=model.config)
    assert not out.exists()
    done = export_gguf_lora(vector, out, config=model.config, max_rank=4, leave_out=True)
    assert done.left_out == ("model.layers.0.input_layernorm.weight",)
    assert 0 < done.error < 1
    assert "blk.0.attn_output.weight.lora_a" in read_back(out)
    with pytest.raises(SteerError, match="nothing of the vector can be written"):
        alone = WeightVector({"model.norm.weight": torch.ones(32)}, vector.card)
        export_gguf_lora(alone, out, config=model.config, leave_out=True)
    experts = WeightVector({"model.layers.0.mlp.experts.down_proj": torch.randn(4, 32, 48)}, vector.card)
    with pytest.raises(SteerError, match=r"mlp\.experts\.down_proj: .*export merged"):
        export_gguf_lora(experts, out, config=tiny("qwen3-moe").config)
    with pytest.raises(SteerError, match=r"at k = 1e\+38 \(lora_B\): holds NaN or infinite"):
        export_gguf_lora(factors_on(model) * 1e6, out, config=model.config, k=1e38)
    assert [path.name for path in tmp_path.iterdir()] == ["w.gguf"]


def test_an_unknown_architecture_names_the_converter(tmp_path: Path) -> None:
    model = tiny("gpt-neox")
    with pytest.raises(SteerError, match=r"gpt_neox: .*known: llama.*convert_lora_to_gguf\.py.*export peft"):
        export_gguf_lora(random_vector(tiny_lm()), tmp_path / "w.gguf", config=model.config)


def test_the_verb(capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path) -> None:
    card = RunCard("vector", base_model=str(checkpoint), base_revision=fingerprint(checkpoint))
    vector = WeightVector(random_vector(tiny_lm()).deltas, card)
    saved, out = vector.save(tmp_path / "syc"), tmp_path / "syc.gguf"
    code, said, err = run(capsys, "export", "gguf-lora", saved, "-o", out)
    assert code == 0, err
    assert "LoRA for llama.cpp at rank 3; its scale 1 is k = 1" in said
    again = read_back(export_gguf_lora(vector, tmp_path / "b.gguf", config=config_of(str(checkpoint))).path)
    assert all(np.array_equal(again[name], tensor) for name, tensor in read_back(out).items())
    code, said, err = run(capsys, "export", "gguf-lora", saved, "-o", out, "--max-rank", 1, "--k=-2")
    assert code == 0, err
    assert "at rank 1, " in said
    assert str(tmp_path).encode() not in out.read_bytes()
    (tmp_path / "mine.gguf").write_bytes(b"GGUF of somebody")
    code, _, err = run(capsys, "export", "gguf-lora", saved, "-o", tmp_path / "mine.gguf")
    assert code == 1
    assert "was not made by weightsteer" in err
    nameless = WeightVector(vector.deltas, RunCard("vector")).save(tmp_path / "nameless")
    code, _, err = run(capsys, "export", "gguf-lora", nameless, "-o", tmp_path / "x.gguf")
    assert code == 1
    assert "give one with --base" in err
