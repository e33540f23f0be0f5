"""The shape of a task, and the scorers that most tasks share."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

from ...behavior import Prompt
from ...errors import SteerError
from ...files import digest
from ...language_model import LanguageModel
from ...progress import Progress, silent
from ...schema import shown
from ...thinking import why_unanswered
from ..metrics import Metric
from ..results import SPLITS
from ..task_spec import HALVES, TaskSpec
from .by_hash import half_of

if TYPE_CHECKING:
    from ...lm import LM

Values = dict[str, list[float | None]]  # metric -> one value an item, in their order; None: it does not count there


def mean_of(values: Sequence[float | None]) -> float:
    """Mean over the items that count.

    Raises:
        SteerError: none of them does.
    """
    counted = [value for value in values if value is not None]
    if not counted:
        raise SteerError("no item counts, so there is nothing to choose by; are all verdicts of the judge malformed?")
    return fmean(counted)


def is_above_zero(margin: float) -> float:
    """1 or 0; NaN, which is neither, stays NaN."""
    return margin if math.isnan(margin) else float(margin > 0)


def without_nan(values: Values, name: str, steered: str = "") -> Values:
    """What a task measured, with None for NaN: an item for which the model gives no number does not count.

    A warning says how many there are.

    Args:
        steered: by which method at which k, for messages.

    Raises:
        SteerError: a metric has NaN and not one number.
    """
    found: Values = {}
    where = ", ".join(filter(None, (f"task {name}", steered)))
    for metric, row in values.items():
        found[metric] = [None if value is None or math.isnan(value) else value for value in row]
        lost = sum(value is not None and math.isnan(value) for value in row)
        if lost and all(value is None for value in found[metric]):
            raise SteerError(
                f"{where}: the model gives no number for {metric} (NaN in all {lost} items); it is broken, or steered "
                "too far: take a smaller k"
            )
        if lost:
            warnings.warn(
                f"{where}: {lost} of {len(row)} items have no number for {metric} (NaN) and do not count", stacklevel=2
            )
    return found


def answers_to(
    lm: LanguageModel, prompts: Sequence[str], *, max_new_tokens: int, batch_size: int = 8, progress: Progress = silent
) -> list[str | None]:
    """The model's greedy answers; None, and a warning, where a reply has none (see `Reply`).

    Raises:
        SteerError: not one reply has an answer.
    """
    replies = lm.replies(prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress)
    answers = [reply.answer for reply in replies]
    missing = why_unanswered(replies)
    if missing and all(answer is None for answer in answers):
        raise SteerError(f"{lm.name}: {missing}")
    if missing:
        warnings.warn(f"{lm.name}: {missing}; they do not count", stacklevel=2)
    return answers


def spread(values: Values, answers: Sequence[str | None]) -> Values:
    """Values of the answers that there are, as values of all; None elsewhere."""
    found: Values = {}
    for metric, row in values.items():
        given = iter(row)
        found[metric] = [None if answer is None else next(given) for answer in answers]
    return found


class Task(Protocol):
    """Items with a split each, and a scorer."""

    @property
    def name(self) -> str: ...
    @property
    def ids(self) -> Sequence[int]:
        """Each item's number in its file; the same in any selection, so that items pair across measurements."""
        ...

    @property
    def splits(self) -> Sequence[str]: ...
    @property
    def sha256(self) -> str:
        """Hash of the items and their splits."""
        ...

    @property
    def needs_weights(self) -> bool:
        """Whether it reads the model in memory itself, so that one behind a server is not enough."""
        ...

    @property
    def is_recorded(self) -> bool:
        """Whether what the model replies goes through `LanguageModel`, so that it can be kept."""
        ...

    def ask(self, lm: LanguageModel, *, batch_size: int = 8, progress: Progress = silent) -> Any:
        """All that is asked of the model: replies, or log-probabilities. `rate` makes the values from it."""
        ...

    def rate(self, said: Any, *, progress: Progress = silent) -> Values:
        """One value an item for each metric, from what `ask` gave; here judges are asked, and the model is not."""
        ...

    def measure(self, lm: LanguageModel, *, batch_size: int = 8, progress: Progress = silent) -> Values:
        """One value an item for each metric: `ask`, then `rate`."""
        ...

    def against(self, lm: LM) -> Self:
        """The same task with what it needs to know of the unsteered model; for most tasks nothing."""
        ...

    def first(self, limit: int) -> Self:
        """The same task with at most `limit` items of each split."""
        ...

    def of_split(self, split: str) -> Self:
        """The same task with the items of one split."""
        ...

    def all_in(self, split: str) -> Self:
        """The same task with every item in one split."""
        ...

    def of_half(self, half: str) -> Self:
        """The same task with the items that may choose, or with those that are only reported."""
        ...

    def renamed(self, name: str) -> Self:
        """The same task under another name."""
        ...


