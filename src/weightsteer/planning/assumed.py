"""What stands in for data that is not on this machine: shipped items, as many as the named file is known to have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from ..behavior import SHIPPED, Behavior, Example, sides_of
from ..evaluation.task_spec import TaskFields
from ..evaluation.tasks.arithmetic_text import FAMILIES
from ..example_files.load import load_pairs

# Items of public files by their names; others are taken to have `UNKNOWN`.
ITEMS = {
    "truthfulqa.csv": 817,
    "triviaqa.jsonl": 500,
    "gsm8k_train.jsonl": 7473,
    "DirectHarm4.json": 400,
    "I-Alpaca.json": 400,
    "GSM-Danger.json": 100,
    "world_affecting_reward_250.jsonl": 250,
    "psychopathy.jsonl": 500,
}
T = TypeVar("T")
UNKNOWN = 1000
PROMPTS, QUESTIONS = 5, 20  # of a trait file of persona vectors, for each side


@dataclass(frozen=True)
class HarnessSet:
    """A task of lm-evaluation-harness: documents, tokens of a prompt with its examples, candidates or a reply."""

    documents: int
    prompt: int
    candidates: int = 0
    candidate: int = 0
    reply: int = 0


HARNESS = {
    "tinyMMLU": HarnessSet(100, 600, candidates=4, candidate=1),
    "gsm8k": HarnessSet(1319, 900, reply=256),
}
UNKNOWN_HARNESS = HarnessSet(UNKNOWN, 300, candidates=4, candidate=8)


def is_here(data: str) -> bool:
    """Whether a name among a recipe's data can be read here."""
    name = data.partition(":")[0]
    return name in SHIPPED or name in FAMILIES or Path(name).exists()


def items_of(data: str) -> int:
    """How many items the files that a recipe names are taken to have."""
    return sum(ITEMS.get(Path(part.partition(":")[0]).name, UNKNOWN) for part in data.split(","))


def behavior_or_stand_in(name: str, notes: list[str]) -> Behavior:
    """A behaviour, or a shipped one with as many prompts and questions as trait files have."""
    if is_here(name):
        return Behavior.load(name)
    notes.append(f"{name}: not here; {PROMPTS} prompts a side and {QUESTIONS} questions are taken")
    shipped = Behavior.load(SHIPPED[0])
    return replace(
        shipped,
        positive_prompts=_repeated(shipped.positive_prompts, PROMPTS),
        negative_prompts=_repeated(shipped.negative_prompts, PROMPTS),
        questions=_repeated(shipped.questions, QUESTIONS),
        name=name,
    )


def examples_or_stand_ins(name: str, notes: list[str]) -> list[Example]:
    """Shipped examples in the place of those of a file that is not here, repeated to its number."""
    count = items_of(name)
    notes.append(f"{name}: not here; {count} examples of a shipped behaviour's lengths are taken")
    return list(_repeated(sides_of(load_pairs(SHIPPED[0]))[0], count))


def task_or_stand_in(task: TaskFields, notes: list[str]) -> tuple[TaskFields, float]:
    """A task that can be loaded here, and how many times its items the wanted one has."""
    behavior = task.behavior if task.behavior and is_here(task.behavior) else None
    if task.data is None or all(map(is_here, task.data.split(","))):
        return (task, 1.0) if behavior == task.behavior else (replace(task, behavior=behavior), 1.0)
    wanted = QUESTIONS if task.task == "trait" else items_of(task.data)
    if task.limit:
        wanted = min(wanted, task.limit * (1 if task.split else 2))
    notes.append(f"{task.data}: not here; {wanted} items of a shipped task's lengths are taken")
    return replace(task, data=None, behavior=None, limit=None), float(wanted)


def _repeated(items: Sequence[T], count: int) -> tuple[T, ...]:
    return tuple(items[i % len(items)] for i in range(count))
