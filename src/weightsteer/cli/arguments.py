"""A command line before click reads it: what may not be given twice, and an expression that begins with a minus."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import typer

from ..errors import SteerError

EVERYWHERE = ("-h", "-q")  # short options that every verb has


def refuse_repeated(app: typer.Typer, arguments: Sequence[str]) -> None:
    """Raise for an option that is given twice and takes one value, of which click would silently take the last."""
    command: Any = typer.main.get_command(app)
    words = list(arguments)
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    options = _options_of(command)
    seen: set[str] = set()
    while words and (word := words.pop(0)) != "--":
        name = _option_in(word)
        option = options.get(name)
        if option is None:
            continue
        if option.name in seen and not option.multiple:
            raise SteerError(f"{name}: is given twice; give it once")
        seen.add(option.name)
        if word == name and not option.is_flag:
            words = words[1:]  # its value


def with_expression(app: typer.Typer, arguments: Sequence[str]) -> list[str]:
    """The arguments of `combine`, with a blank before an expression that begins with a minus, which is no option."""
    words = list(arguments)
    start = next((place for place, word in enumerate(words) if not word.startswith("-")), len(words))
    if words[start : start + 1] != ["combine"]:
        return words
    group: Any = typer.main.get_command(app)
    options = _options_of(group.commands["combine"])
    place = start + 1
    while place < len(words) and words[place].startswith("-"):
        word = words[place]
        name = _option_in(word)
        if name not in options and name not in EVERYWHERE and not word.startswith("--"):
            words[place] = f" {word}"
            break
        takes_value = name in options and not options[name].is_flag and word == name
        place += 2 if takes_value else 1
    return words


def _options_of(command: Any) -> dict[str, Any]:
    """A command's options by each of their names."""
    return {name: parameter for parameter in command.params for name in parameter.opts if name.startswith("-")}


def _option_in(word: str) -> str:
    """The option's name in a word, which may hold its value too: `--out=x`, `-ox`."""
    return word.partition("=")[0] if word.startswith("--") else word[:2]


def refuse_twice(what: str, names: Iterable[str]) -> None:
    """Raise for a name that comes twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise SteerError(f"{what}: {name!r} is given twice; give it once")
        seen.add(name)
