"""Charts of directions: cosines over the steps of a training, and a clustered heat map of many vectors (no torch)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np
from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
from scipy.spatial.distance import squareform

WIDTH, HEIGHT = 380, 280
SHOWN_BANDS = 2.0  # standard deviations of chance that are shaded


def over_steps(readings: Sequence[Mapping[str, Any]]) -> alt.HConcatChart:
    """Whole-model readings over the steps: the cosine with its shaded null band, z, and the projection.

    `readings` are rows with step, vector, cosine, centre, band, z, projection.
    """
    rows = [
        {
            **row,
            "low": row["centre"] - SHOWN_BANDS * row["band"],
            "high": row["centre"] + SHOWN_BANDS * row["band"],
        }
        for row in readings
    ]
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("step:Q", title="Step"),
        color=alt.Color("vector:N", title="Vector", legend=alt.Legend(orient="bottom", symbolOpacity=1)),
    )
    tooltip = ["vector:N", "step:Q", *(alt.Tooltip(f"{n}:Q", format=".4f") for n in ("cosine", "z", "projection"))]
    band = base.mark_area(opacity=0.12).encode(y=alt.Y("low:Q", title=None), y2="high:Q")
    panels = [band + _line(base, "cosine", tooltip), _line(base, "z", tooltip), _line(base, "projection", tooltip)]
    titles = (
        f"Cosine of tau and the vector (shaded: chance, {SHOWN_BANDS:g} s.d.)",
        "z: standard deviations from chance",
        "Multiples of the vector in tau",
    )
    sized = [p.properties(width=WIDTH, height=HEIGHT, title=t) for p, t in zip(panels, titles, strict=True)]
    return alt.hconcat(*sized)


def _line(base: alt.Chart, field: str, tooltip: Sequence[Any]) -> alt.Chart:
    return base.mark_line(point=True).encode(y=alt.Y(f"{field}:Q", title=None), tooltip=list(tooltip))


def parts_over_steps(readings: Sequence[Mapping[str, Any]]) -> alt.FacetChart:
    """The cosine in each layer (down) at each step (across), one panel a vector; rows with a part "layer N"."""
    rows = [
        {**row, "layer": int(str(row["part"]).removeprefix("layer "))}
        for row in readings
        if str(row["part"]).startswith("layer ")
    ]
    return (
        alt.Chart(alt.Data(values=rows), width=WIDTH / 2, height=HEIGHT)
        .mark_rect()
        .encode(
            x=alt.X("step:O", title="Step"),
            y=alt.Y("layer:O", title="Layer"),
            color=alt.Color("cosine:Q", title="Cosine", scale=alt.Scale(scheme="redblue", reverse=True, domainMid=0)),
            tooltip=["vector:N", "step:O", "layer:O", alt.Tooltip("cosine:Q", format=".4f"), "z:Q"],
        )
        .facet(column=alt.Column("vector:N", title=None))
    )


def cluster_order(cosines: np.ndarray) -> list[int]:
    """An order of the vectors in which like ones are neighbours: average linkage on 1 - cosine."""
    if len(cosines) < 3:
        return list(range(len(cosines)))
    distances = squareform(np.clip(1.0 - np.nan_to_num(cosines), 0.0, 2.0), checks=False)
    return [int(i) for i in leaves_list(optimal_leaf_ordering(linkage(distances, "average"), distances))]


def heatmap(names: Sequence[str], cosines: np.ndarray) -> alt.LayerChart:
    """The table of cosines with its values, like vectors side by side."""
    order = [names[i] for i in cluster_order(cosines)]
    cells = [
        {"row": a, "column": b, "cosine": float(cosines[i, j])}
        for i, a in enumerate(names)
        for j, b in enumerate(names)
        if np.isfinite(cosines[i, j])
    ]
    base = alt.Chart(alt.Data(values=cells)).encode(
        x=alt.X("column:N", title=None, sort=order), y=alt.Y("row:N", title=None, sort=order)
    )
    color = alt.Color("cosine:Q", scale=alt.Scale(scheme="redblue", reverse=True, domain=[-1, 1]))
    squares = base.mark_rect().encode(color=color, tooltip=["row:N", "column:N", alt.Tooltip("cosine:Q", format=".4f")])
    dark = alt.condition("abs(datum.cosine) > 0.6", alt.value("white"), alt.value("black"))
    values = base.mark_text(fontSize=10).encode(text=alt.Text("cosine:Q", format=".2f"), color=dark)
    size = 44 * len(names)
    return (squares + values).properties(width=size, height=size, title="Cosines")
