"""The house keeps its plan: imports in one direction, lazy names, and documents that run."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import weightsteer
from weightsteer.cli import app

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "weightsteer"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_imports_keep_their_direction() -> None:
    """The contract in pyproject.toml."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_package_and_module_is_in_the_architecture_page() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    for path in SOURCE.rglob("*.py"):
        name = path.relative_to(SOURCE).as_posix()
        assert path.stem.startswith("__") or f"`{name}`" in page, f"{name} is not in docs/architecture.md"


def test_public_names_load_and_none_shares_a_rooms_name() -> None:
    for name in weightsteer.__all__:
        value = getattr(weightsteer, name)
        assert inspect.getdoc(value), name
        assert name not in {path.stem for path in SOURCE.rglob("*.py")}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        weightsteer.nothing  # noqa: B018
    with pytest.raises(AttributeError, match="contrast_vector is called subtract_finetunes now"):
        weightsteer.contrast_vector  # noqa: B018


def blocks(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_python_in_the_documents_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the tiny model, with its vector at the place that the documents name."""
    from conftest import random_vector, tiny_lm
    from weightsteer.evaluation import dial
    from weightsteer.lm import LM

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LM, "load", classmethod(lambda cls, *a, **o: tiny_lm()))
    for name, value in {"TEXTS": 1, "PROMPTS": 2, "NEW_TOKENS": 4}.items():
        monkeypatch.setattr(dial, name, value)  # a smaller calibration
    random_vector(tiny_lm()).save("runs/sycophancy-demo/vector")
    for seed, name in enumerate(("gloomy", "cheerful"), start=4):
        random_vector(tiny_lm(), seed=seed).save(f"runs/{name}/vector")
    space: dict[str, object] = {}
    for block in blocks(path):
        exec(compile(block, str(path), "exec"), space)


def test_generated_pages_are_those_of_the_code() -> None:
    import sys

    sys.path.insert(0, str(ROOT / "docs"))
    from generate import cli_page, methods_page
    from recipe_page import recipe_page, without_meaning

    assert (ROOT / "docs" / "cli.md").read_text() == cli_page(), "run `make docs`"
    assert (ROOT / "docs" / "methods.md").read_text() == methods_page(), "run `make docs`"
    assert (ROOT / "docs" / "recipe.md").read_text() == recipe_page(), "run `make docs`"
    assert not without_meaning(), "fields of a recipe without a comment that explains them"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_in_the_documents_exist(path: Path) -> None:
    """Every `weightsteer VERB --option` of a shell block is one that the command line takes."""
    for block in re.findall(r"```(?:sh|bash|console)\n(.*?)```", path.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words[:1] == ["weightsteer"]:
                assert_is_a_command(words[1:], line)


def assert_is_a_command(words: list[str], line: str) -> None:
    command = typer.main.get_command(app)
    while words and (inner := getattr(command, "commands", {}).get(words[0])):
        command, words = inner, words[1:]
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    used = {word.partition("=")[0] for word in words if word.startswith("-") and not re.match(r"-\d", word)}
    program = {"--help", "-h", "--quiet", "-q"}
    assert not hasattr(command, "commands") or used <= {"--version", *program}, line
    assert used <= {*known, *program}, line


SCRIPTS = [path for folder in ("benchmarks", "scripts", "recipes") for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_scripts_import_only_what_there_is(path: Path) -> None:
    """A script that nobody runs for weeks still finds each name of ours that it imports."""
    for line in ast.walk(ast.parse(path.read_text())):
        if isinstance(line, ast.ImportFrom) and (line.module or "").partition(".")[0] == "weightsteer":
            module = importlib.import_module(line.module or "")
            for name in line.names:
                found = hasattr(module, name.name) or importlib.util.find_spec(f"{line.module}.{name.name}")
                assert found, f"{line.module}.{name.name}"
