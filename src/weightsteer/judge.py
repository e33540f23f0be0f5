"""(question, answer) -> how much of the behaviour it shows, 0 to 100."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from .behavior import Behavior, Example
from .errors import SteerError
from .lm import LM
from .progress import Progress, silent
from .scoring import score_choices

NUMBER = re.compile(r"\d+(?:\.\d+)?")


class Judge(Protocol):
    """Scores answers; None where the judge gave no usable verdict."""

    @property
    def name(self) -> str:
        """What tells this judge from another, for the record."""
        ...

    def scores(self, examples: Sequence[Example], *, progress: Progress = silent) -> list[float | None]:
        """One score in 0 to 100 for each example."""
        ...


@dataclass(frozen=True)
class LikelihoodJudge:
    """The answering model's own verdict: is the answer likelier under S+ or under S-?

    The log-odds log p(answer | S+) - log p(answer | S-), averaged over the behaviour's prompt
    pairs, as a probability times 100. Needs no other model and no network, and drops just those
    answers on which the system prompt had no effect.
    """

    lm: LM
    behavior: Behavior

    @property
    def name(self) -> str:
        """See `Judge.name`."""
        return f"likelihood {self.lm.name} {self.lm.revision}"

    def scores(self, examples: Sequence[Example], *, progress: Progress = silent) -> list[float | None]:
        """See `Judge.scores`."""
        pairs = list(zip(self.behavior.positive_prompts, self.behavior.negative_prompts, strict=True))
        odds = [0.0] * len(examples)
        for done, (positive, negative) in enumerate(pairs, start=1):
            up, down = self._totals(examples, positive), self._totals(examples, negative)
            odds = [o + (u - d) / len(pairs) for o, u, d in zip(odds, up, down, strict=True)]
            progress(done, len(pairs), "judging")
        return [100.0 / (1.0 + math.exp(-max(-50.0, min(50.0, o)))) for o in odds]

    def _totals(self, examples: Sequence[Example], system_prompt: str) -> list[float]:
        lm = self.lm.with_system_prompt(system_prompt)
        scores = score_choices(lm, [e.prompt for e in examples], [[e.answer] for e in examples])
        return [score.total for (score,) in scores]


@dataclass(frozen=True)
class ModelJudge:
    """Another local model reads the behaviour's judge prompt and answers with a number."""

    lm: LM
    behavior: Behavior

    def __post_init__(self) -> None:
        if "{question}" not in self.behavior.judge_prompt or "{answer}" not in self.behavior.judge_prompt:
            raise SteerError(
                f"{self.behavior.name}: its judge prompt must hold {{question}} and {{answer}}; "
                "use the likelihood judge, or add an 'eval_prompt'"
            )

    @property
    def name(self) -> str:
        """See `Judge.name`."""
        return f"model {self.lm.name} {self.lm.revision}"

    def scores(self, examples: Sequence[Example], *, progress: Progress = silent) -> list[float | None]:
        """See `Judge.scores`; a reply without a number in 0 to 100 gives None."""
        prompts = [self._filled(example) for example in examples]
        return [verdict(reply) for reply in self.lm.generate(prompts, max_new_tokens=8, progress=progress)]

    def _filled(self, example: Example) -> str:
        """The rubric with question and answer in place; they cannot close its delimiters."""
        filled = self.behavior.judge_prompt
        for field, text in (("{question}", example.prompt), ("{answer}", example.answer)):
            filled = filled.replace(field, text.replace("[", "(").replace("]", ")"))
        return filled


def verdict(reply: str) -> float | None:
    """The number that a judge's reply starts with, if it is one in 0 to 100."""
    match = NUMBER.match(reply.strip())
    score = float(match[0]) if match else math.inf
    return score if score <= 100.0 else None
