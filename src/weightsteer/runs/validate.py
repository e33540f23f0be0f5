"""A recipe's mistakes, found before any work."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NoReturn

from ..behavior import Behavior, Prompt, pairs_of
from ..data_building.sampling import asked_questions
from ..errors import SteerError
from ..evaluation.metrics import metric_key
from ..evaluation.results import BASE
from ..evaluation.tasks.scenarios import Scenario
from ..evaluation.tasks.task import ItemTask, Task
from ..example_files.checks import refuse_unfit
from ..former_names import METHODS as FORMER_METHODS
from ..judges.judge import rubric_of
from ..steering.methods import METHODS
from ..vectors.expression import check_expression
from .dial_pairs import dial_pairs, unmoved_pairs
from .recipe import Recipe
from .recipe_fields import VARIANT_VECTORS
from .trainings import refuse_combinations, refuse_few_rows

LEAST_PAIRS = 2  # of which one is held out of training


def validate_recipe(recipe: Recipe, behavior: Behavior, tasks: Mapping[str, Task]) -> None:
    """Check what data and tasks tell without a model, beside `check_alone`.

    Raises:
        SteerError: the field, what was expected and what was found.
    """
    if sides := recipe.sides():
        refuse_unfit(*sides)
        refuse_few_rows(recipe, min(map(len, sides)))
    _check_tasks(recipe, tasks)
    _check_methods(recipe, behavior)
    _check_rubric(recipe, behavior)
    _check_overlap(recipe, behavior, tasks)


def _refuse(recipe: Recipe, reason: str) -> NoReturn:
    raise SteerError(f"recipe {recipe.name}: {reason}")


def check_alone(recipe: Recipe) -> None:
    """Check what the recipe tells by itself of its trainings and strengths.

    Raises:
        SteerError: the field, what was expected and what was found.
    """
    finetunes = [wanted.train for wanted in (recipe.first_finetune, recipe.repair_target) if wanted]
    for fields in (recipe.train, *recipe.train_of.values(), *finetunes):
        recipe.train_settings(fields)
        for name in ("kind", "snapshots"):
            if name in fields:
                _refuse(recipe, f"{name!r} of a training follows from the method; leave it out")
    refuse_combinations(recipe)
    _check_strengths(recipe)
    _check_sweep(recipe)
    _check_variants(recipe)


def check_names(recipe: Recipe) -> None:
    """Check, without the tasks' data, that each metric which is named is one of a task that is there.

    Raises:
        SteerError: a metric that no task has, or two tasks of one name.
    """
    names = recipe.task_names()
    stated: dict[str, list[str]] = {}
    for task, metric in recipe.metrics:
        stated.setdefault(task, []).append(metric)
    for text in (recipe.sweep.behavior, *recipe.budget, *recipe.plot):
        _task_of(recipe, text, names)
    require_metrics(recipe, stated)


def require_metrics(recipe: Recipe, found: Mapping[str, Collection[str]]) -> None:
    """Raise where the recipe names a metric that its task does not measure.

    Args:
        found: task -> its metrics, of the tasks of which they are known.
    """
    for text in (recipe.sweep.behavior, *recipe.budget, *recipe.plot):
        name, metric = metric_key(text)
        if name in found and metric not in found[name]:
            _refuse(recipe, f"{text}: task {name!r} has no such metric; it has {', '.join(found[name])}")


def _task_of(recipe: Recipe, text: str, tasks: Collection[str]) -> str:
    """The task of a metric that the recipe names.

    Raises:
        SteerError: it is not among `tasks`.
    """
    name = metric_key(text)[0]
    if name not in tasks:
        _refuse(recipe, f"field 'tasks': needs a task {name!r}, for {text}")
    return name


def _check_tasks(recipe: Recipe, tasks: Mapping[str, Task]) -> None:
    """Choosing needs validation items, the report test items."""
    needs = dict.fromkeys((recipe.sweep.behavior, *recipe.budget), "validation")
    needs |= {"prose/nll": "test"} | {text: "test" for text in recipe.plot if text not in needs}
    for text, split in needs.items():
        name = _task_of(recipe, text, tasks)
        if split not in tasks[name].splits:
            _refuse(recipe, f"{text}: task {name!r} has no {split} items; change its 'split'")


def _check_methods(recipe: Recipe, behavior: Behavior) -> None:
    """Each method's own demands, as the registry states them."""
    for name in recipe.sweep.methods:
        method = METHODS[name]
        if name == "system prompt" and not behavior.positive_prompts:
            _refuse(recipe, f"method {name!r} needs the field 'behavior': a trait file with system prompts")
        if package := method.missing_package():
            _refuse(recipe, f"method {name!r} needs {package}")
        sides = recipe.sides()
        if method.needs_pairs and sides and len(pairs_of(*sides)) < LEAST_PAIRS:
            _refuse(recipe, f"method {name!r} needs pairs: questions that D+ and D- have in common")
        if method.uses_dial_pairs and not recipe.data.sampling:
            dial_pairs(recipe, recipe.sides() or ([], []))
            unmoved_pairs(recipe, recipe.sides() or ([], []))


