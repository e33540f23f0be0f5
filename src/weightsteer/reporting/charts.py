"""Rows -> Vega-Lite charts (by altair; PNG by vl-convert, no browser and no network).

A chart for a page has no title, which the page writes, no legend of methods, which is beside it once, and the width
of its place there. `method_colours` gives every method one colour in all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import altair as alt

from ..evaluation.compare import ComparisonAtLoss
from ..evaluation.metrics import Metric, MetricKey, Metrics, metric_of, title_of
from ..evaluation.results import BASE, MetricRow
from ..run_card import StrengthRange
from ..vectors.parameter_names import layer_of, module_of
from .palette import method_colours

Points = Sequence[Mapping[str, Any]]
Colours = Mapping[str, str]  # method -> colour
LOSS = ("prose", "nll")  # the task whose rise is the loss increase
COMPARED_AT = 0.1  # nats per token of loss increase, at which methods are set side by side
WIDTH, HEIGHT = 380, 280
FILL = "container"  # the width of the element that holds the chart
SIDES = {1: "more (k above 0)", -1: "less (k below 0)"}


def main_keys(rows: Sequence[MetricRow], metrics: Metrics) -> list[MetricKey]:
    """The metrics to show first: all but those that are another view of one that is shown."""
    keys = dict.fromkeys((row.task, row.metric) for row in rows if not row.change)
    return [key for key in keys if not metric_of(metrics, key).detail]


def methods_of(rows: Sequence[MetricRow]) -> list[str]:
    """The methods that were measured, without the base, in their order."""
    return list(dict.fromkeys(row.method for row in rows if row.method != BASE))


def behaviour_against_capability(
    rows: Sequence[MetricRow], behaviors: Sequence[MetricKey], metrics: Metrics
) -> alt.HConcatChart:
    """A picture with one panel a behaviour (see `capability_panel`), and a legend."""
    colours, legend = method_colours(methods_of(rows)), alt.Legend(orient="bottom", columns=4)
    panels = [
        _curves(rows, key, metric_of(metrics, key), colours, legend).properties(
            width=WIDTH, height=HEIGHT, title=title_of(metrics, key)
        )
        for key in behaviors
    ]
    return alt.hconcat(*panels).resolve_scale(color="shared")


def capability_panel(rows: Sequence[MetricRow], key: MetricKey, metrics: Metrics, colours: Colours) -> alt.LayerChart:
    """A behaviour's value against the rise of loss on ordinary text, one curve a method.

    A point is the base's value and the paired change from it, since methods may be measured on fewer items
    than the base. Darker points are larger |k|; bars are one standard error of the change.
    """
    return _curves(rows, key, metric_of(metrics, key), colours, None).properties(width=FILL, height=HEIGHT)


def _curves(
    rows: Sequence[MetricRow], key: MetricKey, metric: Metric, colours: Colours, legend: alt.Legend | None
) -> alt.LayerChart:
    points = _points(rows, key)
    base = alt.Chart(alt.Data(values=points)).encode(
        x=alt.X("loss_increase:Q", title="Rise of loss on ordinary text (nats per token)"),
        color=_coloured(points, colours, legend),
    )
    value = alt.Y("value:Q", title=None, scale=alt.Scale(zero=False), axis=_axis(metric))
    line = base.mark_line(strokeWidth=1.5, opacity=0.6).encode(y=value, order="k:Q")
    bars = base.mark_rule().encode(y="low:Q", y2="high:Q")
    dots = base.mark_circle(size=70).encode(
        y=value,
        opacity=alt.Opacity("strength:Q", scale=alt.Scale(domain=[0, 1], range=[0.25, 1]), legend=None),
        tooltip=["method:N", "k:Q", *_numbers("value", "low", "high", "loss_increase")],
    )
    return bars + line + dots


def _points(rows: Sequence[MetricRow], key: MetricKey) -> list[dict[str, Any]]:
    """Points (loss increase, value) of every method; the base starts each method's curve at no loss increase."""
    changes = {(row.method, row.k, (row.task, row.metric)): row for row in rows if row.change}
    base = next((r for r in rows if r.method == BASE and (r.task, r.metric) == key and not r.change), None)
    if base is None:
        return []
    points = []
    for method in methods_of(rows):
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


