"""What `/dial` says: the base, and the vectors with their ranges, for programs and for the playground (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from ..run_card import RunCard
from ..strength_names import DIGITS

OutOfRange = Literal["warn", "refuse", "clamp"]
Server = Literal["weightsteer", "vllm"]  # only the first has `/dial/fan` and `/dial/kl`


def described(base: str, cards: Mapping[str, RunCard], server: Server, out_of_range: OutOfRange) -> dict[str, Any]:
    """The base's name, and each vector's tested range and recommended strengths, None where its card has none."""
    vectors = [_vector(name, card) for name, card in cards.items()]
    return {"base": base, "vectors": vectors, "digits": DIGITS, "out_of_range": out_of_range, "server": server}


def _vector(name: str, card: RunCard) -> dict[str, Any]:
    strength = card.strength
    return {
        "name": name,
        "about": card.about,
        "least": strength.low if strength else None,
        "most": strength.high if strength else None,
        "recommended": (strength.recommended or None) if strength else None,
        "negative": (strength.negative or None) if strength else None,
    }
