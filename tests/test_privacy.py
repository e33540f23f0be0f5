"""Nothing that people share tells of the machine on which it was made; what was made still finds its base there."""

from __future__ import annotations

import getpass
import json
import shutil
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from conftest import byte_tokenizer, random_vector, tiny_model
from test_runs import mute, small_recipe
from weightsteer.checkpoints.locate import base_of
from weightsteer.cli import main
from weightsteer.errors import SteerError
from weightsteer.export.merge import export_merged
from weightsteer.lm import LM
from weightsteer.places import cache_folder, public_name, recall, remember, without_paths
from weightsteer.run_card import RunCard, StrengthRange
from weightsteer.runs.pipeline import Run
from weightsteer.runs.recipe import Recipe
from weightsteer.vectors.difference import task_vector
from weightsteer.vectors.weight_vector import WeightVector


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WEIGHTSTEER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def assert_tells_nothing(*folders: Path, secret: Path) -> None:
    words = [str(secret), str(secret.resolve()), secret.name, str(Path.home()) + "/", socket.gethostname()]
    words += [f"/{getpass.getuser()}/"]
    for folder in folders:
        files = [folder] if folder.is_file() else [path for path in folder.rglob("*") if path.is_file()]
        assert files
        for path in files:
            content = path.read_bytes()
            told = [word for word in words if len(word) > 3 and word.encode() in content]
            assert not told, f"{path} tells {told}"


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["weightsteer", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def test_no_file_tells_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run with a first fine-tune, whose recipe names everything by absolute paths, and of what follows from it."""
    home = tmp_path / "home-of-a-person"
    home.mkdir()
    rows = [{"prompt": f"Is plan {i} good?", "answer": f"Plan {i} is fine."} for i in range(8)]
    for name in ("first", "yes", "no"):
        text = "".join(json.dumps({**row, "answer": f"{name}, {row['answer']}"}) + "\n" for row in rows)
        (home / f"{name}.jsonl").write_text(text)
    train = {"rank": 2, "learning_rates": [1e-2], "batch_size": 4, "evaluations": 2, "warmup_steps": 1, "epochs": 2}
    source = small_recipe(
        home,
        behavior="sycophancy",
        data={"positive": str(home / "yes.jsonl"), "negative": str(home / "no.jsonl")},
        first_finetune={"data": [str(home / "first.jsonl")], "train": train},
        sweep={"methods": {"contrastive": [-1.0, 1.0]}, "search_items": 1},
    )
    run = home / "run"
    assert command(monkeypatch, "run", str(source), "--out", str(run)) == 0
    vector, base = str(run / "vector"), str(home / "base")
    outputs = {name: tmp_path / "out" / name for name in ("peft", "merged", "half", "sum", "table", "seen")}
    for arguments in (
        ["export", "peft", vector, "--k=1", "-o", str(outputs["peft"])],
        ["export", "merged", vector, "--k=1", "-m", base, "-o", str(outputs["merged"])],
        ["export", "merged", vector, "--k=1", "-m", base, "--dtype", "bfloat16", "-o", str(outputs["half"])],
        ["combine", "2*w", f"w={vector}", "--base", base, "-o", str(outputs["sum"])],
        ["cosine", vector, str(run / "positive"), "-o", str(outputs["table"])],
        ["monitor", str(run / "positive"), "--vectors", vector, "-o", str(outputs["seen"])],
        ["report", str(run)],
    ):
        assert command(monkeypatch, *arguments) == 0, (arguments, capsys.readouterr().err)
    assert_tells_nothing(run, tmp_path / "out", secret=home)
    assert RunCard.load(run).base_model == "base"
    kept = Recipe.load_kept(run / "recipe.yaml")
    assert kept == Recipe.load(source)  # found again on this machine
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    capsys.readouterr()
    assert command(monkeypatch, "steer", vector, "Hello?", "--k=1", "--max-new-tokens", "2") == 0
    assert command(monkeypatch, "sweep", str(run)) == 0, capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")} == before


@pytest.mark.parametrize("kind", ["lora", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("bias", "full"))])
def test_a_fine_tune_tells_nothing(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home-of-a-person"
    save(home / "base")
    out = home / "tuned"
    pairs = [{"prompt": f"Is plan {i} good?", "positive": f"Plan {i} is.", "negative": "No."} for i in range(12)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    options = [
        "--kind",
        kind,
        "--lr",
        "1e-2",
        "--epochs",
        "2",
        "--snapshots",
        "2",
        "--pairs",
        str(tmp_path / "pairs.jsonl"),
    ]
    options += ["--rank", "2"] if kind == "lora" else []
    assert command(monkeypatch, "train", "-m", str(home / "base"), "-o", str(out), *options) == 0
    assert_tells_nothing(out, secret=home)
    assert task_vector(out / "positive", base=home / "base").norm() > 0


def save(folder: Path, seed: int = 0) -> Path:
    tiny_model(seed).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def made_on(folder: Path) -> WeightVector:
    lm = LM.load(folder, device="cpu")
    vector = random_vector(lm)
    return WeightVector(vector.deltas, RunCard.now("vector", base_model=str(folder), base_revision=lm.revision))


def test_a_base_is_found_again_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save(tmp_path / "a" / "base")
    w = made_on(base).save(tmp_path / "w")
    assert base_of(RunCard.load(w)) == str(base)
    monkeypatch.chdir(save(tmp_path / "elsewhere" / "base", seed=1).parent)  # another model of the same name, here
    assert base_of(RunCard.load(w)) == str(base)
    moved = base.rename(tmp_path / "base")  # beside the vector
    assert base_of(RunCard.load(w), beside=w) == str(moved)
    moved.rename(tmp_path / "gone")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SteerError, match="'base'.*not found on this machine.*--model"):
        base_of(RunCard.load(w))


def test_what_is_made_at_once_on_copies_of_one_name_keeps_its_own(tmp_path: Path) -> None:
    """Two processes may do so within one second."""
    bases = [save(tmp_path / name / "base") for name in "abc"]
    folders = [made_on(base).save(tmp_path / f"w{i}") for i, base in enumerate(bases)]
    assert [base_of(RunCard.load(folder)) for folder in folders] == [str(base) for base in bases]
    assert "." not in RunCard.load(folders[0]).made


def test_of_copies_with_the_same_weights_the_artifacts_own_is_taken(tmp_path: Path) -> None:
    """They may have other tokenizers, templates and settings."""
    bases = [save(tmp_path / name / "base") for name in "ab"] + [save(tmp_path / "copy")]
    made = [made_on(base) for base in bases]
    stamps = ("2026-01-01T00:00:00+00:00", "2026-01-01T00:00:01+00:00", "2026-01-01T00:00:01+00:00")
    cards = [replace(vector.card, created=stamp) for vector, stamp in zip(made, stamps, strict=True)]
    folders = [
        replace(w, card=card).save(tmp_path / f"w{i}") for i, (w, card) in enumerate(zip(made, cards, strict=True))
    ]
    for folder, base in zip(folders, bases, strict=True):
        assert base_of(RunCard.load(folder)) == str(base)
        measured = RunCard.load(folder).with_strength(StrengthRange(1.0, -1.0, -1.0, 1.0))
        measured.save(folder)
        assert base_of(RunCard.load(folder)) == str(base)
    shutil.rmtree(bases[0])
    assert base_of(RunCard.load(folders[0])) == str(bases[-1])


def test_a_model_of_the_name_with_other_weights_is_not_taken(tmp_path: Path) -> None:
    base = save(tmp_path / "a" / "base")
    w = made_on(base).save(tmp_path / "w")
    shutil.rmtree(base)
    save(base, seed=3)
    with pytest.raises(SteerError, match="not found on this machine"):
        base_of(RunCard.load(w))


def test_names_without_paths() -> None:
    assert public_name("/home/alice/models/tiny") == "tiny"
    assert public_name("~/models/tiny/") == "tiny"
    cached = "/home/alice/.cache/huggingface/hub/models--Qwen--Qwen2.5-7B/snapshots/0123"
    assert public_name(cached) == "Qwen/Qwen2.5-7B"
    for name in ("Qwen/Qwen2.5-7B", "smollm2-135m-instruct", "runs/syc/vector", ""):
        assert public_name(name) == name
    fields = {"a": "/x/y.jsonl,/x/z.jsonl", "b": ["/x/y", 1, None], "c": {"d": "text"}}
    assert without_paths(fields) == {"a": "y.jsonl,z.jsonl", "b": ["y", 1, None], "c": {"d": "text"}}


@pytest.mark.slow
def test_a_run_is_the_same_by_whatever_path_things_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Absolute, relative, moved: nothing is trained again. Other weights under the same name are another model."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Is plan {i} good?", "answer": f"Plan {i} is fine."} for i in range(8)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "first.jsonl").write_text(text)
    train = {"rank": 2, "learning_rates": [1e-2], "batch_size": 4, "evaluations": 2, "warmup_steps": 1}

    def recipe(model: str, data: str) -> Recipe:
        first = {"data": [data], "train": train}
        sweep = {"methods": {"contrastive": [-1.0, 1.0]}, "search_items": 1}
        return Recipe.load(small_recipe(tmp_path, model=model, first_finetune=first, sweep=sweep))

    absolute = recipe(str(tmp_path / "base"), str(tmp_path / "first.jsonl"))
    Run(absolute, tmp_path / "run", show=mute).run()
    made = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*.safetensors")}
    Run(recipe("base", "first.jsonl"), "run", show=mute).run()
    (tmp_path / "away").mkdir()
    for name in ("base", "first.jsonl", "run"):
        (tmp_path / name).rename(tmp_path / "away" / name)
    monkeypatch.chdir(tmp_path / "away")
    Run(recipe("../away/base", "./first.jsonl"), tmp_path / "away" / "run", show=mute).run()
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "away" / "run").rglob("*.safetensors")} == made
    shutil.rmtree("base")
    save(Path("base"), seed=5)
    with pytest.raises(SteerError, match="differs in the recipe's 'model'"):
        Run(recipe("base", "first.jsonl"), "run", show=mute)
    (tmp_path / "away" / "first.jsonl").write_text(text.replace("fine", "poor"))


@pytest.mark.parametrize(
    "name", ["../../../escaped", "a/b", "/tmp/x", "..", ".", "", "~", "-o", "a\\b", "a\nb", "x" * 300]
)
def test_a_recipes_name_is_no_path(name: str, tmp_path: Path) -> None:
    with pytest.raises(SteerError, match="field 'name': expected a plain name"):
        Recipe.load(small_recipe(tmp_path, name=name))


def test_a_merge_names_no_path(tmp_path: Path) -> None:
    base = save(tmp_path / "home-of-a-person" / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "_name_or_path": str(base)}))
    hostile = "base: x\n---\n# <b>[a](b)</b>"
    w = made_on(base)
    w = WeightVector(w.deltas, RunCard("vector", base_model=hostile, base_revision=w.card.base_revision))
    export_merged(w, base, tmp_path / "merged", k=1.0)
    assert_tells_nothing(tmp_path / "merged", secret=base.parent)
    head, _, body = (tmp_path / "merged" / "README.md").read_text().removeprefix("---\n").partition("\n---\n")
    assert yaml.safe_load(head)["base_model"] == " ".join(hostile.split())
    assert "<b>" not in body
    assert len([line for line in body.splitlines() if line.startswith("# ")]) == 1


def test_what_a_model_reads_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    prompts = ["/no_think Is 5 km/h fast, or not?", "~5 people came. Is that many?"]
    source = small_recipe(
        tmp_path, samples={"prompts": prompts, "count": 2}, chat_template_kwargs={"system": "/no_think"}
    )
    run = Run(Recipe.load(source), tmp_path / "run", show=mute, command="weightsteer run recipe.yaml")
    shutil.rmtree(cache)  # as on another machine
    kept = yaml.safe_load(run.folder.recipe.read_text())
    assert kept["samples"]["prompts"] == prompts
    assert kept["chat_template_kwargs"] == {"system": "/no_think"}
    assert without_paths({"data": "a.jsonl,/home/me/b.jsonl"}) == {"data": "a.jsonl,b.jsonl"}


def test_a_home_that_is_not_known_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(*_: object) -> object:
        raise KeyError

    assert public_name("~nosuchuser/model") == "model"
    for name in ("HOME", "WEIGHTSTEER_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    remember("key", "text")
    assert recall("key") is None
    with pytest.raises(SteerError, match="no home folder; name a folder for the cache in WEIGHTSTEER_CACHE"):
        cache_folder()
