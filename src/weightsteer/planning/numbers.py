"""The numbers of a plan: how a model is held, a stage's memory by its parts, and all stages of a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from .devices import Device


@dataclass(frozen=True)
class Choices:
    """How a model is held: packed or not, with its activations kept or computed again, on how many devices."""

    quantize: Literal["nf4", "int8"] | None = None
    gradient_checkpointing: bool = False
    devices: int = 1
    shard: Literal["ddp", "fsdp"] = "ddp"


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the stage's peak."""

    process: float = 0.0  # Python and its libraries, or the driver's context
    weights: float = 0.0  # of all models that are held
    trained: float = 0.0  # adapters or biases, in float32
    optimizer: float = 0.0
    gradients: float = 0.0
    activations: float = 0.0  # kept for the backward pass
    work: float = 0.0  # logits, and what one operation needs
    cache: float = 0.0  # keys and values
    sums: float = 0.0  # of activations

    @property
    def total(self) -> float:
        """All of it."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class StagePlan:
    """What one stage takes."""

    name: str
    memory: Memory
    seconds: float
    trained: float
    generated: float
    scored: float
    judged: float
    disk: float
    fits: bool
    advice: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A whole run on one kind of device."""

    recipe: str
    model: str
    parameters: int
    dtype: str
    device: Device
    choices: Choices
    stages: tuple[StagePlan, ...]
    notes: tuple[str, ...] = ()

    @property
    def peak(self) -> float:
        """Bytes of the stage that takes most."""
        return max(stage.memory.total for stage in self.stages)

    @property
    def seconds(self) -> float:
        """All stages, one after the other; the judge's own time is not in it."""
        return sum(stage.seconds for stage in self.stages)

    def as_json(self) -> dict[str, Any]:
        """Everything, for programs; sizes in bytes, times in seconds."""
        stages = [{**asdict(stage), "total": stage.memory.total} for stage in self.stages]
        return {**asdict(self), "stages": stages, "peak": self.peak, "seconds": self.seconds}
