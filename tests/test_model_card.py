"""What a merged folder takes over from its base, and what the cards beside weights say."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, PeftModel
from peft.helpers import rescale_adapter_scale
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from conftest import random_vector, tiny_lm
from test_adapter_sources import adapter
from weightsteer.checkpoints.locate import base_of
from weightsteer.errors import SteerError
from weightsteer.export.merge import export_merged
from weightsteer.run_card import RunCard, StrengthRange
from weightsteer.vectors.difference import task_vector
from weightsteer.vectors.vector_folder import save_card
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


def front_matter(folder: Path) -> tuple[dict[str, object], str]:
    head, _, body = (folder / "README.md").read_text().removeprefix("---\n").partition("\n---\n")
    fields = yaml.safe_load(head)
    assert isinstance(fields, dict)
    return fields, body


def test_a_saved_vector_says_what_it_is_and_keeps_its_hub_id(base: Path, tmp_path: Path) -> None:
    lm = tiny_lm()
    card = RunCard.now("vector", base_model="owner/tiny", settings={"rank": 2, "learning_rates": [1e-3]}, seed=4)
    w = WeightVector(random_vector(lm).deltas, card)
    w.save(tmp_path / "w")
    fields, body = front_matter(tmp_path / "w")
    assert fields["base_model"] == "owner/tiny"
    assert fields["library_name"] == "peft"
    assert "lora" in fields["tags"]  # type: ignore[operator]
    assert "| learning rates | 0.001 |" in body
    assert "weightsteer steer . " in body
    assert 'LM.load("owner/tiny")' in body
    assert "AutoPeftModelForCausalLM" in body
    w.export_peft(tmp_path / "candid", k=-3.0)
    assert "steered at k = -3" in front_matter(tmp_path / "candid")[1]
    save_card(w.card.with_strength(StrengthRange(2.0, -1.5, -4.0, 4.0)), tmp_path / "w")
    assert "2 for more, -1.5 for less" in front_matter(tmp_path / "w")[1]
    dense = WeightVector({"model.norm.weight": torch.ones(32)}, card).save(tmp_path / "dense")
    assert front_matter(dense)[0]["library_name"] == "weightsteer"


def test_other_tools_get_the_hub_id_of_the_embedded_model_and_we_still_know_it(tmp_path: Path) -> None:
    card = RunCard("vector", base_model="smollm2-135m-instruct", base_revision="f" * 64)
    WeightVector(random_vector(tiny_lm()).deltas, card).save(tmp_path / "w")
    config = json.loads((tmp_path / "w" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert front_matter(tmp_path / "w")[0]["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert base_of(RunCard.load(tmp_path / "w")) == "smollm2-135m-instruct"


def test_auto_peft_opens_what_is_saved(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(base.parent)
    w = WeightVector(random_vector(tiny_lm()).deltas, RunCard("vector", base_model="base"))
    w.export_peft(tmp_path / "x", k=0.5)
    theirs, lm, ids = AutoPeftModelForCausalLM.from_pretrained("x"), tiny_lm(), torch.tensor([[4, 5, 6]])
    with torch.no_grad(), w.applied(lm, 0.5):
        torch.testing.assert_close(theirs(ids).logits, lm.model(ids).logits, atol=1e-5, rtol=1e-5)


def test_peft_rescales_a_saved_vector_as_its_readme_says(base: Path, tmp_path: Path) -> None:
    w = WeightVector(random_vector(tiny_lm()).deltas, RunCard("vector", base_model="base"))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), w.save(tmp_path / "w"))
    lm, ids = tiny_lm(), torch.tensor([[4, 5, 6]])
    with torch.no_grad(), w.applied(lm, -0.7), rescale_adapter_scale(theirs, -0.7):
        torch.testing.assert_close(theirs(ids).logits, lm.model(ids).logits, atol=1e-5, rtol=1e-5)


def test_a_vector_that_peft_would_load_by_half_does_not_say_how(base: Path, tmp_path: Path) -> None:
    whole = random_vector(tiny_lm())
    mixed = WeightVector({**whole.deltas, "model.norm.weight": torch.ones(16)}, whole.card)
    for vector, by_peft in ((whole, True), (mixed, False)):
        vector.save(tmp_path / str(by_peft))
        fields, body = front_matter(tmp_path / str(by_peft))
        assert ("PeftModel" in body) is by_peft
        assert fields["library_name"] == ("peft" if by_peft else "weightsteer")
