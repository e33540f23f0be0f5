"""The house keeps its plan: floors, lazy names, sizes, and documents that run."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import weightsteer

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "weightsteer"
FLOORS = {
    "errors": 0,
    "progress": 1,
    "records": 1,
    "names": 1,
    "workers": 1,
    "recipe_fields": 1,
    "endpoint": 2,
    "behavior": 2,
    "lowrank": 2,
    "tensorfile": 2,
    "rounding": 2,
    "cells": 2,
    "charts": 4,
    "lint": 3,
    "checkpoint": 3,
    "delta": 3,
    "embedded": 3,
    "matched": 3,
    "choose": 3,
    "trends": 3,
    "pages": 3,
    "report": 5,
    "adapter": 4,
    "apply": 4,
    "reshape": 4,
    "lineage": 4,
    "locate": 5,
    "vector": 5,
    "lm": 6,
    "extract": 6,
    "export": 6,
    "merge": 6,
    "similarity": 6,
    "geometry": 6,
    "expression": 6,
    "scoring": 7,
    "finetune": 7,
    "activations": 7,
    "fan": 7,
    "monitor": 7,
    "chat": 7,
    "judge": 8,
    "control": 8,
    "tasks": 9,
    "contrast": 9,
    "methods": 10,
    "sweep": 11,
    "cost": 11,
    "recipe": 12,
    "rehearse": 14,
    "precheck": 13,
    "workshop": 13,
    "lineup": 14,
    "road": 15,
    "cli": 16,
    "__init__": 16,
}


def rooms() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Rooms that a file imports, wherever in the file; imports for type checkers alone do not count."""
    tree = ast.parse(path.read_text())
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    inside = path.parent != SOURCE
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and node not in typing_only:
            if inside and node.level == 1:
                continue  # within the room
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", rooms(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_a_room_imports_lower_floors_only(path: Path) -> None:
    room = room_of(path)
    assert room in FLOORS, f"{room} has no floor: add it here and to docs/architecture.md"
    for other in imports_of(path) - {room}:
        assert FLOORS[other] < FLOORS[room], f"{room} (floor {FLOORS[room]}) imports {other} (floor {FLOORS[other]})"


def test_every_room_is_in_the_architecture_page() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    for path in rooms():
        assert f"`{room_of(path)}" in page, f"{room_of(path)} is not in docs/architecture.md"


def test_floors_in_the_page_are_the_floors_here() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    listed = {name: int(floor) for floor, name in re.findall(r"^\| (\d+) \| `(\w+)(?:\.py|/)`", page, re.MULTILINE)}
    assert listed == FLOORS


def test_files_stay_short() -> None:
    for path in rooms():
        lines = len(path.read_text().splitlines())
        assert lines <= 350, f"{path.name}: {lines} lines"


def test_public_names_load_and_none_shares_a_rooms_name() -> None:
    for name in weightsteer.__all__:
        value = getattr(weightsteer, name)
        assert inspect.getdoc(value), name
        assert name not in FLOORS
    with pytest.raises(AttributeError):
        weightsteer.nothing  # noqa: B018


def blocks(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_python_in_the_documents_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the tiny model, with its vector at the place that the documents name."""
    from conftest import random_vector, tiny_lm
    from weightsteer.lm import LM

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LM, "load", classmethod(lambda cls, *a, **o: tiny_lm()))
    random_vector(tiny_lm()).save("runs/sycophancy-demo/vector")
    random_vector(tiny_lm(), seed=4).save("runs/gloomy/vector")
    space: dict[str, object] = {}
    for block in blocks(path):
        exec(compile(block, str(path), "exec"), space)


def test_cli_page_is_the_help_text() -> None:
    import sys

    sys.path.insert(0, str(ROOT / "docs"))
    from make_cli import cli_page

    assert (ROOT / "docs" / "cli.md").read_text() == cli_page(), "run `make docs`"
