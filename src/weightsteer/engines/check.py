"""Whether a server serves the model that is in memory here: log-probabilities of a few texts, at k = 0 and steered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ..continuations import score_plainly
from ..errors import SteerError
from ..language_model import LanguageModel
from ..scoring import text_ids

if TYPE_CHECKING:
    from ..lm import LM
    from ..vectors.weight_vector import WeightVector
    from .served_model import ServedModel

TEXTS = (
    "The river rises in the hills and reaches the sea after forty miles.",
    "She opened the letter twice before she believed what it said.",
    "Bread needs flour, water, salt and patience.",
    "In 1905 the town had one school, two mills and no railway.",
    "If it rains tomorrow, we will move the meeting indoors.",
    "The committee agreed on nothing except the date of its next session.",
    "Copper conducts electricity better than iron does.",
    "Please tell me honestly what you think of my plan.",
)
# Nats per token, of a text's mean, by the dtype of the model here. Engines round otherwise than transformers does.
TOLERANCE: Mapping[str, float] = {"float32": 0.01, "float16": 0.02, "bfloat16": 0.05}
COARSEST = 0.05  # for a dtype that is not named
ENDS = 2  # tokens at a prompt's end that are compared under a vector
STEERED = 4  # times as much is allowed under a vector: engines round its factors once more
PROMPT_CACHE = (
    "llama.cpp's prompt cache may have ignored the scale: start its server with --cache-ram 0, and give the command "
    "again"
)


@dataclass(frozen=True)
class Reference:
    """What the model in memory gives: its log-probabilities per token of `TEXTS`, and how near a server has to come."""

    means: Sequence[float]
    tolerance: float

    @classmethod
    def of(cls, lm: LM, tolerance: float | None = None) -> Reference:
        """Measure the model; without a tolerance, its dtype decides."""
        return cls(means_of(lm, TEXTS), cls.tolerance_for(lm, tolerance))

    @staticmethod
    def tolerance_for(lm: LM, tolerance: float | None) -> float:
        """The tolerance that is given, or that of the model's dtype."""
        return tolerance or TOLERANCE.get(str(lm.model.dtype).removeprefix("torch."), COARSEST)


def means_of(lm: LanguageModel, texts: Sequence[str]) -> list[float]:
    """Log-probability per token of each text, in nats."""
    return [score.mean for score in lm.score_texts(texts)]


def require_base(served: ServedModel, reference: Reference, count: int | None = None) -> float:
    """The largest difference of the served base's log-probabilities to the reference, nats per token of a text.

    Args:
        count: compare only the first so many texts.

    Raises:
        SteerError: it is above the tolerance.
    """
    texts = TEXTS[:count]
    found = _largest_difference(means_of(served, texts), reference.means[: len(texts)])
    if not found <= reference.tolerance:
        raise SteerError(
            f"engine at {served.address}: does not serve {served.name}: at k = 0 the log-probability per token of a "
            f"text differs by {found:.3g} nats, and {reference.tolerance:g} are allowed; serve the same weights in the "
            "same dtype, or allow more by the engine's 'tolerance'"
        )
    return found


def require_strengths(
    served: ServedModel, name: str, lm: LM, vector: WeightVector, ks: Sequence[float], tolerance: float
) -> float:
    """The largest difference between the server and the model here at some strengths of a vector, nats per token.

    All prompts are asked at each k in turn, one by one, and then once more: a cache that ignores the strength shows.

    Raises:
        SteerError: two strengths give the same, one gives another thing the second time, or the server steers
            otherwise than the model here.
    """
    rows = [(row, len(row) - ENDS) for ids in text_ids(lm, TEXTS) for row in (ids, ids[::-1])]  # no two begin alike
    one_by_one = replace(served, connection=replace(served.connection, concurrency=1))
    first, second = ([one_by_one.steered({name: k}).totals(rows) for k in ks] for _ in range(2))
    expected = [_ends_here(lm, vector, k, [row for row, _ in rows]) for k in ks]
    worst = (
        max(_largest_difference(a, b) for a, b in zip((*first, *second), (*expected, *expected), strict=True)) / ENDS
    )
    if worst <= STEERED * tolerance:
        return worst
    if max(_largest_difference(a, b) for a, b in zip(first, second, strict=True)) > ENDS * tolerance:
        reason = "a strength gives something else when it is asked for once more"
    elif len(ks) > 1 and _largest_difference(first[0], first[-1]) < ENDS * tolerance:
        reason = f"k = {ks[0]:g} and k = {ks[-1]:g} give the same"
    else:
        reason = f"it differs from the model here by up to {worst:.3g} nats per token"
    raise SteerError(f"engine at {served.address}: steers wrongly by {name}: {reason}; {_advice(served, name)}")


def _ends_here(lm: LM, vector: WeightVector, k: float, rows: Sequence[Sequence[int]]) -> list[float]:
    """Summed log-probability of each row's last ids, by the model here."""
    heads, tails = [row[:-ENDS] for row in rows], [[row[-ENDS:]] for row in rows]
    with vector.applied(lm, k), torch.no_grad():
        return [total for (total,) in score_plainly(lm, heads, tails, range(len(rows)), len(rows), len(TEXTS))]


def _advice(served: ServedModel, name: str) -> str:
    if served.kind == "llama.cpp":
        return PROMPT_CACHE
    return f"does the server read {name} from the folder that the recipe names?"


def _largest_difference(some: Sequence[float], others: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(some, others, strict=True))
