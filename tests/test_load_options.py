"""How models are loaded: quantised bases, attention, devices; what cannot be, in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import TEMPLATE, random_vector
from weightsteer.behavior import ContrastPair, Example
from weightsteer.checkpoints.load_options import LoadOptions, Quantize
from weightsteer.errors import SteerError
from weightsteer.evaluation.packed_check import refuse_unsteered_pack
from weightsteer.evaluation.results import read_rows
from weightsteer.lm import LM
from weightsteer.progress import Progress, silent
from weightsteer.run_card import RunCard
from weightsteer.run_folder import RunFolder
from weightsteer.runs.pipeline import Run
from weightsteer.runs.recipe import Recipe
from weightsteer.runs.tiny_model import byte_tokenizer
from weightsteer.training import TrainSettings, train_side, train_vector
from weightsteer.vectors.difference import task_vector
from weightsteer.vectors.packed import unpacked

IDS = torch.tensor([[1, 70, 80, 90, 100, 2]])


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint whose hidden size is a whole number of nf4's blocks of 64."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.1,
    )
    folder = tmp_path_factory.mktemp("wide") / "base"
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer(TEMPLATE).save_pretrained(folder)
    return folder


@contextmanager
def mute(label: str) -> Iterator[Progress]:
    yield silent


def quantised(folder: Path, how: Quantize) -> LM:
    return LM.load(folder, device="cpu", options=LoadOptions(quantize=how))


@torch.no_grad()
def logits(lm: LM) -> Tensor:
    found: Tensor = lm.model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_sides_over_a_quantised_base_make_a_vector_for_it(
    how: Quantize, wide: Path, pairs: list[ContrastPair], quick: TrainSettings, tmp_path: Path
) -> None:
    lm = quantised(wide, how)
    before = logits(lm)
    vector = train_vector(lm, pairs, out=tmp_path / "run", settings=replace(quick, gradient_checkpointing=True))
    assert torch.equal(logits(lm), before)  # training leaves the base as it was
    card = RunCard.load(tmp_path / "run" / "positive")
    assert card.settings["quantize"] == vector.card.settings["quantize"] == how
    assert card.measured["load"] == {"quantize": how}
    assert card.base_revision == LM.load(wide).revision  # the dense base takes the vector too
    assert card.measured["base_norm"] > 0
    with vector.applied(lm, 0.0):
        assert torch.equal(logits(lm), before)
    with vector.applied(lm, 1.0):
        assert not torch.allclose(logits(lm), before, atol=1e-3)
    assert torch.equal(logits(lm), before)


def test_the_hook_on_nf4_computes_the_dense_sum(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # on a CPU that can, bitsandbytes multiplies in bfloat16, which is 1e-2 away from the sum in float32
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    lm, dense = quantised(wide, "nf4"), LM.load(wide, device="cpu")
    vector = random_vector(dense)
    twins = dict(dense.model.named_modules())
    with torch.no_grad():
        for name, layer in lm.model.named_modules():
            if isinstance(layer, nn.Linear) and (weight := unpacked(layer)) is not None:
                twins[name].weight.copy_(weight + vector.deltas[f"{name}.weight"].dense())  # type: ignore[operator]
    with vector.applied(lm, 1.0):
        torch.testing.assert_close(logits(lm), logits(dense), rtol=0, atol=2e-5)


def test_a_quantised_base_is_believed_after_a_check(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vector = random_vector(LM.load(wide, device="cpu"))
    for how in ("nf4", "int8"):
        refuse_unsteered_pack(quantised(wide, how), vector)  # type: ignore[arg-type]
    lm = quantised(wide, "nf4")
    layer = lm.model.model.layers[0].mlp.down_proj
    monkeypatch.setattr(type(layer), "__call__", lambda self, x: 2 * nn.Module.__call__(self, x), raising=False)
    with pytest.raises(SteerError, match="q_proj.weight: at k = 1 the quantised layer moves otherwise"):
        refuse_unsteered_pack(lm, vector)


def test_a_side_over_a_quantised_base_is_another_fine_tune(
    wide: Path, pairs: list[ContrastPair], quick: TrainSettings, tmp_path: Path
) -> None:
    examples = [Example(p.prompt, p.positive) for p in pairs]
    made = train_side(quantised(wide, "nf4"), examples, tmp_path / "side", settings=quick)
    with pytest.raises(SteerError, match="made otherwise .*quantize: nf4 there, None asked"):
        train_side(LM.load(wide, device="cpu"), examples, tmp_path / "side", settings=quick)
    with pytest.raises(SteerError, match="adapter, and it cannot be merged into a base in nf4; load the base base so"):
        LM.load(made, device="cpu", options=LoadOptions(quantize="nf4"))
    with pytest.raises(SteerError, match="kind bias: trains weights of the model itself.*use kind lora"):
        train_side(quantised(wide, "nf4"), examples, tmp_path / "bias", settings=replace(quick, kind="bias"))
    assert task_vector(made).norm() > 0


def test_what_is_not_installed_or_not_possible_is_one_line(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SteerError, match="flash_attention_2: needs the package flash-attn.*use attention sdpa"):
        LM.load(wide, options=LoadOptions(attention="flash_attention_2"))
    with pytest.raises(SteerError, match="device 'cpu': is one device, and device_map spreads the model"):
        LM.load(wide, device="cpu", options=LoadOptions(device_map="auto"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SteerError, match=r"needs bitsandbytes.*pip install 'weightsteer\[quantized\]'"):
        LM.load(wide, options=LoadOptions(quantize="nf4"))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"quantize": "fp4"}, "quantize: expected one of nf4, int8, found 'fp4'"),
        ({"attention": "flash"}, "attention: expected one of sdpa, flash_attention_2, eager"),
        ({"max_memory": {"gpu": "20GiB"}}, "max_memory: expected the number of a GPU, cpu or mps, found 'gpu'"),
        ({"max_memory": {0: "much"}}, "max_memory: 0: expected a size such as 20GiB, found 'much'"),
        ({"device_map": "spread"}, "device_map: expected one of auto, balanced"),
    ],
)
def test_an_option_of_another_kind_is_refused(fields: dict[str, object], expected: str) -> None:
    with pytest.raises(SteerError, match=expected):
        LoadOptions(**fields)  # type: ignore[arg-type]


def test_options_as_they_are_typed() -> None:
    found = LoadOptions.of_texts("int8", "eager", "0=20GiB,cpu=1.5GB", '{"": "cpu"}', "continuous")
    assert found == LoadOptions("int8", "eager", {0: "20GiB", "cpu": "1.5GB"}, {"": "cpu"}, "continuous")
    assert found.described["max_memory"] == {"0": "20GiB", "cpu": "1.5GB"}
    assert LoadOptions().described == {}
    with pytest.raises(SteerError, match="--max-memory: expected DEVICE=SIZE"):
        LoadOptions.of_texts(None, None, "20GiB", None, None)


def test_a_spread_model_and_another_attention_compute_the_same(wide: Path) -> None:
    plain = LM.load(wide, device="cpu")
    spread = LM.load(wide, options=LoadOptions(device_map={"": "cpu"}, attention="eager"))
    assert spread.model.config._attn_implementation == "eager"
    torch.testing.assert_close(logits(spread), logits(plain), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_a_recipe_over_a_quantised_base_goes_to_its_report(how: Quantize, wide: Path, tmp_path: Path) -> None:
    """Both sides by QLoRA, w, two strengths of it, samples, costs, the page; a second call makes nothing anew."""
    recipe = Recipe.model_validate(
        {
            "name": "packed",
            "model": str(wide),
            "device": "cpu",
            "load": {"quantize": how},
            "data": {"pairs": "sycophancy", "limit": 8},
            "train": {"rank": 2, "learning_rates": [1e-2], "batch_size": 4, "evaluations": 2, "warmup_steps": 1},
            "tasks": [{"task": task, "limit": 2} for task in ("preference", "false_beliefs", "facts", "prose")],
            "sweep": {
                "methods": {"contrastive": [-1.0, 1.0], "tau+": None, "activation": None},
                "activation_pairs": 4,
                "search_items": 1,
            },
            "budget": {"facts/accuracy": 1.0, "prose/nll": 1.0},
            "samples": {"count": 1, "max_new_tokens": 4},
        }
    )
    page = Run(recipe, tmp_path / "run", show=mute).run()
    made = RunFolder(tmp_path / "run")
    assert page.exists()
    assert RunCard.load(made.finetune("positive")).measured["load"] == {"quantize": how}
    assert RunCard.load(made.vector).settings["quantize"] == how
    rows = read_rows(made.rows)
    assert {row.k for row in rows if row.method == "contrastive"} == {-1.0, 1.0}
    assert any(row.change and row.value for row in rows if row.method == "contrastive")
    before = {path: path.stat().st_mtime_ns for path in made.path.rglob("*.safetensors")}
    assert before
    Run(recipe, tmp_path / "run", show=mute).run()
    assert {path: path.stat().st_mtime_ns for path in before} == before