def _check_strengths(recipe: Recipe) -> None:
    """The strengths that a recipe lists for a method, or that it leaves to be searched."""
    methods = recipe.sweep.methods
    if "contrastive" not in methods:
        _refuse(recipe, "field 'sweep.methods': needs 'contrastive', whose k is chosen")
    for name, ks in methods.items():
        rule = METHODS[name].ks
        if (ks is None and rule.must_be_listed) or (ks is not None and not any(ks)):
            _refuse(recipe, f"method {name!r} needs a list of k, such as [-1, 1]; found {ks}")
        if ks and len(set(ks)) < len(ks):
            _refuse(recipe, f"method {name!r}: a k is given twice in {ks}; give it once")
        for k in ks or ():
            if not rule.allows(k):
                _refuse(recipe, f"method {name!r}: expected {rule.described}; found {k:g}")
        if METHODS[name].needs_repair_target and recipe.repair_target is None:
            _refuse(recipe, f"method {name!r} needs the field 'repair_target'")


def _check_sweep(recipe: Recipe) -> None:
    """What the sweep says of methods must be said of its own, once."""
    sweep = recipe.sweep
    known = {*sweep.methods, *sweep.variants}
    if not sweep.fractions or not sweep.sides:
        _refuse(recipe, "field 'sweep': fractions and sides must not be empty")
    if len(set(sweep.sides)) < len(sweep.sides):
        _refuse(recipe, "field 'sides': a side is given twice; give it once")
    if sweep.kl is not None and "token_kl" not in (task.shown_name for task in recipe.tasks):
        _refuse(recipe, "field 'sweep.kl': needs a task 'token_kl'")
    for name in recipe.train_of:
        if name not in sweep.methods:
            _refuse(recipe, f"field 'train_of': {name!r} is no method of its sweep")
        for other in recipe.train_of:
            if METHODS[other].training == METHODS[name].training and recipe.train_of[other] != recipe.train_of[name]:
                _refuse(
                    recipe, f"field 'train_of': {name!r} and {other!r} share one training; give both the same fields"
                )
    for name in (*sweep.fractions_of, *sweep.items_of):
        if name not in known:
            _refuse(recipe, f"{name!r} is no method of its sweep; it has {', '.join(known)}")
    for name in sweep.fractions_of:
        if sweep.methods.get(name) is not None:
            _refuse(recipe, f"field 'fractions_of': {name!r} has a list of k; leave one out")
    for name, count in sweep.items_of.items():
        if count < 1:
            _refuse(recipe, f"field 'items_of': {name!r}: expected 1 or more, found {count}")


def _check_variants(recipe: Recipe) -> None:
    for name, text in recipe.sweep.variants.items():
        if name == BASE or name in METHODS or name in FORMER_METHODS:
            _refuse(recipe, f"variant {name!r} has the name of a method; choose another")
        try:
            check_expression(text, VARIANT_VECTORS)
        except SteerError as error:
            _refuse(recipe, f"variant {name!r}: {error}")


def _check_rubric(recipe: Recipe, behavior: Behavior) -> None:
    """Answers that a judge is to filter need the behaviour's rubric."""
    sampling = recipe.data.sampling
    if sampling and recipe.judge and not sampling.likelihood:
        rubric_of(behavior)


def _check_overlap(recipe: Recipe, behavior: Behavior, tasks: Mapping[str, Task]) -> None:
    """No task asks a prompt that is trained on, or that coefficients are learned on."""
    trained = set(_trained_prompts(recipe, behavior))
    for name, task in tasks.items():
        items = task.items if isinstance(task, ItemTask) else ()
        if shared := sum(not trained.isdisjoint(_asked_by(item)) for item in items):
            _refuse(recipe, f"task {name!r} asks {shared} questions that are trained on; give it 'data' with others")


def _asked_by(item: Any) -> set[Prompt]:
    """The prompts of an item, whatever its task calls them."""
    if isinstance(item, Scenario):
        return {item.unlettered[0], *item.lettered("")}
    named = {getattr(item, name) for name in ("prompt", "question", "proposal", "confirmed") if getattr(item, name, "")}
    return named | set(getattr(item, "prompts", ()))


def _trained_prompts(recipe: Recipe, behavior: Behavior) -> Iterable[Prompt]:
    for side in recipe.sides() or ():
        yield from (example.prompt for example in side)
    if any(METHODS[name].uses_dial_pairs for name in recipe.sweep.methods):
        sides = recipe.sides() or ([], [])  # none yet, where they are sampled
        yield from (pair.prompt for pair in (*dial_pairs(recipe, sides), *unmoved_pairs(recipe, sides)))
    if recipe.data.sampling:
        yield from asked_questions(behavior, recipe.data.sampling.questions)
    for wanted in (recipe.first_finetune, recipe.repair_target):
        if wanted is not None and wanted.data:
            yield from (example.prompt for example in recipe.finetune_examples(wanted))
