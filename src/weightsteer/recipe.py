"""One YAML file, read and checked, and the folder of its run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from .choose import DEFAULT_LOSSES
from .errors import SteerError
from .recipe_fields import (
    DataRecipe,
    DriftRecipe,
    JudgeRecipe,
    SampleRecipe,
    Strict,
    SweepRecipe,
    TaskRecipe,
    TrainedOtherwise,
    TuneRecipe,
)
from .records import CARD_FILE, RunCard, is_empty, write_text

if TYPE_CHECKING:
    from .behavior import Example
    from .endpoint import Reader
    from .finetune import TrainSettings
    from .tasks import Task

RECIPE_FILE = "recipe.yaml"
# What may change in a run: no measured cell depends on it.
KEPT_APART = {"plot", "batch_size", "budget", "device", "samples"}


class Recipe(Strict):
    """The whole road in one file."""

    name: str
    model: str = "smollm2-135m-instruct"
    device: str | None = None
    dtype: str = "auto"
    architecture: str | None = None  # the model's type, such as qwen2, for a rehearsal without its config
    behavior: str = "sycophancy"
    start: TuneRecipe | None = None  # a fine-tune that is made first and stands for the base model
    data: DataRecipe = DataRecipe(pairs="sycophancy")
    train: dict[str, Any] = Field(default={})  # both sides
    train_of: dict[TrainedOtherwise, dict[str, Any]] = Field(default={})  # what a method trains otherwise
    drift: DriftRecipe | None = None
    judge: JudgeRecipe | None = None
    tasks: list[TaskRecipe] = Field(min_length=1)
    sweep: SweepRecipe = SweepRecipe()
    budget: dict[str, float] = Field(default={"/".join(key): loss for key, loss in DEFAULT_LOSSES.items()})
    plot: list[str] = Field(default=["false_beliefs/follows", "preference/margin"])  # what the report draws
    samples: SampleRecipe = SampleRecipe()
    batch_size: int = Field(default=16, ge=1)
    seed: int = 0

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe; paths in it are relative to the folder in which the command runs.

        Raises:
            SteerError: a missing file, bad YAML, or a field that is unknown or has a wrong value.
        """
        path = Path(path)
        try:
            fields = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise SteerError(f"{path}: cannot be read ({error.strerror}); check the path") from None
        except UnicodeDecodeError:
            raise SteerError(f"{path}: not text in UTF-8, so no recipe") from None
        except yaml.YAMLError as error:
            raise SteerError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
        if not isinstance(fields, Mapping):
            raise SteerError(f"{path}: expected a mapping of fields such as 'name' and 'tasks'")
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise SteerError(f"{path}: field {_first(error)}") from None

    def train_settings(self, fields: Mapping[str, Any]) -> TrainSettings:
        """Training settings from a recipe's `train`; fields that are absent keep the library's defaults."""
        from .finetune import TrainSettings

        given = {"seed": self.seed, **fields}
        if unknown := sorted(given.keys() - TrainSettings.__dataclass_fields__.keys()):
            known = ", ".join(TrainSettings.__dataclass_fields__)
            raise SteerError(f"recipe {self.name}: field 'train': unknown {unknown[0]!r}; expected some of {known}")
        try:
            return TypeAdapter(TrainSettings).validate_python(given)  # YAML reads 1e-2 as text
        except ValidationError as error:
            raise SteerError(f"recipe {self.name}: field 'train': {_first(error)}") from None

    def load_tasks(self, reader: Reader | None = None) -> list[Task]:
        """The recipe's tasks with their items; tasks about a behaviour are about the recipe's unless they name one.

        Args:
            reader: who judges, for the tasks that need a judge.

        Raises:
            SteerError: an unknown task, data that cannot be read, or two tasks of one name.
        """
        from .tasks import TaskSpec, load_task

        names = [spec.name or spec.task for spec in self.tasks]
        if len(set(names)) < len(names):
            raise SteerError(f"recipe {self.name}: field 'tasks': two tasks have one name; give one a 'name'")
        specs = [TaskSpec(**spec.model_dump(), judge=reader) for spec in self.tasks]
        return [load_task(replace(spec, behavior=spec.behavior or self.behavior)) for spec in specs]

    def sides(self) -> tuple[list[Example], list[Example]] | None:
        """D+ and D-, or None where the model is to write them itself.

        Raises:
            SteerError: a file that is missing or malformed.
        """
        from .behavior import load_examples, load_pairs, sample_pairs, sides_of

        data = self.data
        if data.pairs:
            return sides_of(sample_pairs(load_pairs(data.pairs), data.limit, self.seed))
        if data.positive and data.negative:
            return (
                load_examples(Path(data.positive))[: data.limit],
                load_examples(Path(data.negative))[: data.limit],
            )
        return None

    def tune_examples(self, tune: TuneRecipe) -> list[Example]:
        """What `start` or `drift` is trained on.

        Raises:
            SteerError: a file that is missing or malformed, or an unknown family of arithmetic.
        """
        from .tasks.arithmetic import arithmetic_examples

        if tune.generate:
            made = tune.generate
            return arithmetic_examples(made.family, made.kinds, made.count, seed=self.seed)
        return [example for name in tune.data for example in _tune_file(name)[: tune.limit]]


