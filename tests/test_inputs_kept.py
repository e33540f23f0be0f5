"""No verb writes over what it reads: an output that is an input, or a folder around one, is refused before work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from conftest import tiny_lm
from test_cli import run
from weightsteer.cli import app, export
from weightsteer.errors import SteerError
from weightsteer.training import train_vector

READ_ONLY = {
    "report",
    "sweep",
    "compare",
    "measure",
    "lint",
    "show",
    "identify",
    "study",
    "steer",
    "chat",
    "calibrate",
    "list_names",
    "play",
    "serve",
    "serve_command",
}  # or they write a run's own folder
NO_INPUT = {"generate", "init"}
KEPT = ("is an input too; choose another output", "holds an input", "exists, and a pack replaces nothing")

# A place X, and in it: data p.jsonl, n.jsonl, pairs.jsonl, trait.json, recipe.yaml; folders v, w, base, run.
COMMANDS = {
    "sample": ["sample X/trait.json -o X", "sample gloomy --positive X/p.jsonl --negative X/n.jsonl -o X"],
    "train": [
        "train --pairs X/pairs.jsonl -o X",
        "train --pairs X/pairs.jsonl -o X/pairs.jsonl",
        "train --positive X/p.jsonl --negative X/n.jsonl -o X",
        "train --pairs gloomy -m X/base -o X/base",
        "train --pairs gloomy -m X/base -o X",
    ],
    "make": ["make X/pairs.jsonl -o X", "make X/pairs.jsonl -o X/pairs.jsonl", "make X/trait.json -o X"],
    "subtract": [
        "subtract X/v X/w -o X/v",
        "subtract X/v X/w -o X/w",
        "subtract X/v X/w -o X",
        "subtract X/v X/w --base X/base -o X/base",
    ],
    "combine": ["combine a+b a=X/v b=X/w -o X/w", "combine a a=X/v -o X", "combine a a=X/v --base X/base -o X/base"],
    "cosine": ["cosine X/v.csv X/w -o X/v"],
    "monitor": [
        "monitor X/run --vectors X/v -o X",
        "monitor X/run --vectors X/v -o X/run",
        "monitor X/run --vectors X/v --controls X/w -o X/w",
    ],
    "screen": ["screen X/p.jsonl --dictionary X/v -o X/p.jsonl", "screen X/p.jsonl --dictionary X/v -o X/v"],
    "export peft": ["export peft X/v -o X/v --k=1", "export peft X/v --negative X/w -o X --k=1"],
    "export adapters": ["export adapters X/v -o X/v --k=1", "export adapters X/v -o X --k=1"],
    "export gguf_lora": ["export gguf-lora X/v --base X/base -o X/v", "export gguf-lora X/v --base X/base -o X"],
    "push": ["push X/v X/v --no-samples", "push X/v X --no-samples"],
    "pull": ["pull X/v -o X/v", "pull X/v -o X"],
    "export merged": ["export merged X/v -m X/base -o X/base --k=1", "export merged X/v -o X --k=1"],
    "export gguf": ["export gguf X/v -o X/v --k=1", "export gguf X/v -m X/base -o X --k=1"],
    "run": ["run X/recipe.yaml -o X", "run X/recipe.yaml --dry-run -o X/base", "run X/tasks.yaml -o X/run"],
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    place = tmp_path / "X"
    for folder in ("v", "v.csv", "w", "base", "run"):
        (place / folder).mkdir(parents=True)
        (place / folder / "mine.txt").write_text("mine")
    (place / "run" / "held.jsonl").write_text('{"question": "Q?", "correct": "A.", "incorrect": "B."}\n')
    for name, row in (
        ("p", {"prompt": "Q?", "answer": "Yes."}),
        ("n", {"prompt": "Q?", "answer": "No."}),
        ("pairs", {"prompt": "Q?", "positive": "Yes.", "negative": "No."}),
    ):
        (place / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    trait = {"instruction": [{"pos": "Shout!", "neg": "Whisper."}], "questions": ["Why?"]}
    (place / "trait.json").write_text(json.dumps(trait))
    recipe = {"name": "r", "model": str(place / "base"), "tasks": [{"task": "prose"}]}
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    held = {**recipe, "tasks": [{"task": "facts", "data": str(place / "run" / "held.jsonl")}]}
    (place / "tasks.yaml").write_text(yaml.safe_dump(held))
    return place


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_verb_is_known_here() -> None:
    verbs = {command.callback.__name__ for command in app.registered_commands if command.callback}
    exports = {f"export {command.callback.__name__}" for command in export.app.registered_commands if command.callback}
    assert verbs | exports == {*COMMANDS, *READ_ONLY, *NO_INPUT}


@pytest.mark.parametrize("command", [command for commands in COMMANDS.values() for command in commands])
def test_inputs_are_never_outputs(place: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = content(place.parent)
    code, _, err = run(capsys, *command.replace("X", str(place)).split())
    assert (code, err.count("\n")) == (1, 1), err
    assert any(said in err for said in KEPT), err
    assert content(place.parent) == before


def test_python_keeps_them_too(place: Path) -> None:
    with pytest.raises(SteerError, match="holds an input"):
        train_vector(tiny_lm(), place / "pairs.jsonl", out=place)


def test_sides_of_another_origin_are_not_replaced(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = ("--positive", place / "p.jsonl", "--negative", place / "n.jsonl", "-o", place.parent / "d")
    assert run(capsys, "sample", "gloomy", *own)[0] == 0
    assert run(capsys, "sample", "gloomy", *own)[0] == 0  # the same again
    (place.parent / "d" / "negative.jsonl").write_text('{"prompt": "mine", "answer": "mine"}\n')
    before = content(place.parent)
    code, _, err = run(capsys, "sample", "gloomy", *own)
    assert code == 1
    assert "negative.jsonl: exists and holds other examples" in err
    assert content(place.parent) == before


def test_a_run_goes_on_from_the_recipe_that_it_has_kept(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The kept recipe may lie in the run's folder; what fails here is the model, which is none."""
    (place.parent / "out").mkdir()
    (place / "recipe.yaml").rename(place.parent / "out" / "recipe.yaml")
    code, _, err = run(capsys, "run", place.parent / "out" / "recipe.yaml", "-o", place.parent / "out")
    assert code == 1
    assert "input" not in err
