"""The learned dial: a vector's few coefficients, learned by gradient through the hook at +k and -k together.

On pairs that the vector was not trained on, each pair's margin is log p(positive) - log p(negative), each a mean per
token. Learned is the c that lifts the margins at +k and lowers those at -k, under a budget of token KL to the base on
neutral replies: the multiplier of the KL grows while the KL is above the budget, and falls while it is below. Pairs
whose margins are to stay, such as refusing or helping with what is harmless, have a budget and multiplier of their own.

The coefficients multiply each other, so that near zero they have hardly any gradient, and learning does not return
from there. So they are measured a few times on the way, and those are kept that move the margins furthest within the
budgets.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from ..batches import pad_right
from ..behavior import ContrastPair, pair_rows
from ..errors import SteerError
from ..files import digest
from ..lm import LM
from ..model_parts import projecting_only
from ..progress import Progress, silent
from ..vectors.coefficients import KNOTS, CoefficientForm, factors_of, weigh
from ..vectors.delta import Delta
from ..vectors.hooks import steer
from ..vectors.low_rank import LowRank
from ..vectors.weight_vector import WeightVector
from .job import Encoded
from .neutral import draw, neutral_rows, token_kls
from .trainer import IGNORED
from .two_way import encode_pairs
from .weighted_trainer import SIDE

MAX_LENGTH = 1024  # tokens of a pair's conversation
SHRINK = 0.2  # how fast a multiplier follows what it holds down, in powers of e a step at twice the budget
FIND_K, KL_ROWS = 4, 8  # tries for the k at the budget, and neutral replies that they read
MOST_K = 8.0
CHECKS = 5  # how often the coefficients are measured while they are learned
UNMOVED = "unmoved margin, size"  # mean size of the changes of margins that are to stay, at +k and -k
MOST_GROWN = 2.0  # beyond so many times the vector, what was measured does not tell what its margins would be


@dataclass(frozen=True)
class DialSettings:
    """How coefficients are learned."""

    kl: float = 0.05  # budget: mean token KL to the base on neutral replies, nats, at +k and -k alike
    steps: int = 40
    learning_rate: float = 0.05  # of Adam, on the coefficients; it falls to 0 in a straight line
    batch_size: int = 4  # pairs in a step
    neutral: int = 4  # neutral replies in a step
    unmoved_margin: float = 0.1  # budget: mean size of the change of a margin that is to stay, nats per token
    knots: int = KNOTS  # of the curve over depth
    seed: int = 0


@dataclass
class _Tally:
    """What the learning took."""

    tokens: int = 0
    started: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True)
class _Rows:
    """Rows of token ids with the targets that count, padded: (rows, length)."""

    ids: Tensor
    mask: Tensor
    targets: Tensor

    @classmethod
    def of(cls, lm: LM, rows: Sequence[tuple[list[int], list[int]]]) -> _Rows:
        ids, mask = pad_right([row for row, _ in rows], lm.pad_id, lm.device)
        return cls(ids, mask, pad_right([labels for _, labels in rows], IGNORED, lm.device)[0])

    def logits(self, lm: LM) -> list[Tensor]:
        """For each row the logits that predict its targets."""
        wanted = self.targets[:, 1:] != IGNORED
        with projecting_only(lm.model, pad(wanted, (0, 1))):
            found = lm.model(input_ids=self.ids, attention_mask=self.mask, use_cache=False).logits[0]
        return list(found.split(wanted.sum(dim=1).tolist()))

    def means(self, logits: Sequence[Tensor]) -> Tensor:
        """Mean log-probability of each row's targets: (rows,)."""
        wanted = [row[row != IGNORED] for row in self.targets[:, 1:]]
        found = [torch.log_softmax(part.float(), dim=-1) for part in logits]
        return torch.stack([p.gather(1, t[:, None]).mean() for p, t in zip(found, wanted, strict=True)])


