"""One YAML file -> the whole road, stage by stage, skipping what is done."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import SteerError
from .records import CARD_FILE, RunCard, digest, is_empty, write_text

if TYPE_CHECKING:
    from .behavior import Example
    from .finetune import TrainSettings
    from .tasks import Task

RECIPE_FILE = "recipe.yaml"
MethodName = Literal["contrastive", "tau+", "tau-", "activation", "system prompt"]


class _Strict(BaseModel):
    """A part of a recipe; an unknown key is an error, not a silent nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataRecipe(_Strict):
    """Where D+ and D- come from: a shipped behaviour or a file of pairs, or one file a side."""

    pairs: str | None = None
    positive: str | None = None
    negative: str | None = None
    limit: int | None = Field(default=None, ge=2)  # use so many pairs


class TaskRecipe(_Strict):
    """One task: which items, and how many of each split."""

    task: str
    data: str | None = None
    limit: int | None = Field(default=None, ge=1)
    name: str | None = None


class SweepRecipe(_Strict):
    """Which methods, at which strengths.

    A method's strengths are a list of k, or None: the k at which the loss on ordinary text has
    risen by `damage` nats is found on each side, and `fractions` of it are swept, so that all
    methods cover the same range of damage.
    """

    methods: dict[MethodName, list[float] | None] = {
        "contrastive": None,
        "tau+": None,
        "tau-": None,
        "activation": None,
        "system prompt": [-1.0, 1.0],
    }
    damage: float = Field(default=0.2, gt=0)
    fractions: list[float] = [0.25, 0.5, 0.75, 1.0]
    fractions_of: dict[MethodName, list[float]] = {}  # a method's own fractions
    activation_pairs: int | None = Field(default=None, ge=2)  # default: all that are trained on
    layer_step: int = Field(default=1, ge=1)  # scan every so-manieth layer
    probe_items: int = Field(default=8, ge=1)  # validation items of the layer scan and of the search for k


class BudgetRecipe(_Strict):
    """How much capability the recommended k may cost."""

    accuracy: float = Field(default=0.03, ge=0)  # share of the plain facts
    nll: float = Field(default=0.1, ge=0)  # nats per token of ordinary text


class SampleRecipe(_Strict):
    """Replies shown in the report: prompts (default: the behaviour's last questions) at five strengths."""

    prompts: list[str] | None = None
    count: int = Field(default=3, ge=0)
    max_new_tokens: int = Field(default=48, ge=1)


class Recipe(_Strict):
    """The whole road in one file."""

    name: str
    model: str = "smollm2-135m-instruct"
    device: str | None = None
    dtype: str = "auto"
    behavior: str = "sycophancy"
    data: DataRecipe = DataRecipe(pairs="sycophancy")
    train: dict[str, Any] = {}
    tasks: list[TaskRecipe] = Field(min_length=1)
    sweep: SweepRecipe = SweepRecipe()
    budget: BudgetRecipe = BudgetRecipe()
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
        except yaml.YAMLError as error:
            raise SteerError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
        if not isinstance(fields, Mapping):
            raise SteerError(f"{path}: expected a mapping of fields such as 'name' and 'tasks'")
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise SteerError(f"{path}: field {where!r}: {first['msg']}; found {first.get('input')!r}") from None

    def train_settings(self) -> TrainSettings:
        """The recipe's training settings; fields that are absent keep the library's defaults."""
        from .finetune import TrainSettings

        fields = {"seed": self.seed, **self.train}
        try:
            if "learning_rates" in fields:
                fields["learning_rates"] = tuple(float(rate) for rate in fields["learning_rates"])
            return TrainSettings(**fields)
        except (TypeError, ValueError) as error:
            raise SteerError(f"recipe {self.name}: field 'train': {error}") from None

    def load_tasks(self) -> list[Task]:
        """The recipe's tasks with their items; `preference` without data is the recipe's behaviour.

        Raises:
            SteerError: an unknown task, data that cannot be read, or two tasks of one name.
        """
        from .tasks import TaskSpec, load_task

        specs = [TaskSpec(**spec.model_dump()) for spec in self.tasks]
        own = [replace(s, data=self.behavior) if s.task == "preference" and not s.data else s for s in specs]
        names = [spec.name or spec.task for spec in own]
        if len(set(names)) < len(names):
            raise SteerError(f"recipe {self.name}: field 'tasks': two tasks have one name; give one a 'name'")
        return [load_task(spec) for spec in own]

    def sides(self) -> tuple[list[Example], list[Example]]:
        """D+ and D-.

        Raises:
            SteerError: neither pairs nor both sides are named, or a file is missing or malformed.
        """
        from .behavior import load_examples, load_pairs, sample_pairs, sides_of

        data = self.data
        if data.pairs and not (data.positive or data.negative):
            return sides_of(sample_pairs(load_pairs(data.pairs), data.limit, self.seed))
        if data.positive and data.negative and not data.pairs:
            return (
                load_examples(Path(data.positive))[: data.limit],
                load_examples(Path(data.negative))[: data.limit],
            )
        raise SteerError(
            f"recipe {self.name}: field 'data': expected 'pairs', or both 'positive' (D+) and 'negative' (D-); "
            f"found {data.model_dump(exclude_none=True)}"
        )


def claim_run(recipe: Recipe, source: Path, folder: Path, inputs: Mapping[str, str]) -> RunCard:
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
        if digest([found.settings, found.data_sha256]) != digest([card.settings, card.data_sha256]):
            raise SteerError(
                f"{folder}: holds a run of another recipe or of other data; choose another --out, or remove it"
            )
        return found
    if folder.exists() and not is_empty(folder):
        raise SteerError(f"{folder}: exists and was not made by weightsteer; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    card.save(folder)
    write_text(folder / RECIPE_FILE, source.read_text(encoding="utf-8"))
    return card


def save_json(path: Path, value: Any) -> None:
    """Write one JSON file, atomically."""
    write_text(path, json.dumps(value, indent=2, default=asdict) + "\n")
