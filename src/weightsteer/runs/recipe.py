"""One YAML file, read and checked; what makes two runs runs of one recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from ..errors import SteerError
from ..evaluation.choose_k import DEFAULT_BUDGET
from ..evaluation.metrics import Metrics, metric_key, metric_of
from ..evaluation.task_spec import TaskFields, TaskSpec
from ..files import digest, is_empty, write_text
from ..former_names import RECIPE_FIELDS, find_former, with_new_names
from ..places import public_name, recall, remember, without_paths
from ..run_card import CARD_FILE, RunCard
from ..run_folder import RunFolder
from ..schema import describe_mistake, suggestion
from ..steering.methods import METHODS
from .identity import content_of, refuse_path, same_model, without_folders, without_resources
from .own_data import OWN, held_out_pairs, own_sides, with_own_behavior
from .recipe_fields import (
    DataRecipe,
    DialRecipe,
    EngineRecipe,
    FinetuneRecipe,
    JudgeRecipe,
    LoadRecipe,
    NotNegative,
    RepairRecipe,
    SampleRecipe,
    Strict,
    SweepRecipe,
    TrainedAlone,
    fields_of,
)
from .recipe_file import read_recipe_fields

if TYPE_CHECKING:
    from ..behavior import Example
    from ..evaluation.tasks import Task
    from ..judges.endpoint import ChatModel
    from ..training import TrainSettings

# What may change in a run: no measurement depends on it.
KEPT_APART = {"plot", "batch_size", "budget", "device", "samples", "architecture"}
DIAL_DATA = ("dial pairs", "unmoved pairs")  # what a run calls the pairs that coefficients are learned on


class Recipe(Strict):
    """A whole run in one file."""

    model_config = ConfigDict(populate_by_name=True)

    name: str  # what the run is called: its folder is runs/NAME
    # the base: the embedded model, a Hugging Face id, a folder, or a folder with a PEFT adapter
    model: str = "smollm2-135m-instruct"
    device: str | None = None  # cpu, cuda, mps or auto; without it, the accelerator if there is one
    dtype: str = "auto"  # float32, bfloat16, float16 or auto, the checkpoint's own
    # quantised or not, which attention, spread over which devices; in Python `loading`, since `load` reads a recipe
    loading: LoadRecipe = Field(default=LoadRecipe(), alias="load")
    chat_template_kwargs: dict[str, Any] = Field(default={})  # variables of the model's chat template
    architecture: str | None = None  # the model's type, such as qwen2, for a dry run without its config
    # a shipped behaviour or a trait file; without it, that of `data.pairs`, or what the own pairs show
    behavior: str = "sycophancy"
    first_finetune: FinetuneRecipe | None = None  # made before all else; the model after it stands for the base
    data: DataRecipe = DataRecipe(pairs="sycophancy")  # what both sides are trained on
    train: dict[str, Any] = Field(default={})  # how both sides are trained: the fields of `train` below
    train_of: dict[TrainedAlone, dict[str, Any]] = Field(default={})  # a method's own settings over these
    dial: DialRecipe = DialRecipe()  # how the learned dial learns its coefficients
    repair_target: RepairRecipe | None = None  # a fine-tune that every method is to repair
    judge: JudgeRecipe | None = None  # who scores replies, for tasks and sampling that need a judge
    engine: EngineRecipe | None = None  # a server on which the sweep measures what it can; without it, all runs here
    tasks: list[TaskFields] = Field(min_length=1)  # what is measured
    sweep: SweepRecipe = SweepRecipe()  # which methods are measured, at which strengths, and how k is chosen
    # task/metric -> how much it may get worse at the k that is recommended
    budget: dict[str, NotNegative] = Field(default={"/".join(key): loss for key, loss in DEFAULT_BUDGET.items()})
    plot: list[str] = Field(default=["false_beliefs/follows", "preference/margin"])  # what the report draws
    samples: SampleRecipe = SampleRecipe()  # replies that the report shows
    # most prompts in a batch of the measurements; without it, 16 on a CPU and what memory holds on an accelerator
    batch_size: int | None = Field(default=None, ge=1)
    seed: int = 0  # seed of the data, the trainings and the sampling

    @model_validator(mode="before")
    @classmethod
    def _about_its_data(cls, fields: Any) -> Any:
        return with_own_behavior(fields) if isinstance(fields, Mapping) else fields

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe; paths in it are relative to the folder in which the command runs.

        One that a run has kept is read as that run's (see `load_kept`).

        Raises:
            SteerError: a missing file, bad YAML, or a field that is unknown, has a wrong value or another name now.
        """
        if _is_kept(Path(path)):
            return cls.load_kept(Path(path))
        fields = read_recipe_fields(Path(path))
        if former := find_former(fields):
            raise SteerError(f"{path}: {former[0]!r} is called {former[1]!r} now; rename it")
        found = cls._checked(path, fields)
        try:
            refuse_path(found.name)
        except SteerError as error:
            raise SteerError(f"{path}: {error}") from None
        return found

    @classmethod
    def load_kept(cls, path: Path) -> Recipe:
        """Read the recipe that a run has kept; one of an older version is read in this version's names.

        What it names by an absolute path is found again on the machine on which the run was begun.

        Raises:
            SteerError: as `load`.
        """
        full = recall(_private_key(path)) if path.is_file() else None
        fields = yaml.safe_load(full) if full else read_recipe_fields(path)
        card = path.parent / CARD_FILE
        if card.is_file() and "behavior" in (settings := RunCard.load(path.parent).settings):
            fields = {"behavior": settings["behavior"], **fields}  # the default of the version that began the run
        return cls._checked(path, with_new_names(fields))

    @classmethod
    def _checked(cls, path: str | Path, fields: Mapping[str, Any]) -> Recipe:
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise SteerError(f"{path}: field {_first(error)} ({FIELDS_PAGE} lists the fields)") from None

    @property
    def metrics(self) -> Metrics:
        """What the recipe's tasks say of their metrics.

        Raises:
            SteerError: an unknown task.
        """
        from ..evaluation.tasks import metrics_of

        return metrics_of(self.tasks)

    @property
    def way(self) -> int:
        """Where k > 0 is to move the metric that k and layers are chosen by: 1 up, -1 down."""
        return metric_of(self.metrics, metric_key(self.sweep.behavior)).way or 1

    def task_names(self) -> list[str]:
        """What the recipe's tasks are called, each otherwise.

        Raises:
            SteerError: two have one name.
        """
        names = [spec.shown_name for spec in self.tasks]
        if len(set(names)) < len(names):
            raise SteerError(f"recipe {self.name}: field 'tasks': two tasks have one name; give one a 'name'")
        return names

    def train_settings(self, fields: Mapping[str, Any]) -> TrainSettings:
        """Training settings from a recipe's `train`; fields that are absent keep the library's defaults."""
        from ..training import TrainSettings

        given = {"seed": self.seed, **fields}
        if unknown := sorted(given.keys() - TrainSettings.__dataclass_fields__.keys()):
            known = ", ".join(TrainSettings.__dataclass_fields__)
            meant = suggestion(unknown[0], TrainSettings.__dataclass_fields__)
            raise SteerError(
                f"recipe {self.name}: field 'train': unknown {unknown[0]!r}{meant}; expected some of {known}"
            )
        from ..training.settings import SWITCHES

        if odd := sorted(name for name, value in given.items() if isinstance(value, bool) and name not in SWITCHES):
            raise SteerError(f"recipe {self.name}: field 'train': {odd[0]}: expected no true or false")
        try:
            return TypeAdapter(TrainSettings).validate_python(given)  # YAML reads 1e-2 as text
        except ValidationError as error:
            raise SteerError(
                f"recipe {self.name}: field 'train': {_first(error)} ({FIELDS_PAGE} lists the fields)"
            ) from None

    def load_tasks(self, judge: ChatModel | None = None, trust_code: Sequence[str] = ()) -> list[Task]:
        """The recipe's tasks with their items; tasks about a behaviour are about the recipe's unless they name one.

        Args:
            judge: who judges, for the tasks that need a judge.
            trust_code: files of tasks whose code may run (see `load_harness`).

        Raises:
            SteerError: an unknown task, data that cannot be read, or two tasks of one name.
        """
        from ..evaluation.tasks import load_task

        self.task_names()
        specs = [TaskSpec(**vars(spec), judge=judge, trust_code=tuple(trust_code)) for spec in self.tasks]
        held = tuple(held_out_pairs(self))
        named = None if held or self.behavior == OWN else self.behavior
        return [load_task(replace(spec, behavior=spec.behavior or named, held_out=held)) for spec in specs]

    def sides(self) -> tuple[list[Example], list[Example]] | None:
        """D+ and D-, or None where the model is to write them itself.

        Raises:
            SteerError: a file that is missing or malformed.
        """
        return None if self.data.sampling else own_sides(self)

    def named_files(self) -> list[str]:
        """What the recipe names and may be a file or folder of the user's: data, behaviours, models."""
        from ..behavior import SHIPPED

        data, finetunes = self.data, (self.first_finetune, self.repair_target)
        listed = [task.data for task in self.tasks] + [name for made in finetunes if made for name in made.data]
        names = [self.model, self.behavior, data.pairs, data.positive, data.negative]
        names += [self.dial.pairs, self.dial.unmoved]
        names += [task.behavior for task in self.tasks] + [part for text in listed if text for part in text.split(",")]
        return [name for name in names if name and name.partition(":")[0] not in SHIPPED]

    def finetune_examples(self, wanted: FinetuneRecipe) -> list[Example]:
        """What `first_finetune` or `repair_target` is trained on.

        Raises:
            SteerError: a file that is missing or malformed, or an unknown family of arithmetic.
        """
        from ..evaluation.tasks.arithmetic import arithmetic_examples

        if wanted.generate:
            made = wanted.generate
            return arithmetic_examples(made.family, made.kinds, made.count, seed=self.seed)
        return [example for name in wanted.data for example in _examples_of(name)[: wanted.limit]]