def alternate_splits(count: int, group: int = 1) -> tuple[str, ...]:
    """Validation and test in turn; `group` neighbours (mirrored couples) go to the same split."""
    return tuple(SPLITS[(i // group) % 2] for i in range(count))


def interleave(flags: Sequence[bool]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """An order in which true and false items take turns, true first, and the split of each item in it.

    Each kind alternates between the splits by itself, so that both splits, and the first n items of
    either, hold as many of one kind as of the other for as long as both last. The first of one kind and
    the first of the other share a split, and so on: couples that mirror each other stay together.
    """
    kinds = [[i for i, flag in enumerate(flags) if flag == kind] for kind in (True, False)]
    ranked = sorted((rank, kind, i) for kind, members in enumerate(kinds) for rank, i in enumerate(members))
    return tuple(i for _, _, i in ranked), tuple(SPLITS[rank % 2] for rank, _, _ in ranked)


@dataclass(frozen=True)
class TaskKind:
    """One entry of a module's `TASKS`: how a task is loaded, and what is known of it without its items."""

    load: Callable[[TaskSpec], Task]
    metrics: tuple[Metric, ...]  # of the harness none: they are each of its tasks' own
    judge: Literal["needed", "optional"] | None = None  # whether a judge scores its replies
    generates: bool = False  # open replies, whose length can be set


@dataclass(frozen=True)
class Choice:
    """A prompt with two candidate answers: the one whose choice is counted, and the other."""

    prompt: Prompt
    counted: str
    other: str


@dataclass(frozen=True)
class ItemTask(ABC):
    """What tasks made of items share: selection by split and number."""

    name: str
    items: tuple[Any, ...]
    splits: tuple[str, ...]
    ids: tuple[int, ...] = ()  # given by the order of the items
    is_recorded: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.items:
            raise SteerError(f"task {self.name}: no items")
        if not self.ids:
            object.__setattr__(self, "ids", tuple(range(len(self.items))))

    @property
    def needs_weights(self) -> bool:
        """See `Task.needs_weights`; most do not."""
        return False

    @property
    def sha256(self) -> str:
        """See `Task.sha256`."""
        return digest(asdict(self))

    @abstractmethod
    def ask(self, lm: LanguageModel, *, batch_size: int = 8, progress: Progress = silent) -> Any:
        """See `Task.ask`."""

    def rate(self, said: Any, *, progress: Progress = silent) -> Values:
        """See `Task.rate`; without a judge, `ask` gives the values themselves."""
        values: Values = said
        return values

    def measure(self, lm: LanguageModel, *, batch_size: int = 8, progress: Progress = silent) -> Values:
        """See `Task.measure`."""
        return self.rate(self.ask(lm, batch_size=batch_size, progress=progress), progress=progress)

    def against(self, lm: LM) -> Self:
        """See `Task.against`."""
        return self

    def _selected(self, indices: Sequence[int]) -> Self:
        chosen = ((self.items[i], self.splits[i], self.ids[i]) for i in indices)
        items, splits, ids = zip(*chosen, strict=True)
        return replace(self, items=items, splits=splits, ids=ids)

    def first(self, limit: int) -> Self:
        """See `Task.first`."""
        if limit < 1:
            raise SteerError(f"task {self.name}: limit must be at least 1, found {limit}")
        kept = [[i for i, s in enumerate(self.splits) if s == split][:limit] for split in SPLITS]
        return self._selected(sorted(i for part in kept for i in part))

    def of_split(self, split: str) -> Self:
        """See `Task.of_split`."""
        chosen = [i for i, s in enumerate(self.splits) if s == split]
        if not chosen:
            raise SteerError(f"task {self.name}: no items in split {split!r}")
        return self._selected(chosen)

    def all_in(self, split: str) -> Self:
        """See `Task.all_in`."""
        if split not in SPLITS:
            raise SteerError(f"task {self.name}: split: expected one of {', '.join(SPLITS)}, found {split!r}")
        return replace(self, splits=(split,) * len(self.items))

    def of_half(self, half: str) -> Self:
        """See `Task.of_half`: a fixed hash of each item's own text says which half it belongs to."""
        if half not in HALVES:
            raise SteerError(f"task {self.name}: half: expected one of {', '.join(HALVES)}, found {half!r}")
        chosen = [i for i, item in enumerate(self.items) if half_of(item) == half]
        if not chosen:
            raise SteerError(f"task {self.name}: none of its {len(self.items)} items is in the half {half!r}")
        return self._selected(chosen)

    def renamed(self, name: str) -> Self:
        """See `Task.renamed`."""
        return replace(self, name=name)


@dataclass(frozen=True)
class ChoiceTask(ItemTask):
    """Which of two given answers is likelier per token, as the assistant's reply.

    Metrics: `share`, 1 where the counted answer is the likelier; `margin`, its log-probability per
    token minus the other's, in nats.
    """

    items: tuple[Choice, ...]
    share: str = "share"

    def __post_init__(self) -> None:
        super().__post_init__()
        for number, item in zip(self.ids, self.items, strict=True):
            if not item.counted.strip() or not item.other.strip() or item.counted.strip() == item.other.strip():
                raise SteerError(
                    f"task {self.name}, item {number + 1}: expected two different answers, found {shown(item.counted)} "
                    f"and {shown(item.other)}"
                )

    def ask(self, lm: LanguageModel, *, batch_size: int = 8, progress: Progress = silent) -> Values:
        """See `Task.ask`."""
        scores = lm.score_choices(
            [item.prompt for item in self.items],
            [(item.counted, item.other) for item in self.items],
            batch_size=batch_size,
            progress=progress,
        )
        margins = [counted.mean - other.mean for counted, other in scores]
        return {self.share: [is_above_zero(margin) for margin in margins], "margin": list(margins)}


@dataclass(frozen=True)
class TextTask(ItemTask):
    """Loss on running text, in nats per token (the perplexity's logarithm): metric `nll`."""

    items: tuple[str, ...]

    def ask(self, lm: LanguageModel, *, batch_size: int = 8, progress: Progress = silent) -> Values:
        """See `Task.ask`."""
        return {"nll": [-score.mean for score in lm.score_texts(self.items, batch_size=batch_size)]}


class Scorer(Protocol):
    """Gives values to open replies: a rule, or a judge."""

    @property
    def name(self) -> str:
        """What tells this scorer from another, for the record."""
        ...

    def __call__(self, items: Sequence[Any], replies: Sequence[str]) -> Values:
        """One value an item for each metric."""
        ...


@dataclass(frozen=True)
class ReplyTask(ItemTask):
    """Open replies, greedy, each given its values by a scorer. Every item has a `prompt`."""

    scorer: Scorer | None = None
    max_new_tokens: int = 64

    @property
    def sha256(self) -> str:
        """See `Task.sha256`."""
        assert self.scorer is not None
        return digest([self.name, [asdict(i) for i in self.items], self.splits, self.scorer.name, self.max_new_tokens])

    def ask(self, lm: LanguageModel, *, batch_size: int = 8, progress: Progress = silent) -> list[str | None]:
        """See `Task.ask`: an answer an item."""
        prompts, length = [item.prompt for item in self.items], self.max_new_tokens
        return answers_to(lm, prompts, max_new_tokens=length, batch_size=batch_size, progress=progress)

    def rate(self, said: list[str | None], *, progress: Progress = silent) -> Values:
        """See `Task.rate`."""
        assert self.scorer is not None
        given = [(item, answer) for item, answer in zip(self.items, said, strict=True) if answer is not None]
        items, answers = zip(*given, strict=True)
        return spread(self.scorer(items, answers), said)
