"""Names that earlier versions used: a user is told the new one, and what those versions wrote is still read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

RECIPE_FIELDS = {  # field, by its former place -> its own name now
    "start": "first_finetune",
    "drift": "repair_target",
    "drift.joint_side": "desired_side",
    "drift.joint_examples": "desired_examples",
    "data.contrast": "sampling",
    "sweep.damage": "loss_increase",
    "sweep.probe_items": "search_items",
}
METHODS = {"undo": "negated task vector", "joint": "joint training"}
FUNCTIONS = {"lines": "scale_by_depth", "boost": "boost_subspace", "plus": "positive", "minus": "negative"}
VERBS = {"contrast": "sample"}
OPTIONS = {  # verb -> option -> its name now
    "run": {"--rehearse": "--dry-run"},
    "compare": {"--damages": "--loss-increases"},
    "show": {"--plus": "--positive", "--minus": "--negative"},
    "export": {"--minus": "--negative"},
}
PYTHON_NAMES = {
    "ContrastSettings": "SamplingSettings",
    "Row": "MetricRow",
    "build_sides": "sample_sides",
    "contrast_vector": "subtract_finetunes",
    "export_adapter": "WeightVector.export_peft",
}


def find_former(fields: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first recipe field or method that has another name now: (the former one, the new one)."""
    for dotted, new in RECIPE_FIELDS.items():
        parent, _, leaf = dotted.rpartition(".")
        for place in dict.fromkeys((parent, RECIPE_FIELDS.get(parent, parent))):
            part = fields.get(place) if place else fields
            if isinstance(part, Mapping) and leaf in part:
                return ".".join(filter(None, (place, leaf))), ".".join(filter(None, (place, new)))
    sweep = fields.get("sweep")
    methods = sweep.get("methods") if isinstance(sweep, Mapping) else None
    named = methods if isinstance(methods, Mapping) else {}  # another type is refused where the fields are checked
    return next(((name, METHODS[name]) for name in named if name in METHODS), None)


def with_new_names(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's fields as an older version kept them, in this version's names."""
    found = _renamed(fields, "")
    sweep = found.get("sweep")
    if isinstance(sweep, Mapping):
        found["sweep"] = _with_new_methods(sweep)
    return found


def _renamed(fields: Mapping[str, Any], parent: str) -> dict[str, Any]:
    found = {}
    for name, value in fields.items():
        dotted = f"{parent}.{name}" if parent else name
        inner = _renamed(value, dotted) if isinstance(value, Mapping) else value
        found[RECIPE_FIELDS.get(dotted, name)] = inner
    return found


def _with_new_methods(sweep: Mapping[str, Any]) -> dict[str, Any]:
    """The sweep's methods and its expressions in new names."""
    found = dict(sweep)
    for field in ("methods", "fractions_of", "items_of"):
        if isinstance(found.get(field), Mapping):
            found[field] = {METHODS.get(name, name): value for name, value in found[field].items()}
    if isinstance(found.get("variants"), Mapping):
        pattern = re.compile(rf"\b({'|'.join(FUNCTIONS)})\b")
        found["variants"] = {
            name: pattern.sub(lambda match: FUNCTIONS[match[1]], text) if isinstance(text, str) else text
            for name, text in found["variants"].items()
        }
    return found