FIELDS_PAGE = "docs/recipe.md"
FIELDS = fields_of(Recipe)  # every name in a recipe, for suggestions


def _first(error: ValidationError) -> str:
    """The first mistake: where, what was expected, what was found."""
    return describe_mistake(error, FIELDS).removeprefix("field ")


def _examples_of(name: str) -> list[Example]:
    """Examples of a file, or one side of a shipped behaviour, such as gloomy:negative."""
    from ..behavior import SHIPPED, sides_of
    from ..example_files.load import load_examples, load_pairs

    behavior, _, side = name.partition(":")
    if behavior not in SHIPPED:
        return load_examples(name)
    if side not in ("positive", "negative"):
        raise SteerError(f"{name!r}: expected one side, {behavior}:positive or {behavior}:negative")
    return sides_of(load_pairs(behavior))[0 if side == "positive" else 1]


def claim_run(recipe: Recipe, folder: RunFolder, inputs: Mapping[str, str]) -> RunCard:
    """Make the run's folder, or take up the one that this recipe started from the same inputs.

    Args:
        inputs: name -> hash of everything that the recipe reads.

    Raises:
        SteerError: the folder belongs to another recipe, to other data, or to something else.
    """
    path = folder.path
    named = {"base_model": recipe.model, "base_revision": content_of(recipe.model)}
    card = RunCard.now("run", **named, data_sha256=inputs, settings=recipe.model_dump(), seed=recipe.seed)
    if (path / CARD_FILE).exists():
        found = RunCard.load(path)
        if other := _difference(found, card, folder):
            raise SteerError(f"{path}: holds a run that differs in {other}; choose another --out, or remove it")
        _keep_recipe(recipe, folder)
        return found
    if path.exists() and not is_empty(path):
        raise SteerError(f"{path}: exists and was not made by weightsteer; choose another --out")
    path.mkdir(parents=True, exist_ok=True)
    card.save(path)
    _keep_recipe(recipe, folder)
    return card


