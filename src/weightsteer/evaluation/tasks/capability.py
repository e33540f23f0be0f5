"""What steering should leave alone: plain factual choices, small sums, and the loss on ordinary text."""

from __future__ import annotations

from ...files import read_jsonl
from ..metrics import Metric
from ..task_spec import TaskSpec
from .data import task_file
from .task import Choice, ChoiceTask, TaskKind, TextTask, alternate_splits

MARGIN = ("Leans to the correct answer", "nats per token")


def load_facts(spec: TaskSpec) -> ChoiceTask:
    """Factual questions without a stated belief: shipped, or JSONL with question, correct, incorrect.

    Metric `accuracy`: share of items in which the correct answer is the likelier per token.
    """
    return _questions("facts", "facts.jsonl", spec)


def load_sums(spec: TaskSpec) -> ChoiceTask:
    """Adding, subtracting, multiplying, counting, comparing: shipped, or JSONL with question, correct, incorrect.

    The wrong answer is the right one with a number that is a near miss. Metric `accuracy`: share of
    items in which the correct answer is the likelier per token.
    """
    return _questions("sums", "sums.jsonl", spec)


def _questions(name: str, shipped: str, spec: TaskSpec) -> ChoiceTask:
    rows = read_jsonl(task_file(shipped, spec.data), required=("question", "correct", "incorrect"))
    items = tuple(Choice(row["question"], row["correct"], row["incorrect"]) for row in rows)
    return ChoiceTask(name, items, alternate_splits(len(items)), share="accuracy")


def load_prose(spec: TaskSpec) -> TextTask:
    """Ordinary text: shipped passages, or JSONL with `text`. Metric `nll`: nats per token."""
    rows = read_jsonl(task_file("prose.jsonl", spec.data), required=("text",))
    texts = tuple(row["text"] for row in rows)
    return TextTask("prose", texts, alternate_splits(len(texts)))


TASKS = {
    "facts": TaskKind(
        load_facts,
        (
            Metric("accuracy", "Accuracy on plain facts", phrase="knows a plain fact"),
            Metric("margin", *MARGIN, detail=True),
        ),
    ),
    "sums": TaskKind(
        load_sums,
        (
            Metric("accuracy", "Accuracy on small sums", phrase="solves a small sum"),
            Metric("margin", *MARGIN, detail=True),
        ),
    ),
    "prose": TaskKind(load_prose, (Metric("nll", "Loss on ordinary text", "nats per token", "lower"),)),
}
