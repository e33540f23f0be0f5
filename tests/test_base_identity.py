"""Which two artifacts count as made on one base: content decides, names are hints, --base overrules."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import tiny_model
from test_adapter_sources import adapter, configure, llama
from weightsteer.checkpoints.checkpoint import fingerprint
from weightsteer.checkpoints.locate import base_of
from weightsteer.errors import SteerError
from weightsteer.run_card import RunCard
from weightsteer.vectors.base_identity import is_same_base
from weightsteer.vectors.difference import subtract_finetunes, task_vector
from weightsteer.vectors.weight_vector import WeightVector


def card(name: str, revision: str = "") -> RunCard:
    return RunCard("finetune", base_model=name, base_revision=revision)


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (card("Qwen/Qwen2.5-7B"), card("Qwen/Qwen2.5-7B"), True),
        (card("Qwen/Qwen2.5-7B"), card("qwen/qwen2.5-7b/"), True),
        (card("Qwen/Qwen2.5-7B-Instruct"), card("unsloth/qwen2.5-7b-instruct-unsloth-bnb-4bit"), True),
        (card("Qwen/Qwen2.5-7B-Instruct"), card("unsloth/Qwen2.5-7B-Instruct"), True),
        (card("Qwen/Qwen2.5-7B-Instruct"), card("Qwen/Qwen2.5-7B-Instruct-AWQ"), True),
        (card("Qwen/Qwen2.5-7B"), card("Qwen/Qwen2.5-7B-Instruct"), False),
        (card("Qwen/Qwen2.5-7B"), card("somebody/Qwen2.5-7B"), False),
        (card("/a/models--Qwen--Qwen2.5-7B/snapshots/abc"), card("Qwen/Qwen2.5-7B"), True),
        (card("/nowhere/base"), card("/nowhere/base/"), True),
        (card("/nowhere/base"), card("/nowhere/other"), False),
        (card("a/b", "a" * 40), card("c/d", "a" * 40), True),
        (card("a/b", "a" * 40), card("a/b", "b" * 40), False),
        (card("a/b", "a" * 64), card("a/b", "b" * 64), False),
        (card("a/b", "a" * 40), card("a/b", "b" * 64), True),  # a commit and a hash cannot be compared
        (card("a/b"), card("", "a" * 64), True),
        (card("smollm2-135m-instruct", "a" * 64), card("HuggingFaceTB/SmolLM2-135M-Instruct", "b" * 40), True),
        (card("smollm2-135m-instruct"), card("somebody/SmolLM2-135M-Instruct"), False),
        (card("/srv/models/Qwen2.5-7B"), card("Qwen/Qwen2.5-7B"), True),  # another machine's folder
        (card("/srv/models/Qwen2.5-7B"), card("/home/me/Qwen2.5-7B/"), True),
        (card("/srv/models/Qwen2.5-7B", "a" * 64), card("/home/me/Qwen2.5-7B", "b" * 64), False),
        (card("Qwen2.5-7B"), card("Qwen/Qwen2.5-7B"), True),
    ],
)
def test_names_are_hints_and_hashes_decide(first: RunCard, second: RunCard, same: bool) -> None:
    assert is_same_base(first, second) is same
    assert is_same_base(second, first) is same


def test_a_copy_of_the_base_under_another_path_is_the_same_base(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    shutil.copytree(tmp_path / "base", tmp_path / "copy")
    assert is_same_base(card(str(tmp_path / "base")), card(str(tmp_path / "copy")))
    assert is_same_base(card(str(tmp_path / "base")), card("moved/elsewhere", fingerprint(tmp_path / "copy")))


def test_a_folder_here_is_what_is_named_like_it_unless_weights_tell_them_apart(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "Tiny-1B")
    here = card(str(tmp_path / "Tiny-1B"))
    assert is_same_base(here, card("owner/tiny-1b"))
    assert is_same_base(card("/gone/models/Tiny-1B"), here)
    assert not is_same_base(here, card("owner/Tiny-2B"))
    tiny_model(seed=1).save_pretrained(tmp_path / "other" / "Tiny-1B")
    assert not is_same_base(here, card(str(tmp_path / "other" / "Tiny-1B")))
    assert not is_same_base(here, card("owner/tiny-1b", "c" * 64))


def test_a_branch_is_no_revision_and_base_overrules_names(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    sides = [adapter(tmp_path / str(seed), llama(), seed, tmp_path / "base") for seed in (1, 2)]
    branch = configure(sides[0], tmp_path / "branch", revision="main")
    assert subtract_finetunes(sides[0], branch).norm() == 0.0
    other = configure(sides[1], tmp_path / "other", base_model_name_or_path="owner/other")
    with pytest.raises(SteerError, match=r"different bases: .*say so with --base"):
        subtract_finetunes(sides[0], other)
    w = subtract_finetunes(sides[0], other, base=tmp_path / "base")
    assert w.card.base_model == str(tmp_path / "base")
    assert w.card.base_revision == fingerprint(tmp_path / "base")
    assert (subtract_finetunes(*sides) - w).norm() == 0.0
    with pytest.raises(SteerError, match="different bases"):
        task_vector(sides[0]).cosine(task_vector(other))
    assert task_vector(sides[0], base=tmp_path / "base").cosine(task_vector(other, base=tmp_path / "base")) < 1.0


def test_base_overrules_the_card_of_a_saved_vector(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    vector = task_vector(adapter(tmp_path / "adapter", llama(), 1, tmp_path / "base"))
    replace(vector, card=replace(vector.card, base_model="owner/other", base_revision="")).save(tmp_path / "vector")
    assert json.loads((tmp_path / "vector" / "weightsteer.json").read_text())["base_model"] == "owner/other"
    assert task_vector(tmp_path / "vector", base=tmp_path / "base").cosine(vector) == pytest.approx(1.0)


def test_a_base_that_an_adapter_names_by_its_path_is_known_by_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for run, seed in (("x", 0), ("y", 1)):  # two models, each in a folder called "final"
        tiny_model(seed=seed).save_pretrained(tmp_path / run / "final")
        for number in (1, 2):
            adapter(tmp_path / run / str(number), tiny_model(seed=seed), number, tmp_path / run / "final")
        subtract_finetunes(tmp_path / run / "1", tmp_path / run / "2").save(tmp_path / run / "w")
    mine, other = (WeightVector.load(tmp_path / run / "w") for run in ("x", "y"))
    assert mine.card.base_model == "final"
    assert mine.card.base_revision == fingerprint(tmp_path / "x" / "final")
    monkeypatch.chdir(tmp_path / "y")  # where "final" is the other one
    assert base_of(mine.card) == str(tmp_path / "x" / "final")
    with pytest.raises(SteerError, match="different bases"):
        mine + other


def test_a_folder_that_is_known_by_its_name_alone_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model().save_pretrained(tmp_path / "final")
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="final: .*by its name alone"):
        assert base_of(RunCard("vector", base_model="final")) == "final"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an adapter from elsewhere means what PEFT would load
        assert base_of(card("final")) == "final"


def test_another_base_than_the_one_that_was_trained_on_is_told_of(tmp_path: Path) -> None:
    for seed in (0, 1):
        tiny_model(seed=seed).save_pretrained(tmp_path / str(seed))
    trained = adapter(tmp_path / "adapter", tiny_model(), 1, tmp_path / "0")
    task_vector(trained).save(tmp_path / "w")
    with pytest.warns(UserWarning, match="1: is not the base that was trained on"):
        task_vector(tmp_path / "w", base=tmp_path / "1")


def test_a_damaged_folder_of_the_base_s_name_stops_no_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "final").mkdir()
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (tmp_path / "final" / "model.safetensors.index.json").write_text(json.dumps(index))
    sides = [adapter(tmp_path / str(seed), tiny_model(), seed, Path("final")) for seed in (1, 2)]
    assert subtract_finetunes(*sides).card.base_revision == ""
