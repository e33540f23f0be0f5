"""How well the model still does what it was fine-tuned for: the loss on given answers."""

from __future__ import annotations

from dataclasses import dataclass

from ...behavior import Example
from ...example_files.load import load_examples
from ...files import read_jsonl
from ...language_model import LanguageModel
from ...progress import Progress, silent
from ..metrics import Metric
from ..task_spec import TaskSpec
from .data import task_file
from .task import ItemTask, TaskKind, Values, alternate_splits


@dataclass(frozen=True)
class AnswerTask(ItemTask):
    """Loss on the answers that are given, in nats per token: metric `nll`."""

    items: tuple[Example, ...]

    def ask(self, lm: LanguageModel, *, batch_size: int = 8, progress: Progress = silent) -> Values:
        """See `Task.ask`."""
        prompts, answers = [item.prompt for item in self.items], [[item.answer] for item in self.items]
        scores = lm.score_choices(prompts, answers, batch_size=batch_size, progress=progress)
        return {"nll": [-score.mean for (score,) in scores]}


def load_answers(spec: TaskSpec) -> AnswerTask:
    """Prompts with the answers to be expected: examples as for training, or the shipped plain facts.

    Raises:
        SteerError: a missing file, or an entry that is no example.
    """
    if spec.data:
        items = tuple(load_examples(spec.data))
    else:
        rows = read_jsonl(task_file("facts.jsonl", None), required=("question", "correct"))
        items = tuple(Example(row["question"], row["correct"]) for row in rows)
    return AnswerTask("answers", items, alternate_splits(len(items)))


TASKS = {
    "answers": TaskKind(
        load_answers,
        (Metric("nll", "Loss on the given answers", "nats per token", "lower"),),
    ),
}
