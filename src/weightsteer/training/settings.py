"""How a side is trained."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from ..errors import SteerError

KINDS = ("lora", "bias", "full")
SHARDS = ("ddp", "fsdp")
MOST_PROCESSES = 100_000
LARGEST_SEED = 2**32 - 1  # numpy, which the Trainer seeds too, takes no larger one
MOST_EPOCHS = 10_000
MOST_FINETUNES = 100
MOST = 10_000_000  # steps, tokens, examples in a batch: more is a slip of the hand


@dataclass(frozen=True)
class Bounds:
    """Which numbers a field takes."""

    low: float
    high: float = math.inf
    whole: bool = True
    open_low: bool = False  # `low` itself is not allowed, and `high` neither unless it is infinite

    def refusal(self, value: object) -> str | None:
        """What was expected, if `value` is not it. A bool or a text is no number here."""
        right_type = isinstance(value, int if self.whole else (int, float)) and not isinstance(value, bool)
        if right_type and self._holds(value):  # type: ignore[arg-type]
            return None
        above = f"above {self.low:g}" if self.open_low else f"of at least {self.low:g}"
        below = "" if math.isinf(self.high) else f" and {'below' if self.open_low else 'at most'} {self.high:.12g}"
        return f"a {'whole' if self.whole else 'finite'} number {above}{below}"

    def _holds(self, value: float) -> bool:
        if not (self.whole or abs(value) <= sys.float_info.max):
            return False
        return self.low < value < self.high if self.open_low else self.low <= value <= self.high


def _number(default: Any, bounds: Bounds) -> Any:
    return field(default=default, metadata={"bounds": bounds})


SWITCHES = ("bf16", "gradient_checkpointing")  # fields that are true or false
# fields by which no result changes beyond rounding, only what it takes to make it
RESOURCES = ("gradient_checkpointing", "processes", "shard")
COUNT = Bounds(1, MOST)
RATE = Bounds(0, whole=False, open_low=True)
WEIGHTS = ("kl_weight", "even_weight")  # of what is added to the loss on the answers
ADDED = {**dict.fromkeys(WEIGHTS, 0), "finetunes": 1}  # fields that change nothing at this number


def _checked_rates(rates: object) -> tuple[float, ...]:
    """The learning rates, no two of which are written alike: the name of a rate's folder has six digits of it."""
    if not isinstance(rates, Sequence) or isinstance(rates, str | bytes):
        raise SteerError(f"learning_rates: expected a list of numbers, found {rates!r}")
    if not rates:
        raise SteerError("learning_rates: expected at least one, found none")
    shown: dict[str, float] = {}
    for rate in rates:
        if expected := RATE.refusal(rate):
            raise SteerError(f"learning_rates: expected {expected}, found {rate!r}")
        if f"{rate:g}" in shown:
            raise SteerError(f"learning_rates: expected different ones, found {rate:g} twice")
        shown[f"{rate:g}"] = rate
    return tuple(rates)


