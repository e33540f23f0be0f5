"""Vectors and their strengths as a model's name, `syc@-0.72+gloomy@0.3`, for servers that know a model by its name."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from .errors import SteerError
from .schema import LARGEST_FLOAT, shown, suggestion

DIGITS = 3  # after the point: engines keep every name that they have met, so that names lie on a grid
PART = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*)(?:@(?P<k>[+-]?(?:\d+(?:\.\d*)?|\.\d+)))?", re.ASCII)
EXAMPLE = "expected a vector and its strength, such as syc@-0.72, or a sum, syc@-0.7+gloomy@0.3"
LONGEST = 1000  # characters


def parse_strengths(text: str, names: Collection[str]) -> dict[str, float | None]:
    """The strength of each vector that a model's name names, on the grid; None where it says none, as in `syc`.

    Raises:
        SteerError: another form, a vector that is not among `names` or stands twice, or a strength out of range.
    """
    found: dict[str, float | None] = {}
    for part in _parts(text):
        match = PART.fullmatch(part)
        if match is None:
            raise SteerError(f"model {shown(text)}: {EXAMPLE}")
        name, k = match["name"], match["k"]
        if name not in names:
            known = ", ".join(names) or "none"
            raise SteerError(f"model {shown(text)}: no vector {shown(name)} among {known}{suggestion(name, names)}")
        if name in found:
            raise SteerError(f"model {shown(text)}: {name} stands twice; give each vector once")
        found[name] = None if k is None else on_grid(float(k), f"model {shown(text)}")
    return found


def strength_name(strengths: Mapping[str, float]) -> str:
    """The one name of these strengths: in the order of the vectors' names, without those that are 0; "" if all are."""
    parts = ((name, on_grid(k, name)) for name, k in sorted(strengths.items()))
    return "+".join(f"{name}@{_plain(k)}" for name, k in parts if k)


def on_grid(k: float, where: str = "k") -> float:
    """The nearest strength on the grid of `DIGITS` digits after the point.

    Raises:
        SteerError: it is not finite, or beyond what 32 bits hold.
    """
    if not abs(k) <= LARGEST_FLOAT:
        raise SteerError(f"{where}: expected a finite strength up to {LARGEST_FLOAT:.3g}, found {shown(k)}")
    return round(k, DIGITS) + 0.0  # no -0.0


def is_name(text: str) -> bool:
    """Whether a vector can be called so in such a name."""
    return len(text) <= LONGEST and re.fullmatch(r"[A-Za-z0-9][\w.-]*", text, re.ASCII) is not None


def _parts(text: str) -> list[str]:
    """What stands between the + signs; a + after an @ is the sign of a number."""
    if not text or len(text) > LONGEST:
        raise SteerError(f"model {shown(text)}: {EXAMPLE}")
    return re.split(r"(?<!@)\+", text)


def _plain(k: float) -> str:
    """A number without an exponent and without zeros that say nothing."""
    return f"{k:.{DIGITS}f}".rstrip("0").rstrip(".")
