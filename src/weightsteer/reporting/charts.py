"""Rows -> Vega-Lite charts (by altair; PNG by vl-convert, no browser and no network)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import altair as alt

from ..evaluation.compare import ComparisonAtLoss
from ..evaluation.metrics import MetricKey, Metrics, metric_of, title_of
from ..evaluation.results import BASE, MetricRow
from ..vectors.parameter_names import layer_of, module_of

Table = Sequence[Mapping[str, Any]]
LOSS = ("prose", "nll")  # the task whose rise is the loss increase
COMPARED_AT = 0.1  # nats per token of loss increase, at which behaviour is set against training tokens
WIDTH, HEIGHT = 380, 280


def main_keys(rows: Sequence[MetricRow], metrics: Metrics) -> list[MetricKey]:
    """The metrics to show first: all but those that are another view of one that is shown."""
    keys = dict.fromkeys((row.task, row.metric) for row in rows if not row.change)
    return [key for key in keys if not metric_of(metrics, key).detail]


def behaviour_against_capability(
    rows: Sequence[MetricRow], behaviors: Sequence[MetricKey], metrics: Metrics
) -> alt.HConcatChart:
    """One panel a behaviour: its value against the rise of loss on ordinary text, one curve a method.

    A point is the base's value and the paired change from it, since methods may be measured on fewer items
    than the base. Darker points are larger |k|; bars are one standard error of the change.
    """
    panels = [_panel(_points(rows, key), title_of(metrics, key)) for key in behaviors]
    return alt.hconcat(*panels).resolve_scale(color="shared")


def _points(rows: Sequence[MetricRow], key: MetricKey) -> list[dict[str, Any]]:
    """Points (loss increase, value) of every method; the base starts each method's curve at no loss increase."""
    changes = {(row.method, row.k, (row.task, row.metric)): row for row in rows if row.change}
    base = next((r for r in rows if r.method == BASE and (r.task, r.metric) == key and not r.change), None)
    if base is None:
        return []
    points = []
    for method in dict.fromkeys(row.method for row in rows if row.method != BASE):
        ks = sorted({row.k for row in rows if row.method == method} | {0.0})
        for k in ks:
            name = method if k else BASE
            change, increase = changes.get((name, k, key)), changes.get((name, k, LOSS))
            if change and increase and math.isfinite(change.value + increase.value):  # else the model overflowed
                place = {"method": method, "k": k, "strength": abs(k) / max(map(abs, ks))}
                value = _with_error(replace(change, value=base.value + change.value))
                points.append({**place, "loss_increase": increase.value, **value})
    return points


def _with_error(row: MetricRow) -> dict[str, Any]:
    error = 0.0 if math.isnan(row.stderr) else row.stderr
    return {"value": row.value, "low": row.value - error, "high": row.value + error, "n": row.n}


def _panel(points: Table, title: str) -> alt.LayerChart:
    base = alt.Chart(alt.Data(values=list(points))).encode(
        x=alt.X("loss_increase:Q", title="Rise of loss on ordinary text (nats per token)"),
        color=_method_colours(points),
    )
    value = alt.Y("value:Q", title=None, scale=alt.Scale(zero=False))
    tooltip = [
        "method:N",
        "k:Q",
        *(alt.Tooltip(f"{n}:Q", format=".3f") for n in ("value", "low", "high", "loss_increase")),
    ]
    line = base.mark_line(strokeWidth=1.5, opacity=0.6).encode(y=value, order="k:Q")
    bars = base.mark_rule().encode(y="low:Q", y2="high:Q")
    dots = base.mark_circle(size=70).encode(
        y=value,
        opacity=alt.Opacity("strength:Q", scale=alt.Scale(domain=[0, 1], range=[0.25, 1]), legend=None),
        tooltip=tooltip,
    )
    return (bars + line + dots).properties(width=WIDTH, height=HEIGHT, title=title)


def behaviour_against_cost(
    found: Mapping[MetricKey, Sequence[ComparisonAtLoss]], costs: Sequence[MetricRow], metrics: Metrics
) -> alt.HConcatChart:
    """One panel a behaviour: its change at one loss increase against the tokens that each method trains on.

    A method's cost is that of its dearest strength. Points are hollow where its strongest k costs less.
    """
    tokens: dict[str, float] = {}
    for row in costs:
        if row.metric == "training tokens":
            tokens[row.method] = max(row.value, tokens.get(row.method, 0.0))
    panels = [_cost_panel(rows, tokens, title_of(metrics, key, change=True)) for key, rows in found.items()]
    return alt.hconcat(*panels).resolve_scale(color="shared")


