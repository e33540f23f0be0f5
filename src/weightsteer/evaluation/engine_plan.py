"""What a sweep with an engine will ask, and where: told before the work."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from ..chat_template import PromptLike
from ..engines.dialects import Dialect, Scored, Wanted, Written
from ..errors import SteerError
from ..language_model import LanguageModel
from ..lm import LM
from ..progress import Progress, silent
from ..scoring import Score, candidates_of, text_ids
from ..thinking import Reply
from .results import BASE
from .tasks.task import Task

IN_MEMORY = "reads the model in memory"


@dataclass
class Cost:
    """Requests to a server, and tokens: those that it reads, and those that it writes at most."""

    requests: int = 0
    read: int = 0
    written: int = 0

    def add(self, other: Cost, times: int = 1) -> None:
        """So much more."""
        self.requests += times * other.requests
        self.read += times * other.read
        self.written += times * other.written

    @property
    def described(self) -> str:
        """In words."""
        return (
            f"{self.requests:,} requests, {self.read:,} tokens to read, at most {self.written:,} to write"
            if self.requests
            else "nothing"
        )


@dataclass(frozen=True)
class Counting(LanguageModel):
    """A `LanguageModel` that counts what it is asked and says nothing."""

    local: LM
    dialect: Dialect
    cost: Cost = field(default_factory=Cost)

    @property
    def name(self) -> str:
        return self.local.name

    @property
    def revision(self) -> str:
        return self.local.revision

    def with_system_prompt(self, text: str | None) -> Counting:
        return replace(self, local=self.local.with_system_prompt(text))

    def chat_ids(self, prompt: PromptLike) -> list[int]:
        return self.local.chat_ids(prompt)

    def replies(
        self,
        prompts: Sequence[PromptLike],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 8,
        progress: Progress = silent,
    ) -> list[Reply]:
        for prompt in prompts:
            self.cost.add(Cost(1, len(self.chat_ids(prompt)), max_new_tokens))
        return [Reply("")] * len(prompts)

    def score_choices(
        self,
        prompts: Sequence[PromptLike],
        choices: Sequence[Sequence[str]],
        *,
        batch_size: int = 8,
        progress: Progress = silent,
    ) -> list[list[Score]]:
        for number, (prompt, texts) in enumerate(zip(prompts, choices, strict=True)):
            for part in candidates_of(self.local, number, prompt, texts):
                for tail in part.tails:
                    self._count(len(part.head) + len(tail), len(tail))
        return [[Score(0.0, 1)] * len(texts) for texts in choices]

    def score_texts(self, texts: Sequence[str], *, batch_size: int = 8) -> list[Score]:
        for ids in text_ids(self.local, texts):
            self._count(len(ids), len(ids) - 1)
        return [Score(0.0, 1)] * len(texts)

    def written(self, rows: Sequence[tuple[Sequence[int], Wanted]], progress: Progress = silent) -> list[Written]:
        """See `ServedModel.written`."""
        for ids, wanted in rows:
            self.cost.add(Cost(1, len(ids), wanted.tokens))
        return [Written("", None, True)] * len(rows)

    def scored(self, rows: Sequence[tuple[Sequence[int], int]], progress: Progress = silent) -> list[Scored]:
        """See `ServedModel.scored`."""
        for ids, start in rows:
            self._count(len(ids), len(ids) - start)
        return [Scored(0.0, False)] * len(rows)

    def _count(self, length: int, scored: int) -> None:
        self.cost.add(Cost(self.dialect.requests_for(scored), length))


@dataclass(frozen=True)
class Part:
    """A method, or the base, at so many strengths on some tasks; `here`: why it does not run on the server."""

    name: str
    strengths: int
    tasks: Sequence[Task]
    here: str = ""


def plan_lines(parts: Sequence[Part], local: LM, dialect: Dialect) -> list[str]:
    """One line for each method that the server measures, with what it costs, and for each that runs here, with why.

    What a task asks only after certain replies is not counted.
    """
    costs: dict[tuple[str, int], Cost] = {}
    lines, total = [], Cost()
    for part in parts:
        asked = [] if part.here else [task for task in part.tasks if not task.needs_weights]
        cost = Cost()
        for task in asked:
            key = (task.name, len(task.ids))
            if key not in costs:
                costs[key] = _cost_of(task, local, dialect)
            cost.add(costs[key], part.strengths)
        total.add(cost)
        if asked:
            lines.append(f"  on the server: {part.name}{_at(part)}: {cost.described}")
        rest = [task.name for task in part.tasks if task not in asked]
        if rest:
            what = f" ({', '.join(rest)})" if asked else ""
            lines.append(f"  in memory: {part.name}{_at(part)}{what}: {part.here or IN_MEMORY}")
    return [*lines, f"  all of it: {total.described}"]


def _at(part: Part) -> str:
    if part.name == BASE:
        return ""
    return f" at {part.strengths} strengths" if part.strengths != 1 else " at 1 strength"


def _cost_of(task: Task, local: LM, dialect: Dialect) -> Cost:
    counting = Counting(local, dialect)
    with suppress(SteerError):  # what it found in the replies was nothing
        task.ask(counting)
    return counting.cost
