"""What one training run is given, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from ..lm import LM
from ..run_card import RunCard
from .combinations import refuse_snapshots
from .settings import WholeSettings

LEAST_GAIN = 1e-6  # of the base's loss; a smaller gain is float32's rounding
Encoded = dict[str, list[int]]  # the token ids and masks of one example, by the name that the trainer's collator reads


_ANY_OUTCOME: ContextVar[bool] = ContextVar("any outcome of a training counts", default=False)


@contextmanager
def without_gain() -> Iterator[None]:
    """Inside, a training need not better its base: a dry run trains random models for a few steps."""
    token = _ANY_OUTCOME.set(True)
    try:
        yield
    finally:
        _ANY_OUTCOME.reset(token)


def any_outcome_counts() -> bool:
    """Whether this is inside `without_gain`."""
    return _ANY_OUTCOME.get()


@dataclass(frozen=True)
class Job:
    """One training run at one learning rate, in its own folder."""

    lm: LM
    train: list[Encoded]
    validation: list[Encoded]
    settings: WholeSettings
    learning_rate: float
    folder: Path
    card: RunCard  # of the fine-tune that the run is for
    further: tuple[list[Encoded], ...] = ()  # the rows of the other fine-tunes, where a mean is wanted
    rows: int | None = None  # that pass at once in all processes together, a divisor of the batch size; None: all

    @property
    def rows_at_once(self) -> int:
        """Examples that pass through the model together."""
        return self.rows or self.settings.batch_size

    @property
    def passes(self) -> int:
        """How many of them make an optimizer step; what a step is made of does not depend on `rows`."""
        return self.settings.accumulation * (self.settings.batch_size // self.rows_at_once)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run, unless it stops early."""
        settings = self.settings
        batches = -(-len(self.train) // (settings.batch_size * settings.accumulation))
        return settings.max_steps or max(1, round(batches * settings.epochs))

    @property
    def every(self) -> int:
        """Optimizer steps between two evaluations, which the fine-tunes of a mean share; each keeps two if it can."""
        wanted = self.settings.evaluations
        return max(1, self.steps // max(min(2, wanted), wanted // self.settings.finetunes))

    @property
    def snapshot_steps(self) -> list[int]:
        """The steps after which a snapshot is kept, equally spaced, the last step among them.

        Raises:
            SteerError: more snapshots than steps.
        """
        wanted, steps = self.settings.snapshots, self.steps
        refuse_snapshots(wanted, steps)
        return [round(number * steps / wanted) for number in range(1, wanted + 1)]


@dataclass(frozen=True)
class Outcome:
    """What one training run reached and what it cost.

    `base_loss` is the validation loss at step 0, which is the base's own, and `loss` the lowest one after it,
    infinite where none was finite; `last_loss` is that of the last point, infinite for NaN. All are in nats per
    token of the answers, or DPO's loss. `tokens` counts what the steps were trained on, prompts
    included and padding not; `seconds` is the time in those steps, validation and saving not.
    """

    base_loss: float
    loss: float
    last_loss: float
    steps: int
    tokens: int
    seconds: float
    parameters: int  # trained

    @property
    def gains(self) -> bool:
        """Whether the training brought the validation loss below the base's, by more than rounding."""
        if _ANY_OUTCOME.get() and math.isfinite(self.loss):
            return True
        return self.base_loss - self.loss > LEAST_GAIN * abs(self.base_loss)

    @property
    def moved(self) -> bool:
        """Whether the training changed what the model computes at all."""
        return not all(
            abs(loss - self.base_loss) <= LEAST_GAIN * self.base_loss for loss in (self.loss, self.last_loss)
        )

    @property
    def diverged(self) -> bool:
        """Whether the loss became infinite or NaN, and was never better than the base's."""
        return not (self.gains or math.isfinite(self.last_loss))
