"""Where on this machine the models lie that artifacts name: a private index, so that no artifact holds a path.

An artifact that people share names a local model by its folder's name and the hash of its weights. Which folder that is
stays in the user's cache, in one small file for each artifact and one for each hash.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import SteerError
from .files import write_text

HUB_CACHE = re.compile(r"models--(?P<owner>[^/]+?)--(?P<model>[^/]+)(?:/|$)")
INDEX = "places"
READ_BY_MODELS = ("prompts", "chat_template_kwargs")  # fields of recipes and cards


def cache_folder() -> Path:
    """Where what is made once for this machine lies: $WEIGHTSTEER_CACHE, else the platform's user cache.

    Raises:
        SteerError: there is no such variable, and no home.
    """
    if named := os.environ.get("WEIGHTSTEER_CACHE"):
        return Path(named)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "weightsteer"
    try:
        return Path.home() / ".cache" / "weightsteer"
    except RuntimeError:
        raise SteerError("this user has no home folder; name a folder for the cache in WEIGHTSTEER_CACHE") from None


def expanded(name: str | Path) -> Path:
    """A path with its `~` written out; one of a user who is not known stays as it is."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def is_private(name: str) -> bool:
    """Whether a name is a path that tells of the machine: an absolute one, or one from the user's home."""
    return name.startswith("~") or Path(name).is_absolute()


def public_name(name: str) -> str:
    """A name without the path before it: of a folder in the hub's cache the model's id, else the last part."""
    if not is_private(name):
        return name
    cached = HUB_CACHE.search(name)
    return f"{cached['owner']}/{cached['model']}" if cached else expanded(name).name


def without_paths(value: Any) -> Any:
    """A value of JSON's kinds in which every text that is a path, or has one between commas, has public names there.

    What a model reads is left alone: "/no_think" is no path.
    """
    if isinstance(value, str):
        return ",".join(map(public_name, value.split(",")))
    if isinstance(value, Mapping):
        return {key: item if key in READ_BY_MODELS else without_paths(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [without_paths(item) for item in value]
    return value


def shareable(path: Path) -> str:
    """A path as a shared page may name it: from the folder in which the command runs, or its last part alone."""
    if not is_private(str(path)):
        return str(path)
    place, here = expanded(path).resolve(), Path.cwd()
    return str(place.relative_to(here)) if place.is_relative_to(here) else place.name


def remember(key: str, text: str) -> None:
    """Keep a text of this machine, such as a path, under a hash; without a place to write it is lost."""
    if key and recall(key) != text:
        try:
            write_text(_file(key), text)
        except (OSError, SteerError):
            return


def recall(key: str) -> str | None:
    """What was kept under a hash; None if nothing was."""
    try:
        return _file(key).read_text(encoding="utf-8") if key else None
    except (OSError, UnicodeDecodeError, SteerError):
        return None


def _file(key: str) -> Path:
    return cache_folder() / INDEX / re.sub(r"[^0-9A-Za-z-]", "_", key)[:80]