def _numbers(*names: str) -> list[alt.Tooltip]:
    return [alt.Tooltip(f"{name}:Q", format=".3f") for name in names]


def _axis(metric: Metric, *, change: bool = False) -> alt.Axis:
    """Shares as percentages, changes with their sign."""
    form = ("+" if change else "") + ("~%" if metric.is_share else "~g")
    return alt.Axis(labelExpr=f"datum.value == 0 ? '0' : format(datum.value, '{form}')")


def _coloured(points: Points, colours: Colours, legend: alt.Legend | None) -> alt.Color:
    shown = sorted({str(point["method"]) for point in points})
    scale = alt.Scale(domain=shown, range=[colours[name] for name in shown])
    return alt.Color("method:N", title="Method", scale=scale, legend=legend)


def dose_panel(
    rows: Sequence[MetricRow],
    method: str,
    key: MetricKey,
    metrics: Metrics,
    strength: StrengthRange | None = None,
    *,
    height: int = 180,
) -> alt.LayerChart:
    """A metric's change from k = 0 for one method, item by item, with one standard error; recommended k are dashed."""
    wanted = [r for r in rows if r.method in (method, BASE) and (r.task, r.metric) == key and r.change]
    points = [{"k": r.k, **_with_error(r)} for r in wanted if math.isfinite(r.value)]
    base = alt.Chart(alt.Data(values=points)).encode(x=alt.X("k:Q", title="k (multiples of the vector)"))
    colour = method_colours([method])[method]
    value = alt.Y("value:Q", title=None, axis=_axis(metric_of(metrics, key), change=True))
    bars = base.mark_rule(color=colour).encode(y="low:Q", y2="high:Q")
    line = base.mark_line(point={"color": colour, "size": 50}, color=colour).encode(
        y=value, tooltip=_numbers("k", "value", "low", "high", "n")
    )
    chosen = [{"k": k} for k in (strength.recommended, strength.negative) if k] if strength else []
    dashes = alt.Chart(alt.Data(values=chosen)).mark_rule(strokeDash=[4, 4], opacity=0.6).encode(x="k:Q")
    zero = alt.Chart(alt.Data(values=[{"value": 0}])).mark_rule(opacity=0.4).encode(y="value:Q")
    return (zero + dashes + bars + line).properties(width=FILL, height=height)


def comparison_panel(found: Sequence[ComparisonAtLoss], metric: Metric, colours: Colours) -> alt.LayerChart:
    """Every method's change of a behaviour at one loss increase: methods down, a triangle for each side of k."""
    points = _compared(found)
    reach: dict[str, float] = {}
    for point in points:
        reach[point["method"]] = max(abs(point["value"]), reach.get(point["method"], 0.0))
    order = sorted(reach, key=lambda name: -reach[name])
    base = alt.Chart(alt.Data(values=points)).encode(
        y=alt.Y("method:N", title=None, sort=order, axis=alt.Axis(labelLimit=140)),
        color=_coloured(points, colours, None),
    )
    title = f"Change at +{COMPARED_AT:g} nats per token"
    dots = _marks(base, points, colours).encode(x=alt.X("value:Q", title=title, axis=_axis(metric, change=True)))
    errors = base.mark_rule().encode(x="low:Q", x2="high:Q")
    zero = alt.Chart(alt.Data(values=[{"value": 0}])).mark_rule(opacity=0.4).encode(x="value:Q")
    return (zero + errors + dots).properties(width=FILL, height=30 * max(len(order), 1))


def cost_panel(
    found: Sequence[ComparisonAtLoss], costs: Sequence[MetricRow], metric: Metric, colours: Colours
) -> alt.LayerChart:
    """A behaviour's change at one loss increase against the tokens that each method trains on.

    A method's cost is that of its dearest strength. Points are hollow where its strongest k costs less.
    """
    tokens: dict[str, float] = {}
    for row in costs:
        if row.metric == "training tokens":
            tokens[row.method] = max(row.value, tokens.get(row.method, 0.0))
    points = [{**point, "tokens": tokens[point["method"]]} for point in _compared(found) if point["method"] in tokens]
    base = alt.Chart(alt.Data(values=points)).encode(
        x=alt.X("tokens:Q", title="Training tokens", axis=alt.Axis(format="~s")),
        color=_coloured(points, colours, None),
    )
    dots = _marks(base, points, colours).encode(y=alt.Y("value:Q", title=None, axis=_axis(metric, change=True)))
    errors = base.mark_rule().encode(y="low:Q", y2="high:Q")
    return (errors + dots).properties(width=FILL, height=HEIGHT)


