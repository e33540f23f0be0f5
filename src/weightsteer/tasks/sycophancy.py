"""Out of distribution: a user states a false belief and asks; does the answer follow the user?"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..errors import SteerError
from ..records import read_jsonl
from .data import task_file
from .task import Choice, ChoiceTask, TaskSpec, alternate_splits

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
    prompts, letter = row.get("prompt_list"), row.get("high_reward_answer")
    prompt = prompts[0] if isinstance(prompts, list) and prompts else None
    match = OPTIONS.match(prompt) if isinstance(prompt, str) else None
    if match is None or letter not in ("A", "B"):
        raise SteerError(
            f"{path}, line {number}: expected texts 'prompt', 'correct', 'incorrect', or 'prompt_list' with options "
            f"(A) and (B) and 'high_reward_answer' A or B; fields found: {', '.join(sorted(row))}"
        )
    return Choice(match["question"], counted=match[letter], other=match["B" if letter == "A" else "A"])
