"""A recipe's YAML: read so that it means one thing and stays as small as its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..errors import SteerError, first_line
from ..schema import read_limited, refuse_unusual, shown

MOST_BYTES = 1 << 18  # the largest recipe of ours has 3 kB
MOST_VALUES = 20_000  # once aliases are written out
DEEPEST = 20


def read_recipe_fields(path: Path) -> dict[str, Any]:
    """The fields of a recipe's file: texts, finite numbers, lists and mappings, and nothing else that YAML has.

    Raises:
        SteerError: it cannot be read, is no YAML mapping, has a field twice, or has aliases that multiply or that hold
            themselves.
    """
    try:
        text = read_limited(path, MOST_BYTES)
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is not None:
            _Nodes(path).check(node)
        fields = None if node is None else loader.construct_document(node)
    except SteerError:
        raise
    except OSError as error:
        raise SteerError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except yaml.YAMLError as error:
        raise SteerError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    except RecursionError:
        raise SteerError(f"{path}: nested too deeply for a recipe") from None
    except Exception as error:  # PyYAML's makers of dates, sets and numbers raise what comes
        raise SteerError(f"{path}: not YAML ({type(error).__name__}: {first_line(error)})") from None
    if not isinstance(fields, dict):
        raise SteerError(f"{path}: expected a mapping of fields such as 'name' and 'tasks'")
    refuse_unusual(fields, str(path))
    return fields


class _Nodes:
    """The nodes of a file, whose aliases are not yet written out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sizes: dict[int, int] = {}  # a node -> how many values it is, written out
        self.open: set[int] = set()

    def check(self, node: yaml.Node, depth: int = 0) -> int:
        """How many values the node is, with every alias written out."""
        if id(node) in self.open:
            raise self._wrong(node, "an alias holds itself")
        if depth > DEEPEST:
            raise self._wrong(node, "nested too deeply for a recipe")
        if id(node) not in self.sizes:
            self.open.add(id(node))
            self.sizes[id(node)] = 1 + sum(self.check(inner, depth + 1) for inner in self._inside(node))
            self.open.remove(id(node))
        if self.sizes[id(node)] > MOST_VALUES:
            raise self._wrong(node, f"it is more than {MOST_VALUES} values, once its aliases are written out")
        return self.sizes[id(node)]

    def _inside(self, node: yaml.Node) -> list[yaml.Node]:
        if isinstance(node, yaml.SequenceNode):
            return list(node.value)
        if not isinstance(node, yaml.MappingNode):
            return []
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise self._wrong(node, f"field {shown(twice)} stands twice; keep one of them")
        return [part for pair in node.value for part in pair]

    def _wrong(self, node: yaml.Node, reason: str) -> SteerError:
        return SteerError(f"{self.path}, line {node.start_mark.line + 1}: {reason}")
