"""Patterns of module names, as PEFT's configs have them, that end in a bounded time."""

from __future__ import annotations

import importlib
import re
from collections.abc import Collection
from typing import Any

MOST_WAYS = 1_000_000  # in which a pattern is tried on one name
LONGEST = 2_000  # characters
NAME_LENGTH = 64  # how often a part without bound may repeat, for the count of ways


def compile_pattern(text: str, *, anywhere: bool) -> re.Pattern[str] | None:
    """A pattern of module names; None where to try it on a name could take very long.

    Python's `re` goes back over what it matched: (a+)+$ takes time that doubles with each letter.

    Args:
        anywhere: the pattern may begin at any part of a name (PEFT's alpha_pattern), else it is of the whole name.

    Raises:
        re.error: it is no pattern.
    """
    whole = rf"(.*\.)?({text})$" if anywhere else rf"(?:{text})\Z"
    if len(text) > LONGEST:
        return None
    try:
        compiled = re.compile(whole)
    except (OverflowError, RecursionError) as error:
        raise re.error(str(error)) from None
    parser: Any = importlib.import_module("re._parser")
    return compiled if _ways(parser.parse(whole)) <= MOST_WAYS * (NAME_LENGTH if anywhere else 1) else None


def _ways(pattern: Any) -> int:
    """At most in how many ways a parsed pattern is tried: sequences multiply, branches add up."""
    ways = 1
    for operation, argument in pattern:
        name = str(operation)
        if name == "BRANCH":
            ways *= sum(map(_ways, argument[1]))
        elif name == "SUBPATTERN":
            ways *= _ways(argument[-1])
        elif name.endswith("REPEAT"):
            low, high, inner = argument
            ways *= _repeated(_ways(inner), int(low), int(high))
        elif name in ("ASSERT", "ASSERT_NOT"):
            ways *= _ways(argument[1])
        elif name not in ("LITERAL", "NOT_LITERAL", "ANY", "IN", "AT"):
            return MOST_WAYS * MOST_WAYS  # references back and what else there may be
        ways = min(ways, MOST_WAYS * MOST_WAYS)
    return ways


def _repeated(inner: int, low: int, high: int) -> int:
    times = min(high, NAME_LENGTH)
    if inner == 1:
        return max(times - low, 0) + 1
    return MOST_WAYS * MOST_WAYS if times > 8 else inner**times


def is_named(module: str, names: Collection[str]) -> bool:
    """Whether a list of targets means a module: by its whole name, or by its last parts."""
    return any(module == name or module.endswith(f".{name}") for name in names)


def is_end_of(module: str, names: Collection[str]) -> bool:
    """Whether a module is the end of a longer name: of a module inside a model that wraps this one."""
    return any(name.endswith(f".{module}") for name in names)
