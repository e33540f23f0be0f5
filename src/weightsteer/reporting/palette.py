"""One colour for each method, the same in every figure: pages, PNG files and the docs' pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from zlib import crc32

# Of middle lightness, so that each can be seen on white paper and on a dark page.
METHOD_COLOURS: Mapping[str, str] = {
    "contrastive": "#f58518",
    "contrastive half": "#c98a4b",
    "tau+": "#72b7b2",
    "tau-": "#54a24b",
    "bias-only": "#9d755d",
    "full": "#c2185b",
    "activation": "#4c78a8",
    "activation all layers": "#6ba3d6",
    "system prompt": "#e45756",
    "fine-tuned": "#b279a2",
    "DPO": "#8a63d2",
    "joint training": "#8c8c8c",
    "negated task vector": "#c9a227",
    "contrastive KL": "#e0a100",
    "more of D+ KL": "#b35900",
    "contrastive parts": "#c2571a",
    "two-way": "#2e9e6b",
    "two-way even": "#1b7f79",
    "two-way KL": "#5fb49c",
    "learned dial": "#d6409f",
    "dial pairs": "#a3785f",
    "random": "#9e9e9e",
    "random dial": "#757f8a",
    "activation trained": "#3f6fb0",
}
OTHERS = ("#00897b", "#7986cb", "#ad8f00", "#ef6c8f", "#5d8aa8", "#a1662f", "#7cb342", "#ba68c8", "#78909c", "#d4785c")
VECTORS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#8a63d2", "#72b7b2", "#c9a227", "#b279a2", "#9d755d", "#8c8c8c")


def method_colours(names: Iterable[str]) -> dict[str, str]:
    """Colour of each method; a variant of a recipe's own gets one by its name, and the next where that is taken."""
    found, free = {}, list(OTHERS)
    for name in sorted(set(names)):
        if name in METHOD_COLOURS:
            found[name] = METHOD_COLOURS[name]
            continue
        free = free or list(OTHERS)
        found[name] = free.pop(crc32(name.encode()) % len(free))
    return found
