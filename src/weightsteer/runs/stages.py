"""A run as stages of jobs that any worker can do: what is planned here is written here, and by nobody else.

Each stage's jobs may be done in any order and at once; the next one is planned from what they gave. What the run's
folder holds already is not asked for again, so that a driver that was killed goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import SteerError
from ..evaluation.cost import costs_still_of, known_costs
from ..evaluation.metrics import metric_key
from ..evaluation.results import BASE
from ..evaluation.search import layer_of_widest, layers_to_scan
from ..evaluation.sweep import (
    keep_measurement,
    measured_parts,
    measurements_of,
    strengths_to_measure,
    write_rows,
)
from ..evaluation.tasks.task import Task
from ..files import append_jsonl, read_kept, write_json, write_jsonl
from ..leftovers import sweep_within
from ..locks import hold
from ..steering.activations import ActivationVector
from ..steering.methods import METHODS
from .bench import (
    FindStrengths,
    Job,
    LoadModel,
    Make,
    MeasureCell,
    MeasureCosts,
    RunRef,
    ScanLayer,
    TryTask,
    WriteSamples,
)
from .pipeline import VALIDATED, Run
from .run_methods import known_strengths, method_names
from .validate import require_metrics

Strengths = dict[str, list[float]]  # method -> its k


@dataclass(frozen=True)
class Stage:
    """Jobs that do not wait for each other, and what keeps the result of each."""

    name: str
    jobs: Sequence[Job]
    keep: Callable[[Job, Any], None]


def ref_of(run: Run, *, any_outcome: bool = False) -> RunRef:
    """What workers have to know of a run.

    Raises:
        SteerError: a server measures it, which workers would not make faster.
    """
    if run.engine is not None:
        raise SteerError(
            f"recipe {run.recipe.name}: its engine, a server, measures it; leave out --ray, or the recipe's 'engine'"
        )
    places = str(run.folder.path.resolve()), str(Path.cwd())
    return RunRef(run.recipe.model_dump(), *places, tuple(run.trust.code), tuple(run.trust.keys), any_outcome)


def stages(run: Run) -> Generator[Stage, None, None]:
    """The stages of a run, from the data to the report. Whoever takes one does its jobs before the next.

    The run's folder is held from the first stage to the last.
    """
    with hold(run.folder.path):
        sweep_within(run.folder.path)
        if not is_measured(run):
            yield Stage("model", [LoadModel()], _nothing)
            yield from _tasks(run)
            yield Stage("data, fine-tunes and vectors", [Make()], _nothing)
            yield from _layer(run)
            yield from _strengths(run)
            yield from _measurements(run)
        finish(run)


def is_measured(run: Run) -> bool:
    """Whether nothing is left to be made or measured."""
    if not run.folder.vector.is_dir():
        return False
    known = known_strengths(run.folder, run.recipe.sweep)
    return all(name in known for name in method_names(run.recipe)) and not _open_jobs(run, known)


def finish(run: Run) -> Path:
    """Rows, the choice of k and the report, from what the run's folder holds; returns the report's path."""
    with hold(run.folder.path):
        strengths = known_strengths(run.folder, run.recipe.sweep)
        keys = [(name, k, task.name) for name, k, task in _cells(run, strengths)]
        rows = write_rows(keys, measurements_of(run.folder), run.folder)
        samples = run.known_samples(_sample_ks(strengths))
        assert samples is not None  # the last stage made them
        run.choose(rows, samples)
        return run.report()


def _tasks(run: Run) -> Iterator[Stage]:
    """The metrics that the recipe names must be measured, which shows before any training."""
    found: dict[str, Sequence[str]] = dict(run.known_metrics())

    def keep(job: Job, result: Any) -> None:
        assert isinstance(job, TryTask)
        found[job.task] = result

    yield Stage("tasks", [TryTask(task.name) for task in run.tasks if task.name not in found], keep)
    require_metrics(run.recipe, found)


def _layer(run: Run) -> Iterator[Stage]:
    """The layer of methods that steer at one, where the run has not chosen it."""
    wanted = any(name in METHODS and METHODS[name].scans_layers for name in method_names(run.recipe))
    if not wanted or read_kept(run.folder.layer, int) is not None:
        return
    vector, spans = ActivationVector.load(run.folder.activations), dict[int, float]()

    def keep(job: Job, result: Any) -> None:
        assert isinstance(job, ScanLayer)
        spans[job.layer] = result

    layers = layers_to_scan(vector, run.recipe.sweep.layer_step)
    yield Stage("layers", [ScanLayer(layer) for layer in layers], keep)
    in_order = {layer: spans[layer] for layer in layers}
    write_json(run.folder.layer, layer_of_widest(in_order, " / ".join(metric_key(run.recipe.sweep.behavior))))


def _strengths(run: Run) -> Iterator[Stage]:
    """The strengths of all methods."""
    known, names = known_strengths(run.folder, run.recipe.sweep), method_names(run.recipe)

    def keep(job: Job, result: Any) -> None:
        assert isinstance(job, FindStrengths)
        known[job.method] = result
        write_json(run.folder.strengths, {name: known[name] for name in names if name in known})

    yield Stage("strengths", [FindStrengths(name) for name in names if name not in known], keep)


def _measurements(run: Run) -> Iterator[Stage]:
    """All cells, the samples and the costs."""
    strengths = known_strengths(run.folder, run.recipe.sweep)

    def keep(job: Job, result: Any) -> None:
        match job:
            case MeasureCell():
                measurement, turns = result
                keep_measurement(measurement, turns, run.folder)
            case WriteSamples(_, ks):
                run.keep_samples(ks, result)
            case MeasureCosts():
                append_jsonl(run.folder.costs, [asdict(row) for row in result])
            case _:
                raise AssertionError(job)

    yield Stage("measurements", _open_jobs(run, strengths), keep)
    _order_costs(run)


def _open_jobs(run: Run, strengths: Strengths) -> list[Job]:
    """What is still to be measured: the samples, which take longest, then the cells in the order of the rows."""
    done = measurements_of(run.folder)
    cells = [cell for cell in _cells(run, strengths) if (cell[0], cell[1], cell[2].name) not in done]
    jobs: list[Job] = [MeasureCell(name, k, task.name, task.sha256) for name, k, task in cells]
    ks = _sample_ks(strengths)
    if run.known_samples(ks) is None:
        jobs.insert(0, WriteSamples(tuple(run.sample_prompts()), tuple(ks)))
    kept = {row.method for row in costs_still_of(run.folder, strengths)}
    jobs += [
        MeasureCosts(name, tuple(strengths[name]))
        for name in method_names(run.recipe)
        if strengths[name] and name not in kept
    ]
    return jobs


def _cells(run: Run, strengths: Strengths) -> list[tuple[str, float, Task]]:
    """Method, k and the part of a task, in the order of the rows; the base first."""
    tasks, items_of = run.tasks, run.recipe.sweep.items_of
    cells: list[tuple[str, float, Task]] = [(BASE, 0.0, task) for task in tasks]
    for name in method_names(run.recipe):
        parts = measured_parts(name, tasks, VALIDATED, items_of)
        cells += [(name, k, part) for k in strengths_to_measure(strengths[name]) for part in parts]
    return cells


def _sample_ks(strengths: Strengths) -> list[float]:
    return sorted({0.0, *strengths["contrastive"]})


def _order_costs(run: Run) -> None:
    """Costs in the order of the methods, whichever worker was first."""
    place = {name: number for number, name in enumerate(method_names(run.recipe))}
    rows = known_costs(run.folder)
    ordered = sorted(rows, key=lambda row: place.get(row.method, len(place)))
    if ordered != rows:
        write_jsonl(run.folder.costs, [asdict(row) for row in ordered])


def _nothing(job: Job, result: Any) -> None:
    """What is made lies in the run's folder."""
