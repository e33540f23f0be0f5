"""The models, data and fine-tunes of a run: made once in its folder, and found there afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..behavior import SIDES, Behavior, ContrastPair, Example, pairs_of, sides_of
from ..checkpoints.whole import is_whole
from ..data_building.sampling import sample_sides
from ..data_building.sampling_settings import SamplingSettings
from ..errors import SteerError
from ..evaluation.metrics import metric_key
from ..evaluation.search import best_layer
from ..evaluation.tasks.task import Task
from ..example_files.load import load_examples
from ..files import read_json, read_kept, write_json
from ..judges.endpoint import ChatModel, Endpoint
from ..judges.judge import Judge, LikelihoodJudge, LocalChatModel, RubricJudge, rubric_of
from ..judges.keys import require_own_key
from ..lm import LM
from ..model_parts import width_of
from ..run_folder import RunFolder
from ..schema import checked
from ..steering.activations import ActivationVector, activation_vector
from ..steering.method import TWO_WAY, DialOf, Training
from ..steering.trained_activation import train_activation
from ..training import preferences_of, train_preference, train_two_way, two_way_vector
from ..training.defaults import resolve
from ..training.learned_dial import DialSettings, learn_dial
from ..vectors.difference import subtract_finetunes, task_vector
from ..vectors.random_like import random_like
from ..vectors.weight_vector import WeightVector
from .dial_pairs import dial_pairs, unmoved_pairs
from .models import RunModels, ShowProgress
from .recipe import Recipe
from .trainings import DENSE, train_fields


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
        return LocalChatModel(
            LM.load(judge.model, device=recipe.device, dtype=recipe.dtype, options=recipe.loading.options)
        )
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
        base: LM | None = None,
    ) -> None:
        """Nothing is made yet. `base` is the base, where it is loaded already."""
        self.recipe, self.folder, self.show = recipe, folder, show
        self.tasks, self.judge = tasks, judge
        self.behavior = behavior
        self.models = RunModels(recipe, folder, show=show, base=base)
        self._sides: tuple[list[Example], list[Example]] | None = None

    def base(self) -> LM:
        """The model that vectors are made on: the recipe's, after its first fine-tune if there is one."""
        return self.models.base()

    def loaded_base(self) -> LM | None:
        """The base, if it is loaded."""
        return self.models.loaded_base()

    def lm(self) -> LM:
        """The model that steering is applied to: the base, or the fine-tune of it that is to be repaired."""
        return self.models.lm()

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
        train = train_fields(self.recipe, training)
        sides = sides_of(self.dial_pairs()) if training == "dial-pairs" else self.sides()
        folder, own = self.folder, training != "lora"
        out = {side: folder.finetune_of(training, side) if own else folder.finetune(side) for side in SIDES}
        lm = self.models.to_train(self.models.base_float32 if training in DENSE else self.base, train)
        given = zip(SIDES, sides, strict=True)
        positive, negative = (self.models.train(lm, examples, out[side], train) for side, examples in given)
        del lm
        self.models.free_float32(training)
        return positive, negative

    def _pairs(self) -> list[ContrastPair]:
        """The pairs that the two sides form.

        Raises:
            SteerError: they have too few questions in common.
        """
        pairs = pairs_of(*self.sides())
        if len(pairs) < 2:
            raise SteerError(
                f"recipe {self.recipe.name}: a method of its sweep needs pairs: questions that D+ and D- have in common"
            )
        return pairs

    def _two_way(self, training: Training) -> Path:
        """The one adapter of a two-way training, on the pairs that the two sides form."""
        settings = self.recipe.train_settings(train_fields(self.recipe, training))
        with self.show(f"train {training}") as progress:
            out = self.folder.two_way(training)
            return train_two_way(self.base(), self._pairs(), out, settings=settings, progress=progress)

    def dial_pairs(self) -> list[ContrastPair]:
        """Pairs that the sides are not trained on, for the coefficients."""
        return dial_pairs(self.recipe, self.sides())

    def random_vector(self) -> WeightVector:
        """See `MethodSources.random_vector`; kept in the run's folder."""
        path = self.folder.random
        if not is_whole(path):
            random_like(self.difference(), self.recipe.seed).save(path)
        return WeightVector.load(path)

    def learned_dial(self, of: DialOf) -> WeightVector:
        """See `MethodSources.learned_dial`; kept in the run's folder."""
        path, wanted = self.folder.dial(of), self.recipe.dial
        if not is_whole(path):
            sides: tuple[WeightVector, WeightVector | None] = self.random_vector(), None
            if of == "contrastive":
                positive, negative = self.finetunes()
                sides = task_vector(positive), task_vector(negative)
            fields = wanted.model_dump(exclude={"pairs", "count", "unmoved"})
            settings = DialSettings(**fields, seed=self.recipe.seed)
            pairs, unmoved = self.dial_pairs(), unmoved_pairs(self.recipe, self.sides())
            with self.show(f"coefficients of {of}") as progress:
                learn_dial(self.base(), *sides, pairs, unmoved=unmoved, settings=settings, progress=progress).save(path)
        return WeightVector.load(path)

    def trained_activation(self) -> ActivationVector:
        """See `MethodSources.trained_activation`; trained on as many pairs, as often, as the LoRA sides see."""
        path, train = self.folder.trained_activation, self.recipe.train
        if not is_whole(path):
            start, pairs = self.activations().only(self.activation_layer()), self._pairs()
            width = width_of(self.base().model)
            whole = resolve(self.recipe.train_settings(train), examples=len(pairs), width=width)
            steps = len(pairs) / (whole.batch_size * whole.accumulation)  # of an epoch
            epochs = whole.max_steps / steps if whole.max_steps else whole.epochs
            with self.show("train an activation") as progress:
                train_activation(
                    self.base(),
                    start,
                    pairs,
                    epochs=max(1, round(epochs)),
                    batch_size=whole.batch_size,
                    seed=self.recipe.seed,
                    progress=progress,
                ).save(path)
        return ActivationVector.load(path)

    def _prefer(self) -> tuple[Path, Path]:
        """DPO towards each side, on the pairs that the two sides form."""
        pairs = self._pairs()
        train = train_fields(self.recipe, "DPO")
        settings, tuned, lm = self.recipe.train_settings(train), [], self.models.to_train(self.base, train)
        for side in SIDES:
            with self.show(f"train DPO {side}") as progress:
                out, wanted = self.folder.finetune_of("DPO", side), preferences_of(pairs, side)
                tuned.append(train_preference(lm, wanted, out, settings=settings, progress=progress))
        return tuned[0], tuned[1]

    def difference(self, training: Training = "lora") -> WeightVector:
        """See `MethodSources.difference`; kept as an adapter in the run's folder."""
        path = self.folder.vector if training == "lora" else self.folder.vector_of(training)
        if not is_whole(path):
            if training in TWO_WAY:
                two_way_vector(self._two_way(training)).save(path)
            else:
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
            layer = best_layer(
                self.lm(),
                vector,
                items,
                metric=metric,
                way=self.recipe.way,
                step=sweep.layer_step,
                progress=progress,
            )
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
        lm, out = self.models.to_train(self.base, target.train), self.folder.joint_finetune
        return {
            copies: self.models.train(lm, [*examples, *desired * copies], out(copies), target.train)
            for copies in wanted
        }


def read_layer(folder: RunFolder) -> int:
    """The layer that a run chose for activation steering.

    Raises:
        SteerError: the file is no layer's number.
    """
    return checked(int, read_json(folder.layer), str(folder.layer))
