"""A dry run: any recipe, end to end, at its smallest size, on a tiny random model of its architecture."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..behavior import SHIPPED
from ..data_building.sampling_settings import SamplingRecipe
from ..evaluation.task_spec import TaskFields
from ..evaluation.tasks import kind_of
from ..evaluation.tasks.arithmetic_text import FAMILIES
from ..steering.methods import METHODS
from .own_data import OWN
from .recipe import Recipe
from .recipe_fields import (
    DataRecipe,
    DialRecipe,
    FinetuneRecipe,
    GenerateRecipe,
    JudgeRecipe,
    LoadRecipe,
    RepairRecipe,
)
from .validate import check_alone

TRAIN: Mapping[str, Any] = {
    "rank": 2,
    "alpha": 4,
    "batch_size": 2,
    "accumulation": 1,
    "max_steps": 4,
    "warmup_steps": 1,
    "evaluations": 2,
    "learning_rates": [1e-2],
}
EXAMPLES = 4
NEW_TOKENS = 4


def shrink_recipe(recipe: Recipe, model: Path) -> Recipe:
    """The same recipe at the smallest size: every stage, method and task stays; data that is not here is replaced.

    Missing files become the shipped examples of their kind, and a judge becomes the tiny model itself, whose rubbish
    verdicts show how malformed ones are handled.
    """
    check_alone(recipe)  # its mistakes are to be found here too
    judged = {task.shown_name for task in recipe.tasks if recipe.judge and kind_of(task.task).judge}
    data = _small_data(recipe.data)
    stands_in = recipe.behavior == OWN and data.pairs in SHIPPED  # for pairs that are not here
    small = {
        "name": f"{recipe.name}-dry-run",
        "model": str(model),
        "device": "cpu",
        "dtype": "float32",
        "loading": LoadRecipe(),  # the tiny model is too narrow for a quantisation
        "behavior": recipe.behavior if _is_here(recipe.behavior) and not stands_in else SHIPPED[0],
        "data": data,
        "first_finetune": recipe.first_finetune and _small_finetune(recipe.first_finetune, FinetuneRecipe),
        "repair_target": recipe.repair_target and _small_finetune(recipe.repair_target, RepairRecipe),
        "train": dict(TRAIN),
        "train_of": {name: {"finetunes": 2} for name in recipe.sweep.methods if "finetunes" in METHODS[name].preset},
        "dial": DialRecipe(
            pairs=SHIPPED[0], unmoved=recipe.dial.unmoved and SHIPPED[0], count=EXAMPLES, steps=2, batch_size=2
        ),
        "judge": recipe.judge and JudgeRecipe(model=str(model)),
        "tasks": [_small_task(task) for task in recipe.tasks],
        "sweep": recipe.sweep.model_copy(
            update={
                "methods": {name: ks and sorted({ks[0], ks[-1]}) for name, ks in recipe.sweep.methods.items()},
                "behavior": _chosen_by(recipe.sweep.behavior, judged),
                "fractions": recipe.sweep.fractions[-1:],
                "fractions_of": {},
                "items_of": {},
                "activation_pairs": EXAMPLES,
                "layer_step": 1,  # the tiny model has two layers
                "search_items": 1,
            }
        ),
        "budget": {_chosen_by(text, judged): 1e9 for text in recipe.budget},
        "samples": recipe.samples.model_copy(update={"count": 1, "max_new_tokens": NEW_TOKENS}),
        "batch_size": 4,
        "engine": None,  # no server serves the tiny model
        "chat_template_kwargs": {},  # the tiny model has a template of ours
    }
    return recipe.model_copy(update=small)


def _chosen_by(text: str, judged: Collection[str]) -> str:
    """What k is chosen by, or the loss where that takes a judge."""
    return "prose/nll" if text.partition("/")[0] in judged else text


def _is_here(data: str) -> bool:
    name = data.partition(":")[0]  # may say which side, or that a file is harmless
    return name in SHIPPED or Path(name).exists()


def _small_data(data: DataRecipe) -> DataRecipe:
    if data.sampling:
        all_kept = SamplingRecipe(
            samples=1,
            max_new_tokens=NEW_TOKENS,
            positive_from=0.0,
            negative_to=100.0,
            cut_answers="keep",
            questions=2,
            likelihood=True,
        )
        return DataRecipe(sampling=all_kept, limit=EXAMPLES)
    named = [name for name in (data.pairs, data.positive, data.negative) if name]
    if all(_is_here(name) for name in named):
        return data.model_copy(update={"limit": EXAMPLES})
    return DataRecipe(pairs=SHIPPED[0], limit=EXAMPLES)


def _small_finetune(wanted: FinetuneRecipe, kind: type[FinetuneRecipe]) -> FinetuneRecipe:
    """Files that are not here become a little arithmetic."""
    fields = {**wanted.model_dump(), "train": dict(TRAIN), "limit": EXAMPLES}
    if wanted.generate:
        fields["generate"] = {**wanted.generate.model_dump(), "count": EXAMPLES}
    elif not all(_is_here(path) for path in wanted.data):
        fields |= {"data": [], "generate": GenerateRecipe(family="addition", count=EXAMPLES).model_dump()}
    return kind(**fields)


def _small_task(task: TaskFields) -> TaskFields:
    """Two items of each split; the shipped ones where the file is not here. Named sets of the harness are not here."""
    here = task.data is None or all(_is_here(part) or part in FAMILIES for part in task.data.split(","))
    return replace(
        task,
        limit=2,
        split=None,
        half=None,
        data=task.data if here else None,
        behavior=task.behavior if task.behavior and _is_here(task.behavior) else None,
        max_new_tokens=task.max_new_tokens and NEW_TOKENS,
    )
