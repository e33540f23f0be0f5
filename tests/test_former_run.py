"""A vector and a run's folder of version 0.1, before names and places changed, are read as before."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from test_cli import run
from test_runs import mute
from weightsteer.errors import SteerError
from weightsteer.evaluation.compare import compare_at_loss
from weightsteer.evaluation.results import read_rows
from weightsteer.former_names import with_new_names
from weightsteer.run_card import RunCard
from weightsteer.run_folder import RunFolder
from weightsteer.runs.pipeline import Run
from weightsteer.runs.recipe import Recipe
from weightsteer.vectors.difference import subtract_finetunes
from weightsteer.vectors.weight_vector import WeightVector

KEPT = Path(__file__).parent / "data" / "former_run"
RUNS = sorted((Path(__file__).parents[1] / "docs" / "runs").glob("laptop-*"))


@pytest.fixture
def former(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A copy of the kept run; its recipe names its model by a relative path."""
    shutil.copytree(KEPT, tmp_path / "kept")
    monkeypatch.chdir(tmp_path / "kept")
    return RunFolder(Path("former"))


def test_the_vector_is_the_difference_of_its_two_sides(former: RunFolder) -> None:
    vector = WeightVector.load(former.vector)
    assert vector.card.strength is not None
    both = subtract_finetunes(former.finetune("positive"), former.finetune("negative"))
    assert (vector - both).norm() == 0.0
    assert vector.norm() > 0.0


def test_the_run_goes_on_and_measures_nothing_again(former: RunFolder) -> None:
    rows, strength = read_rows(former.rows), RunCard.load(former.vector).strength
    before = {path: path.read_bytes() for path in former.path.rglob("*") if path.suffix in (".safetensors", ".jsonl")}
    assert {"joint training", "negated task vector"} <= {row.method for row in rows}
    assert any(row.change for row in rows)
    page = Run(Recipe.load_kept(former.recipe), former.path, show=mute).run()
    assert page.exists()
    assert read_rows(former.rows) == rows
    assert RunCard.load(former.vector).strength == strength
    after = {path: path.read_bytes() for path in before}
    assert [path.name for path in before if before[path] != after[path]] == ["rows.jsonl"]  # changes are a field now
    assert not (former.path / "positive").exists()


def test_report_and_compare_take_the_folder(former: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "report", former.path)[0] == 0
    code, table, err = run(capsys, "compare", former.path, "--behavior", "preference/margin")
    assert code == 0, err
    assert "| joint training |" in table


def test_a_recipe_in_former_names_is_told_the_new_ones(former: RunFolder) -> None:
    kept = yaml.safe_load(former.recipe.read_text())
    told = []
    fields = dict(kept)
    for path in (("start",), ("drift",), ("sweep", "probe_items")):
        part = fields if len(path) == 1 else fields["sweep"]
        with pytest.raises(SteerError, match="is called") as error:
            Recipe.load(write(former, fields))
        told.append(str(error.value).split("is called ")[1].split(" now")[0])
        part.pop(path[-1], None)
    assert told == ["'first_finetune'", "'repair_target'", "'sweep.search_items'"]
    with pytest.raises(SteerError, match="'undo' is called 'negated task vector' now|'joint' is called"):
        Recipe.load(write(former, fields))


def write(folder: RunFolder, fields: dict[str, object]) -> Path:
    path = folder.path.with_name("mine.yaml")
    path.write_text(yaml.safe_dump(fields))
    return path


def test_new_names_are_left_as_they_are(former: RunFolder) -> None:
    fields = with_new_names(yaml.safe_load(former.recipe.read_text()))
    assert with_new_names(fields) == fields


@pytest.mark.parametrize("folder", RUNS, ids=lambda path: path.name)
def test_published_runs_are_read(folder: Path) -> None:
    run_folder = RunFolder(folder)
    recipe = Recipe.load_kept(run_folder.recipe)
    task, metric = recipe.plot[0].split("/")
    found = compare_at_loss([folder], (task, metric), draws=5)
    assert {row.method for row in found} - {"base"} <= {*recipe.sweep.methods, *recipe.sweep.variants}
    assert {row.method for row in read_rows(run_folder.costs)} <= {*recipe.sweep.methods, *recipe.sweep.variants}
