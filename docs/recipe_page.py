"""docs/recipe.md from the code: every field of a recipe, its type, default and meaning.

The meaning of a field is the comment beside it in the source, so that it stands in one place.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import textwrap
import tokenize
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from weightsteer.data_building.sampling_settings import SamplingRecipe
from weightsteer.evaluation.task_spec import TaskFields
from weightsteer.runs.recipe import Recipe
from weightsteer.runs.recipe_fields import (
    DataRecipe,
    DialRecipe,
    EngineRecipe,
    FinetuneRecipe,
    GenerateRecipe,
    JudgeRecipe,
    LoadRecipe,
    RepairRecipe,
    SampleRecipe,
    SweepRecipe,
)
from weightsteer.training.settings import TrainSettings

PARTS: Mapping[str, type] = {  # where a part stands in a recipe -> its class
    "The whole file": Recipe,
    "load": LoadRecipe,
    "data": DataRecipe,
    "data.sampling": SamplingRecipe,
    "train": TrainSettings,
    "tasks": TaskFields,
    "sweep": SweepRecipe,
    "dial": DialRecipe,
    "samples": SampleRecipe,
    "judge": JudgeRecipe,
    "engine": EngineRecipe,
    "first_finetune": FinetuneRecipe,
    "repair_target": RepairRecipe,
    "first_finetune.generate": GenerateRecipe,
}
WORDS = {
    int: "whole number",
    float: "number",
    str: "text",
    bool: "true or false",
    Any: "any value",
    object: "any value",
}
TRAINING = {  # of `TrainSettings`, where no comment stands beside a field
    "kind": "lora, bias or full; in a recipe it follows from the method",
    "rank": "rank of the LoRA",
    "alpha": "alpha of the LoRA: alpha / rank scales the change",
    "learning_rates": "each is tried; the lowest validation loss wins",
    "epochs": "passes over the data",
    "max_steps": "steps, in place of epochs",
    "batch_size": "examples in a step",
    "accumulation": "batches of which the gradients are summed to one step",
    "weight_decay": "AdamW's weight decay",
    "warmup_steps": "steps in which the learning rate rises to its full value",
    "seed": "seed of the adapter and of the order; a recipe that does not name it gives its own",
}
INTRO = """# Recipe fields

`make docs` generates this page from the code. A recipe is one YAML file; `weightsteer run` takes it from
the training pairs to the report. A field that is left out has its default, and one that is not in
these tables is an error. `weightsteer list recipes` names the recipes that are shipped, of which `demo`
is a short one to begin with. Paths are relative to the folder in which the command runs. The names of
methods and tasks are explained in [Methods and tasks](methods.md).
"""


def recipe_page() -> str:
    """One table for each part of a recipe."""
    parts = [INTRO]
    for place, part in PARTS.items():
        about = " ".join((inspect.getdoc(part) or "").partition("Raises:")[0].split())
        parts += [f"## {place}", "", textwrap.fill(about, 100), "", *_rows(part), ""]
    return "\n".join(parts)


def _rows(part: type) -> list[str]:
    hints, defaults, meanings = typing.get_type_hints(part), defaults_of(part), meanings_of(part)
    lines = ["| field | value | default | meaning |", "| --- | --- | --- | --- |"]
    for name, default in defaults.items():
        cells = (f"`{_shown_name(part, name)}`", _type(hints[name]), _default(default), meanings.get(name, ""))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def _shown_name(part: type, name: str) -> str:
    """A field as a recipe has it, where Python calls it otherwise."""
    alias = part.model_fields[name].alias if issubclass(part, BaseModel) else None
    return alias or name


def defaults_of(part: type) -> dict[str, Any]:
    """Field -> default, or `PydanticUndefined` where there is none."""
    if issubclass(part, BaseModel):
        return {name: field.get_default(call_default_factory=True) for name, field in part.model_fields.items()}
    found = {}
    for entry in dataclasses.fields(part):
        made = entry.default_factory is not dataclasses.MISSING
        default = entry.default_factory() if made else entry.default  # type: ignore[misc]
        found[entry.name] = PydanticUndefined if default is dataclasses.MISSING else default
    return found


def _default(default: Any) -> str:
    """A default as it would stand in YAML; of a part, none, since its own table says it."""
    if default is PydanticUndefined:
        return "must be given"
    if default is None:
        return ""
    if isinstance(default, BaseModel) or dataclasses.is_dataclass(default):
        default = default.model_dump(exclude_defaults=True) if isinstance(default, BaseModel) else {}
        return f"`{_yaml(default)}`" if default else "as below"
    return f"`{_yaml(list(default) if isinstance(default, tuple) else default)}`"


def _yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...").strip()


def _type(hint: Any) -> str:
    """A type in words."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _type(inner[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(one) for one in inner if one is not type(None))
    if origin is Literal:
        return " or ".join(f"`{_yaml(one)}`" for one in inner)
    if origin in (list, tuple):
        return f"list of {_plural(_type(inner[0]))}"
    if origin in (dict, Mapping):
        return f"mapping of {_plural(_type(inner[0]))} to {_plural(_type(inner[1]))}"
    place = next((place for place, part in PARTS.items() if part is hint), None)
    return f"[{place}](#{place.replace('.', '')})" if place else WORDS.get(hint, getattr(hint, "__name__", str(hint)))


def _plural(words: str) -> str:
    return f"{words}s" if words in ("text", "number", "whole number", "any value") else words


def meanings_of(part: type) -> dict[str, str]:
    """Field -> the comment beside it, or on the lines above it, in the class and those that it inherits from."""
    found: dict[str, str] = {}
    for cls in reversed(part.__mro__):
        if cls.__module__.startswith("weightsteer"):
            found |= _comments(textwrap.dedent(inspect.getsource(cls)))
    return {**TRAINING, **{name: text for name, text in found.items() if text}} if part is TrainSettings else found


def _comments(source: str) -> dict[str, str]:
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    lines, found = source.splitlines(), {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            within = [comments[line] for line in range(node.lineno, (node.end_lineno or 0) + 1) if line in comments]
            above, line = list[str](), node.lineno - 1
            while not within and line in comments and lines[line - 1].strip().startswith("#"):
                above, line = [comments[line], *above], line - 1
            found[node.target.id] = " ".join(within or above)
    return found


def without_meaning() -> Sequence[str]:
    """Fields that no comment explains: a test wants none."""
    return [
        f"{place}: {name}"
        for place, part in PARTS.items()
        for name in defaults_of(part)
        if not meanings_of(part).get(name)
    ]
