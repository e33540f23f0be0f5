"""Do greedy replies to neutral prompts repeat themselves? The damage that a loss on given text does not show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...files import read_jsonl
from ...looping import loops, repeated_share
from ..metrics import Metric
from ..task_spec import TaskSpec
from .data import task_file
from .task import ReplyTask, TaskKind, Values, alternate_splits

METRICS = (
    Metric("loops", "Replies that loop", better="lower", phrase="loops"),
    Metric("repeated", "Repeated 4-grams in a reply", "share of its 4-grams", "lower", detail=True),
)
NEW_TOKENS = 80


@dataclass(frozen=True)
class _Prompt:
    prompt: str


@dataclass(frozen=True)
class LoopScorer:
    """Metrics: `loops`, 1 where a reply is empty or repeats itself (`looping.LOOPING`); `repeated`, how much."""

    name: str = "loops"

    def __call__(self, items: Sequence[_Prompt], replies: Sequence[str]) -> Values:
        """See `Scorer`."""
        broken = [float(loops(reply) or not reply.strip()) for reply in replies]
        return {"loops": list(broken), "repeated": [repeated_share(reply) for reply in replies]}


def load_loops(spec: TaskSpec) -> ReplyTask:
    """Neutral prompts: shipped, or JSONL with `prompt`. See `LoopScorer` for the metrics."""
    rows = read_jsonl(task_file("loop_prompts.jsonl", spec.data), required=("prompt",))
    prompts = tuple(_Prompt(row["prompt"]) for row in rows)
    length = spec.max_new_tokens or NEW_TOKENS
    return ReplyTask("loops", prompts, alternate_splits(len(prompts)), scorer=LoopScorer(), max_new_tokens=length)


TASKS = {"loops": TaskKind(load_loops, METRICS, generates=True)}