def learn_dial(
    lm: LM,
    positive: WeightVector,
    negative: WeightVector | None,
    pairs: Sequence[ContrastPair],
    *,
    unmoved: Sequence[ContrastPair] = (),
    settings: DialSettings | None = None,
    progress: Progress = silent,
) -> WeightVector:
    """Learn the coefficients of w = positive - negative on `pairs`; `lm` stays as it was.

    The result is an ordinary vector of the rank of w. Its card tells the coefficients (settings, `coefficients`), the k
    at which they were learned, and in `measured` the margins and the KL at +k and -k before and after, the step whose
    coefficients were kept, and the costs.

    Args:
        negative: None for a vector without two sides; `positive` is w then.
        pairs: pairs that neither side was trained on.
        unmoved: pairs whose margins are to stay as they are, at +k and -k alike.
        progress: called with steps done, steps in all, and the margin and KL.

    Raises:
        SteerError: fewer than two pairs, a dense vector, or a model that gives no numbers.
    """
    chosen = settings or DialSettings()
    if len(pairs) < 2:
        raise SteerError(f"learned dial: expected at least 2 pairs to learn on, found {len(pairs)}")
    tally = _Tally()
    learner = _Learner(lm, positive, negative, (pairs, unmoved), chosen, tally)
    with _frozen(lm):
        k = learner.k_at_budget()
        numbers, measured = learner.learn(k, progress)
    found = weigh(positive, negative, numbers.double(), learner.form)
    costs = {
        "search_tokens": tally.tokens,
        "search_seconds": time.perf_counter() - tally.started,
        "parameters": learner.form.count,
        "settings": 1,
    }
    made = {**found.card.settings, "dial": {**asdict(chosen), "k": k}}
    data = {**found.card.data_sha256, "dial pairs": digest(pair_rows(pairs))}
    if unmoved:
        data["unmoved pairs"] = digest(pair_rows(unmoved))
    card = replace(
        found.card, settings=made, data_sha256=data, measured={**found.card.measured, **costs, "dial": measured}
    )
    return replace(found, card=card)


@contextmanager
def _frozen(lm: LM) -> Iterator[None]:
    """No gradient for the model's own weights."""
    required = {name: p.requires_grad for name, p in lm.model.named_parameters()}
    lm.model.requires_grad_(False)
    try:
        yield
    finally:
        for name, parameter in lm.model.named_parameters():
            parameter.requires_grad_(required[name])


def _balanced(measured: Mapping[str, float]) -> float:
    """The multiplier at which a larger w gains as much margin as it costs in KL: margins grow with k, the KL with k^2.

    1 where the vector lifts no margin at the start.
    """
    odd = _odd(measured)
    return odd / (2 * measured["kl"]) if odd > 0 and measured["kl"] > 0 else 1.0


def _odd(measured: Mapping[str, float]) -> float:
    """The part of the margins' change that turns its sign with k, nats per token."""
    return (measured["margin at k"] - measured["margin at -k"]) / 2


def _room(measured: Mapping[str, float], settings: DialSettings) -> float:
    """How many times the vector the budgets allow: margins grow with k, the KL with k^2."""
    kl, moved = measured["kl"], measured.get(UNMOVED, 0.0)
    rooms = [MOST_GROWN]
    if kl > 0:
        rooms.append(math.sqrt(settings.kl / kl))
    if moved > 0:
        rooms.append(settings.unmoved_margin / moved)
    return min(rooms)


def _worth(measured: Mapping[str, float], settings: DialSettings) -> float:
    """The odd part that the margins would have at the budgets; one the wrong way is not made better by less of it."""
    if not all(map(math.isfinite, measured.values())):
        return -math.inf
    return _odd(measured) * (_room(measured, settings) if _odd(measured) > 0 else 1.0)


def _followed(multiplier: float, found: Tensor, budget: float) -> float:
    """The multiplier after a step in which what it holds down was `found`."""
    return multiplier * math.exp(SHRINK * max(-1.0, min(1.0, float(found.detach()) / budget - 1)))


@dataclass(frozen=True)
class _Pairs:
    """Encoded pairs, and the margin of each in the base: (pairs,)."""

    rows: list[Encoded]
    base: Tensor


@dataclass(frozen=True)
class _Point:
    """Coefficients on the way, and what was measured with them."""

    numbers: Tensor
    step: int
    measured: dict[str, float]


@dataclass(frozen=True)
class _Step:
    """What one batch gives: means over its pairs and neutral replies, with their gradients."""

    margin: Tensor  # odd change of the margins, nats per token
    loss: Tensor
    kl: Tensor  # nats per token
    moved: Tensor  # size of the changes of margins that are to stay, nats per token


