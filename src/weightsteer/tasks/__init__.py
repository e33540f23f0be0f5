"""What is measured: one file a task, each a list of items and a scorer that gives one value an item."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import SteerError
from .capability import load_facts, load_prose
from .sycophancy import load_false_beliefs
from .task import Task
from .trait import load_preference

TASKS: Mapping[str, Callable[[str | Path | None], Task]] = {
    "preference": load_preference,
    "false_beliefs": load_false_beliefs,
    "facts": load_facts,
    "prose": load_prose,
}


@dataclass(frozen=True)
class TaskSpec:
    """One task of a recipe: which, on which data (None: the shipped items), and how many of each split."""

    task: str
    data: str | None = None
    limit: int | None = None
    name: str | None = None

    def load(self) -> Task:
        """Load the task's items.

        Raises:
            SteerError: an unknown task, or a data file that cannot be read.
        """
        if self.task not in TASKS:
            raise SteerError(f"unknown task {self.task!r}; expected one of {', '.join(TASKS)}")
        task = TASKS[self.task](self.data)
        if self.limit is not None:
            task = task.first(self.limit)
        return task.renamed(self.name) if self.name else task


__all__ = ["TASKS", "Task", "TaskSpec"]
