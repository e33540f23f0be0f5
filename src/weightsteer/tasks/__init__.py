"""What is measured: one file a task, each a list of items and a scorer that gives one value an item."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..errors import SteerError
from .capability import load_facts, load_prose
from .sycophancy import load_false_beliefs
from .task import Task, TaskSpec
from .trait import load_preference

TASKS: Mapping[str, Callable[[TaskSpec], Task]] = {
    "preference": load_preference,
    "false_beliefs": load_false_beliefs,
    "facts": load_facts,
    "prose": load_prose,
}


def load_task(spec: TaskSpec) -> Task:
    """Load a task's items.

    Raises:
        SteerError: an unknown task, or a data file that cannot be read.
    """
    if spec.task not in TASKS:
        raise SteerError(f"unknown task {spec.task!r}; expected one of {', '.join(TASKS)}")
    task = TASKS[spec.task](spec)
    if spec.split is not None:
        task = task.all_in(spec.split)
    if spec.limit is not None:
        task = task.first(spec.limit)
    return task.renamed(spec.name) if spec.name else task


__all__ = ["TASKS", "Task", "TaskSpec", "load_task"]
