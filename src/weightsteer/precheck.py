"""A recipe's mistakes, found before any work."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from importlib.util import find_spec
from typing import get_args

from .behavior import Behavior
from .cells import BASE
from .contrast import asked_questions
from .errors import SteerError
from .expression import FUNCTIONS
from .judge import rubric_of
from .recipe import Recipe, metric_key
from .recipe_fields import SNAPSHOTS, MethodName
from .tasks.answers import AnswerTask
from .tasks.task import ChoiceTask, ReplyTask, Task

SHARES = tuple(number / SNAPSHOTS for number in range(1, SNAPSHOTS + 1))  # of a training, at its snapshots
VECTORS = ("w", "plus", "minus")  # what a variant may be made of


def refuse_what_cannot_run(recipe: Recipe, behavior: Behavior, tasks: Mapping[str, Task]) -> None:
    """Check what can be known without a model.

    Raises:
        SteerError: the field, what was expected and what was found.
    """
    check_trainings(recipe)
    _check_tasks(recipe, tasks)
    _check_strengths(recipe)
    _check_variants(recipe)
    _check_needs(recipe, behavior)
    _check_overlap(recipe, behavior, tasks)


def check_trainings(recipe: Recipe) -> None:
    """Settings that are known, of the right kind, and not the method's own.

    Raises:
        SteerError: the field, what was expected and what was found.
    """
    for fields in (recipe.train, *recipe.train_of.values(), *(t.train for t in (recipe.start, recipe.drift) if t)):
        recipe.train_settings(fields)
        for name in ("kind", "snapshots"):
            if name in fields:
                raise SteerError(f"recipe {recipe.name}: {name!r} of a training follows from the method; leave it out")


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
    listed = {str(name) for name, ks in methods.items() if ks is not None}
    for text in recipe.sweep.fractions_of:
        if text in listed:
            raise SteerError(f"recipe {recipe.name}: field 'fractions_of': {text!r} has a list of k; leave one out")
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
        for node in ast.walk(tree):
            match node:
                case ast.Call(func=ast.Name(id=function), keywords=words):
                    if any(word.arg not in FUNCTIONS.get(function, ()) for word in words):
                        taken = ", ".join(FUNCTIONS.get(function, ())) or "none"
                        raise SteerError(f"recipe {recipe.name}: variant {name!r}: options of {function}: {taken}")
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
    if contrast and recipe.judge and not contrast.likelihood:
        rubric_of(behavior)


def _check_overlap(recipe: Recipe, behavior: Behavior, tasks: Mapping[str, Task]) -> None:
    """No item of a task that is like what is trained on is itself trained on."""
    sides, contrast = recipe.sides(), recipe.data.contrast
    trained = {example.prompt for side in sides or () for example in side}
    if contrast:
        trained |= set(asked_questions(behavior, contrast.questions))
    for tune in (recipe.start, recipe.drift):
        if tune is not None and tune.data:
            trained |= {example.prompt for example in recipe.tune_examples(tune)}
    for spec in recipe.tasks:
        if spec.task not in ("preference", "trait", "answers"):
            continue
        task = tasks[spec.name or spec.task]
        assert isinstance(task, ChoiceTask | ReplyTask | AnswerTask)
        if shared := sum(item.prompt in trained for item in task.items):
            raise SteerError(
                f"recipe {recipe.name}: task {task.name!r} asks {shared} questions that are trained on; give it 'data' "
                "with others"
            )
