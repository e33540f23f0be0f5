"""A run's replies to a few prompts at several strengths: shown in the report, and where they loop, k is not chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import SteerError
from ..evaluation.metrics import MetricKey
from ..files import read_finished
from ..looping import breaks_more
from ..run_card import RunCard, StrengthRange
from ..schema import checked, shown


@dataclass(frozen=True)
class Replies:
    """A row of the file of samples: k, as it is written -> the reply."""

    prompt: str
    replies: Mapping[str, str]
    max_new_tokens: int | None = None  # how long they may be; earlier versions did not say


@dataclass(frozen=True)
class Samples:
    """One row a prompt, each with the same k."""

    rows: tuple[Replies, ...]
    former: bool = False  # made after k was chosen, by an earlier version, at the recommended k and their halves

    @classmethod
    def of(cls, prompts: Sequence[str], ks: Sequence[float], found: Sequence[Sequence[str]], longest: int) -> Samples:
        """Samples from the replies of each k to all prompts, of at most so many tokens."""
        texts = zip(prompts, zip(*found, strict=True), strict=True)
        rows = ((p, {f"{k:g}": reply for k, reply in zip(ks, row, strict=True)}) for p, row in texts)
        return cls(tuple(Replies(prompt, replies, longest) for prompt, replies in rows))

    @property
    def ks(self) -> list[float]:
        """The strengths that every prompt was answered at, ascending."""
        return sorted({float(k) for row in self.rows for k in row.replies})

    def are_of(self, prompts: Sequence[str], ks: Sequence[float], longest: int) -> bool:
        """Whether these are the replies to the prompts at just these strengths, of at most so many tokens."""
        return self._answer(prompts, ks) and all(row.max_new_tokens in (None, longest) for row in self.rows)

    def _answer(self, prompts: Sequence[str], ks: Sequence[float]) -> bool:
        names = {f"{k:g}" for k in ks}
        return [row.prompt for row in self.rows] == prompts and all(row.replies.keys() == names for row in self.rows)

    def are_former(self, prompts: Sequence[str], card: RunCard, budget: Mapping[MetricKey, float]) -> bool:
        """Whether an earlier version made them, and chose k by the same budget: then both stay as they are."""
        strength, asked = card.strength, [row.prompt for row in self.rows]
        if strength is None or strength.budget != {" ".join(key): limit for key, limit in budget.items()}:
            return False
        return bool(asked) and self._answer(prompts[: len(asked)], strength.shown)

    def broken_ks(self) -> list[float]:
        """The strengths, as they are written, at which more replies loop or are empty than at 0.

        An earlier version's choice stays.
        """
        if self.former:
            return []
        replies = {k: [row.replies[f"{k:g}"] for row in self.rows] for k in self.ks}
        return [k for k in self.ks if k and breaks_more(replies[k], replies[0.0])]

    def shown_ks(self, strength: StrengthRange) -> list[float]:
        """Up to five strengths to show: 0, and on each side the recommended k and what is nearest to its half.

        On a side without a recommended k, the smallest that there is.
        """
        chosen = {0.0}
        for side, wanted in ((1, strength.recommended), (-1, strength.negative)):
            there = [k for k in self.ks if k * side > 0]
            end = wanted or min(there, key=abs, default=0.0)
            for aim in (end, end / 2):
                chosen.add(min(there, key=lambda k: abs(k - aim), default=0.0))
        return sorted(chosen)


def read_samples(path: Path) -> Samples:
    """The samples of a run's folder; none if there is no such file.

    Raises:
        SteerError: a row of another form.
    """
    rows = enumerate(read_finished(path), start=1)
    found = tuple(checked(Replies, row, f"{path}, row {number}") for number, row in rows)
    for number, row in enumerate(found, start=1):
        wrong = next((name for name in row.replies if not _is_strength(name)), None)
        if wrong is not None:
            raise SteerError(f"{path}, row {number}: expected replies by k, as in '-0.5', found {shown(wrong)}")
        if "0" not in row.replies or row.replies.keys() != found[0].replies.keys():
            raise SteerError(
                f"{path}, row {number}: expected replies at 0 and at the strengths of the first row; remove the file, "
                "and `weightsteer run` makes it again"
            )
    return Samples(found)


def _is_strength(name: str) -> bool:
    """Whether a text is a finite k as it is written here."""
    try:
        return math.isfinite(float(name)) and f"{float(name):g}" == name
    except ValueError:
        return False
