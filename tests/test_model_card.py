"""What a merged folder takes over from its base, and what it leaves behind."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from conftest import tiny_lm
from test_adapter_sources import adapter
from weightsteer.errors import SteerError
from weightsteer.export.merge import export_merged
from weightsteer.run_card import RunCard
from weightsteer.vectors.difference import task_vector
from weightsteer.vectors.weight_vector import WeightVector


@pytest.fixture
def base(tmp_path: Path) -> Path:
    lm = tiny_lm()
    lm.model.save_pretrained(tmp_path / "base")
    lm.tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def change(base: Path) -> WeightVector:
    size = AutoModelForCausalLM.from_pretrained(base).config.hidden_size
    return WeightVector({"model.norm.weight": torch.ones(size)}, RunCard("vector", base_model=str(base)))


def test_a_base_with_an_adapter_beside_it_is_refused_and_the_merge_without_it_loads(base: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(base)
    ours, theirs = (adapter(tmp_path / str(seed), model.__class__(model.config), seed, base) for seed in (1, 2))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(theirs / name, base)
    with pytest.raises(SteerError, match="holds an adapter .* beside the model"):
        export_merged(task_vector(ours, base=base), base, tmp_path / "merged", k=1.0)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (base / name).unlink()
    export_merged(task_vector(ours, base=base), base, tmp_path / "merged", k=1.0)
    assert not list((tmp_path / "merged").glob("adapter*"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def test_only_files_of_a_model_are_copied(base: Path, tmp_path: Path) -> None:
    kept = ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE", "chat_template.jinja"]
    left = ["modeling_tiny.py", "training_args.bin", "optimizer.pt", "notes.txt", "data.jsonl", "trainer_state.json"]
    for name in [*kept, *left]:
        if not (base / name).exists():
            (base / name).write_text("x")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "rag.jinja").write_text("x")
    (base / "additional_chat_templates" / "other.sh").write_text("x")
    export_merged(change(base), base, tmp_path / "merged", k=1.0)
    found = {path.relative_to(tmp_path / "merged").as_posix() for path in (tmp_path / "merged").rglob("*")}
    assert {*kept, "additional_chat_templates/rag.jinja"} <= found
    assert not found & {*left, "additional_chat_templates/other.sh"}


def test_links_are_followed_within_the_model_only(base: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("nobody's business")
    (base / "merges.txt").symlink_to(secret)
    with pytest.raises(SteerError, match=r"merges\.txt: is a link out of the model's folder"):
        export_merged(change(base), base, tmp_path / "merged", k=1.0)
    assert not (tmp_path / "merged").exists()
    (base / "merges.txt").unlink()
    (base / "vocab.txt").symlink_to(base / "tokenizer.json")
    export_merged(change(base), base, tmp_path / "merged", k=1.0)
    assert not (tmp_path / "merged" / "vocab.txt").is_symlink()


def test_a_snapshot_of_the_hub_cache_is_merged_through_its_links(base: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--owner--tiny"
    snapshot, blobs = cache / "snapshots" / "abc", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(base.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(os.path.relpath(blobs / str(number), snapshot))
    export_merged(change(base), snapshot, tmp_path / "merged", k=1.0)
    export_merged(change(base), base, tmp_path / "plain", k=1.0)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
