"""Charts of directions: cosines over the steps of a training, and a clustered heat map of many vectors (no torch)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np
from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
from scipy.spatial.distance import squareform

from .charts import FILL, HEIGHT, WIDTH
from .palette import VECTORS

SHOWN_BANDS = 2.0  # standard deviations of chance that are shaded
CELL = 44  # side of a cell of the heat map as a picture
LEAST = 30  # width of a cell from which its value is written into it
LAYERS = "layer "  # what the part of a reading is called that is one layer
TITLES = {
    "cosine": f"Cosine of tau and the vector (shaded: chance, {SHOWN_BANDS:g} s.d.)",
    "z": "z: standard deviations from chance",
    "projection": "Multiples of the vector in tau",
    "share": "Share of tau's norm along the vector alone",
}

Readings = Sequence[Mapping[str, Any]]


def over_steps(readings: Readings, *, alert: float | None = None, share: float | None = None) -> alt.HConcatChart:
    """A picture of whole-model readings over the steps: see `step_panels`."""
    legend = alt.Legend(orient="bottom", symbolOpacity=1)
    panels = _step_panels(readings, alert, share, legend)
    return alt.hconcat(*(panel.properties(width=WIDTH, height=HEIGHT, title=TITLES[n]) for n, panel in panels.items()))


def step_panels(
    readings: Readings, *, alert: float | None = None, share: float | None = None
) -> dict[str, alt.LayerChart]:
    """Title -> chart for a page: the cosine with its shaded null band, z, the projection, the share if there is one.

    Args:
        readings: rows with step, vector, cosine, centre, band, z, projection.
        alert: the |z| from which an alert is raised.
        share: the share from which an alert is raised.
    """
    legend = alt.Legend(orient="bottom", symbolOpacity=1, columns=1, labelLimit=250)
    panels = _step_panels(readings, alert, share, legend)
    return {TITLES[name]: panel.properties(width=FILL, height=HEIGHT) for name, panel in panels.items()}


def _step_panels(
    readings: Readings, alert: float | None, share: float | None, legend: alt.Legend
) -> dict[str, alt.LayerChart]:
    rows = [
        {
            **row,
            "low": row["centre"] - SHOWN_BANDS * row["band"],
            "high": row["centre"] + SHOWN_BANDS * row["band"],
        }
        for row in readings
    ]
    scale = alt.Scale(domain=list(dict.fromkeys(row["vector"] for row in rows)), range=list(VECTORS))
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("step:Q", title="Step"), color=alt.Color("vector:N", title="Vector", scale=scale, legend=legend)
    )
    tooltip = ["vector:N", "step:Q", *(alt.Tooltip(f"{n}:Q", format=".4f") for n in ("cosine", "z", "projection"))]
    band = base.mark_area(opacity=0.12).encode(y=alt.Y("low:Q", title=None), y2="high:Q")
    panels = {
        "cosine": band + _line(base, "cosine", tooltip),
        "z": _threshold("z", [alert, -alert] if alert else []) + _line(base, "z", tooltip),
        "projection": alt.layer(_line(base, "projection", tooltip)),
    }
    if any(row.get("share") is not None for row in rows):
        limits = [] if share is None else [share]
        panels["share"] = _threshold("share", limits) + _line(base, "share", tooltip)
    return panels


def _threshold(field: str, limits: Sequence[float]) -> alt.Chart:
    """Dashed lines at which an alert is raised."""
    data = alt.Data(values=[{field: limit} for limit in limits])
    return alt.Chart(data).mark_rule(strokeDash=[6, 4]).encode(y=f"{field}:Q")


def _line(base: alt.Chart, field: str, tooltip: Sequence[Any]) -> alt.Chart:
    return base.mark_line(point=True).encode(y=alt.Y(f"{field}:Q", title=None), tooltip=list(tooltip))


def layer_panels(readings: Readings) -> dict[str, alt.Chart]:
    """Vector -> chart for a page: the cosine in each layer (down) at each step (across); of the rows of a layer."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in readings:
        if str(row["part"]).startswith(LAYERS):
            layer = int(str(row["part"]).removeprefix(LAYERS))
            found.setdefault(str(row["vector"]), []).append({**row, "layer": layer})
    largest = max((abs(row["cosine"]) for rows in found.values() for row in rows), default=1.0) or 1.0
    scale = alt.Scale(scheme="redblue", reverse=True, domain=[-largest, largest])  # one scale, so that panels compare
    return {
        vector: alt.Chart(alt.Data(values=rows))
        .mark_rect()
        .properties(width=FILL, height=HEIGHT)
        .encode(
            x=alt.X("step:O", title="Step", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
            y=alt.Y("layer:O", title="Layer", axis=alt.Axis(labelOverlap=True)),
            color=alt.Color("cosine:Q", title="Cosine", scale=scale, legend=alt.Legend(orient="bottom")),
            tooltip=["step:O", "layer:O", alt.Tooltip("cosine:Q", format=".4f"), alt.Tooltip("z:Q", format=".1f")],
        )
        for vector, rows in found.items()
    }


def cluster_order(cosines: np.ndarray) -> list[int]:
    """An order of the vectors in which like ones are neighbours: average linkage on 1 - cosine."""
    if len(cosines) < 3:
        return list(range(len(cosines)))
    distances = squareform(np.clip(1.0 - np.nan_to_num(cosines), 0.0, 2.0), checks=False)
    return [int(i) for i in leaves_list(optimal_leaf_ordering(linkage(distances, "average"), distances))]


def heatmap(names: Sequence[str], cosines: np.ndarray, *, fill: bool = False) -> alt.LayerChart:
    """The table of cosines with its values, like vectors side by side.

    Args:
        fill: for a page: as large as the element that holds it, without a title.
    """
    order = [names[i] for i in cluster_order(cosines)]
    cells = [
        {"row": a, "column": b, "cosine": float(cosines[i, j])}
        for i, a in enumerate(names)
        for j, b in enumerate(names)
        if np.isfinite(cosines[i, j])
    ]
    across, down = (alt.Axis(labelLimit=130, labelOverlap=True, labelAngle=angle) for angle in (-45, 0))
    base = alt.Chart(alt.Data(values=cells)).encode(
        x=alt.X("column:N", title=None, sort=order, axis=across),
        y=alt.Y("row:N", title=None, sort=order, axis=down),
    )
    scale = alt.Scale(scheme="redblue", reverse=True, domain=[-1, 1])
    legend = alt.Legend(orient="bottom" if fill else "right", title="Cosine")
    squares = base.mark_rect().encode(
        color=alt.Color("cosine:Q", scale=scale, legend=legend),
        tooltip=["row:N", "column:N", alt.Tooltip("cosine:Q", format=".4f")],
    )
    dark = alt.condition("abs(datum.cosine) > 0.6", alt.value("white"), alt.value("black"))
    roomy = alt.condition(f"width >= {LEAST * len(names)}", alt.value(1), alt.value(0))
    values = base.mark_text(fontSize=10).encode(text=alt.Text("cosine:Q", format=".2f"), color=dark, opacity=roomy)
    chart = squares + values
    if fill:
        return chart.properties(width=FILL, height=FILL)
    return chart.properties(width=CELL * len(names), height=CELL * len(names), title="Cosines")
