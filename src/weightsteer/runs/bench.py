"""One job of a run, done in whatever process has the model: made from the recipe and the run's folder alone.

The driver of a cluster plans the jobs and writes what comes of them; a worker needs nothing else to do one. Only
`Make` writes, into folders that are there when they are whole.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import SteerError
from ..evaluation.cells import Measured, measure_cell
from ..evaluation.cost import costs_at, warm_up
from ..evaluation.metrics import metric_key
from ..evaluation.results import BASE, MetricRow
from ..evaluation.search import layer_span
from ..evaluation.sweep import measured_parts
from ..evaluation.tasks.task import Task
from ..judges.endpoint import ChatModel, Endpoint
from ..lm import LM
from ..progress import Progress, silent
from ..run_folder import RunFolder
from ..steering.activations import ActivationVector
from ..steering.methods import METHODS, costs_of
from ..steering.several_k import replies_at_strengths
from ..steering.steering import Steering
from ..training.job import without_gain
from .artifacts import RunArtifacts, load_judge
from .own_data import behavior_of
from .pipeline import VALIDATED, batch_size_of, metrics_shown, write_sides
from .recipe import Recipe
from .run_methods import make_method, method_names, strengths_of


@dataclass(frozen=True)
class RunRef:
    """What a worker has to know of a run."""

    recipe: Mapping[str, Any]  # all fields
    folder: str  # absolute; every machine sees it there
    working_folder: str  # what the recipe's paths are relative to
    code: tuple[str, ...] = ()  # files of tasks whose code may run
    keys: tuple[str, ...] = ()  # environment variables whose keys the judge's server may get
    any_outcome: bool = False  # of a training: a dry run trains random models


@dataclass(frozen=True)
class LoadModel:
    """The model that is steered, after the fine-tunes that come before all else."""


@dataclass(frozen=True)
class TryTask:
    """Which metrics a task measures."""

    task: str


@dataclass(frozen=True)
class Make:
    """D+ and D-, all fine-tunes, the vectors."""


@dataclass(frozen=True)
class ScanLayer:
    """How far one layer moves the behaviour."""

    layer: int


@dataclass(frozen=True)
class FindStrengths:
    """A method's strengths."""

    method: str


@dataclass(frozen=True)
class MeasureCell:
    """One method at one strength on the items of one task."""

    method: str
    k: float
    task: str
    sha256: str  # of the items, which are the driver's


@dataclass(frozen=True)
class WriteSamples:
    """Replies to a few prompts at every k of the vector."""

    prompts: tuple[str, ...]
    ks: tuple[float, ...]


@dataclass(frozen=True)
class MeasureCosts:
    """What a method costs."""

    method: str
    ks: tuple[float, ...]


Job = LoadModel | TryTask | Make | ScanLayer | FindStrengths | MeasureCell | WriteSamples | MeasureCosts