class _Learner:
    """The data, and the passes of the model that the coefficients are learned by."""

    def __init__(
        self,
        lm: LM,
        positive: WeightVector,
        negative: WeightVector | None,
        pairs: tuple[Sequence[ContrastPair], Sequence[ContrastPair]],
        settings: DialSettings,
        tally: _Tally,
    ) -> None:
        self.lm, self.settings, self.tally = lm, settings, tally
        names = list(dict.fromkeys([*positive.deltas, *(negative.deltas if negative else ())]))
        self.form = CoefficientForm(names, two_sides=negative is not None, knots=settings.knots)
        self.factors = {name: factors_of(positive, negative, name) for name in names}
        self.pairs, self.unmoved = (self._with_base(some) for some in pairs)
        self.neutral = neutral_rows(lm)

    def _deltas(self, numbers: Tensor) -> dict[str, Delta]:
        """The weighed vector, with the coefficients' gradients."""
        ours, theirs = self.form.scales(numbers)
        found: dict[str, Delta] = {}
        for place, (name, (first, second)) in enumerate(self.factors.items()):
            B, A = first.B * ours[place].to(first.B), first.A
            if second is not None:
                B, A = torch.cat([B, second.B * theirs[place].to(B)], dim=1), torch.cat([A, second.A])
            found[name] = LowRank(B, A, first.layout)
        return found

    def _pair_rows(self, rows: Sequence[Encoded]) -> list[tuple[list[int], list[int]]]:
        """Both answers of each pair, the positive ones first."""
        positive = [(row["input_ids"], row["labels"]) for row in rows]
        return positive + [(row[f"{SIDE}input_ids"], row[f"{SIDE}labels"]) for row in rows]

    def _margins(self, rows: _Rows, logits: Sequence[Tensor]) -> Tensor:
        positive, negative = rows.means(logits).chunk(2)
        return positive - negative

    @torch.no_grad()
    def _with_base(self, pairs: Sequence[ContrastPair]) -> _Pairs:
        size, encoded = self.settings.batch_size, encode_pairs(self.lm, pairs, MAX_LENGTH)
        found = [torch.zeros(0, device=self.lm.device)]
        for start in range(0, len(encoded), size):
            rows = _Rows.of(self.lm, self._pair_rows(encoded[start : start + size]))
            found.append(self._margins(rows, rows.logits(self.lm)))
        return _Pairs(encoded, torch.cat(found))

    def _kls(self, rows: _Rows, moved: Sequence[Tensor]) -> Tensor:
        """Mean token KL to the base over the rows, which stand there twice: at +k, then at -k."""
        half = len(moved) // 2
        with torch.no_grad():
            base = _Rows(rows.ids[:half], rows.mask[:half], rows.targets[:half]).logits(self.lm)
        return torch.cat([token_kls(base[i % half], row) for i, row in enumerate(moved)]).mean()

    def _steered(self, rows: _Rows, numbers: Tensor, k: float) -> list[Tensor]:
        """Logits of the rows, of which the first half is at +k, the second at -k."""
        half = len(rows.ids) // 2
        ks = torch.tensor([k] * half + [-k] * half, device=self.lm.device)
        self.tally.tokens += int(rows.mask.sum())
        with steer(self.lm.model, self._deltas(numbers), ks):
            return rows.logits(self.lm)

    @torch.no_grad()
    def k_at_budget(self) -> float:
        """The k at which the vector itself has about the budget's KL, a mean of both sides."""
        kept = [(row["input_ids"], row["labels"]) for row in self.neutral[:KL_ROWS]]
        rows, k = _Rows.of(self.lm, kept * 2), 0.5
        for _ in range(FIND_K):
            found = float(self._kls(rows, self._steered(rows, self.form.start(), k)))
            if not math.isfinite(found):
                k /= 4
                continue
            k = min(MOST_K, k * min(4.0, math.sqrt(self.settings.kl / max(found, self.settings.kl / 16))))
        return float(f"{k:.3g}")

    def learn(self, k: float, progress: Progress) -> tuple[Tensor, dict[str, float]]:
        """The coefficients, and what was measured before and after."""
        settings = self.settings
        numbers = self.form.start().requires_grad_(True)
        optimizer = torch.optim.Adam([numbers], lr=settings.learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / settings.steps)
        start = self._point(self.form.start(), 0, k)
        points, of_kl, of_moved = [start], _balanced(start.measured), 1.0
        checks = {math.ceil(settings.steps * part / CHECKS) for part in range(1, CHECKS + 1)}
        batches = zip(self._batches(self.pairs), self._batches(self.unmoved), strict=True)
        for number, (chosen, still) in enumerate(batches):
            step = self._step(numbers, k, chosen, still, number)
            (step.loss + of_kl * step.kl + of_moved * step.moved).backward()
            if numbers.grad is None or not bool(torch.isfinite(numbers.grad).all()):
                raise SteerError("learned dial: the model gives no numbers at these coefficients; lower the KL budget")
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            of_kl = _followed(of_kl, step.kl, settings.kl)
            of_moved = _followed(of_moved, step.moved, settings.unmoved_margin)
            if number + 1 in checks:
                points.append(self._point(numbers.detach().clone(), number + 1, k))
            told = f"margin {float(step.margin.detach()):+.3f}, KL {float(step.kl.detach()):.3f}"
            progress(number + 1, settings.steps, told)
        best = max(points, key=lambda point: _worth(point.measured, settings))
        kept = self.form.scaled(best.numbers, min(1.0, _room(best.measured, settings)))
        before = {f"{name} at the start": value for name, value in start.measured.items()}
        return kept, {**before, **self.measure(kept, k), "step": best.step, "multiplier": of_kl}

    def _point(self, numbers: Tensor, step: int, k: float) -> _Point:
        return _Point(numbers, step, self.measure(numbers, k))

    def _batches(self, pairs: _Pairs) -> Iterator[list[int]]:
        """Places of the pairs of each step: pass after pass, each in an order of its own; none of no pairs."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        waiting: list[int] = []
        size = min(self.settings.batch_size, len(pairs.rows))
        for _ in range(self.settings.steps):
            while len(waiting) < size:
                waiting += torch.randperm(len(pairs.rows), generator=generator).tolist()
            taken, waiting = waiting[:size], waiting[size:]
            yield taken

    def _step(self, numbers: Tensor, k: float, chosen: Sequence[int], still: Sequence[int], step: int) -> _Step:
        more, less = self._changes(self.pairs, chosen, numbers, k)
        key = self.settings.seed * 1_000_003 + step
        kept = [(row["input_ids"], row["labels"]) for row in draw(self.neutral, self.settings.neutral, key)]
        rows = _Rows.of(self.lm, kept * 2)
        moved = (
            torch.cat(self._changes(self.unmoved, still, numbers, k)).abs()
            if still
            else torch.zeros(1, device=self.lm.device)
        )
        return _Step(
            margin=(more - less).mean() / 2,
            loss=-(logsigmoid(more) + logsigmoid(-less)).mean(),
            kl=self._kls(rows, self._steered(rows, numbers, k)),
            moved=moved.mean(),
        )

    def _changes(self, pairs: _Pairs, chosen: Sequence[int], numbers: Tensor, k: float) -> tuple[Tensor, Tensor]:
        """Changes of the margins of the chosen pairs from the base, at +k and at -k."""
        rows = _Rows.of(self.lm, self._pair_rows([pairs.rows[i] for i in chosen]) * 2)
        means = rows.means(self._steered(rows, numbers, k))
        base = pairs.base[list(chosen)]
        more, less = (side.chunk(2)[0] - side.chunk(2)[1] - base for side in means.chunk(2))
        return more, less

    @torch.no_grad()
    def measure(self, numbers: Tensor, k: float) -> dict[str, float]:
        """Mean change of the margin at +k and at -k over all pairs, and the KL over all neutral replies.

        Where there are pairs whose margins are to stay, theirs too.
        """
        more, less = self._all_changes(self.pairs, numbers, k)
        found = {"margin at k": float(more.mean()), "margin at -k": float(less.mean())}
        if self.unmoved.rows:
            more, less = self._all_changes(self.unmoved, numbers, k)
            found |= {
                "unmoved margin at k": float(more.mean()),
                "unmoved margin at -k": float(less.mean()),
                UNMOVED: float(torch.cat([more, less]).abs().mean()),
            }
        kls = []
        for start in range(0, len(self.neutral), KL_ROWS):
            kept = [(row["input_ids"], row["labels"]) for row in self.neutral[start : start + KL_ROWS]]
            still = _Rows.of(self.lm, kept * 2)
            kls.append(float(self._kls(still, self._steered(still, numbers, k))))
        return {**found, "kl": sum(kls) / len(kls)}

    def _all_changes(self, pairs: _Pairs, numbers: Tensor, k: float) -> tuple[Tensor, Tensor]:
        """Changes of all pairs' margins from the base, at +k and at -k: two of (pairs,)."""
        size, count = self.settings.batch_size, len(pairs.rows)
        found = [
            self._changes(pairs, range(start, min(start + size, count)), numbers, k) for start in range(0, count, size)
        ]
        more, less = (torch.cat(side) for side in zip(*found, strict=True))
        return more, less
