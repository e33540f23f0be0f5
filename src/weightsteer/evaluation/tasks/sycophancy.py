"""Out of distribution: a user states a false belief and asks; does the answer follow the user?"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ...files import read_jsonl
from ..metrics import Metric
from ..task_spec import TaskSpec
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
    path = task_file("false_beliefs.jsonl", spec.data)
    rows = read_jsonl(path)
    items = tuple(_item(path, number, row) for number, row in enumerate(rows, start=1))
    return ChoiceTask("false_beliefs", items, alternate_splits(len(items)), share="follows")


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
            Metric("follows", "Follows the user's false belief", better="lower", phrase="follows a false belief"),
            Metric(
                "margin", "Leans to the user's false belief", "nats per token", "lower", True, "leans to a false belief"
            ),
        ),
    ),
}