def _keep_recipe(recipe: Recipe, folder: RunFolder) -> None:
    """Keep the recipe in the run's folder without paths of this machine; with them it is kept on the machine alone."""
    fields = recipe.model_dump(mode="json", exclude_defaults=True, by_alias=True)
    if Recipe.model_validate(fields).behavior != recipe.behavior:
        fields["behavior"] = recipe.behavior
    full, shared = (
        yaml.safe_dump(form, sort_keys=False, allow_unicode=True) for form in (fields, without_paths(fields))
    )
    write_text(folder.recipe, shared)
    if full != shared:
        remember(_private_key(folder.recipe), full)


def _is_kept(path: Path) -> bool:
    """Whether a file is the recipe in a run's folder."""
    return path == RunFolder(path.parent).recipe and (path.parent / CARD_FILE).is_file() and _is_run(path.parent)


def _is_run(folder: Path) -> bool:
    try:
        return RunCard.load(folder).kind == "run"
    except SteerError:
        return False


def _private_key(path: Path) -> str:
    """What a run's recipe is remembered under: its text, and the hashes of all that it reads."""
    text, card = path.read_bytes().decode(errors="replace"), path.parent / CARD_FILE
    return digest([text, dict(RunCard.load(path.parent).data_sha256) if card.is_file() else {}])


