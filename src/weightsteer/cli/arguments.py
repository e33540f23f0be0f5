"""What may not be given twice: options of a command line, and names in a list."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import typer

from ..errors import SteerError


def refuse_repeated(app: typer.Typer, arguments: Sequence[str]) -> None:
    """Raise for an option that is given twice and takes one value, of which click would silently take the last."""
    command: Any = typer.main.get_command(app)
    words = list(arguments)
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    options = {name: parameter for parameter in command.params for name in parameter.opts if name.startswith("-")}
    seen: set[str] = set()
    while words and (word := words.pop(0)) != "--":
        name = word.partition("=")[0] if word.startswith("--") else word[:2]
        option = options.get(name)
        if option is None:
            continue
        if option.name in seen and not option.multiple:
            raise SteerError(f"{name}: is given twice; give it once")
        seen.add(option.name)
        if word == name and not option.is_flag:
            words = words[1:]  # its value


def refuse_twice(what: str, names: Iterable[str]) -> None:
    """Raise for a name that comes twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise SteerError(f"{what}: {name!r} is given twice; give it once")
        seen.add(name)
