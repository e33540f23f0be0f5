"""How D+ and D- are sampled from a model (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

Score = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]


@dataclass(frozen=True)
class SamplingFields:
    """What a recipe says of the sampling (paper: 10 samples a question and prompt)."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")  # in a recipe an unknown key is an error

    samples: Annotated[int, Field(ge=1, le=100_000)] = 10
    max_new_tokens: Annotated[int, Field(ge=1, le=1_000_000)] = 160
    positive_from: Score = 75.0  # judge's score from which an answer shows the behaviour
    negative_to: Score = 25.0  # judge's score up to which it clearly does not
    cut_answers: Literal["drop", "keep"] = "drop"  # what max_new_tokens cut off would teach to stop in mid-sentence
    questions: Annotated[int | None, Field(ge=1)] = None  # the first so many; None: all, of a shipped behaviour half


@dataclass(frozen=True)
class SamplingSettings(SamplingFields):
    """How D+ and D- are sampled and filtered."""

    temperature: float = 1.0
    seed: int = 0
    batch_size: int = 8


@dataclass(frozen=True)
class SamplingRecipe(SamplingFields):
    """The model answers the behaviour's questions under S+ and S-, and a judge filters."""

    likelihood: bool = False  # filter by the likelihood under S+ and S-, though there is a judge
