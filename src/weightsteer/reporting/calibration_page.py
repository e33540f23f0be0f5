"""The page of a calibrated vector: what its dial does in a sentence, replies, and a chart and table of all k."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import altair as alt

from ..evaluation.calibration import Calibration, CalibrationRow, table
from .charts import FILL
from .pages import write_page
from .palette import METHOD_COLOURS
from .samples import Sample, shown_replies
from .tables import plain_table

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
    samples = [Sample(prompt, {k: found.replies[k][at] for k in ks}) for at, prompt in enumerate(found.prompts)]
    panels = {field: title for field, title in PANELS.items() if _is_known(found.rows, field)}
    return write_page(
        path,
        "calibration.html",
        {field: panel(found, field).to_dict() for field in panels},
        title=f"{name}: a dial for {model}",
        description=description,
        sentences=sentences(found),
        notes=found.notes,
        ks=ks,
        replies=[(sample.prompt, shown_replies(sample, ks)) for sample in samples],
        panels=panels,
        table=plain_table("calibration", table(found)),
        pairs=found.pairs,
        prompts=len(found.prompts),
        strength=strength,
        commands=list(commands),
    )


def sentences(found: Calibration) -> list[str]:
    """What the recommended k do, a sentence a side; one that says so where none is recommended."""
    rows = {row.k: row for row in found.rows}
    told = []
    for k, way in ((found.strength.recommended, "more"), (found.strength.negative, "less")):
        if not k:
            continue
        row = rows[k]
        told.append(
            f"At k = {k:+g} the model shows {way} of the behaviour{_by_how_much(row)}; ordinary text costs "
            f"{row.loss_change:+.3f} nats per token."
        )
    return told or ["No k is recommended on either side."]


def _by_how_much(row: CalibrationRow) -> str:
    """The change on held-out pairs as odds of a token; "" where none was measured."""
    if row.behavior is None:
        return ""
    error = f" ± {row.stderr:.2f}" if row.stderr else ""
    side = "the behaviour" if row.behavior > 0 else "its opposite"
    return (
        f": each token of an answer that shows {side} gains a factor of {math.exp(abs(row.behavior)):.1f} over the "
        f"other answer ({row.behavior:+.2f}{error} nats)"
    )


def panel(found: Calibration, field: str) -> alt.LayerChart:
    """One number over k; the recommended k are dashed."""
    points: list[dict[str, Any]] = [asdict(row) for row in found.rows if getattr(row, field) is not None]
    base = alt.Chart(alt.Data(values=points)).encode(x=alt.X("k:Q", title="k (multiples of the vector)"))
    colour = METHOD_COLOURS["contrastive"]
    line = base.mark_line(point={"color": colour, "size": 50}, color=colour).encode(
        y=alt.Y(f"{field}:Q", title=None),
        tooltip=["k:Q", alt.Tooltip(f"{field}:Q", format=".3f", title=PANELS[field])],
    )
    chosen = [{"k": k} for k in (found.strength.recommended, found.strength.negative) if k]
    dashes = alt.Chart(alt.Data(values=chosen)).mark_rule(strokeDash=[4, 4], opacity=0.6).encode(x="k:Q")
    return (dashes + line).properties(width=FILL, height=180)


def _is_known(rows: Sequence[CalibrationRow], field: str) -> bool:
    return sum(getattr(row, field) is not None for row in rows) > 1
