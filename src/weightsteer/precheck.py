"""A recipe's mistakes, found before any work."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from importlib.util import find_spec
from typing import get_args

from .behavior import SHIPPED, Behavior
from .cells import BASE
from .errors import SteerError
from .expression import FUNCTIONS
from .judge import rubric_of
from .recipe import Recipe, metric_key
from .recipe_fields import SNAPSHOTS, MethodName
from .tasks.task import Task

SHARES = tuple(number / SNAPSHOTS for number in range(1, SNAPSHOTS + 1))  # of a training, at its snapshots
VECTORS = ("w", "plus", "minus")  # what a variant may be made of


def refuse_what_cannot_run(recipe: Recipe, behavior: Behavior, tasks: Mapping[str, Task]) -> None:
    """Check what can be known without a model.

    Raises:
        SteerError: the field, what was expected and what was found.
    """
    for fields in (recipe.train, *recipe.train_of.values(), *(t.train for t in (recipe.start, recipe.drift) if t)):
        recipe.train_settings(fields)
    _check_tasks(recipe, tasks)
    _check_strengths(recipe)
    _check_variants(recipe)
    _check_needs(recipe, behavior)


def _check_tasks(recipe: Recipe, tasks: Mapping[str, Task]) -> None:
    """Choosing needs validation items, the report test items."""
    needs = dict.fromkeys((recipe.sweep.behavior, *recipe.budget), "validation")
    needs |= {"prose/nll": "test"} | {text: "test" for text in recipe.plot if text not in needs}
    for text, split in needs.items():
        name = metric_key(text)[0]
        if name not in tasks:
            raise SteerError(f"recipe {recipe.name}: field 'tasks': needs a task {name!r}, for {text}")
        if split not in tasks[name].splits:
            raise SteerError(f"recipe {recipe.name}: {text}: task {name!r} has no {split} items; change its 'split'")


def _check_strengths(recipe: Recipe) -> None:
    methods, known = recipe.sweep.methods, {*recipe.sweep.methods, *recipe.sweep.variants}
    if "contrastive" not in methods:
        raise SteerError(f"recipe {recipe.name}: field 'sweep.methods': needs 'contrastive', whose k is chosen")
    allowed = {"system prompt": (1.0,), "fine-tuned": SHARES, "DPO": SHARES}
    for name, ks in methods.items():
        if (ks is not None and not any(ks)) or (ks is None and name in ("system prompt", "joint")):
            raise SteerError(f"recipe {recipe.name}: method {name!r} needs a list of k, such as [-1, 1]; found {ks}")
        for k in ks or []:
            if name in allowed and abs(k) not in (0.0, *allowed[name]):
                shown = ", ".join(f"{size:g}" for size in allowed[name])
                raise SteerError(f"recipe {recipe.name}: method {name!r}: expected k of {shown} or minus; found {k:g}")
            if name == "joint" and (k != round(k) or not k):
                raise SteerError(f"recipe {recipe.name}: method 'joint': expected whole numbers of copies; found {k:g}")
    if not recipe.sweep.fractions or not recipe.sweep.sides:
        raise SteerError(f"recipe {recipe.name}: field 'sweep': fractions and sides must not be empty")
    for text in (*recipe.sweep.fractions_of, *recipe.sweep.items_of):
        if text not in known:
            raise SteerError(f"recipe {recipe.name}: {text!r} is no method of its sweep; it has {', '.join(known)}")
    for text, count in recipe.sweep.items_of.items():
        if count < 1:
            raise SteerError(f"recipe {recipe.name}: field 'items_of': {text!r}: expected 1 or more, found {count}")
    for name in recipe.train_of:
        if name not in methods:
            raise SteerError(f"recipe {recipe.name}: field 'train_of': {name!r} is no method of its sweep")


def _check_variants(recipe: Recipe) -> None:
    """Names and syntax; whether the layers and ranks exist is known when the vector is there."""
    for name, text in recipe.sweep.variants.items():
        if name in (BASE, *get_args(MethodName)):
            raise SteerError(f"recipe {recipe.name}: variant {name!r} has the name of a method; choose another")
        try:
            tree = ast.parse(text.strip(), mode="eval")
        except SyntaxError:
            raise SteerError(f"recipe {recipe.name}: variant {name!r}: {text!r} cannot be read") from None
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - FUNCTIONS.keys()
        if odd := sorted(used - set(VECTORS)):
            raise SteerError(f"recipe {recipe.name}: variant {name!r}: expected w, plus and minus; found {odd[0]!r}")


def _check_needs(recipe: Recipe, behavior: Behavior) -> None:
    methods, contrast = recipe.sweep.methods, recipe.data.contrast
    for name in ("joint", "undo"):
        if name in methods and recipe.drift is None:
            raise SteerError(f"recipe {recipe.name}: method {name!r} needs the field 'drift'")
    if "DPO" in methods and find_spec("trl") is None:
        raise SteerError(f"recipe {recipe.name}: method 'DPO' needs TRL; pip install 'weightsteer[dpo]'")
    if contrast and recipe.behavior not in SHIPPED:
        for task in recipe.tasks:
            if task.task == "trait" and (task.data or task.behavior or recipe.behavior) == recipe.behavior:
                raise SteerError(
                    f"recipe {recipe.name}: task 'trait' would ask the questions of {recipe.behavior} that D+ and D- "
                    "are made from; give it 'data', a trait file with other questions"
                )
    if contrast and recipe.judge and not contrast.likelihood:
        rubric_of(behavior)