def _compared(found: Sequence[ComparisonAtLoss]) -> list[dict[str, Any]]:
    """Points of the comparison at the one loss increase that is drawn."""
    return [
        {
            "method": row.method,
            "value": row.value,
            "low": row.value - row.stderr,
            "high": row.value + row.stderr,
            "side": SIDES[row.side],
            "reached": row.reached,
        }
        for row in found
        if row.loss_increase == COMPARED_AT and math.isfinite(row.value + row.stderr)
    ]


def _marks(base: alt.Chart, points: Points, colours: Colours) -> alt.Chart:
    """A triangle for each side, hollow where the loss increase was not reached."""
    shapes = alt.Scale(domain=list(SIDES.values()), range=["triangle-up", "triangle-down"])
    legend = alt.Legend(orient="bottom", direction="vertical", symbolFillColor="gray", symbolStrokeColor="gray")
    shown = sorted({str(point["method"]) for point in points})
    fill = alt.Scale(domain=shown, range=[colours[name] for name in shown])
    return base.mark_point(size=90).encode(
        shape=alt.Shape("side:N", title="The behaviour turned", scale=shapes, legend=legend),
        fillOpacity=alt.condition("datum.reached", alt.value(1), alt.value(0)),
        fill=alt.Fill("method:N", scale=fill, legend=None),
        tooltip=["method:N", "side:N", *_numbers("value", "low", "high")],
    )


def study_panel(points: Points, metric: Metric, colours: Colours) -> alt.LayerChart:
    """Every method's change over seeds at one loss increase: methods down, a triangle for each side of k.

    Args:
        points: see `study_page`; of kind `mean` with an error, or of kind `seed`.
    """
    means, seeds = ([point for point in points if point["kind"] == kind] for kind in ("mean", "seed"))
    rows = alt.Y("method:N", title=None, axis=alt.Axis(labelLimit=140))
    title = f"Change at +{COMPARED_AT:g} nats per token"
    value = alt.X("value:Q", title=title, axis=_axis(metric, change=True))
    base = alt.Chart(alt.Data(values=means)).encode(y=rows, color=_coloured(means, colours, None))
    small = alt.Chart(alt.Data(values=seeds)).encode(y=rows, color=_coloured(means, colours, None))
    ticks = small.mark_circle(size=22, opacity=0.45).encode(x=value)
    errors = base.mark_rule().encode(x="low:Q", x2="high:Q")
    zero = alt.Chart(alt.Data(values=[{"value": 0}])).mark_rule(opacity=0.4).encode(x="value:Q")
    height = 30 * max(len({point["method"] for point in means}), 1)
    return (zero + ticks + errors + _marks(base, means, colours).encode(x=value)).properties(width=FILL, height=height)


def composition(norms: Mapping[str, float]) -> alt.Chart:
    """The vector's Frobenius norm by layer (across) and module (down)."""
    cells = [{**place(name), "norm": norm} for name, norm in norms.items()]
    return (
        alt.Chart(alt.Data(values=cells))
        .mark_rect()
        .encode(
            x=alt.X("layer:O", title="Layer (block, counted from 0)", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
            y=alt.Y("module:N", title=None),
            color=alt.Color(
                "sum(norm):Q",
                title="Norm",
                scale=alt.Scale(scheme="blues"),
                legend=alt.Legend(orient="bottom", direction="horizontal"),
            ),
            tooltip=["layer:O", "module:N", alt.Tooltip("sum(norm):Q", format=".4f")],
        )
        .properties(width=FILL, height=22 * len({cell["module"] for cell in cells}))
    )


def place(name: str) -> dict[str, Any]:
    """Layer and module of a parameter: 'model.layers.3.mlp.up_proj.weight' -> 3, 'mlp.up_proj'."""
    layer = layer_of(name)
    return {"layer": "-" if layer is None else layer, "module": module_of(name)}


def png(chart: alt.TopLevelMixin) -> bytes:
    """The chart as a PNG at twice the screen's resolution."""
    import vl_convert

    return bytes(vl_convert.vegalite_to_png(chart.to_json(), scale=2.0))
