"""What a recipe or a caller says of one task (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

HALVES = ("choose", "report")  # of a set's items, by a fixed hash: what may be looked at, and what is only reported
MOST_TOKENS = 1_000_000  # of a reply: no model's context is longer


@dataclass(frozen=True)
class TaskFields:
    """One task: which, on which data (None: the shipped items), and how many of each split."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")  # in a recipe an unknown key is an error

    task: str  # one of the tasks
    data: str | None = None  # a file of items; without it, the shipped ones
    limit: Annotated[int | None, Field(ge=1)] = None  # at most so many items of each split
    name: str | None = None  # what it is called in measurements, where one task stands there twice
    split: Literal["validation", "test"] | None = None  # all items go to this split; None: to both in turn
    half: Literal["choose", "report"] | None = None  # only the items that may choose, or only those to be reported
    behavior: str | None = None  # a shipped behaviour or a trait file, for tasks about one
    max_new_tokens: Annotated[int | None, Field(ge=1, le=MOST_TOKENS)] = (
        None  # longest reply, for tasks with open replies
    )

    @property
    def shown_name(self) -> str:
        """What the task is called in measurements."""
        return self.name or self.task


@dataclass(frozen=True)
class TaskSpec(TaskFields):
    """A task to be loaded, who judges its replies, and whose code may run."""

    judge: Any = None  # a `ChatModel`, for tasks that need a judge
    held_out: tuple[Any, ...] = ()  # pairs that the recipe keeps out of training, for tasks that name no data
    trust_code: tuple[str, ...] = ()  # files of tasks whose code may run, as the user named them
