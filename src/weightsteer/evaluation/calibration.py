"""What a calibration found: how far each k moves the behaviour, what it costs, and which k to use (no torch)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..looping import MORE_LOOPS
from ..run_card import RunCard, StrengthRange
from .choose_k import furthest

BUDGET = 0.1  # nats per token that ordinary text may cost
CALIBRATION = "calibration"  # where a card's `measured` holds it
LOSS = "prose nll"  # the budget's name in a card


@dataclass(frozen=True)
class CalibrationRow:
    """One strength k, in multiples of the vector; every number but the shares is in nats per token."""

    k: float
    loss_change: float  # of ordinary text, over the base's
    kl: float  # of the base to the steered model, on ordinary text
    behavior: float | None  # change of log p(positive) - log p(negative) on held-out pairs; None without pairs
    stderr: float | None  # of that change, paired; None for a single pair
    repeated: float | None  # mean share of repeated 4-grams in the replies; None where none were written, as below
    loops: float | None  # share of replies that loop
    broken: float | None  # share of replies that loop or are empty

    def is_allowed(self, base: CalibrationRow, budget: float) -> bool:
        """Whether text costs at most the budget, and no more replies are broken than the base's (`MORE_LOOPS`).

        Replies that nobody has written yet are taken to be whole.
        """
        whole = self.broken is None or base.broken is None or self.broken - base.broken <= MORE_LOOPS
        return self.loss_change <= budget and whole


@dataclass(frozen=True)
class Calibration:
    """What was measured at every k, and the range with the recommended k."""

    strength: StrengthRange
    rows: tuple[CalibrationRow, ...]  # ascending in k; k = 0 is the base
    pairs: int  # held-out pairs that the behaviour was measured on
    prompts: tuple[str, ...]
    replies: Mapping[float, tuple[str, ...]]  # k -> the reply to each prompt, of 0 and every k that came into question
    notes: tuple[str, ...] = ()  # what a reader has to know of the choice

    def written_into(self, card: RunCard, model: str = "") -> RunCard:
        """The vector's card with the range, the recommended k and the table; the replies are not kept there.

        Of another model than the vector's base (`model` is its revision) the card gets the range and the k alone,
        beside those of the base.
        """
        if not card.is_base(model):
            return card.with_strength(self.strength, model)
        table = {
            "rows": [asdict(row) for row in self.rows],
            "pairs": self.pairs,
            "prompts": len(self.prompts),
            "notes": list(self.notes),
        }
        return replace(card, strength=self.strength, measured={**card.measured, CALIBRATION: table})


def choose_strengths(rows: Sequence[CalibrationRow], budget: float) -> StrengthRange:
    """The k on each side that moves the behaviour furthest its way, of those that are allowed; 0 if none does.

    Where the behaviour was not measured at any k, the largest allowed one.
    """
    base = next(row for row in rows if row.k == 0)
    allowed = [row for row in rows if row.is_allowed(base, budget)]
    if any(row.behavior is not None for row in rows if row.k):
        change = {row.k: row.behavior for row in allowed if row.behavior is not None}
    else:
        change = {row.k: row.k for row in allowed}
    ks = [row.k for row in rows]
    return StrengthRange(furthest(change, 1), furthest(change, -1), min(ks), max(ks), {LOSS: budget})


def explain(rows: Sequence[CalibrationRow], strength: StrengthRange) -> list[str]:
    """Why a side has no recommended k, where it has none."""
    base = next(row for row in rows if row.k == 0)
    budget = strength.budget[LOSS]
    found = []
    for side, chosen, way in ((1, strength.recommended, "more"), (-1, strength.negative, "less")):
        if chosen:
            continue
        allowed = [row for row in rows if row.k * side > 0 and row.is_allowed(base, budget)]
        reason = (
            f"no k within the budget moves the held-out pairs to {way} of the behaviour"
            if allowed
            else "at every k that was tried, text costs more than the budget, or more replies loop than the base's"
        )
        found.append(f"k {'above' if side > 0 else 'below'} 0: none is recommended, since {reason}")
    return found


def table(calibration: Calibration) -> list[list[str]]:
    """The head and a line for each k, as texts; a recommended k has a mark."""
    chosen = {calibration.strength.recommended, calibration.strength.negative} - {0.0}
    head = ["k", "loss change", "KL to k = 0", "behaviour", "loops", "choice"]
    return [head, *([*_cells(row), "recommended" if row.k in chosen else ""] for row in calibration.rows)]


def _cells(row: CalibrationRow) -> list[str]:
    behavior = "" if row.behavior is None else f"{row.behavior:+.3f}"
    error = "" if not row.stderr else f" ± {row.stderr:.3f}"
    looping = "" if row.loops is None else f"{row.loops:.0%}"
    return [f"{row.k:g}", f"{row.loss_change:+.3f}", f"{row.kl:.3f}", behavior + error, looping]


def calibration_of(card: RunCard) -> Mapping[str, Any] | None:
    """The table that a card holds, or None."""
    found = card.measured.get(CALIBRATION)
    return found if isinstance(found, Mapping) else None
