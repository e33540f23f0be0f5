"""What the README of a pack says beyond that of a vector: behaviour, answers, what was measured, the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..run_card import RunCard
from ..shown import markdown_text

SHOWN_ROWS = ("k", "behavior", "loss_change", "kl", "loops")
HEAD = """
| k | behaviour | loss on text | KL to the base | replies that loop |
| ---: | ---: | ---: | ---: | ---: |
"""
UNITS = """
Behaviour is the change of log p(shows it) - log p(shows its opposite) on held-out pairs. It, the change
of the loss on ordinary text and the KL divergence are in nats per token.
"""


@dataclass(frozen=True)
class Sample:
    """One answer of the steered model."""

    prompt: str
    k: float
    reply: str


def pack_sections(card: RunCard, about: str, samples: Sequence[Sample], hub_id: str = "") -> str:
    """The sections in Markdown; foreign text in them stands as plain words."""
    parts = [
        f"\n## The behaviour\n\n{markdown_text(about)}\n" if about else "",
        _fetching(hub_id) if hub_id else "",
        _answers(samples) if samples else "",
        _results(card),
        _data(card),
    ]
    return "".join(parts)


def _fetching(hub_id: str) -> str:
    return f"\n```sh\nweightsteer pull {hub_id} -o FOLDER\n```\n"


def _answers(samples: Sequence[Sample]) -> str:
    prompts = dict.fromkeys(sample.prompt for sample in samples)
    text = "\n## Sample answers\n\nOne prompt, greedy decoding, not chosen among others.\n"
    for prompt in prompts:
        text += f"\n> {markdown_text(prompt)}\n\n"
        for sample in samples:
            if sample.prompt == prompt:
                text += f"- k = {sample.k:g}: {markdown_text(sample.reply) or '(an empty reply)'}\n"
    return text


def _results(card: RunCard) -> str:
    """The calibration's table, where the card holds one."""
    found = card.measured.get("calibration")
    rows = found.get("rows") if isinstance(found, Mapping) else None
    lines = [_line(row) for row in rows if isinstance(row, Mapping)] if isinstance(rows, Sequence) else []
    return f"\n## What was measured\n{HEAD}" + "\n".join(lines) + f"\n{UNITS}" if lines else ""


def _line(row: Mapping[str, Any]) -> str:
    return "| " + " | ".join(_cell(name, row.get(name)) for name in SHOWN_ROWS) + " |"


def _cell(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    return f"{value:g}" if name == "k" else f"{value:.0%}" if name == "loops" else f"{value:+.3f}"


def _data(card: RunCard) -> str:
    """The hashes of the data and the weights from which the vector was made."""
    rows = [f"| {markdown_text(name)} | {markdown_text(value)} |" for name, value in card.data_sha256.items()]
    return "\n## Made from\n\n| | SHA-256 |\n| --- | --- |\n" + "\n".join(rows) + "\n" if rows else ""
