"""The models, data and fine-tunes of a run: made once in its folder, and found there afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch

from ..behavior import SIDES, Behavior, Example, pairs_of
from ..checkpoints.embedded_model import EMBEDDED_NAME
from ..checkpoints.locate import checkpoint_folder
from ..checkpoints.whole import is_whole
from ..data_building.sampling import sample_sides
from ..data_building.sampling_settings import SamplingSettings
from ..errors import SteerError
from ..evaluation.metrics import metric_key
from ..evaluation.search import best_layer
from ..evaluation.tasks.task import Task
from ..example_files.load import load_examples
from ..export.merge import MergeSettings, export_merged
from ..files import read_json, read_kept, write_json
from ..judges.endpoint import ChatModel, Endpoint
from ..judges.judge import Judge, LikelihoodJudge, LocalChatModel, RubricJudge, rubric_of
from ..judges.keys import require_own_key
from ..lm import LM
from ..progress import Progress
from ..run_card import RunCard
from ..run_folder import RunFolder
from ..schema import checked
from ..steering.activations import ActivationVector, activation_vector
from ..steering.methods import METHODS, SNAPSHOT_COUNT, Training
from ..training import preferences_of, train_preference, train_side
from ..training.order import free_memory, without_weights
from ..vectors.difference import subtract_finetunes, task_vector
from ..vectors.weight_vector import WeightVector
from .recipe import Recipe
from .recipe_fields import FinetuneRecipe


class ShowProgress(Protocol):
    """How a stage shows its progress: `with show(label) as progress`."""

    def __call__(self, label: str) -> AbstractContextManager[Progress]: ...


def load_judge(recipe: Recipe, folder: RunFolder, keys: Sequence[str] = ()) -> ChatModel | None:
    """The recipe's judge: a server, whose replies are kept in the run, or a local model.

    Args:
        keys: environment variables whose keys the user lets the recipe send to its judge.

    Raises:
        SteerError: an address that is none, a key that is not for it, or a model that cannot be loaded.
    """
    judge = recipe.judge
    if judge is None:
        return None
    if judge.url is None:
        return LocalChatModel(LM.load(judge.model, device=recipe.device, dtype=recipe.dtype))
    require_own_key(judge.key_env, judge.url, keys)
    return Endpoint(
        judge.url, judge.model, key_env=judge.key_env, concurrency=judge.concurrency, cache=folder.judge_cache
    )


class RunArtifacts:
    """What one run makes, each when it is first asked for. The registry of methods makes its methods from this."""

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        *,
        behavior: Behavior,
        tasks: Mapping[str, Task],
        judge: ChatModel | None,
        show: ShowProgress,
    ) -> None:
        self.recipe, self.folder, self.show = recipe, folder, show
        self.tasks, self.judge = tasks, judge
        self.behavior = behavior
        self._base: LM | None = None
        self._lm: LM | None = None
        self._float32: LM | None = None
        self._sides: tuple[list[Example], list[Example]] | None = None

    def base(self) -> LM:
        """The model that vectors are made on: the recipe's, after its first fine-tune if there is one."""
        if self._base is None:
            self._base = self._load_base()
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
            base = self.base()
            exact = base.model.dtype == torch.float32
            name, device = self._base_name, self.recipe.device
            variables = self.recipe.chat_template_kwargs
            self._float32 = (
                base if exact else LM.load(name, device=device, dtype="float32", chat_template_kwargs=variables)
            )
        return self._float32

    def _load(self, name: str) -> LM:
        recipe = self.recipe
        variables = recipe.chat_template_kwargs
        return LM.load(name, device=recipe.device, dtype=recipe.dtype, chat_template_kwargs=variables)

    def _load_finetuned(self, lm: LM, base: str, wanted: FinetuneRecipe, adapter: Path, merged: Path) -> LM:
        """Train on `wanted`, merge it into the base as a checkpoint in the run's folder, and load that."""
        if not is_whole(merged):
            tau = task_vector(self._train(lm, self.recipe.finetune_examples(wanted), adapter, wanted.train))
            with self.show(f"merge {adapter.name}") as progress:
                settings = MergeSettings(seed=self.recipe.seed)
                export_merged(tau, checkpoint_folder(base), merged, k=1.0, settings=settings, progress=progress)
        return self._load(str(merged))

    def _to_train(self, base: Callable[[], LM], train: Mapping[str, Any]) -> LM:
        """The model to train on; without its weights, and ours let go, where other processes load it to train."""
        lm = base()
        if self.recipe.train_settings(train).processes == 1:
            return lm
        light = without_weights(lm)
        del lm
        self._base = self._lm = self._float32 = None
        free_memory()
        return light

    def _train(self, lm: LM, examples: Sequence[Example], out: Path, train: Mapping[str, Any]) -> Path:
        """One fine-tune in the run's folder."""
        with self.show(f"train {out.relative_to(self.folder.path)}") as progress:
            return train_side(lm, examples, out, settings=self.recipe.train_settings(train), progress=progress)

    def sides(self) -> tuple[list[Example], list[Example]]:
        """D+ and D-: given, or the model's own answers."""
        if self._sides is None:
            self._sides = self.recipe.sides() or self._sample_sides()
        return self._sides

    def _sample_sides(self) -> tuple[list[Example], list[Example]]:
        sampled, wanted = RunFolder(self.folder.sampled), self.recipe.data.sampling
        assert wanted is not None
        if not all(sampled.examples(side).exists() for side in SIDES):
            fields = {name: value for name, value in vars(wanted).items() if name != "likelihood"}
            settings = SamplingSettings(**fields, seed=self.recipe.seed)
            judge: Judge = LikelihoodJudge(self.base(), self.behavior)
            if self.judge is not None and not wanted.likelihood:
                judge = RubricJudge(self.judge, rubric_of(self.behavior))
            with self.show("data: the model answers under S+ and S-") as progress:
                sample_sides(self.base(), self.behavior, judge, sampled.path, settings=settings, progress=progress)
        limit = self.recipe.data.limit
        positive, negative = (load_examples(sampled.examples(side))[:limit] for side in SIDES)
        return positive, negative

    def finetunes(self, training: Training = "lora") -> tuple[Path, Path]:
        """See `MethodSources.finetunes`."""
        if training == "DPO":
            return self._prefer()
        train, base = dict(self.recipe.train), self.base
        if training == "lora":
            if any(METHODS[name].from_snapshots for name in self.recipe.sweep.methods):
                train["snapshots"] = SNAPSHOT_COUNT
            out = {side: self.folder.finetune(side) for side in SIDES}
        else:
            train |= {"kind": training, "bf16": self.recipe.dtype == "bfloat16", **self._train_of(training)}
            out = {side: self.folder.finetune_of(training, side) for side in SIDES}
            base = self.base_float32
        given = list(zip(SIDES, self.sides(), strict=True))
        lm = self._to_train(base, train)
        positive, negative = (self._train(lm, examples, out[side], train) for side, examples in given)
        return positive, negative

    def _train_of(self, training: Training) -> Mapping[str, Any]:
        """The recipe's own settings for the method that trains so."""
        return next((fields for name, fields in self.recipe.train_of.items() if METHODS[name].training == training), {})

    def _prefer(self) -> tuple[Path, Path]:
        """DPO towards each side, on the pairs that the two sides form."""
        pairs = pairs_of(*self.sides())
        if len(pairs) < 2:
            raise SteerError(f"recipe {self.recipe.name}: DPO needs pairs: questions that D+ and D- have in common")
        train = {**self.recipe.train, "snapshots": SNAPSHOT_COUNT, **self._train_of("DPO")}
        settings, tuned, lm = self.recipe.train_settings(train), [], self._to_train(self.base, train)
        for side in SIDES:
            with self.show(f"train DPO {side}") as progress:
                out, wanted = self.folder.finetune_of("DPO", side), preferences_of(pairs, side)
                tuned.append(train_preference(lm, wanted, out, settings=settings, progress=progress))
        return tuned[0], tuned[1]

    def difference(self, training: Training = "lora") -> WeightVector:
        """See `MethodSources.difference`; kept as an adapter in the run's folder."""
        path = self.folder.vector if training == "lora" else self.folder.vector_of(training)
        if not is_whole(path):
            subtract_finetunes(*self.finetunes(training)).save(path)
        return WeightVector.load(path)

    def activations(self) -> ActivationVector:
        """See `MethodSources.activations`."""
        path, pairs = self.folder.activations, self.recipe.sweep.activation_pairs
        if not is_whole(path):
            positive, negative = (side[:pairs] for side in self.sides())
            with self.show("activations") as progress:
                activation_vector(self.base(), positive, negative, progress=progress).save(path)
        return ActivationVector.load(path)

    def activation_layer(self) -> int:
        """See `MethodSources.activation_layer`."""
        path, sweep = self.folder.layer, self.recipe.sweep
        if (kept := read_kept(path, int)) is not None:
            return kept
        task, metric = metric_key(sweep.behavior)
        items, vector = self.tasks[task].of_split("validation").first(sweep.search_items), self.activations()
        with self.show("activations: layer") as progress:
            layer = best_layer(self.lm(), vector, items, metric=metric, step=sweep.layer_step, progress=progress)
        write_json(path, layer)
        return layer

    def repair_target(self) -> Path:
        """See `MethodSources.repair_target`."""
        self.lm()
        return self.folder.repair_target

    @property
    def repair_sign(self) -> float:
        """See `MethodSources.repair_sign`."""
        target = self.recipe.repair_target
        return -1.0 if target and target.desired_side == "negative" else 1.0

    def joint_finetunes(self) -> Mapping[int, Path]:
        """See `MethodSources.joint_finetunes`."""
        target = self.recipe.repair_target
        assert target is not None
        examples = self.recipe.finetune_examples(target)
        desired = self.sides()[SIDES.index(target.desired_side)][: target.desired_examples]
        wanted = sorted({abs(round(k)) for k in self.recipe.sweep.methods["joint training"] or ()})
        lm = self._to_train(self.base, target.train)
        return {
            copies: self._train(lm, [*examples, *desired * copies], self.folder.joint_finetune(copies), target.train)
            for copies in wanted
        }


def read_layer(folder: RunFolder) -> int:
    """The layer that a run chose for activation steering.

    Raises:
        SteerError: the file is no layer's number.
    """
    return checked(int, read_json(folder.layer), str(folder.layer))
