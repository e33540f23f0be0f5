"""What a fixed hash of an item's own text decides: its split, and whether it may choose or is only reported.

A hash does not change when items are added, taken out or put in another order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ...behavior import prompt_text
from ...files import digest
from ..results import SPLITS
from ..task_spec import HALVES


def hash_splits(keys: Sequence[str]) -> tuple[str, ...]:
    """A split for each key; equal keys share one."""
    return tuple(SPLITS[_bit("split", key)] for key in keys)


def half_of(item: Any) -> str:
    """One of `HALVES`, by an item's prompt, or by all its fields where it has none."""
    return HALVES[_bit("half", _own_text(item))]


def _own_text(item: Any) -> str:
    if isinstance(item, str):
        return item
    prompt = getattr(item, "prompt", None)
    return digest(asdict(item)) if prompt is None else prompt_text(prompt)


def _bit(purpose: str, text: str) -> int:
    """0 or 1 from the SHA-256 of a text; the bits for two purposes have nothing to do with each other."""
    return hashlib.sha256(f"{purpose}\n{text}".encode()).digest()[0] & 1
