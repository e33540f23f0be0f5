"""Saved vectors by name: NAME=FOLDER, or a folder that goes by its own name."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from .adapter_files import ADAPTER_CONFIG
from .errors import SteerError
from .places import expanded
from .run_card import CARD_FILE
from .schema import shown
from .strength_names import is_name


def name_of(folder: Path) -> str:
    """What people call a vector: its folder, and of a run's `vector` the run's folder."""
    place = folder.absolute()
    return place.parent.name if place.name == "vector" else place.name


def named_folders(arguments: Iterable[str]) -> dict[str, Path]:
    """Name -> folder of vectors that a user named, each as FOLDER or NAME=FOLDER.

    Raises:
        SteerError: no such folder, a name that cannot stand in `syc@-0.72`, or a name that comes twice.
    """
    found: dict[str, Path] = {}
    for argument in arguments:
        given, equals, rest = argument.partition("=")
        named = bool(equals) and is_name(given) and not Path(argument).exists()
        folder = expanded(rest if named else argument)
        if not is_vector(folder):
            raise SteerError(f"{folder}: no saved vector is there; expected its folder, or NAME=FOLDER")
        name = given if named else name_of(folder)
        if not is_name(name):
            raise SteerError(
                f"{folder}: its name, {shown(name)}, cannot stand in syc@-0.72 (letters, digits, and _ . - after the "
                "first); name it, as NAME=FOLDER"
            )
        if name in found:
            raise SteerError(f"{name}: is the name of two vectors; name one of them otherwise, as NAME=FOLDER")
        found[name] = folder.absolute()
    return found


def vectors_within(folder: Path) -> dict[str, Path]:
    """Name -> folder of the vectors that lie in a folder, as themselves or as the `vector` of a run."""
    inner = [path for path in sorted(folder.iterdir()) if path.is_dir()] if folder.is_dir() else []
    places = [place for path in inner for place in (path, path / "vector") if is_vector(place)]
    return {name_of(place): place.absolute() for place in reversed(places) if is_name(name_of(place))}


def is_vector(folder: Path) -> bool:
    """Whether a folder looks like a saved vector, or like an adapter."""
    return (folder / ADAPTER_CONFIG).is_file() or (folder / CARD_FILE).is_file()
