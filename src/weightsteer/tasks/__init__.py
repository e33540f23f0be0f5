"""What is measured: one file a task, each a list of items and a scorer that gives one value an item."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..errors import SteerError
from .answers import load_answers
from .arithmetic import load_arithmetic, load_arithmetic_choice
from .capability import load_facts, load_prose, load_sums
from .choices import load_choices, load_choices_cot, load_choices_likelihood
from .four_way import load_four_way, load_four_way_open
from .harness import load_harness
from .refusal import load_refusal, load_refusal_likelihood, load_safety
from .sycophancy import load_false_beliefs
from .task import Task, TaskSpec
from .trait import load_preference, load_statements, load_trait

TASKS: Mapping[str, Callable[[TaskSpec], Task]] = {
    "preference": load_preference,
    "false_beliefs": load_false_beliefs,
    "four_way": load_four_way,
    "four_way_open": load_four_way_open,
    "arithmetic": load_arithmetic,
    "arithmetic_choice": load_arithmetic_choice,
    "choices": load_choices,
    "choices_cot": load_choices_cot,
    "choices_likelihood": load_choices_likelihood,
    "refusal": load_refusal,
    "refusal_likelihood": load_refusal_likelihood,
    "safety": load_safety,
    "trait": load_trait,
    "statements": load_statements,
    "facts": load_facts,
    "sums": load_sums,
    "prose": load_prose,
    "answers": load_answers,
    "harness": load_harness,
}


REPLYING = ("four_way_open", "arithmetic", "choices", "choices_cot", "refusal", "safety", "trait", "harness")


def load_task(spec: TaskSpec) -> Task:
    """Load a task's items.

    Raises:
        SteerError: an unknown task, a data file that cannot be read, or a length of replies for a task without any.
    """
    if spec.task not in TASKS:
        raise SteerError(f"unknown task {spec.task!r}; expected one of {', '.join(TASKS)}")
    if spec.max_new_tokens and spec.task not in REPLYING:
        raise SteerError(f"task {spec.task}: max_new_tokens: expected none, since nothing is generated for it")
    task = TASKS[spec.task](spec)
    if spec.split is not None:
        task = task.all_in(spec.split)
    if spec.limit is not None:
        task = task.first(spec.limit)
    return task.renamed(spec.name) if spec.name else task


__all__ = ["TASKS", "Task", "TaskSpec", "load_task"]
