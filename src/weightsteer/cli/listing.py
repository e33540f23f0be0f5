"""`weightsteer list`: the names that other verbs and recipes take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from ..errors import SteerError
from ..schema import suggestion
from ..shown import one_line, say, say_json
from .options import Json


def _behaviors() -> dict[str, str]:
    from ..behavior import SHIPPED, Behavior
    from ..example_files.load import load_pairs

    return {name: f"{len(load_pairs(name))} pairs. {Behavior.load(name).description}" for name in SHIPPED}


def _tasks() -> dict[str, str]:
    from ..evaluation.tasks import TASKS

    return {name: ", ".join(metric.title for metric in kind.metrics) for name, kind in TASKS.items()}


def _methods() -> dict[str, str]:
    from ..steering.methods import METHODS

    return {name: method.summary for name, method in METHODS.items()}


def _recipes() -> dict[str, str]:
    from ..runs.shipped_recipes import about, shipped_recipes

    return {name: about(path) for name, path in shipped_recipes().items()}


KINDS: Mapping[str, tuple[str, Callable[[], dict[str, str]]]] = {  # what is listed -> where its names are taken
    "behaviors": ("for --pairs, and the field `behavior` of a recipe", _behaviors),
    "tasks": ("for `measure --task`, and the field `tasks` of a recipe", _tasks),
    "methods": ("for the field `sweep.methods` of a recipe", _methods),
    "recipes": ("for `weightsteer run`", _recipes),
}


def list_names(
    kind: Annotated[
        str | None,
        typer.Argument(help=f"{', '.join(KINDS)}; default: all.", autocompletion=lambda: list(KINDS)),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the names that are known: behaviors, tasks, methods or recipes.

    Example: weightsteer list behaviors
    """
    if kind is not None and kind not in KINDS:
        raise SteerError(f"{kind}: expected one of {', '.join(KINDS)}{suggestion(kind, KINDS)}")
    found = {name: KINDS[name][1]() for name in ([kind] if kind else KINDS)}
    if as_json:
        say_json(found)
        return
    for name, entries in found.items():
        if kind is None:
            say(f"{name}, {KINDS[name][0]}")
        width = max((len(entry) for entry in entries), default=0)
        for entry, about in entries.items():
            say(f"{'  ' if kind is None else ''}{entry:<{width}}  {one_line(about)}".rstrip())


NAMES: Mapping[Any, str] = {list_names: "list"}  # verbs that are called otherwise than their functions
