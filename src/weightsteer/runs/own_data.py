"""A recipe with data of its own: which behaviour it is about, and the pairs that it keeps out of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..behavior import SHIPPED, Behavior, ContrastPair, Example, Prompt, pairs_of, sample_pairs, sides_of
from ..errors import SteerError
from ..example_files.load import load_examples, load_pairs
from ..files import read_jsonl
from .recipe_fields import DataRecipe, SweepRecipe

if TYPE_CHECKING:
    from .recipe import Recipe

OWN = ""  # a recipe's behaviour that is known by its pairs alone
ASKS_PAIRS = "preference"  # the task that measures a behaviour on pairs
SHARE, LEAST, MOST = 5, 4, 64  # one prompt in so many is held out, and how many at least and at most


def with_own_behavior(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """A recipe's fields, about its own data where it states no behaviour: nothing shipped stands in for it."""
    data = fields.get("data")
    if "behavior" in fields or data is None:
        return fields
    if not isinstance(data, Mapping | DataRecipe):
        return fields  # it is refused where the fields are checked
    named = data if isinstance(data, Mapping) else vars(data)
    pairs = named.get("pairs")
    if isinstance(pairs, str) and pairs in SHIPPED:
        return {**fields, "behavior": pairs}
    if not (pairs or named.get("positive")):
        return fields
    sweep = fields.get("sweep") or {}
    if not isinstance(sweep, Mapping):
        return {**fields, "behavior": OWN}
    methods = {name: ks for name, ks in SweepRecipe().methods.items() if name != "system prompt"}  # it has no prompts
    plot = [sweep.get("behavior", SweepRecipe().behavior)]
    return {"plot": plot, **fields, "behavior": OWN, "sweep": {"methods": methods, **sweep}}


def behavior_of(recipe: Recipe) -> Behavior:
    """The recipe's behaviour; one that is known by its pairs alone has its held-out prompts, or neutral ones."""
    if recipe.behavior != OWN:
        return Behavior.load(recipe.behavior)
    from ..evaluation.tasks.data import task_file

    held = [pair.prompt for pair in held_out_pairs(recipe) if isinstance(pair.prompt, str)]
    shipped = [row["prompt"] for row in read_jsonl(task_file("neutral.jsonl", None), required=("prompt",))]
    questions = tuple(dict.fromkeys([*shipped, *held]))  # a report takes its prompts from the end
    return Behavior(recipe.name, (), (), questions, description=described(recipe.data))


def described(data: DataRecipe) -> str:
    """What a reader sees of a behaviour that is known by its pairs alone."""
    return shown_by(data.pairs, data.positive, data.negative)


def shown_by(*files: str | None) -> str:
    """What there is to say of a behaviour of which there are only files of answers; "" without one."""
    names = [Path(name).name for name in files if name]
    return f"The behaviour that the pairs in {' and '.join(names)} show." if names else ""


def asks_own_pairs(recipe: Recipe) -> bool:
    """Whether a task is to be measured on pairs of the recipe's own data."""
    own = recipe.data.pairs not in SHIPPED and recipe.data.sampling is None and recipe.behavior not in SHIPPED
    return own and any(task.task == ASKS_PAIRS and not (task.data or task.behavior) for task in recipe.tasks)


def own_sides(recipe: Recipe) -> tuple[list[Example], list[Example]]:
    """D+ and D- as they are trained on: without the pairs that are held out."""
    data = recipe.data
    held = {pair.prompt for pair in held_out_pairs(recipe)}
    if data.pairs:
        rest = [pair for pair in load_pairs(data.pairs) if pair.prompt not in held]
        return sides_of(sample_pairs(rest, data.limit, recipe.seed))
    positive, negative = (_without(side, held)[: data.limit] for side in _files(data))
    return positive, negative


def _files(data: DataRecipe) -> tuple[list[Example], list[Example]]:
    """The files of the two sides."""
    return load_examples(str(data.positive)), load_examples(str(data.negative))


def _without(examples: Sequence[Example], prompts: set[Prompt]) -> list[Example]:
    return [example for example in examples if example.prompt not in prompts]


def held_out_pairs(recipe: Recipe) -> list[ContrastPair]:
    """The pairs that are kept out of training, since a task asks them; none where no task does.

    Raises:
        SteerError: there are too few pairs, or the two sides have no prompts in common; what to write instead.
    """
    if not asks_own_pairs(recipe):
        return []
    data = recipe.data
    pairs = load_pairs(data.pairs) if data.pairs else pairs_of(*_files(data))
    firsts = list({pair.prompt: pair for pair in reversed(pairs)}.values())[::-1]  # a prompt may have many answers
    if len(firsts) < 2 * LEAST:
        raise SteerError(
            f"recipe {recipe.name}: task {ASKS_PAIRS!r} takes the pairs of {LEAST} prompts out of training, and the "
            f"data have {len(firsts)} prompts, of {2 * LEAST} at least; write more, or name pairs that are not trained "
            f"on: {{task: {ASKS_PAIRS}, data: heldout.jsonl}}"
        )
    chosen = sample_pairs(firsts, min(MOST, max(LEAST, len(firsts) // SHARE)), recipe.seed)
    held = {pair.prompt for pair in chosen}
    return sample_pairs([pair for pair in pairs if pair.prompt in held], MOST, recipe.seed)
