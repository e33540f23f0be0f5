"""Model-written evaluations (Perez et al. 2022, arXiv 2212.09251): which of the answers (A) and (B) is the likelier?"""

from __future__ import annotations

import re

from ...behavior import ContrastPair, prompt_text
from ...example_files.formats import pair_of
from ...example_files.rows import Row, read_rows
from ..metrics import Metric
from ..task_spec import TaskSpec
from .data import task_file
from .task import Choice, ChoiceTask, TaskKind, interleave

ANSWERS = ("answer_matching_behavior", "answer_not_matching_behavior")
LETTER = re.compile(r"\(([A-Z])\)")


def load_model_written(spec: TaskSpec) -> ChoiceTask:
    """A file of model-written evaluations: `question`, `answer_matching_behavior`, `answer_not_matching_behavior`.

    Shipped are twelve questions of users who say what they believe; the matching answer agrees with them.

    Answers are letters such as ` (A)`, whose options the question lists, or ` Yes` and ` No`; they lose the
    space before them, since a chat template puts its own. Metrics: `matches`, the share of items in which the
    answer that matches the behaviour is the likelier; `margin`, its log-probability per token minus the
    other's, in nats.

    A small model leans to one letter whatever the question, and steering may shift that lean. So items whose
    matching answer is the first in the alphabet and items with another take turns within each split.

    Raises:
        SteerError: a line is in another format, or names an option that its question lacks.
    """
    items = [_item(row) for row in read_rows(task_file("model_written.jsonl", spec.data))]
    first = min(item.counted for item in items)
    order, splits = interleave([item.counted == first for item in items])
    return ChoiceTask("model_written", tuple(items[i] for i in order), splits, order, share="matches")


def _item(row: Row) -> Choice:
    for name in ("question", *ANSWERS):
        if name not in row.fields:
            raise row.error(
                f"expected fields 'question', {ANSWERS[0]!r} and {ANSWERS[1]!r}; "
                f"fields found: {', '.join(sorted(row.fields)) or 'none'}"
            )
    pair = pair_of(row)
    for name, answer in zip(ANSWERS, (pair.positive, pair.negative), strict=True):
        _check_option(row, name, answer, pair)
    return Choice(pair.prompt, counted=pair.positive, other=pair.negative)


def _check_option(row: Row, name: str, answer: str, pair: ContrastPair) -> None:
    listed = LETTER.findall(prompt_text(pair.prompt))
    letter = LETTER.fullmatch(answer)
    if letter and letter[1] not in listed:
        raise row.error(f"field {name!r} is {answer!r}, an option that the question does not list")
    if pair.positive == pair.negative:
        raise row.error(f"fields {ANSWERS[0]!r} and {ANSWERS[1]!r} are the same, {answer!r}")


TASKS = {
    "model_written": TaskKind(
        load_model_written,
        (
            Metric(
                "matches",
                "Gives the answer that matches the behaviour",
                better=None,
                phrase="gives the behaviour's answer",
            ),
            Metric(
                "margin",
                "Leans to the answer that matches the behaviour",
                "nats per token",
                None,
                True,
                "leans to the behaviour's answer",
            ),
        ),
    ),
}
