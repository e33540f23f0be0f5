"""What a parameter is called in the base, and where it stands there, read off its name; no table of architectures."""

from __future__ import annotations

import re
from collections.abc import Collection

from ..errors import SteerError
from ..schema import shown

TOWER = re.compile(r"vis(?=ion|ual)|image|audio|speech")  # beside the language's, which many names leave out
LAYERS = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")


def refuse_two_spellings(ours: Collection[str], theirs: Collection[str], whose: str) -> None:
    """Raise if two sides that change different parameters seem to mean one module by two names.

    Names differ between tools and versions; with the base at hand they are read alike. Without it two spellings would
    pass for two modules, and every product of the two sides for zero.
    """
    if set(ours) == set(theirs):
        return
    inside = {(_tower(name), _inside_block(name)): name for name in ours if name not in theirs}
    for name in theirs:
        place = _tower(name), _inside_block(name)
        if name not in ours and place[1] and place in inside:
            raise SteerError(
                f"{whose}: {inside[place]} and {name} seem to be one parameter under two names; give the base "
                "(--base MODEL), by which names are read alike"
            )


def _tower(name: str) -> str:
    """Which tower of a model of several a name says it stands in; "" where it says none."""
    found = TOWER.search(name)
    return found[0] if found else ""


def _inside_block(name: str) -> str:
    """The name from its block's number on; "" outside the blocks."""
    found = re.search(r"(?:^|\.)(\d+\..+)$", name)
    return found[1] if found else ""


def layer_of(name: str) -> int | None:
    """The block's number: 'model.layers.3.mlp.up_proj.weight' -> 3; None outside the blocks."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def module_of(name: str) -> str:
    """The module inside its block ('mlp.up_proj'); outside the blocks the last two parts of the name."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[-2:]) if at is None else ".".join(parts[at + 1 :]).removesuffix(".weight")


def is_in(name: str, modules: Collection[str]) -> bool:
    """Whether the parameter belongs to one of the modules: 'mlp', 'q_proj' or 'self_attn.q_proj'."""
    return any(f".{module}." in f".{name}." for module in modules)


def layer_numbers(text: str) -> set[int]:
    """'8-20,25' -> the numbers 8 to 20 and 25.

    Raises:
        SteerError: anything but numbers and ranges.
    """
    numbers: set[int] = set()
    for part in text.split(","):
        found = LAYERS.fullmatch(part.strip())
        if not found:
            raise SteerError(f"layers {shown(text)}: expected numbers and ranges such as '8-20,25', each below 100000")
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first:
            raise SteerError(f"layers {shown(text)}: {first}-{last} holds no layer; write the lower number first")
        numbers |= set(range(first, last + 1))
    return numbers
