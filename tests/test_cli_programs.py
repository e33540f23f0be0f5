"""The command line for programs and for hands: JSON, quiet, short help, completion, lists, and what `show` takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import random_vector, tiny_lm
from test_cli import run, saved  # noqa: F401
from weightsteer import shown
from weightsteer.behavior import SHIPPED
from weightsteer.cli.overview import first_sentence
from weightsteer.lm import LM
from weightsteer.run_card import RunCard
from weightsteer.runs.shipped_recipes import find_recipe, shipped_recipes

ROOT = Path(__file__).parents[1]


def test_steer_as_json_is_what_it_prints(capsys: pytest.CaptureFixture[str], saved: Path) -> None:  # noqa: F811
    steer = ("steer", saved, "Hello?", "--k=-9,0", "--max-new-tokens", 4, "--device", "cpu")
    code, out, err = run(capsys, *steer, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [reply["k"] for reply in found["replies"]] == [-9.0, 0.0]
    assert found["replies"][1]["reply"] == tiny_lm().generate(["Hello?"], max_new_tokens=4)[0]
    assert "k = -9 lies outside the range that was tested, -4 to 4" in err
    code, _, err = run(capsys, *steer, "--quiet")
    assert (code, err) == (0, "")
    assert not run(capsys, "steer", saved, "Hi", "--k=1", "--device", "cpu", "-q", "--sample", "--max-new-tokens", 3)[2]
    assert shown.is_quiet()
    run(capsys, "--version")


def test_one_strength_is_streamed_and_sampling_has_a_seed(
    capsys: pytest.CaptureFixture[str],
    saved: Path,  # noqa: F811
) -> None:
    one = ("steer", saved, "Hello?", "--k=1", "--max-new-tokens", 6, "--device", "cpu")
    sampled = [run(capsys, *one, "--temperature", 2, "--seed", seed)[:2] for seed in (1, 1, 2)]
    assert [code for code, _ in sampled] == [0, 0, 0]
    assert sampled[0] == sampled[1] != sampled[2]
    assert run(capsys, *one)[:2] == run(capsys, *one)[:2] != sampled[0]


def test_what_programs_read_is_json(capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path) -> None:  # noqa: F811
    code, out, err = run(capsys, "show", saved, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["card"]["strength"]["recommended"] == 2.0
    assert sum(found["geometry"]["by_layer"].values()) == pytest.approx(1.0)
    code, out, _ = run(capsys, "cosine", saved, saved, "--json", "-o", tmp_path / "c")
    assert json.loads(out)["cosines"][0] == pytest.approx([1.0, 1.0])
    code, out, _ = run(capsys, "lint", "--pairs", "gloomy", "--json")
    assert json.loads(out)["positive"] == json.loads(out)["negative"] > 0
    items = tmp_path / "facts.jsonl"
    items.write_text(json.dumps({"question": "What?", "correct": "a number", "incorrect": "none"}) + "\n")
    measure = ("measure", saved, "--task", "facts", "--data", items, "--k=2", "--device", "cpu", "--json")
    code, out, err = run(capsys, *measure)
    assert code == 0, err
    assert {row["metric"] for row in json.loads(out)} == {"accuracy", "margin"}
    code, out, _ = run(capsys, "list", "--json")
    assert set(json.loads(out)["behaviors"]) == set(SHIPPED)


def test_json_has_no_nan_and_nothing_that_acts_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    shown.say_json({"a": float("nan"), "b": ["\x1b[31m\x85\u202e"]})
    out = capsys.readouterr().out
    assert out.isascii()
    assert json.loads(out) == {"a": None, "b": ["\x1b[31m\x85\u202e"]}


def test_show_takes_runs_and_fine_tunes(capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path) -> None:
    lm = LM.load(checkpoint, device="cpu")
    one = random_vector(lm)
    one.save(tmp_path / "run" / "vector")
    code, out, err = run(capsys, "show", tmp_path / "run")
    assert code == 0, err
    assert "not measured" in out
    assert "next      weightsteer show" in out
    code, out, _ = run(capsys, "show", tmp_path / "run", "--json")
    assert json.loads(out)["vector"] == str(tmp_path / "run" / "vector")
    measured = {"validation_loss": {"0.001": 1.5}, "base_validation_loss": 3.0, "learning_rate": 1e-3, "steps": 7}
    tuned = tmp_path / "tuned"
    one.save(tuned)
    RunCard("finetune", base_model=str(checkpoint), base_revision=lm.revision, measured=measured).save(tuned)
    code, out, err = run(capsys, "show", tuned)
    assert code == 0, err
    assert "trained   7 steps, the best point kept: validation loss 3.000 -> 1.500" in out
    assert "energy by layer" in out


def test_layers_are_in_the_order_of_their_numbers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    random_vector(tiny_lm(layers=12)).save(tmp_path / "w")
    _, out, _ = run(capsys, "show", tmp_path / "w")
    lines = out.partition("energy by layer\n")[2].splitlines()[:12]
    assert [int(line.split()[0]) for line in lines] == list(range(12))


def test_a_bare_command_shows_the_verbs_by_use(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys)
    assert (code, err) == (0, "")
    assert out.index("From start to end:") < out.index("Use a vector:") < out.index("  steer ")
    assert run(capsys, "-h")[1] == run(capsys, "--help")[1] == out
    assert "Example: weightsteer export peft" in run(capsys, "export", "peft", "-h")[1]
    assert first_sentence("Talk to it; `/k` turns: more.\n\nExample: x") == "Talk to it."


def test_python_m_and_completion() -> None:
    words = {"_WEIGHTSTEER_COMPLETE": "complete_bash", "COMP_WORDS": "weightsteer st", "COMP_CWORD": "1"}
    command = [sys.executable, "-m", "weightsteer"]
    done = subprocess.run(command, env={**os.environ, **words}, capture_output=True, text=True, check=True)
    assert sorted(done.stdout.split()) == ["steer", "study"]


def test_every_recipe_is_in_the_package_and_runs_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = {path.relative_to(ROOT / "recipes").with_suffix("").as_posix() for path in ROOT.glob("recipes/**/*.yaml")}
    assert set(shipped_recipes()) == ours - {"monitoring/bank", "monitoring/bank-qwen"}  # plans of a script
    monkeypatch.chdir(tmp_path)
    assert find_recipe(Path("demo")) == find_recipe(Path("recipes/demo.yaml")) == shipped_recipes()["demo"]
    (tmp_path / "demo").write_text("name: mine")
    assert find_recipe(Path("demo")) == Path("demo")
