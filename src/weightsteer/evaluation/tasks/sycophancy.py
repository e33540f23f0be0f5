"""Out of distribution: a user says what they believe or who they are, and asks; does the answer follow the user?"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ...files import read_jsonl
from ..metrics import Metric
from ..task_spec import TaskSpec
from .by_hash import hash_splits
from .data import reward_hack_row, task_file, wrong_row
from .task import Choice, ChoiceTask, TaskKind, alternate_splits

# reward-hack-generalization's format: "<user's belief and question>\nAnswers:\n(A) ...\n(B) ..."
OPTIONS = re.compile(r"^(?P<question>.*?)\s*Answers\s*:?\s*\(A\)\s*(?P<A>.*?)\s*\(B\)\s*(?P<B>.*?)\s*$", re.DOTALL)


def load_false_beliefs(spec: TaskSpec) -> ChoiceTask:
    """False-belief questions: shipped, or a JSONL file in our format or in reward-hack-generalization's.

    The options are taken out of the prompt and scored as full answers, since a small model cannot
    answer by letter. Metric `follows`: share of items in which the answer that agrees with the user
    is the likelier per token.

    Raises:
        SteerError: a line in neither format, with the file and the field.
    """
    items = _beliefs("false_beliefs.jsonl", spec)
    return ChoiceTask("false_beliefs", items, alternate_splits(len(items)), share="follows")


def load_wrong_claims(spec: TaskSpec) -> ChoiceTask:
    """Wrong claims from other fields and in other phrasings than the false beliefs; formats and metrics as there.

    A fixed hash of an item's prompt says whether it is a validation or a test item.

    Raises:
        SteerError: a line in neither format, with the file and the field.
    """
    items = _beliefs("wrong_claims.jsonl", spec)
    return ChoiceTask("wrong_claims", items, hash_splits([str(item.prompt) for item in items]), share="follows")


def load_stated_opinions(spec: TaskSpec) -> ChoiceTask:
    """A user says who they are (politics, taste, profession, age, region) and asks what has no right answer.

    Items: shipped, or JSONL with `question`, `prompt`, `matching` (the answer that suits such a user) and `other`.
    Each shipped question is asked by a user of either kind; both share a split, by a fixed hash of the question.
    Metric `matches`: share of items in which the answer that suits the user is the likelier per token.

    Raises:
        SteerError: a line that lacks one of the texts, with the file and the field.
    """
    rows = read_jsonl(
        task_file("stated_opinions.jsonl", spec.data), required=("question", "prompt", "matching", "other")
    )
    items = tuple(Choice(row["prompt"], counted=row["matching"], other=row["other"]) for row in rows)
    splits = hash_splits([row["question"] for row in rows])
    return ChoiceTask("stated_opinions", items, splits, share="matches")


def _beliefs(shipped: str, spec: TaskSpec) -> tuple[Choice, ...]:
    path = task_file(shipped, spec.data)
    return tuple(_item(path, number, row) for number, row in enumerate(read_jsonl(path), start=1))


def _item(path: Path, number: int, row: dict[str, Any]) -> Choice:
    if all(isinstance(row.get(field), str) for field in ("prompt", "correct", "incorrect")):
        return Choice(row["prompt"], counted=row["incorrect"], other=row["correct"])
    found = reward_hack_row(row)
    match = OPTIONS.match(found[0]) if found else None
    if found is None or match is None:
        raise wrong_row(path, number, row, "prompt", "correct", "incorrect")
    letter = found[1]
    return Choice(match["question"], counted=match[letter], other=match["B" if letter == "A" else "A"])


TASKS = {
    "false_beliefs": TaskKind(
        load_false_beliefs,
        (
            Metric(
                "follows", "Follows the user's false belief", better="lower", phrase="follows a false belief", toward=1
            ),
            Metric(
                "margin",
                "Leans to the user's false belief",
                "nats per token",
                "lower",
                True,
                "leans to a false belief",
                1,
            ),
        ),
    ),
    "wrong_claims": TaskKind(
        load_wrong_claims,
        (
            Metric(
                "follows", "Follows the user's wrong claim", better="lower", phrase="follows a wrong claim", toward=1
            ),
            Metric(
                "margin",
                "Leans to the user's wrong claim",
                "nats per token",
                "lower",
                True,
                "leans to a wrong claim",
                1,
            ),
        ),
    ),
    "stated_opinions": TaskKind(
        load_stated_opinions,
        (
            Metric(
                "matches", "Gives the opinion that suits the user", better="lower", phrase="suits the user", toward=1
            ),
            Metric(
                "margin",
                "Leans to what suits the user",
                "nats per token",
                "lower",
                True,
                "leans to what suits the user",
                1,
            ),
        ),
    ),
}
