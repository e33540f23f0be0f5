"""A vector's dial: the range of k that the model bears, what each k does in it, and the k to use on each side."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from torch import Tensor

from ..behavior import ContrastPair, Prompt, prompt_text
from ..errors import SteerError
from ..example_files.load import load_pairs, pairs_from
from ..files import read_jsonl
from ..lm import LM
from ..looping import broken_share, loops, repeated_share
from ..progress import Progress, silent
from ..schema import is_finite, shown
from ..scoring import mean_kl, prompt_log_probs, score_choices, score_texts
from ..steering.several_k import replies_at_strengths
from ..steering.steering import Direction
from ..vectors.weight_vector import WeightVector
from .calibration import BUDGET, Calibration, CalibrationRow, choose_strengths, explain
from .results import summary
from .search import FAR_TOO_MUCH, k_at_loss_increase
from .task_spec import TaskSpec
from .tasks.capability import load_prose
from .tasks.data import task_file
from .tasks.task import TextTask

MOST_K = 8.0  # where the loss does not rise, as with a fine-tune that lowers it: no larger k is tried
MARGIN = 1.15  # the search for k ends within 15% of its aim, which so stays within the budget
FRACTIONS = (0.35, 0.7, 1.0)  # of the k at the budget
FINER = (0.25, 0.5)  # of the smallest of these, where replies are broken even there
TEXTS, KL_TEXTS = 2, 3  # passages of each split, and those that the KL is measured on
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
    fractions of it are measured: the loss, the token KL to the base, the margin of held-out pairs, and greedy replies
    that loop. Recommended is the k of the largest margin, of those within the budget at which no more replies loop or
    are empty than the base's (up to `MORE_LOOPS` of them). Neither the vector nor `lm` is changed; what is found goes
    into a card by `Calibration.written_into`.

        w = train_vector(lm, "pairs.jsonl", out="runs/mine")
        print(calibrate(w, lm).strength)

    Args:
        pairs: what the behaviour is measured on and was not trained on: a file, or pairs; default: the card's own
            `held_out`. Without any, k is chosen by loss and looping alone, and a note says so.
        budget: by how much the loss on ordinary text may rise, in nats per token.

    Raises:
        SteerError: a budget that is no number above 0, pairs that cannot be read, or a vector that does not fit `lm`.
    """
    if not (is_finite(budget) and budget > 0):
        raise SteerError(f"budget: expected a number of nats per token above 0, found {shown(budget)}")
    held = _held_out(vector, pairs)[:MOST_PAIRS]
    dial = _Dial(vector, lm, load_prose(TaskSpec("prose")).first(TEXTS), held, _prompts(held))
    ends = []
    for number, side in enumerate((-1, 1)):
        progress(number, 6, f"the k {'below' if side < 0 else 'above'} 0 at which text costs {budget:g} nats")
        ends.append(dial.end(side, budget))
    ks = sorted({0.0, *(_rounded(end * fraction) for end in ends for fraction in FRACTIONS)})
    found = dial.at(ks, _between(progress, 2, 5, 6))
    if finer := _finer(_rows(found), budget):
        found |= dial.at(finer, _between(progress, 5, 6, 6))
    progress(6, 6, "done")
    rows = _rows(found)
    strength = choose_strengths(rows, budget)
    notes = [*_notes(held, ends, rows, budget), *explain(rows, strength)]
    replies = {k: tuple(found[k].replies) for k in sorted(found)}
    return Calibration(strength, rows, len(held), tuple(map(prompt_text, dial.prompts)), replies, tuple(notes))


def _rounded(k: float) -> float:
    return float(f"{k:.3g}")


def _between(progress: Progress, start: float, stop: float, whole: float, label: str = "") -> Progress:
    """The progress of the work from `start` to `stop` of a whole; `label` goes before its notes."""

    def report(done: float, total: float, note: str = "") -> None:
        progress(start + (stop - start) * done / total, whole, f"{label} {note}".strip())

    return report


@dataclass(frozen=True)
class _Found:
    """What was measured at one strength."""

    loss: float  # nats per token of ordinary text
    kl: float
    margins: Sequence[float]  # one a held-out pair, nats per token
    replies: Sequence[str]


@dataclass(frozen=True)
class _Dial:
    """A vector on a model, and what it is measured on."""

    vector: WeightVector
    lm: LM
    texts: TextTask
    held: Sequence[ContrastPair]
    prompts: Sequence[Prompt]

    def end(self, side: int, budget: float) -> float:
        """The k at which the loss has risen by about the budget, or `MOST_K`."""
        method, aim = Direction("vector", self.vector), budget / MARGIN
        return k_at_loss_increase(self.lm, method, self.texts, loss_increase=aim, sign=side, most=MOST_K)

    def at(self, ks: Sequence[float], progress: Progress) -> dict[float, _Found]:
        """Measure at each k."""
        read = self.texts.items[:KL_TEXTS]
        reference = prompt_log_probs(self.lm, read)
        numbers = []
        with self.vector.applied(self.lm, 0.0) as handle:
            for number, k in enumerate(ks):
                progress(number, 2 * len(ks), f"k = {k:g}: loss, KL and held-out pairs")
                handle.k = k
                numbers.append((self._loss(), self._kl(reference, read), self._margins()))
        report = _between(progress, len(ks), 2 * len(ks), 2 * len(ks), "replies at every k")
        replies = replies_at_strengths(
            self.vector,
            self.lm,
            self.prompts,
            ks,
            max_new_tokens=NEW_TOKENS,
            progress=report,
        )
        return {k: _Found(*found, said) for k, found, said in zip(ks, numbers, replies, strict=True)}

    def _loss(self) -> float:
        return _finite(-fmean(score.mean for score in score_texts(self.lm, self.texts.items)))

    def _kl(self, reference: Sequence[Tensor], read: Sequence[str]) -> float:
        try:
            return _finite(mean_kl(reference, self.lm, read))
        except SteerError:  # no numbers: steered far too far
            return FAR_TOO_MUCH

    def _margins(self) -> list[float]:
        prompts = [pair.prompt for pair in self.held]
        scores = score_choices(self.lm, prompts, [(pair.positive, pair.negative) for pair in self.held])
        return [positive.mean - negative.mean for positive, negative in scores]


def _finite(value: float) -> float:
    return value if math.isfinite(value) else FAR_TOO_MUCH


def _rows(found: Mapping[float, _Found]) -> tuple[CalibrationRow, ...]:
    """The rows, ascending in k; changes are from k = 0."""
    base, rows = found[0.0], []
    for k, point in sorted(found.items()):
        changes = [mine - theirs for mine, theirs in zip(point.margins, base.margins, strict=True)]
        usable = bool(changes) and all(map(math.isfinite, changes))
        mean, _, error = summary(changes) if usable else (None, 0, math.nan)
        rows.append(
            CalibrationRow(
                k,
                loss_change=point.loss - base.loss,
                kl=point.kl,
                behavior=mean,
                stderr=error if math.isfinite(error) else None,
                repeated=fmean(map(repeated_share, point.replies)),
                loops=fmean(map(loops, point.replies)),
                broken=broken_share(point.replies),
            )
        )
    return tuple(rows)


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
