"""A recipe's YAML: texts, finite numbers, lists and mappings, and nothing else that YAML has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import SteerError
from ..schema import read_limited, refuse_unusual
from ..yaml_file import parse_yaml

MOST_BYTES = 1 << 18  # the largest recipe of ours has 3 kB
MOST_VALUES = 20_000  # once aliases are written out


def read_recipe_fields(path: Path) -> dict[str, Any]:
    """The fields of a recipe's file.

    Raises:
        SteerError: it cannot be read, is no YAML mapping, has a field twice, or has aliases that multiply or that hold
            themselves.
    """
    try:
        text = read_limited(path, MOST_BYTES)
    except OSError as error:
        raise SteerError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    fields = parse_yaml(text, str(path), what="a recipe", most_values=MOST_VALUES)
    if not isinstance(fields, dict):
        raise SteerError(f"{path}: expected a mapping of fields such as 'name' and 'tasks'")
    refuse_unusual(fields, str(path))
    return fields
