"""YAML read so that it means one thing and stays as small as its file."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from .errors import SteerError, first_line
from .schema import shown

DEEPEST = 20


def parse_yaml(text: str, where: str, *, what: str, most_values: int, texts_only: bool = False) -> Any:
    """A YAML document's value; None of an empty one.

    Args:
        what: what the file is, for messages.
        most_values: how many values it may have, once its aliases are written out.
        texts_only: every value is the text that stands there, so that an answer `No` is not a truth value; what is
            empty, `null` or `~` without quotation marks is None.

    Raises:
        SteerError: no YAML, a field that stands twice, or aliases that multiply or that hold themselves.
    """
    try:
        loader = _TextLoader(text) if texts_only else yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _Nodes(where, what, most_values).check(node)
        return loader.construct_document(node)
    except SteerError:
        raise
    except yaml.YAMLError as error:
        raise SteerError(f"{where}: not YAML ({' '.join(str(error).split())})") from None
    except RecursionError:
        raise SteerError(f"{where}: nested too deeply for {what}") from None
    except Exception as error:  # PyYAML's makers of dates, sets and numbers raise what comes
        raise SteerError(f"{where}: not YAML ({type(error).__name__}: {first_line(error)})") from None


class _TextLoader(yaml.BaseLoader):
    """Reads every plain value as a text, and knows of null alone."""


_TextLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"(?:~|null|Null|NULL|)\Z"), ["~", "n", "N", ""])
_TextLoader.add_constructor("tag:yaml.org,2002:null", lambda _loader, _node: None)


@dataclass
class _Nodes:
    """The nodes of a file, whose aliases are not yet written out."""

    where: str
    what: str
    most_values: int
    sizes: dict[int, int] = field(default_factory=dict)  # a node -> how many values it is, written out
    open: set[int] = field(default_factory=set)

    def check(self, node: yaml.Node, depth: int = 0) -> int:
        """How many values the node is, with every alias written out."""
        if id(node) in self.open:
            raise self._wrong(node, "an alias holds itself")
        if depth > DEEPEST:
            raise self._wrong(node, f"nested too deeply for {self.what}")
        if id(node) not in self.sizes:
            self.open.add(id(node))
            self.sizes[id(node)] = 1 + sum(self.check(inner, depth + 1) for inner in self._inside(node))
            self.open.remove(id(node))
        if self.sizes[id(node)] > self.most_values:
            raise self._wrong(node, f"it is more than {self.most_values} values, once its aliases are written out")
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
        return SteerError(f"{self.where}, line {node.start_mark.line + 1}: {reason}")
