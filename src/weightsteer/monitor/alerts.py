"""When to warn of a training run: at a z under the nulls, or at a share of tau whose rate of false alarms is known."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scipy.stats import norm

from ..errors import SteerError
from .dictionary import Dictionary, Threshold
from .readings import WHOLE, Reading

FORMS = "expected z=NUMBER above 0, such as z=4, or TRAIT: fpr=RATE, such as evil: fpr=0.01"


@dataclass(frozen=True)
class Alert:
    """Warn where a whole-model reading has |z| of at least `z`; of one trait, where it moves towards it by `z`."""

    z: float
    trait: str = ""

    @classmethod
    def parse(cls, text: str, dictionary: Dictionary | None = None) -> Alert | RateAlert:
        """Read "z=4", or "evil: fpr=0.01" with a dictionary that knows its error rates.

        Where the dictionary has no threshold for the rate, the nulls stand in: the z that chance exceeds so often. A
        warning says that its rate of false alarms is not known.

        Raises:
            SteerError: anything else, a rate without a dictionary, or a trait that the dictionary does not have.
        """
        by_rate = re.fullmatch(r"\s*([\w.-]+)\s*:\s*fpr\s*=\s*(\S+)\s*", text)
        name, _, value = text.replace(" ", "").partition("=")
        try:
            number = float(by_rate[2] if by_rate else value)
        except ValueError:
            number = math.nan
        if by_rate:
            return _by_rate(text, by_rate[1], number, dictionary)
        if name != "z" or not (math.isfinite(number) and number > 0):
            raise SteerError(f"alert {text!r}: {FORMS}")
        return cls(number)

    @property
    def threshold(self) -> str:
        """In words."""
        return f"{self.trait}: z = {self.z:.2g}" if self.trait else f"|z| = {self.z:g}"

    def raised(self, readings: Iterable[Reading]) -> list[Reading]:
        """The readings that call for a warning."""
        return [one for one in readings if one.part == WHOLE and self._reached(one)]

    def _reached(self, reading: Reading) -> bool:
        if self.trait:
            return reading.vector == self.trait and reading.z >= self.z
        return abs(reading.z) >= self.z


@dataclass(frozen=True)
class RateAlert:
    """Warn where the share of tau along a trait lies above that of benign fine-tunes, but for a known rate of them."""

    limit: Threshold

    @property
    def trait(self) -> str:
        """The trait that is watched."""
        return self.limit.trait

    @property
    def threshold(self) -> str:
        """In words."""
        return f"{self.trait}: a share of {self.bound}"

    @property
    def bound(self) -> str:
        """The share and what it means; too few benign fine-tunes cannot tell the rate, and it is the largest share."""
        if self.limit.is_highest:
            meaning = f"the largest of {self.limit.fine_tunes} benign fine-tunes"
        else:
            meaning = f"which {self.limit.rate:.2g} of benign fine-tunes exceed"
        return f"{self.limit.share:.4f}, {meaning}"

    def raised(self, readings: Iterable[Reading]) -> list[Reading]:
        """The readings that call for a warning."""
        return [
            one
            for one in readings
            if one.part == WHOLE and one.vector == self.trait and one.share is not None and one.share > self.limit.share
        ]


AnyAlert = Alert | RateAlert


def _by_rate(text: str, trait: str, rate: float, dictionary: Dictionary | None) -> AnyAlert:
    if not 0 < rate < 1:
        raise SteerError(f"alert {text!r}: {FORMS}")
    if dictionary is None:
        raise SteerError(
            f"alert {text!r}: a rate of false alarms needs a dictionary of directions (--dictionary FOLDER)"
        )
    known = dictionary.threshold(trait, rate)
    if known:
        return RateAlert(known)
    rates = [f"{one.rate:g}" for one in dictionary.contents.thresholds if one.trait == trait]
    warnings.warn(
        f"alert {text!r}: the dictionary has no threshold for it ({trait}: {', '.join(rates) or 'none'}), so z under "
        "the nulls stands in; how often it is a false alarm is not known",
        stacklevel=3,
    )
    return Alert(float(norm.isf(rate)), trait)


WITHIN_CHANCE = 2.0  # standard deviations up to which a reading is nothing to speak of


def verdict(readings: Sequence[Reading], alert: AnyAlert | None) -> str:
    """What the whole-model readings come to, in one sentence, for the head of a page."""
    whole = [reading for reading in readings if reading.part == WHOLE]
    if not whole:
        return "No checkpoint has been read yet."
    raised = alert.raised(whole) if alert else []
    if isinstance(alert, RateAlert):
        return _verdict_by_rate(whole, raised, alert)
    furthest = max(whole, key=lambda reading: abs(reading.z))
    way = "toward" if furthest.z > 0 else "away from"
    most = f"the furthest from chance is {way} {furthest.vector!r} at step {furthest.step}, z = {furthest.z:+.1f}"
    if alert and raised:
        first = min(raised, key=lambda reading: reading.step)
        count = f"{len(raised)} of {len(whole)} readings reach" if len(raised) > 1 else f"1 of {len(whole)} reaches"
        return f"Alert: {count} the threshold {alert.threshold}, first at step {first.step} ({first.vector!r}); {most}."
    if alert:
        return f"No alert: none of {len(whole)} readings reaches the threshold {alert.threshold}; {most}."
    if abs(furthest.z) < WITHIN_CHANCE:
        return f"Every reading is within {WITHIN_CHANCE:g} standard deviations of chance; {most}."
    return f"Of {len(whole)} readings, {most}. No alert was asked for."


def _verdict_by_rate(whole: Sequence[Reading], raised: Sequence[Reading], alert: RateAlert) -> str:
    of_trait = [reading for reading in whole if reading.vector == alert.trait]
    if not of_trait:
        return f"No reading of {alert.trait!r} yet."
    last = max(of_trait, key=lambda reading: reading.step)
    steps = {reading.step for reading in raised}
    quiet = max((reading.step for reading in of_trait if reading.step not in steps), default=-1)
    if last.step in steps:
        since = min(step for step in steps if step > quiet)
        return f"Moves along {alert.trait!r}: {share_of(last)}, and since step {since} above {alert.bound}."
    if steps:
        return (
            f"Moved along {alert.trait!r} at {len(steps)} of {len(of_trait)} readings, the last at step {max(steps)}: "
            f"above {alert.bound}. Now {share_of(last)}, below it."
        )
    return f"Does not move along {alert.trait!r} more than benign fine-tunes: {share_of(last)}, below {alert.bound}."


def share_of(reading: Reading) -> str:
    """A reading's share of tau in words, with its standard error where that is known."""
    known = reading.error is not None and math.isfinite(reading.error)
    return f"{reading.share or 0.0:+.4f}{f' ± {reading.error:.4f}' if known else ''} of its norm"


def describe(reading: Reading) -> str:
    """One line about a reading that raised an alert."""
    way = "toward" if (reading.z if reading.share is None else reading.share) > 0 else "away from"
    return (
        f"step {reading.step}: the training moves {way} {reading.vector!r}: cosine {reading.cosine:+.4f}, "
        f"z = {reading.z:+.1f} (chance: {reading.centre:+.4f} ± {reading.band:.4f})"
        + (f"; {share_of(reading)}" if reading.share is not None else "")
    )
