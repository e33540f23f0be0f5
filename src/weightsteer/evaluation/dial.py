"""A vector's dial: the range of k that the model bears, what each k does in it, and the k to use on each side."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from ..behavior import ContrastPair, Prompt, prompt_text
from ..errors import SteerError
from ..example_files.load import load_pairs, pairs_from
from ..files import read_jsonl
from ..lm import LM
from ..looping import broken_share, loops, repeated_share
from ..progress import Progress, silent
from ..run_card import StrengthRange
from ..schema import is_finite, shown
from ..scoring import loss_and_log_probs, score_choices, token_kls
from ..steering.several_k import replies_at_strengths
from ..vectors.handle import SteeringHandle
from ..vectors.weight_vector import WeightVector
from .calibration import BUDGET, Calibration, CalibrationRow, choose_strengths, explain
from .results import summary
from .search import search_k
from .task_spec import TaskSpec
from .tasks.capability import load_prose
from .tasks.data import task_file

MOST_K = 8.0  # where the loss does not rise, as with a fine-tune that lowers it: no larger k is tried
MARGIN = 1.15  # the search for k ends within 15% of its aim, which so stays within the budget
OVERFLOWED = 1e3  # nats of loss or KL that stand for what is no number
FRACTIONS = (0.35, 0.7, 1.0)  # of the k at the budget
FINER = (0.25, 0.5)  # of the smallest of these, where replies are broken even there
TEXTS = 2  # passages of each split
MOST_PAIRS, PROMPTS = 12, 6
NEW_TOKENS = 40  # of a reply


def calibrate(
    vector: WeightVector,
    lm: LM,
    pairs: str | Path | Sequence[ContrastPair] | None = None,
    *,
    budget: float = BUDGET,
    progress: Progress = silent,
) -> Calibration:
    """Find the range of k that the model bears, and the k that moves the behaviour furthest in it, on each side of 0.

    On each side the k is searched at which the loss on ordinary text has risen by the budget (|k| up to `MOST_K`), and
    fractions of it are measured: the loss, the token KL to the base and the margin of held-out pairs. Recommended is
    the k of the largest margin, of those within the budget at which no more greedy replies loop or are empty than the
    base's (up to `MORE_LOOPS` of them); replies are written from that k inward, until they are whole. Neither the
    vector nor `lm` is changed; what is found goes into a card by `Calibration.written_into`.

        w = train_vector(lm, "pairs.jsonl", out="runs/mine")
        print(calibrate(w, lm).strength)

    Args:
        pairs: what the behaviour is measured on and was not trained on: a file, or pairs; default: the card's own
            `held_out`. Without any, k is chosen by loss and looping alone, and a note says so.
        budget: by how much the loss on ordinary text may rise, in nats per token.

    Raises:
        SteerError: a budget that is no number above 0, pairs that cannot be read, or a vector that is zero or does
            not fit `lm`.
    """
    refuse_budget(budget)
    if not vector.norm():
        raise SteerError("calibrate: the vector is zero, so that no k changes the model")
    held = _held_out(vector, pairs)[:MOST_PAIRS]
    dial = _Dial(vector, lm, load_prose(TaskSpec("prose")).first(TEXTS).items, held, _prompts(held))
    ends = dial.ends(budget, _between(progress, 0, 2, 6))
    ks = sorted({0.0, *(_rounded(end * fraction) for end in ends for fraction in FRACTIONS)})
    dial.measure(ks, _between(progress, 2, 4, 6))
    strength = dial.choose(budget, _between(progress, 4, 5, 6))
    if finer := _finer(dial.rows, budget):
        dial.measure(finer, _between(progress, 5, 5.5, 6))
        strength = dial.choose(budget, _between(progress, 5.5, 6, 6))
    progress(6, 6, "done")
    notes = [*_notes(held, ends, dial.rows, budget), *explain(dial.rows, strength)]
    replies = {k: tuple(dial.replies[k]) for k in sorted(dial.replies)}
    return Calibration(strength, dial.rows, len(held), tuple(map(prompt_text, dial.prompts)), replies, tuple(notes))


def refuse_budget(budget: float) -> None:
    """Raise unless a budget is a number above 0."""
    if not (is_finite(budget) and budget > 0):
        raise SteerError(f"budget: expected a number of nats per token above 0, found {shown(budget)}")


def _rounded(k: float) -> float:
    return float(f"{k:.3g}")


def _short(k: float) -> float:
    """k with the digits that a search gives, so that its tries are measured where its result lies."""
    return float(f"{k:.2g}")


def _between(progress: Progress, start: float, stop: float, whole: float, label: str = "") -> Progress:
    """The progress of the work from `start` to `stop` of a whole; `label` goes before its notes."""

    def report(done: float, total: float, note: str = "") -> None:
        progress(start + (stop - start) * done / total, whole, f"{label} {note}".strip())

    return report


@dataclass(frozen=True)
class _Cost:
    """What ordinary text costs at one strength, in nats per token."""

    loss: float
    kl: float  # of the base


@dataclass
class _Dial:
    """A vector on a model, what it is measured on, and what was measured so far, each thing once."""

    vector: WeightVector
    lm: LM
    texts: Sequence[str]
    held: Sequence[ContrastPair]
    prompts: Sequence[Prompt]
    base: list[Tensor] = field(default_factory=list)  # of each text: log-probabilities (tokens, vocabulary)
    costs: dict[float, _Cost] = field(default_factory=dict)  # by k, as the next two
    margins: dict[float, list[float]] = field(default_factory=dict)  # one a held-out pair, nats per token
    replies: dict[float, list[str]] = field(default_factory=dict)  # one a prompt

    def ends(self, budget: float, progress: Progress) -> tuple[float, float]:
        """On each side the k at which the loss has risen by about the budget, or `MOST_K`.

        The second search begins at the end of the first: the loss rises about alike on both sides.
        """
        found: list[float] = []
        with self.vector.applied(self.lm, 0.0) as handle:

            def rise(k: float) -> float:
                base, loss = self._cost(handle, 0.0).loss, self._cost(handle, _short(k)).loss
                return math.inf if loss == OVERFLOWED else loss - base

            for number, side in enumerate((-1, 1)):
                progress(number, 2, f"the k {'below' if side < 0 else 'above'} 0 at which text costs {budget:g} nats")
                start = abs(found[0]) if found else 1.0
                found.append(search_k(rise, budget / MARGIN, side, most=MOST_K, start=start))
        return found[0], found[1]

    def measure(self, ks: Sequence[float], progress: Progress) -> None:
        """The costs and the held-out pairs at each k."""
        with self.vector.applied(self.lm, 0.0) as handle:
            for number, k in enumerate(ks):
                progress(number, len(ks), f"k = {k:g}: loss, KL and held-out pairs")
                self._cost(handle, k)
                handle.k = k
                self.margins[k] = self._margins()

    def choose(self, budget: float, progress: Progress) -> StrengthRange:
        """The strengths to use. Replies are written at 0 and at what is chosen, until whole ones are chosen.

        So the choice is that of replies at every k, and those of smaller k need not be written.
        """
        chosen, left = choose_strengths(self.rows, budget), 1.0
        while wanted := sorted({0.0, chosen.negative, chosen.recommended} - self.replies.keys()):
            said = replies_at_strengths(
                self.vector,
                self.lm,
                self.prompts,
                wanted,
                max_new_tokens=NEW_TOKENS,
                progress=_between(progress, 1 - left, 1 - left / 2, 1, "replies at the k in question"),
            )
            self.replies.update(zip(wanted, said, strict=True))
            chosen, left = choose_strengths(self.rows, budget), left / 2  # nobody knows how often: half of what is left
        return chosen

    @property
    def rows(self) -> tuple[CalibrationRow, ...]:
        """What was measured at each k, ascending; changes are from k = 0."""
        return tuple(self._row(k) for k in sorted(self.margins))

    def _row(self, k: float) -> CalibrationRow:
        changes = [mine - theirs for mine, theirs in zip(self.margins[k], self.margins[0.0], strict=True)]
        usable = bool(changes) and all(map(math.isfinite, changes))
        mean, _, error = summary(changes) if usable else (None, 0, math.nan)
        said = self.replies.get(k)
        return CalibrationRow(
            k,
            loss_change=self.costs[k].loss - self.costs[0.0].loss,
            kl=self.costs[k].kl,
            behavior=mean,
            stderr=error if math.isfinite(error) else None,
            repeated=fmean(map(repeated_share, said)) if said else None,
            loops=fmean(map(loops, said)) if said else None,
            broken=broken_share(said) if said else None,
        )

    def _cost(self, handle: SteeringHandle, k: float) -> _Cost:
        """Loss and KL at k, from one pass over each text."""
        if k in self.costs:
            return self.costs[k]
        handle.k = k
        losses, kls = [], []
        for number, text in enumerate(self.texts):
            loss, log_probs = loss_and_log_probs(self.lm, text)
            if len(self.base) == number:
                assert k == 0, "the base is measured first"
                self.base.append(log_probs)
            losses.append(loss)
            kls.append(token_kls(self.base[number], log_probs))
        self.costs[k] = _Cost(_finite(fmean(losses)), _finite(float(torch.cat(kls).mean())))
        return self.costs[k]

    def _margins(self) -> list[float]:
        prompts = [pair.prompt for pair in self.held]
        scores = score_choices(self.lm, prompts, [(pair.positive, pair.negative) for pair in self.held])
        return [positive.mean - negative.mean for positive, negative in scores]


def _finite(value: float) -> float:
    return value if math.isfinite(value) else OVERFLOWED


def _finer(rows: Sequence[CalibrationRow], budget: float) -> list[float]:
    """Smaller k of the sides on which none is allowed."""
    base, finer = next(row for row in rows if row.k == 0), []
    for side in (-1, 1):
        tried = [row for row in rows if row.k * side > 0]
        if not any(row.is_allowed(base, budget) for row in tried):
            smallest = min((row.k for row in tried), key=abs)
            finer += [_rounded(smallest * fraction) for fraction in FINER]
    return finer


def _held_out(vector: WeightVector, pairs: str | Path | Sequence[ContrastPair] | None) -> list[ContrastPair]:
    """The pairs to measure on: those that are given, or the card's."""
    if pairs is None:
        return pairs_from(vector.card.held_out, "the vector's card, field 'held_out'")
    return load_pairs(pairs, file="heldout.jsonl") if isinstance(pairs, str | Path) else list(pairs)


def _prompts(held: Sequence[ContrastPair]) -> list[Prompt]:
    """Prompts to reply to: those of the held-out pairs, and shipped ones that are about nothing in particular."""
    shipped = [row["prompt"] for row in read_jsonl(task_file("neutral.jsonl", None), required=("prompt",))]
    return list(dict.fromkeys([*(pair.prompt for pair in held), *shipped]))[:PROMPTS]


def _notes(
    held: Sequence[ContrastPair], ends: Sequence[float], rows: Sequence[CalibrationRow], budget: float
) -> Iterator[str]:
    """What a reader has to know of the choice."""
    if not held:
        yield (
            "no held-out pairs: the vector's card has none, so that k was chosen by loss and looping alone; give a "
            "file of pairs with --pairs"
        )
    for end in ends:
        row = next(row for row in rows if row.k == _rounded(end))
        if abs(end) == MOST_K and row.loss_change < budget / MARGIN:
            yield (
                f"text costs {row.loss_change:+.3f} nats at k = {end:g}, less than the budget, and no larger |k| is "
                "tried; where the behaviour hardly changes either, the vector is too small: train longer"
            )
