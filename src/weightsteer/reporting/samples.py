"""Replies to the same prompts at several k: which to show, in which order, and which of them repeat themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from ..looping import loops
from ..run_card import StrengthRange

MOST = 5  # strengths side by side


@dataclass(frozen=True)
class Sample:
    """One prompt's replies, one for each k."""

    prompt: str
    replies: Mapping[float, str]


@dataclass(frozen=True)
class Shown:
    """A reply at one strength."""

    k: float
    text: str
    loops: bool


@dataclass(frozen=True)
class Looping:
    """How many of the replies at one strength repeat themselves."""

    k: float
    loops: int
    count: int


def strengths_to_show(samples: Sequence[Sample], strength: StrengthRange) -> list[float]:
    """Up to five of the strengths with replies: 0, those recommended, their halves, the outermost, then the others."""
    available = {k for sample in samples for k in sample.replies}
    if not available:
        return []
    best, least = strength.recommended, strength.negative
    wanted = [0.0, best, least, best / 2, least / 2, min(available), max(available), *sorted(available, key=abs)]
    nearest = [min(available, key=lambda k: (abs(k - aim), abs(k))) for aim in wanted]
    return sorted(list(dict.fromkeys(nearest))[:MOST])


def shown_replies(sample: Sample, ks: Sequence[float]) -> list[Shown]:
    """The sample's replies at these strengths; a strength without one is left out."""
    return [Shown(k, sample.replies[k], loops(sample.replies[k])) for k in ks if k in sample.replies]


def telling_first(samples: Sequence[Sample], ks: Sequence[float]) -> list[Sample]:
    """Those samples first whose replies at `ks` differ most from the base's and do not repeat themselves."""
    return sorted(samples, key=lambda sample: -_tells(sample, ks))


def _tells(sample: Sample, ks: Sequence[float]) -> float:
    """How unlike the base's reply the steered ones are, from 0 to 1; one that loops or is empty tells nothing."""
    base = sample.replies.get(0.0, "").split()
    steered = [sample.replies[k] for k in ks if k and k in sample.replies]
    likeness = [SequenceMatcher(None, base, text.split(), autojunk=False).ratio() for text in steered]
    scores = [
        0.0 if loops(text) or not text.strip() else 1 - like for text, like in zip(steered, likeness, strict=True)
    ]
    return sum(scores) / len(scores) if scores else 0.0


def looping_by_strength(samples: Sequence[Sample]) -> list[Looping]:
    """For each strength, how many replies of all samples repeat themselves."""
    ks = sorted({k for sample in samples for k in sample.replies})
    at = {k: [loops(sample.replies[k]) for sample in samples if k in sample.replies] for k in ks}
    return [Looping(k, sum(found), len(found)) for k, found in at.items()]
