"""The page of a calibrated vector: one prompt at its strengths, the chart and table of all k, what to try next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import altair as alt

from ..evaluation.calibration import Calibration, CalibrationRow, table
from .pages import write_page

WIDTH, HEIGHT = 300, 180
PANELS = {  # a row's field -> the panel's title
    "behavior": "Behaviour: change on held-out pairs (nats per token)",
    "loss_change": "Ordinary text: rise of the loss (nats per token)",
    "loops": "Share of replies that repeat themselves",
}


def write_calibration_page(
    path: Path, name: str, found: Calibration, *, model: str, description: str = "", commands: Sequence[str] = ()
) -> Path:
    """Write the page; returns its path.

    Args:
        name: the behaviour's.
        commands: what to type next.
    """
    strength = found.strength
    ks = sorted({strength.negative, 0.0, strength.recommended})
    shown = [(prompt, [found.replies[k][number] for k in ks]) for number, prompt in enumerate(found.prompts)]
    head, *lines = table(found)
    return write_page(
        path,
        "calibration.html",
        {"dial": chart(found.rows).to_dict()},
        title=f"{name}: a dial for {model}",
        description=description,
        strength=strength,
        ks=[f"{k:g}" for k in ks],
        shown=shown,
        head=head,
        lines=lines,
        found=found,
        commands=list(commands),
    )


def chart(rows: Sequence[CalibrationRow]) -> alt.HConcatChart:
    """One panel a number that was measured, over k."""
    points: list[dict[str, Any]] = [asdict(row) for row in rows]
    measured = [field for field in PANELS if all(point[field] is not None for point in points)]
    base = alt.Chart(alt.Data(values=points)).encode(x=alt.X("k:Q", title="k (multiples of the vector)"))
    panels = [
        base.mark_line(point=True)
        .encode(
            y=alt.Y(f"{field}:Q", title=None),
            tooltip=["k:Q", alt.Tooltip(f"{field}:Q", format=".3f", title=PANELS[field])],
        )
        .properties(width=WIDTH, height=HEIGHT, title=PANELS[field])
        for field in measured
    ]
    return alt.hconcat(*panels)
