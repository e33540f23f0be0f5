"""Whether a vector is too small to see: its norm beside that of the weights that it changes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ..schema import is_finite
from .weight_vector import WeightVector

BASE_NORM = "base_norm"  # in a fine-tune's card: the norm of the weights that LoRA changes
SEEN = 0.0003  # share of it at which greedy replies begin to differ (docs/training-defaults.md)


def relative_norm(vector: WeightVector) -> float | None:
    """|w| / |theta| over the linear layers of the base; None where the fine-tunes' cards do not tell |theta|."""
    sides = vector.card.measured.get("sides")
    for side in sides if isinstance(sides, list) else ():
        norm = side.get(BASE_NORM) if isinstance(side, Mapping) else None
        if isinstance(norm, int | float) and not isinstance(norm, bool) and is_finite(norm) and norm > 0:
            return vector.norm() / norm
    return None


def size_in_words(vector: WeightVector) -> dict[str, str]:
    """The vector's size for `show`, where it is known."""
    share = relative_norm(vector)
    if share is None:
        return {}
    return {"size": f"{share:.2g} of the norm of the base's linear layers; replies differ from about {SEEN:g} on"}


def why_unseen(vector: WeightVector, ks: Sequence[float]) -> str | None:
    """One line where the vector is too small to see at the largest of these k, with the k that would show it.

    None where it is large enough, where nothing is known of the base's weights, where all k are 0, or where the
    vector's strengths were measured: then the card says more than a norm can.
    """
    if vector.card.strength is not None:
        return None
    share, largest = relative_norm(vector), max(map(abs, ks), default=0.0)
    if share is None or largest == 0.0 or share * largest >= SEEN:
        return None
    found = (
        f"the vector is too small to see at k = {largest:g}: it changes the model's weights by {share * largest:.2g}"
    )
    wanted = f"of their norm, and replies begin to differ at about {SEEN:g}"
    way = f"try k = {_rounded_up(SEEN / share):g}, or train more" if share else "train more"
    return f"{found} {wanted}; {way} (a higher learning rate, more steps)"


def _rounded_up(k: float) -> float:
    """To one digit, upward."""
    unit = 10.0 ** math.floor(math.log10(k))
    return math.ceil(k / unit) * unit
