"""In distribution: held-out contrast pairs, which of the two answers the model prefers."""

from __future__ import annotations

from ..behavior import SHIPPED, load_pairs
from ..errors import SteerError
from .task import Choice, ChoiceTask, TaskSpec, alternate_splits


def load_preference(spec: TaskSpec) -> ChoiceTask:
    """Held-out pairs of a shipped behaviour (by name) or of a JSONL file with prompt, positive, negative.

    Neighbouring pairs, which mirror one claim, stay in one split.

    Raises:
        SteerError: no data is named, or it cannot be read.
    """
    if spec.data is None:
        raise SteerError(f"task preference: expected its data, one of {', '.join(SHIPPED)} or a file of held-out pairs")
    pairs = load_pairs(spec.data, file="heldout.jsonl")
    items = tuple(Choice(pair.prompt, pair.positive, pair.negative) for pair in pairs)
    return ChoiceTask("preference", items, alternate_splits(len(items), group=2))