def _cost_panel(rows: Sequence[ComparisonAtLoss], tokens: Mapping[str, float], title: str) -> alt.LayerChart:
    points = [
        {
            "method": row.method,
            "tokens": tokens[row.method],
            "value": row.value,
            "low": row.value - row.stderr,
            "high": row.value + row.stderr,
            "side": "more" if row.side > 0 else "less",
            "reached": row.reached,
        }
        for row in rows
        if row.method in tokens and row.loss_increase == COMPARED_AT and math.isfinite(row.value + row.stderr)
    ]
    base = alt.Chart(alt.Data(values=points)).encode(
        x=alt.X("tokens:Q", title="Training tokens"), color=_method_colours(points)
    )
    dots = base.mark_point(size=80).encode(
        y=alt.Y("value:Q", title=None),
        shape=alt.Shape("side:N", title="Side", legend=alt.Legend(orient="bottom")),
        fillOpacity=alt.condition("datum.reached", alt.value(1), alt.value(0)),
        fill=alt.Fill("method:N", scale=_method_scale(points), legend=None),
        tooltip=[
            "method:N",
            "side:N",
            *(alt.Tooltip(f"{n}:Q", format=".3f") for n in ("value", "low", "high")),
            "tokens:Q",
        ],
    )
    errors = base.mark_rule().encode(y="low:Q", y2="high:Q")
    return (errors + dots).properties(width=WIDTH, height=HEIGHT, title=f"{title} at {COMPARED_AT:g} nats")


def _method_scale(points: Table) -> alt.Scale:
    few = len({point["method"] for point in points}) <= 10
    return alt.Scale(scheme="tableau10" if few else "tableau20")  # no colour twice


def _method_colours(points: Table) -> alt.Color:
    legend = alt.Legend(orient="bottom", columns=4)
    return alt.Color("method:N", title="Method", scale=_method_scale(points), legend=legend)


def dose_response(
    rows: Sequence[MetricRow], method: str, keys: Sequence[MetricKey], metrics: Metrics
) -> alt.VConcatChart:
    """One panel a metric: its change from k = 0 for one method, item by item, with one standard error."""
    panels = [_dose_panel(rows, method, key, title_of(metrics, key, change=True)) for key in keys]
    pairs = [alt.hconcat(*panels[i : i + 2]) for i in range(0, len(panels), 2)]
    return alt.vconcat(*pairs)


def _dose_panel(rows: Sequence[MetricRow], method: str, key: MetricKey, title: str) -> alt.LayerChart:
    wanted = [r for r in rows if r.method in (method, BASE) and (r.task, r.metric) == key and r.change]
    points = [{"k": r.k, **_with_error(r)} for r in wanted if math.isfinite(r.value)]
    base = alt.Chart(alt.Data(values=points)).encode(x=alt.X("k:Q", title="k (multiples of the vector)"))
    value = alt.Y("value:Q", title=None)
    tooltip = [alt.Tooltip(f"{name}:Q", format=".3f") for name in ("k", "value", "low", "high", "n")]
    bars = base.mark_rule().encode(y="low:Q", y2="high:Q")
    line = base.mark_line(point=True).encode(y=value, tooltip=tooltip)
    return (bars + line).properties(width=WIDTH, height=HEIGHT * 0.6, title=title)


def composition(norms: Mapping[str, float]) -> alt.Chart:
    """The vector's Frobenius norm by layer (across) and module (down)."""
    cells = [{**place(name), "norm": norm} for name, norm in norms.items()]
    return (
        alt.Chart(alt.Data(values=cells))
        .mark_rect()
        .encode(
            x=alt.X("layer:O", title="Layer (block, counted from 0)"),
            y=alt.Y("module:N", title=None),
            color=alt.Color("sum(norm):Q", title="Norm", scale=alt.Scale(scheme="blues")),
            tooltip=["layer:O", "module:N", alt.Tooltip("sum(norm):Q", format=".4f")],
        )
        .properties(width=2 * WIDTH, height=160)
    )


def place(name: str) -> dict[str, Any]:
    """Layer and module of a parameter: 'model.layers.3.mlp.up_proj.weight' -> 3, 'mlp.up_proj'."""
    layer = layer_of(name)
    return {"layer": "-" if layer is None else layer, "module": module_of(name)}


def png(chart: alt.TopLevelMixin) -> bytes:
    """The chart as a PNG at twice the screen's resolution."""
    import vl_convert

    return bytes(vl_convert.vegalite_to_png(chart.to_json(), scale=2.0))
