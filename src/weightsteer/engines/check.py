"""Whether a server serves the model that is in memory here: log-probabilities of a few texts, at k = 0 and steered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..errors import SteerError
from ..language_model import LanguageModel

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
        if tolerance is None:
            tolerance = TOLERANCE.get(str(lm.model.dtype).removeprefix("torch."), COARSEST)
        return cls(means_of(lm, TEXTS), tolerance)


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

    Each k is asked in turn, and then once more, of one prompt: so a cache that ignores the strength shows.

    Raises:
        SteerError: two strengths give the same, one gives another thing the second time, or the server steers
            otherwise than the model here.
    """
    texts = TEXTS[-2:]
    there = replace(served, dialect=served.dialect.in_one_place())
    turns = [_asked_alone(there.steered({name: k}), texts) for k in (*ks, *ks)]
    first, second = turns[: len(ks)], turns[len(ks) :]
    expected = []
    for k in ks:
        with vector.applied(lm, k):
            expected.append(means_of(lm, texts))
    worst = max(_largest_difference(a, b) for a, b in zip(turns, expected * 2, strict=True))
    if not worst <= STEERED * tolerance:
        alike = len(ks) > 1 and _largest_difference(first[0], first[-1]) < tolerance
        if alike and _largest_difference(expected[0], expected[-1]) > STEERED * tolerance:
            reason = f"k = {ks[0]:g} and k = {ks[-1]:g} give the same"
        elif max(_largest_difference(a, b) for a, b in zip(first, second, strict=True)) > tolerance:
            reason = "one k gives something else when it is asked for once more"
        else:
            reason = f"it differs from the model here by {worst:.3g} nats per token"
        raise SteerError(f"engine at {served.address}: steers wrongly by {name}: {reason}; {_advice(served, name)}")
    return worst


def _asked_alone(served: LanguageModel, texts: Sequence[str]) -> list[float]:
    """One text after the other, so that each meets what a cache has kept of the one before."""
    return [mean for text in texts for mean in means_of(served, [text])]


def _advice(served: ServedModel, name: str) -> str:
    if served.kind == "llama.cpp":
        return PROMPT_CACHE
    return f"does the server read {name} from the folder that the recipe names?"


def _largest_difference(some: Sequence[float], others: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(some, others, strict=True))
