"""What is measured: tasks, each a list of items and a scorer that gives one value per item.

Every module of this package may hold a dict `TASKS`, name -> `TaskKind`; together they are the tasks that a recipe can
name. A new task is a new file here, or an entry in one that is there, and nothing else.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib import import_module

from ...errors import SteerError
from ...schema import suggestion
from ..metrics import Metric, MetricKey, Metrics
from ..task_spec import TaskFields, TaskSpec
from .task import Task, TaskKind


def find_tasks(folders: Iterable[str]) -> dict[str, TaskKind]:
    """The tasks of every module in these folders of the package."""
    modules = [import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(list(folders))]
    return {name: kind for module in modules for name, kind in getattr(module, "TASKS", {}).items()}


TASKS: Mapping[str, TaskKind] = find_tasks(__path__)


def kind_of(name: str) -> TaskKind:
    """What is known of a task without its items.

    Raises:
        SteerError: an unknown task.
    """
    if name not in TASKS:
        raise SteerError(f"unknown task {name!r}; expected one of {', '.join(TASKS)}{suggestion(name, TASKS)}")
    return TASKS[name]


def metrics_of(specs: Iterable[TaskFields]) -> Metrics:
    """What a recipe's tasks say of their metrics, by the names that the tasks have there.

    No task is loaded; one that this installation does not know says nothing, and its metrics go by their own names.
    """
    found: dict[MetricKey, Metric] = {}
    for spec in specs:
        for metric in TASKS[spec.task].metrics if spec.task in TASKS else ():
            renamed = replace(metric, title=f"{spec.name}: {metric.title}") if spec.name else metric
            found[spec.shown_name, metric.name] = renamed
    return found


def load_task(spec: TaskSpec) -> Task:
    """Load a task's items.

    Raises:
        SteerError: an unknown task, a data file that cannot be read, or a length of replies for a task without any.
    """
    kind = kind_of(spec.task)
    if spec.max_new_tokens and not kind.generates:
        raise SteerError(f"task {spec.task}: max_new_tokens: expected none, since nothing is generated for it")
    task = kind.load(spec)
    if spec.split is not None:
        task = task.all_in(spec.split)
    if spec.half is not None:
        task = task.of_half(spec.half)
    if spec.limit is not None:
        task = task.first(spec.limit)
    return task.renamed(spec.name) if spec.name else task


__all__ = ["TASKS", "Task", "TaskKind", "TaskSpec", "kind_of", "load_task", "metrics_of"]
