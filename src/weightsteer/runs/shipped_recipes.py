"""The recipes that come with the package, by name: `demo`, `laptop/evil`, `paper/sycophancy`."""

from __future__ import annotations

from importlib import resources
from itertools import takewhile
from pathlib import Path

from ..errors import SteerError
from ..schema import suggestion

FOLDER = "recipes"


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of every recipe that is installed."""
    root = Path(str(resources.files("weightsteer") / FOLDER))
    found = sorted((*root.glob("*.yaml"), *root.glob("*/*.yaml")))
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in found}


def find_recipe(name_or_path: Path) -> Path:
    """The file of a recipe: the user's own, or a shipped one by its name.

    Raises:
        SteerError: there is neither.
    """
    if name_or_path.exists():
        return name_or_path
    shipped = shipped_recipes()
    name = name_or_path.with_suffix("").as_posix().removeprefix(f"{FOLDER}/")
    if name in shipped:
        return shipped[name]
    raise SteerError(
        f"{name_or_path}: no such file and no shipped recipe (`weightsteer list recipes` names them)"
        f"{suggestion(name, shipped)}"
    )


def about(recipe: Path) -> str:
    """The first sentence of the comment at a recipe's head."""
    lines = recipe.read_text(encoding="utf-8").splitlines()
    head = takewhile(lambda line: line.startswith("#") and "weightsteer run" not in line, lines)
    words = " ".join(line.lstrip("# ") for line in head)
    return f"{words.partition('. ')[0].rstrip('.')}."
