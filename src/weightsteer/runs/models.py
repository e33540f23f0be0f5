"""The models of a run: loaded when they are first asked for, and let go where other processes load them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch

from ..behavior import SIDES, Example
from ..checkpoints.embedded_model import EMBEDDED_NAME
from ..checkpoints.locate import checkpoint_folder
from ..checkpoints.whole import is_whole
from ..errors import SteerError
from ..export.merge import MergeSettings, export_merged
from ..fitting import free_memory
from ..lm import LM
from ..progress import Progress
from ..run_card import RunCard
from ..run_folder import RunFolder
from ..steering.method import Training
from ..steering.methods import METHODS
from ..training import train_side
from ..training.order import without_weights
from ..vectors.difference import task_vector
from .recipe import Recipe
from .recipe_fields import FinetuneRecipe


class ShowProgress(Protocol):
    """How a stage shows its progress: `with show(label) as progress`."""

    def __call__(self, label: str) -> AbstractContextManager[Progress]: ...


class RunModels:
    """What one run loads: its base, the model that is steered, the base in float32."""

    def __init__(self, recipe: Recipe, folder: RunFolder, *, show: ShowProgress, base: LM | None = None) -> None:
        """Nothing is loaded yet, but for `base`, where it is given."""
        self.recipe, self.folder, self.show = recipe, folder, show
        self._base = base
        self._lm: LM | None = None
        self._float32: LM | None = None

    def base(self) -> LM:
        """The model that vectors are made on: the recipe's, after its first fine-tune if there is one."""
        if self._base is None:
            self._base = self._load_base()
        return self._base

    def loaded_base(self) -> LM | None:
        """The base, if it is loaded."""
        return self._base

    def _load_base(self) -> LM:
        with self.show("load the model") as progress:
            progress(0, 1, "the embedded model is converted once" if self.recipe.model == EMBEDDED_NAME else "")
            lm = self._load(self.recipe.model)
            progress(1, 1)
        if self.recipe.first_finetune:
            paths = self.folder.first_finetune, self.folder.first_model
            lm = self._load_finetuned(lm, self.recipe.model, self.recipe.first_finetune, *paths)
        made = self.folder.finetune("positive")
        if is_whole(made) and RunCard.load(made).base_revision != lm.revision:
            raise SteerError(f"{made}: was trained on another state of {lm.name}; choose another --out")
        return lm

    def lm(self) -> LM:
        """The model that steering is applied to: the base, or the fine-tune of it that is to be repaired."""
        if self._lm is None:
            target, folder = self.recipe.repair_target, self.folder
            self._lm = (
                self._load_finetuned(self.base(), self._base_name, target, folder.repair_target, folder.repair_model)
                if target
                else self.base()
            )
        return self._lm

    @property
    def _base_name(self) -> str:
        return str(self.folder.first_model) if self.recipe.first_finetune else self.recipe.model

    def base_float32(self) -> LM:
        """The base in float32, for trainings whose weights do not move in 8 bits of mantissa."""
        if self._float32 is None:
            exact = self.base().model.dtype == torch.float32
            self._float32 = self.base() if exact else self._load(self._base_name, dtype="float32")
        return self._float32

    def free_float32(self, made: Training) -> None:
        """Let go of the float32 copy once no training is left that takes it: it is twice the base's size."""
        wanted = {METHODS[name].training for name in self.recipe.sweep.methods} & {"bias", "full"}
        left = {t for t in wanted - {made} if not all(is_whole(self.folder.finetune_of(t, side)) for side in SIDES)}
        if self._float32 is not None and self._float32 is not self._base and not left:
            self._float32 = None
            free_memory()

    def _load(self, name: str, dtype: str | None = None) -> LM:
        recipe = self.recipe
        variables, options = recipe.chat_template_kwargs, recipe.loading.options
        how = dtype or recipe.dtype
        return LM.load(name, device=recipe.device, dtype=how, chat_template_kwargs=variables, options=options)

    def _load_finetuned(self, lm: LM, base: str, wanted: FinetuneRecipe, adapter: Path, merged: Path) -> LM:
        """Train on `wanted`, merge it into the base as a checkpoint in the run's folder, and load that."""
        if not is_whole(merged):
            folder = checkpoint_folder(base)  # before the training: it may be none
            tau = task_vector(self.train(lm, self.recipe.finetune_examples(wanted), adapter, wanted.train))
            with self.show(f"merge {adapter.name}") as progress:
                settings = MergeSettings(seed=self.recipe.seed)
                export_merged(tau, folder, merged, k=1.0, settings=settings, progress=progress)
        return self._load(str(merged))

    def to_train(self, base: Callable[[], LM], train: Mapping[str, Any]) -> LM:
        """The model to train on; without its weights, and ours let go, where other processes load it to train."""
        lm = base()
        if self.recipe.train_settings(train).processes == 1:
            return lm
        light = without_weights(lm)
        del lm
        self._base = self._lm = self._float32 = None
        free_memory()
        return light

    def train(self, lm: LM, examples: Sequence[Example], out: Path, train: Mapping[str, Any]) -> Path:
        """One fine-tune in the run's folder."""
        with self.show(f"train {out.relative_to(self.folder.path)}") as progress:
            return train_side(lm, examples, out, settings=self.recipe.train_settings(train), progress=progress)
