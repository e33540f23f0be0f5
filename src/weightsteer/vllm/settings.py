"""What the plugin is told by its environment: which vectors there are."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ..errors import SteerError
from ..named_folders import is_vector, named_folders, vectors_within
from ..places import cache_folder, expanded

VECTORS = "WEIGHTSTEER_VECTORS"  # FOLDER or NAME=FOLDER, separated by colons as in PATH; a folder may hold vectors
PLUGIN = "weightsteer"  # the name of the entry point, which VLLM_PLUGINS takes


def served_vectors(text: str) -> dict[str, Path]:
    """Name -> folder of every vector that $WEIGHTSTEER_VECTORS names, as they are on the disk now.

    A folder may be empty: a run writes its vectors there once they are trained.

    Raises:
        SteerError: an entry that holds no vector, or a name that comes twice.
    """
    single = []
    found: dict[str, Path] = {}
    for entry in filter(None, text.split(os.pathsep)):
        place = expanded(entry)
        if is_vector(place) or not place.is_dir():
            single.append(entry)
            continue
        for name, folder in vectors_within(place).items():
            if name in found:
                raise SteerError(f"{VECTORS}: {name} is the name of two vectors; name one of them, as NAME=FOLDER")
            found[name] = folder
    named = named_folders(single)
    if twice := sorted(named.keys() & found.keys()):
        raise SteerError(f"{VECTORS}: {twice[0]} is the name of two vectors; name one of them, as NAME=FOLDER")
    return {**found, **named}


def adapters_folder() -> Path:
    """Where the adapters lie that are made for engines."""
    return cache_folder() / "engines"


def environment(vectors: Mapping[str, Path]) -> str:
    """$WEIGHTSTEER_VECTORS for these vectors.

    Raises:
        SteerError: a folder whose path has the separator in it.
    """
    for folder in vectors.values():
        if os.pathsep in str(folder):
            raise SteerError(f"{folder}: has a {os.pathsep!r} in its path, which separates folders; move the vector")
    return os.pathsep.join(f"{name}={folder}" for name, folder in vectors.items())
