"""How D+ and D- are sampled from a model (no torch)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from ..errors import SteerError
from ..schema import shown

MOST_SAMPLES, MOST_TOKENS = 100_000, 1_000_000
LARGEST_SEED = 2**32 - 1  # of a recipe too; the seeds of its parts are some multiples of it

Score = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]


@dataclass(frozen=True)
class SamplingFields:
    """What a recipe says of the sampling (paper: 10 samples a question and prompt)."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")  # in a recipe an unknown key is an error

    samples: Annotated[int, Field(ge=1, le=MOST_SAMPLES)] = 10  # answers for each question and prompt
    max_new_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] = 160  # longest answer, in tokens
    positive_from: Score = 75.0  # judge's score from which an answer shows the behaviour
    negative_to: Score = 25.0  # judge's score up to which it clearly does not
    cut_answers: Literal["drop", "keep"] = "drop"  # what max_new_tokens cut off would teach to stop in mid-sentence
    questions: Annotated[int | None, Field(ge=1)] = None  # the first so many; else all, of a shipped behaviour half


@dataclass(frozen=True)
class SamplingSettings(SamplingFields):
    """How D+ and D- are sampled and filtered."""

    temperature: float = 1.0
    seed: int = 0
    batch_size: int | None = None  # prompts in memory at once; None: 16 on a CPU, on an accelerator what memory allows

    def __post_init__(self) -> None:
        most = {"samples": MOST_SAMPLES, "max_new_tokens": MOST_TOKENS, "batch_size": MOST_TOKENS}
        for name, limit in most.items():
            if (found := getattr(self, name)) is not None and not 1 <= found <= limit:
                raise SteerError(f"sampling: {name}: expected 1 to {limit}, found {shown(found)}")
        if not 0 <= self.temperature < math.inf:
            raise SteerError(f"sampling: temperature: expected a number of at least 0, found {self.temperature}")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise SteerError(f"sampling: seed: expected 0 to {LARGEST_SEED}, found {shown(self.seed)}")


@dataclass(frozen=True)
class SamplingRecipe(SamplingFields):
    """The model answers the behaviour's questions under S+ and S-, and a judge filters."""

    likelihood: bool = False  # filter by the likelihood under S+ and S-, though there is a judge
