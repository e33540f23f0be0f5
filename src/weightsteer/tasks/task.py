"""The shape of a task, and the scorers that most tasks share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from ..errors import SteerError
from ..lm import LM
from ..progress import Progress, silent
from ..records import digest
from ..scoring import score_choices, score_texts

SPLITS = ("validation", "test")
Values = dict[str, list[float]]  # metric -> one value an item, in the order of the items


class Task(Protocol):
    """Items with a split each, and a scorer."""

    @property
    def name(self) -> str: ...
    @property
    def splits(self) -> Sequence[str]: ...
    @property
    def sha256(self) -> str:
        """Hash of the items and their splits."""
        ...

    def measure(self, lm: LM, *, batch_size: int = 8, progress: Progress = silent) -> Values:
        """One value an item for each metric."""
        ...

    def first(self, limit: int) -> Task:
        """The same task with at most `limit` items of each split."""
        ...

    def of_split(self, split: str) -> Task:
        """The same task with the items of one split."""
        ...

    def renamed(self, name: str) -> Task:
        """The same task under another name."""
        ...


def alternate_splits(count: int, group: int = 1) -> tuple[str, ...]:
    """Validation and test in turn; `group` neighbours (mirrored couples) go to the same split."""
    return tuple(SPLITS[(i // group) % 2] for i in range(count))


@dataclass(frozen=True)
class Choice:
    """A prompt with two candidate answers: the one whose choice is counted, and the other."""

    prompt: str
    counted: str
    other: str


@dataclass(frozen=True)
class _Items:
    """What item-based tasks share: selection by split and number."""

    name: str
    items: tuple[Any, ...]
    splits: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.items:
            raise SteerError(f"task {self.name}: no items")

    @property
    def sha256(self) -> str:
        """See `Task.sha256`."""
        return digest(asdict(self))

    def _selected(self, indices: Sequence[int]) -> Any:
        items, splits = zip(*((self.items[i], self.splits[i]) for i in indices), strict=True)
        return replace(self, items=items, splits=splits)

    def first(self, limit: int) -> Any:
        """See `Task.first`."""
        if limit < 1:
            raise SteerError(f"task {self.name}: limit must be at least 1, found {limit}")
        kept = [[i for i, s in enumerate(self.splits) if s == split][:limit] for split in SPLITS]
        return self._selected(sorted(i for part in kept for i in part))

    def of_split(self, split: str) -> Any:
        """See `Task.of_split`."""
        chosen = [i for i, s in enumerate(self.splits) if s == split]
        if not chosen:
            raise SteerError(f"task {self.name}: no items in split {split!r}")
        return self._selected(chosen)

    def renamed(self, name: str) -> Any:
        """See `Task.renamed`."""
        return replace(self, name=name)


@dataclass(frozen=True)
class ChoiceTask(_Items):
    """Which of two given answers is likelier per token, as the assistant's reply.

    Metrics: `share`, 1 where the counted answer is the likelier; `margin`, its log-probability per
    token minus the other's, in nats.
    """

    items: tuple[Choice, ...]
    share: str = "share"

    def measure(self, lm: LM, *, batch_size: int = 8, progress: Progress = silent) -> Values:
        """See `Task.measure`."""
        scores = score_choices(
            lm,
            [item.prompt for item in self.items],
            [(item.counted, item.other) for item in self.items],
            batch_size=batch_size,
            progress=progress,
        )
        margins = [counted.mean - other.mean for counted, other in scores]
        return {self.share: [float(margin > 0) for margin in margins], "margin": margins}


@dataclass(frozen=True)
class TextTask(_Items):
    """Loss on running text, in nats per token (the perplexity's logarithm): metric `nll`."""

    items: tuple[str, ...]

    def measure(self, lm: LM, *, batch_size: int = 8, progress: Progress = silent) -> Values:
        """See `Task.measure`."""
        return {"nll": [-score.mean for score in score_texts(lm, self.items, batch_size=batch_size)]}