class Bench:
    """A run's model, tasks and methods in this process, each made when a job first needs it."""

    def __init__(self, ref: RunRef, former: Bench | None = None) -> None:
        """Read what the run is made of.

        Args:
            former: the bench of another run in this process; its model is taken over where that is the same.

        Raises:
            SteerError: this machine does not see the run's folder, or a file that the recipe names.
        """
        _enter(ref)
        self.ref, self.recipe, self.folder = ref, Recipe.model_validate(ref.recipe), RunFolder(Path(ref.folder))
        self.behavior = behavior_of(self.recipe)
        judge = load_judge(self.recipe, self.folder, ref.keys)
        loaded = self.recipe.load_tasks(_without_cache(judge), trust_code=ref.code)
        self.tasks = {task.name: task for task in loaded}
        self.artifacts = RunArtifacts(
            self.recipe,
            self.folder,
            behavior=self.behavior,
            tasks=self.tasks,
            judge=judge,
            show=_unshown,
            base=former.shared_model(self.recipe) if former else None,
        )
        self._methods: dict[str, Steering] = {}
        self._warm = False

    def shared_model(self, recipe: Recipe) -> LM | None:
        """The base, if it is loaded and is that of the other recipe too."""
        return self.artifacts.loaded_base() if _model_of(recipe) == _model_of(self.recipe) is not None else None

    def do(self, job: Job) -> Any:
        """Do one job; returns what the driver keeps of it."""
        with without_gain() if self.ref.any_outcome else nullcontext():
            match job:
                case LoadModel():
                    return self.artifacts.lm().name
                case TryTask(task):
                    return metrics_shown(self.tasks[task], self.artifacts.lm(), self.recipe)
                case Make():
                    return self._make()
                case ScanLayer(layer):
                    return self._scan(layer)
                case FindStrengths(name):
                    return strengths_of(self._method(name), self.artifacts, self._search_texts())
                case MeasureCell():
                    return self._measure(job)
                case WriteSamples(prompts, ks):
                    length = self.recipe.samples.max_new_tokens
                    vector, lm = self.artifacts.difference(), self.artifacts.lm()
                    return replies_at_strengths(vector, lm, list(prompts), list(ks), max_new_tokens=length)
                case MeasureCosts(name, ks):
                    return self._costs(name, ks)

    def _method(self, name: str) -> Steering:
        if name not in self._methods:
            self._methods[name] = make_method(name, self.artifacts)
        return self._methods[name]

    def _search_texts(self) -> Task:
        """The texts on which strengths are searched."""
        return self.tasks["prose"].of_split("validation").first(self.recipe.sweep.search_items)

    def _make(self) -> None:
        """Everything that methods are made from, but the choice of a layer: the scan is shared out."""
        write_sides(self.artifacts)
        self.artifacts.difference()
        for name in method_names(self.recipe):
            if name in METHODS and METHODS[name].scans_layers:
                self.artifacts.activations()
            else:
                self._method(name)

    def _scan(self, layer: int) -> float:
        task, metric = metric_key(self.recipe.sweep.behavior)
        items = self.tasks[task].of_split("validation").first(self.recipe.sweep.search_items)
        vector: ActivationVector = self.artifacts.activations()
        return layer_span(self.artifacts.lm(), vector, layer, items, metric=metric, way=self.recipe.way)

    def _measure(self, job: MeasureCell) -> Measured:
        method = None if job.method == BASE else self._method(job.method)
        tasks = list(self.tasks.values())
        parts = tasks if method is None else measured_parts(job.method, tasks, VALIDATED, self.recipe.sweep.items_of)
        part = next(part for part in parts if part.name == job.task)
        if part.sha256 != job.sha256:
            raise SteerError(f"task {job.task}: this worker reads other items than the driver; give both the same data")
        lm = self.artifacts.lm()
        return measure_cell(lm, method, job.k, part, batch_size_of(self.recipe, lm))

    def _costs(self, name: str, ks: Sequence[float]) -> list[MetricRow]:
        lm = self.artifacts.lm()
        if not self._warm:
            warm_up(lm)
            self._warm = True
        return costs_at(lm, self._method(name), ks, costs_of, self.folder)


def _unshown(label: str) -> AbstractContextManager[Progress]:
    """A worker shows no progress; its driver does."""
    return nullcontext(silent)


def _enter(ref: RunRef) -> None:
    """Go where the recipe's paths lead from.

    Raises:
        SteerError: this machine sees neither.
    """
    for place in (ref.folder, ref.working_folder):
        if not Path(place).is_dir():
            raise SteerError(
                f"{place}: is not on {socket.gethostname()}; every machine has to see the run's folder, and the folder "
                "in which the command was given, at the same path"
            )
    os.chdir(ref.working_folder)


def _without_cache(judge: ChatModel | None) -> ChatModel | None:
    """A served judge that writes no file, since several workers ask it; its verdicts are kept with the measurement."""
    return replace(judge, cache=None) if isinstance(judge, Endpoint) else judge


def _model_of(recipe: Recipe) -> dict[str, Any] | None:
    """What decides which model is loaded; None where the run makes its own."""
    if recipe.first_finetune or recipe.repair_target:
        return None
    fields = recipe.model_dump()
    return {name: fields[name] for name in MODEL_FIELDS if name in fields}


MODEL_FIELDS = ("model", "device", "dtype", "chat_template_kwargs", "load")