def _difference(found: RunCard, wanted: RunCard, folder: RunFolder) -> str | None:
    """The first of a recipe's fields, or of its inputs, that is another in a run that is there."""
    if not same_model(found, wanted, folder):
        return "the recipe's 'model'"
    is_former = find_former(found.settings) is not None
    mine, theirs = (_essence(card.settings, former=is_former) for card in (wanted, found))
    if theirs is None:
        return "its recipe, which this version cannot read"
    unread = {"behavior"} - wanted.data_sha256.keys()  # known by its pairs, whatever the default was once
    unread |= set(DIAL_DATA) - found.data_sha256.keys()  # which older versions did not note
    for name, value in mine.items() if mine else ():
        if value != theirs[name] and name not in unread:
            return f"the recipe's {name!r}"
    former = {RECIPE_FIELDS.get(n, n): value for n, value in found.data_sha256.items() if n not in unread}
    inputs = sorted((former.keys() | wanted.data_sha256.keys()) - unread)
    changed = [name for name in inputs if former.get(name) != wanted.data_sha256.get(name)]
    return f"the data of {changed[0]!r}" if changed else None


def _essence(settings: Mapping[str, Any], *, former: bool) -> dict[str, Any] | None:
    """A recipe's fields without what may change in a run; None if an older version's cannot be read."""
    try:
        fields = Recipe.model_validate(with_new_names(settings)).model_dump()
    except ValidationError:
        return None
    if fields["judge"]:  # who judges, not how many requests at once
        fields["judge"] = {name: fields["judge"][name] for name in ("model", "url")}
    found = _comparable(fields, former=former)
    found["sweep"] = {**found["sweep"], "methods": _without_listed(found["sweep"]["methods"])}
    return {name: value for name, value in found.items() if name not in {"model", *KEPT_APART}}


def _without_listed(methods: Mapping[str, list[float] | None]) -> dict[str, Any]:
    """A sweep's methods without the strengths k that are listed, each of which is measured by itself."""
    return {name: ks if ks is None or METHODS[name].strengths_from_checkpoints else [] for name, ks in methods.items()}


def _comparable(fields: Mapping[str, Any], *, former: bool) -> dict[str, Any]:
    """A recipe's fields as two runs are compared by them; `former`: the first version made one of the two."""
    plain = without_folders(fields)
    found = without_resources(_beyond_paper(plain) if former else plain)
    return {**found, "loading": {"quantize": found["loading"]["quantize"]}}


def _beyond_paper(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's fields, its trainings without the paper's numbers: the first version took these for what was left out.

    So a recipe that says them compares as one of that version that did not.
    """
    from ..training.settings import PAPER

    def beyond(made: Mapping[str, Any]) -> dict[str, Any]:
        train = {name: value for name, value in made["train"].items() if value != getattr(PAPER, name, None)}
        return {**made, "train": train}

    parts = {name: fields[name] and beyond(fields[name]) for name in ("first_finetune", "repair_target")}
    return {**beyond(fields), **parts}


def refuse_other_recipes(runs: Sequence[str | Path]) -> None:
    """Check that runs differ in their seeds alone, where they have kept their recipes.

    Raises:
        SteerError: one run twice, or two runs of different recipes; the first field in which they differ is named.
    """
    places = [Path(run).resolve() for run in runs]
    if twice := next((run for run, place in zip(runs, places, strict=True) if places.count(place) > 1), None):
        raise SteerError(f"{twice}: is named twice; a run counts once")
    folders = [RunFolder(Path(run)) for run in runs]
    kept_in = [run for run in folders if run.recipe.exists()]
    former = any(find_former(read_recipe_fields(run.recipe)) for run in kept_in)
    recipes = [(run.path, Recipe.load_kept(run.recipe).model_dump()) for run in kept_in]
    kept = [
        (path, {**_comparable(fields, former=former), "model": public_name(fields["model"])})
        for path, fields in recipes
    ]
    for path, fields in kept[1:]:
        for name, value in fields.items():
            if value != kept[0][1][name] and name not in {"name", "seed", *KEPT_APART}:
                raise SteerError(
                    f"{path}: differs from {kept[0][0]} in the recipe's {name!r}; compare runs of one recipe"
                )