@dataclass(frozen=True)
class TrainSettings:
    """How a side is trained. What is None is found from the data and the model (see `training.defaults`).

    The numbers that do not depend on them are the paper's: LoRA of rank 32, alpha 16; AdamW, weight decay 0.01. All of
    the paper's numbers are in `PAPER`.

    Raises:
        SteerError: a field of another type, or out of its range; the message names it.
    """

    kind: str = "lora"
    rank: int = _number(32, COUNT)
    alpha: int = _number(16, COUNT)
    learning_rates: tuple[float, ...] | None = None  # each is tried; the lowest validation loss wins
    epochs: float | None = _number(None, Bounds(0, MOST_EPOCHS, whole=False, open_low=True))
    max_steps: int | None = _number(None, COUNT)  # in place of epochs
    batch_size: int | None = _number(None, COUNT)
    accumulation: int = _number(1, COUNT)
    weight_decay: float = _number(0.01, Bounds(0, whole=False))
    warmup_steps: int | None = _number(None, Bounds(0, MOST))
    # share of the examples held out to choose the stopping point
    validation: float | None = _number(None, Bounds(0, 1, whole=False, open_low=True))
    # validation points (and checkpoints) over the run; the finetunes share them, and each has two at least
    evaluations: int = _number(5, COUNT)
    patience: int = _number(3, COUNT)  # evaluations without improvement before stopping; not if there are snapshots
    snapshots: int = _number(0, Bounds(0, MOST))  # equally spaced points of the run to keep besides the best one
    bf16: bool = False  # autocast: the products in bfloat16, the weights as they are (for a model in float32)
    # each block's activations are computed again on the way back: a tenth of the memory, a third more time
    gradient_checkpointing: bool = False
    max_length: int = _number(1024, Bounds(2, MOST))  # tokens; longer examples are cut at the end
    seed: int = _number(0, Bounds(0, LARGEST_SEED))
    # weight of the token KL to the base on neutral replies, nats per token; lora only
    kl_weight: float = _number(0.0, Bounds(0, whole=False))
    # two-way training: weight of the squared even part of the answers' token log-probabilities
    even_weight: float = _number(0.0, Bounds(0, whole=False))
    # of a side, each on its part of the answers with its own adapter, of which the mean is kept; lora only
    finetunes: int = _number(1, Bounds(1, MOST_FINETUNES))
    processes: int = _number(1, Bounds(1, MOST_PROCESSES))  # that train together, each with its rows of every batch
    shard: str = "ddp"  # ddp: each process holds the whole model; fsdp: each holds a part of every weight

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SteerError(f"kind: expected one of {', '.join(KINDS)}, found {self.kind!r}")
        if self.shard not in SHARDS:
            raise SteerError(f"shard: expected one of {', '.join(SHARDS)}, found {self.shard!r}")
        for name in SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise SteerError(f"{name}: expected true or false, found {getattr(self, name)!r}")
        for entry in fields(self):
            bounds, value = entry.metadata.get("bounds"), getattr(self, entry.name)
            unset = value is None and entry.default is None
            if bounds and not unset and (expected := bounds.refusal(value)):
                raise SteerError(f"{entry.name}: expected {expected}, found {value!r}")
        if self.learning_rates is not None:
            object.__setattr__(self, "learning_rates", _checked_rates(self.learning_rates))


@dataclass(frozen=True)
class WholeSettings(TrainSettings):
    """Settings with every number given, as a training runs by them and its card keeps them; by default the paper's."""

    learning_rates: tuple[float, ...] = (1e-4, 2e-4)
    epochs: float = _number(1.0, Bounds(0, MOST_EPOCHS, whole=False, open_low=True))
    batch_size: int = _number(8, COUNT)
    warmup_steps: int = _number(5, Bounds(0, MOST))
    validation: float = _number(0.05, Bounds(0, 1, whole=False, open_low=True))


PAPER = WholeSettings()  # for models of 1.5 to 7 billion parameters and thousands of examples


def identity_of(settings: TrainSettings) -> dict[str, Any]:
    """The settings that a fine-tune is known by, by name."""
    return deciding(asdict(settings))


def deciding(given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of some fields that change what comes out, which resources do not, nor what adds nothing."""
    return {
        name: value
        for name, value in given.items()
        if name not in RESOURCES and not (name in ADDED and value == ADDED[name])
    }


def filled(settings: TrainSettings, source: WholeSettings) -> WholeSettings:
    """The settings with what is None taken from `source`."""
    given = {entry.name: getattr(settings, entry.name) for entry in fields(TrainSettings)}
    return replace(source, **{name: value for name, value in given.items() if value is not None})


def refuse_weights(settings: TrainSettings, training: str, *names: str) -> None:
    """Raise where a weight is set that this training has no use for; `names`: all of them, unless some are given."""
    for name in names or WEIGHTS:
        if getattr(settings, name):
            raise SteerError(f"{name}: {training} has no such term; leave it out")
