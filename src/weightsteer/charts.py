"""Rows -> Vega-Lite charts (by altair; PNG by vl-convert, no browser and no network)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import altair as alt

from .cells import BASE
from .matched import Matched
from .names import layer_of, module_of
from .records import CHANGE, Row

Table = Sequence[Mapping[str, Any]]
TITLES = {
    ("preference", "margin"): "Prefers the behaviour, held-out questions (nats per token)",
    ("preference", "share"): "Prefers the behaviour (share of held-out questions)",
    ("false_beliefs", "follows"): "Follows the user's false belief (share)",
    ("facts", "accuracy"): "Accuracy on plain facts (share)",
    ("prose", "nll"): "Loss on ordinary text (nats per token)",
}
DAMAGE = ("prose", "nll")
COMPARED_AT = 0.1  # nats per token of damage, at which behaviour is set against training tokens
WIDTH, HEIGHT = 380, 280


def title_of(task: str, metric: str) -> str:
    """What a reader should see for a metric; tasks under another name keep the metric's own words."""
    plain = metric.removesuffix(CHANGE)
    title = TITLES.get((task, plain), f"{task}: {plain}")
    return title if plain == metric else f"Change: {title[0].lower()}{title[1:]}"


def main_keys(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The metrics to show first: all but the second view of a metric (a margin beside its share) and changes."""
    keys = list(dict.fromkeys((row.task, row.metric) for row in rows if not row.metric.endswith(CHANGE)))
    both = {task for task, metric in keys if metric == "margin"}
    second = {(task, "share" if task == "preference" else "margin") for task in both}
    return [key for key in keys if key not in second]


def behaviour_against_capability(rows: Sequence[Row], behaviors: Sequence[tuple[str, str]]) -> alt.HConcatChart:
    """One panel a behaviour: its value against the rise of loss on ordinary text, one curve a method.

    A point is the base's value and the paired change from it, since methods may be measured on fewer items
    than the base. Darker points are larger |k|; bars are one standard error of the change.
    """
    panels = [_panel(_against_damage(rows, key), key) for key in behaviors]
    return alt.hconcat(*panels).resolve_scale(color="shared")


def _against_damage(rows: Sequence[Row], key: tuple[str, str]) -> list[dict[str, Any]]:
    """Points (damage, value) of every method; the base starts each method's curve at no damage."""
    table = {(r.method, r.k, r.task, r.metric): r for r in rows}
    task, metric = key
    methods = list(dict.fromkeys(r.method for r in rows if r.method != BASE))
    points = []
    for method in methods:
        ks = sorted({r.k for r in rows if r.method == method} | {0.0})
        largest = max(abs(k) for k in ks)
        for k in ks:
            name = method if k else BASE
            change = table.get((name, k, task, f"{metric}{CHANGE}"))
            damage = table.get((name, k, DAMAGE[0], f"{DAMAGE[1]}{CHANGE}"))
            if change is None or damage is None or (BASE, 0.0, *key) not in table:
                continue
            if not (math.isfinite(change.value) and math.isfinite(damage.value)):
                continue  # steered so far that the model overflows
            points.append(
                {
                    "method": method,
                    "k": k,
                    "strength": abs(k) / largest,
                    "damage": damage.value,
                    **_with_error(replace(change, value=table[BASE, 0.0, *key].value + change.value)),
                }
            )
    return points


def _with_error(row: Row) -> dict[str, Any]:
    error = 0.0 if math.isnan(row.stderr) else row.stderr
    return {"value": row.value, "low": row.value - error, "high": row.value + error, "n": row.n}


def _panel(points: Table, key: tuple[str, str]) -> alt.LayerChart:
    base = alt.Chart(alt.Data(values=list(points))).encode(
        x=alt.X("damage:Q", title="Rise of loss on ordinary text (nats per token)"), color=_method_colours(points)
    )
    value = alt.Y("value:Q", title=None, scale=alt.Scale(zero=False))
    tooltip = ["method:N", "k:Q", *(alt.Tooltip(f"{n}:Q", format=".3f") for n in ("value", "low", "high", "damage"))]
    line = base.mark_line(strokeWidth=1.5, opacity=0.6).encode(y=value, order="k:Q")
    bars = base.mark_rule().encode(y="low:Q", y2="high:Q")
    dots = base.mark_circle(size=70).encode(
        y=value,
        opacity=alt.Opacity("strength:Q", scale=alt.Scale(domain=[0, 1], range=[0.25, 1]), legend=None),
        tooltip=tooltip,
    )
    return (bars + line + dots).properties(width=WIDTH, height=HEIGHT, title=title_of(*key))


def behaviour_against_cost(
    found: Mapping[tuple[str, str], Sequence[Matched]], costs: Sequence[Row]
) -> alt.HConcatChart:
    """One panel a behaviour: its change at one loss of capability against the tokens that each method trains on.

    A method's cost is that of its dearest strength. Points are hollow where its strongest k costs less than the loss.
    """
    tokens: dict[str, float] = {}
    for row in costs:
        if row.metric == "training tokens":
            tokens[row.method] = max(row.value, tokens.get(row.method, 0.0))
    return alt.hconcat(*[_cost_panel(rows, tokens, key) for key, rows in found.items()]).resolve_scale(color="shared")


def _cost_panel(rows: Sequence[Matched], tokens: Mapping[str, float], key: tuple[str, str]) -> alt.LayerChart:
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
        if row.method in tokens and row.damage == COMPARED_AT and math.isfinite(row.value + row.stderr)
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
    title = f"{title_of(key[0], f'{key[1]}{CHANGE}')} at {COMPARED_AT:g} nats"
    return (base.mark_rule().encode(y="low:Q", y2="high:Q") + dots).properties(width=WIDTH, height=HEIGHT, title=title)


def _method_scale(points: Table) -> alt.Scale:
    few = len({point["method"] for point in points}) <= 10
    return alt.Scale(scheme="tableau10" if few else "tableau20")  # no colour twice


def _method_colours(points: Table) -> alt.Color:
    legend = alt.Legend(orient="bottom", columns=4)
    return alt.Color("method:N", title="Method", scale=_method_scale(points), legend=legend)


def dose_response(rows: Sequence[Row], method: str, keys: Sequence[tuple[str, str]]) -> alt.VConcatChart:
    """One panel a metric: its change from k = 0 for one method, item by item, with one standard error."""
    panels = [_dose_panel(rows, method, (task, f"{metric}{CHANGE}")) for task, metric in keys]
    pairs = [alt.hconcat(*panels[i : i + 2]) for i in range(0, len(panels), 2)]
    return alt.vconcat(*pairs)


def _dose_panel(rows: Sequence[Row], method: str, key: tuple[str, str]) -> alt.LayerChart:
    wanted = [r for r in rows if r.method in (method, BASE) and (r.task, r.metric) == key]
    points = [{"k": r.k, **_with_error(r)} for r in wanted if math.isfinite(r.value)]
    base = alt.Chart(alt.Data(values=points)).encode(x=alt.X("k:Q", title="k (multiples of the vector)"))
    value = alt.Y("value:Q", title=None)
    tooltip = [alt.Tooltip(f"{name}:Q", format=".3f") for name in ("k", "value", "low", "high", "n")]
    bars = base.mark_rule().encode(y="low:Q", y2="high:Q")
    line = base.mark_line(point=True).encode(y=value, tooltip=tooltip)
    return (bars + line).properties(width=WIDTH, height=HEIGHT * 0.6, title=title_of(*key))


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