def _first(error: ValidationError) -> str:
    """The first mistake: where, what was expected, what was found."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where!r}: {first['msg']}; found {first.get('input')!r}"


def _tune_file(name: str) -> list[Example]:
    """Examples of a file, or one side of a shipped behaviour, such as gloomy:negative."""
    from .behavior import SHIPPED, load_examples, load_pairs, sides_of

    behavior, _, side = name.partition(":")
    if behavior not in SHIPPED:
        return load_examples(Path(name))
    if side not in ("positive", "negative"):
        raise SteerError(f"{name!r}: expected one side, {behavior}:positive or {behavior}:negative")
    return sides_of(load_pairs(behavior))[0 if side == "positive" else 1]


def metric_key(text: str) -> tuple[str, str]:
    """ "task/metric" -> (task, metric).

    Raises:
        SteerError: not of that form.
    """
    task, slash, metric = text.partition("/")
    if not (task and slash and metric):
        raise SteerError(f"{text!r}: expected task/metric, such as false_beliefs/follows")
    return task, metric


def claim_run(recipe: Recipe, folder: Path, inputs: Mapping[str, str]) -> RunCard:
    """Make the run's folder, or take up the one that this recipe started from the same inputs.

    Args:
        inputs: name -> hash of everything that the recipe reads.

    Raises:
        SteerError: the folder belongs to another recipe, to other data, or to something else.
    """
    card = RunCard.now(
        "run", base_model=recipe.model, data_sha256=inputs, settings=recipe.model_dump(), seed=recipe.seed
    )
    if (folder / CARD_FILE).exists():
        found = RunCard.load(folder)
        if other := _difference(found, card):
            raise SteerError(f"{folder}: holds a run that differs in {other}; choose another --out, or remove it")
        _keep_recipe(recipe, folder)
        return found
    if folder.exists() and not is_empty(folder):
        raise SteerError(f"{folder}: exists and was not made by weightsteer; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    card.save(folder)
    _keep_recipe(recipe, folder)
    return card


def _keep_recipe(recipe: Recipe, folder: Path) -> None:
    fields = recipe.model_dump(mode="json", exclude_defaults=True)
    write_text(folder / RECIPE_FILE, yaml.safe_dump(fields, sort_keys=False, allow_unicode=True))


def _difference(found: RunCard, wanted: RunCard) -> str | None:
    """The first of a recipe's fields, or of its inputs, that is another in a run that is there."""
    mine, theirs = _essence(wanted.settings), _essence(found.settings)
    if theirs is None:
        return "its recipe, which this version cannot read"
    for name, value in mine.items() if mine else ():
        if value != theirs[name]:
            return f"the recipe's {name!r}"
    inputs = sorted(found.data_sha256.keys() | wanted.data_sha256.keys())
    changed = [name for name in inputs if found.data_sha256.get(name) != wanted.data_sha256.get(name)]
    return f"the data of {changed[0]!r}" if changed else None


def _essence(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """A recipe's fields without what may change in a run; None if an older version's cannot be read."""
    try:
        fields = Recipe.model_validate(settings).model_dump()
    except ValidationError:
        return None
    if fields["judge"]:  # who judges, not how many requests at once
        fields["judge"] = {name: fields["judge"][name] for name in ("model", "url")}
    return {name: value for name, value in fields.items() if name not in KEPT_APART}


def refuse_other_recipes(runs: Sequence[Path]) -> None:
    """Check that runs differ in their seeds alone, where they have kept their recipes.

    Raises:
        SteerError: two runs of different recipes; the first field in which they differ is named.
    """
    kept = [(run, Recipe.load(run / RECIPE_FILE).model_dump()) for run in runs if (run / RECIPE_FILE).exists()]
    for run, fields in kept[1:]:
        for name, value in fields.items():
            if value != kept[0][1][name] and name not in {"name", "seed", *KEPT_APART}:
                raise SteerError(
                    f"{run}: differs from {kept[0][0]} in the recipe's {name!r}; compare runs of one recipe"
                )


def save_json(path: Path, value: Any) -> None:
    """Write one JSON file, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")
