"""The models, data and fine-tunes of a run: made once in its folder, and found there afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from .behavior import Behavior, Example, load_examples
from .contrast import ContrastSettings, build_sides
from .embedded import EMBEDDED_NAME
from .endpoint import Endpoint, Reader
from .errors import SteerError
from .extract import task_vector
from .finetune import train_side
from .judge import Judge, LikelihoodJudge, LocalReader, RubricJudge, rubric_of
from .lm import LM
from .locate import checkpoint_folder
from .merge import MergeSettings, export_merged
from .progress import Progress
from .recipe import Recipe
from .recipe_fields import TuneRecipe
from .records import RunCard

CONTRAST_FOLDER = "contrast"  # what the model itself answered, and the sides chosen from it


class Show(Protocol):
    """How a stage shows its progress: `with show(label) as progress`."""

    def __call__(self, label: str) -> AbstractContextManager[Progress]: ...


class Workshop:
    """The models, data and fine-tunes of one run, each made when it is first asked for."""

    def __init__(self, recipe: Recipe, folder: Path, behavior: Behavior, show: Show) -> None:
        self.recipe, self.folder, self.behavior, self.show = recipe, folder, behavior, show

    @cached_property
    def base(self) -> LM:
        """The model that vectors are made on: the recipe's, after its `start` fine-tune if there is one."""
        with self.show("load the model") as progress:
            note = "the embedded model is converted once" if self.recipe.model == EMBEDDED_NAME else ""
            progress(0, 1, note)
            lm = self._load(self.recipe.model)
            progress(1, 1)
        if self.recipe.start:
            lm = self._tuned(lm, self.recipe.model, self.recipe.start, "start")
        made = self.folder / "plus"
        if made.exists() and RunCard.load(made).base_revision != lm.revision:
            raise SteerError(f"{made}: was trained on another state of {lm.name}; choose another --out")
        return lm

    @cached_property
    def lm(self) -> LM:
        """The model that is steered: the base, or its fine-tune by `drift`."""
        if self.recipe.drift is None:
            return self.base
        return self._tuned(self.base, self._base_name, self.recipe.drift, "drift")

    @property
    def _base_name(self) -> str:
        return str(self.folder / "start-model") if self.recipe.start else self.recipe.model

    @cached_property
    def precise(self) -> LM:
        """The base in float32, for kinds whose weights do not train in 8 bits of mantissa."""
        if self.base.model.dtype == torch.float32:
            return self.base
        return LM.load(self._base_name, device=self.recipe.device, dtype="float32")

    def _load(self, name: str) -> LM:
        return LM.load(name, device=self.recipe.device, dtype=self.recipe.dtype)

    def _tuned(self, lm: LM, base: str, tune: TuneRecipe, name: str) -> LM:
        """Train on `tune`, merge it into the base as a checkpoint in the run's folder, and load that."""
        target = self.folder / f"{name}-model"
        if not target.exists():
            tau = task_vector(self.fine_tuned(lm, self.recipe.tune_examples(tune), name, tune.train))
            with self.show(f"merge {name}") as progress:
                settings = MergeSettings(seed=self.recipe.seed)
                export_merged(tau, checkpoint_folder(base), target, k=1.0, settings=settings, progress=progress)
        return self._load(str(target))

    def fine_tuned(self, lm: LM, examples: Sequence[Example], name: str, train: Mapping[str, Any]) -> Path:
        """One fine-tune in the run's folder."""
        with self.show(f"train {name}") as progress:
            settings = self.recipe.train_settings(train)
            return train_side(lm, examples, self.folder / name, settings=settings, progress=progress)

    @cached_property
    def reader(self) -> Reader | None:
        """The recipe's judge: a server, or a local model."""
        judge = self.recipe.judge
        if judge is None:
            return None
        if judge.url is None:
            return LocalReader(self._load(judge.model))
        cache = self.folder / "judge.jsonl"
        return Endpoint(judge.url, judge.model, key_env=judge.key_env, concurrency=judge.concurrency, cache=cache)

    @cached_property
    def sides(self) -> tuple[list[Example], list[Example]]:
        """D+ and D-: given, or the model's own answers."""
        given = self.recipe.sides()
        if given is not None:
            return given
        out, wanted = self.folder / CONTRAST_FOLDER, self.recipe.data.contrast
        assert wanted is not None
        if not all((out / f"{side}.jsonl").exists() for side in ("positive", "negative")):
            settings = ContrastSettings(**wanted.model_dump(exclude={"likelihood"}), seed=self.recipe.seed)
            with self.show("data: the model answers under S+ and S-") as progress:
                build_sides(self.base, self.behavior, self._contrast_judge, out, settings=settings, progress=progress)
        positive, negative = (load_examples(out / f"{side}.jsonl") for side in ("positive", "negative"))
        limit = self.recipe.data.limit
        return positive[:limit], negative[:limit]

    @property
    def _contrast_judge(self) -> Judge:
        wanted = self.recipe.data.contrast
        if self.reader is None or (wanted and wanted.likelihood):
            return LikelihoodJudge(self.base, self.behavior)
        return RubricJudge(self.reader, rubric_of(self.behavior))
