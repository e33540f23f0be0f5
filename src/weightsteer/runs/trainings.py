"""A recipe -> the trainings of its run, each with its settings; what they do not take, found before any model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import SteerError
from ..steering.method import TWO_WAY, Training
from ..steering.methods import METHODS, SNAPSHOT_COUNT
from .recipe import Recipe

if TYPE_CHECKING:
    from ..training import TrainSettings
    from ..training.combinations import Way

DENSE: tuple[Training, ...] = ("bias", "full")  # trainings of the model's own weights, on a base in float32


def trainings_of(recipe: Recipe) -> list[Training]:
    """The trainings that the methods of a recipe ask for; LoRA first, since the contrastive vector is of it."""
    return ["lora", *sorted({METHODS[name].training for name in recipe.sweep.methods} - {"lora"})]


def train_fields(recipe: Recipe, training: Training) -> dict[str, Any]:
    """The settings of the fine-tunes of one training: the recipe's, below what its method asks for and the recipe's
    own for that method.
    """
    fields = dict(recipe.train)
    if training == "lora":
        if any(METHODS[name].from_snapshots for name in recipe.sweep.methods):
            fields["snapshots"] = SNAPSHOT_COUNT
        return fields
    if training in DENSE:
        fields |= {"kind": training, "bf16": recipe.dtype == "bfloat16"}
    if training == "DPO":
        fields["snapshots"] = SNAPSHOT_COUNT
    return {**fields, **_own_fields(recipe, training)}


def _own_fields(recipe: Recipe, training: Training) -> Mapping[str, Any]:
    """What the methods that train so set, and over it what the recipe sets for one of them."""
    names = [name for name, method in METHODS.items() if method.training == training]
    own = next((recipe.train_of[name] for name in names if name in recipe.train_of), {})
    return {**METHODS[names[0]].preset, **own}


def all_settings(recipe: Recipe) -> Iterator[tuple[Way, TrainSettings]]:
    """Every training of a run by its kind, with its settings."""
    for wanted in (recipe.first_finetune, recipe.repair_target):
        if wanted:
            yield "side", recipe.train_settings(wanted.train)
    for training in trainings_of(recipe):
        way: Way = "two-way" if training in TWO_WAY else "preference" if training == "DPO" else "side"
        yield way, recipe.train_settings(train_fields(recipe, training))


def refuse_combinations(recipe: Recipe) -> None:
    """Check every training's settings against each other and against how the recipe loads its model.

    Raises:
        SteerError: what the training itself would say once it starts.
    """
    from ..training.combinations import refuse_combination

    _refuse_means_of_snapshots(recipe)
    for way, settings in all_settings(recipe):
        refuse_combination(settings, way, recipe.loading.options, base=recipe.model)


def _refuse_means_of_snapshots(recipe: Recipe) -> None:
    """Raise for a method whose strengths are snapshots of one fine-tune, where a mean of several is asked for."""
    for name in recipe.sweep.methods:
        training = METHODS[name].training
        if not (METHODS[name].from_snapshots or training == "DPO"):
            continue
        if (count := recipe.train_settings(train_fields(recipe, training)).finetunes) > 1:
            own = "or set finetunes 1 and compare with the method 'contrastive parts'"
            way = "set `train_of: {DPO: {finetunes: 1}}`" if training == "DPO" else f"leave it out, {own}"
            raise SteerError(
                f"recipe {recipe.name}: method {name!r} steers with snapshots of one fine-tune, and 'finetunes' asks "
                f"for the mean of {count}; {way}"
            )


def refuse_few_rows(recipe: Recipe, rows: int) -> None:
    """Check that each fine-tune of each method's mean has a row of the recipe's data.

    Args:
        rows: of the smaller side.

    Raises:
        SteerError: what the training itself would say once it starts.
    """
    from ..training.defaults import trained_on
    from ..training.mean import refuse_empty_parts

    for training in trainings_of(recipe):
        settings = recipe.train_settings(train_fields(recipe, training))
        refuse_empty_parts(trained_on(rows, settings), settings.finetunes)


def refuse_here(recipe: Recipe) -> None:
    """Check that this machine has what the recipe's model and trainings need.

    Raises:
        SteerError: a package that is missing, or more processes than there are GPUs.
    """
    from ..checkpoints.load_options import refuse_missing_packages
    from ..training.combinations import refuse_scarce

    refuse_missing_packages(recipe.loading.options)
    for _, settings in all_settings(recipe):
        if settings.processes > 1:
            refuse_scarce(settings.processes, recipe.device)
