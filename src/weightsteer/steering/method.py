"""What a method is: how it is made and from what, what it costs, which k it takes, what it needs (no torch)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from ..run_folder import RunFolder

if TYPE_CHECKING:
    from ..behavior import Behavior
    from ..vectors.weight_vector import WeightVector
    from .activations import ActivationVector
    from .steering import Steering

# How the two sides are trained; the names of folders in a run. Two-way trainings make one adapter.
Training = Literal["lora", "parts", "bias", "full", "DPO", "kl", "dial-pairs", "two-way", "two-way-even", "two-way-kl"]
TWO_WAY: tuple[Training, ...] = ("two-way", "two-way-even", "two-way-kl")
DialOf = Literal["contrastive", "random"]  # which vector's coefficients are learned
TrainingCost = tuple[Path, float]  # a fine-tune, and the share of its training that a method uses
Costs = Callable[[RunFolder, float], Sequence[TrainingCost]]


class MethodSources(Protocol):
    """What methods are made from. Each is trained or computed when it is first asked for, and kept in the run."""

    @property
    def behavior(self) -> Behavior: ...
    def finetunes(self, training: Training = "lora") -> tuple[Path, Path]:
        """The fine-tunes on D+ and D-."""
        ...

    def difference(self, training: Training = "lora") -> WeightVector:
        """w = tau+ - tau- of these fine-tunes; of a two-way training, its one adapter."""
        ...

    def random_vector(self) -> WeightVector:
        """A random vector with the contrastive one's norm in each tensor."""
        ...

    def learned_dial(self, of: DialOf) -> WeightVector:
        """The vector weighed by coefficients that are learned on the recipe's `dial` pairs."""
        ...

    def trained_activation(self) -> ActivationVector:
        """The activation vector at the chosen layer, trained at both signs at once on the pairs."""
        ...

    def activations(self) -> ActivationVector:
        """Mean response activations of D+ minus D-, every layer."""
        ...

    def activation_layer(self) -> int:
        """The layer that moves the behaviour most, on validation items."""
        ...

    def repair_target(self) -> Path:
        """The fine-tune that is to be repaired."""
        ...

    def joint_finetunes(self) -> Mapping[int, Path]:
        """Copies of the desired examples -> the repair target trained again with them."""
        ...

    @property
    def repair_sign(self) -> float:
        """Which way k goes to repair: 1 towards D+, -1 towards D-."""
        ...


@dataclass(frozen=True)
class KRule:
    """Which strengths a method takes."""

    described: str  # for the docs and for errors: "k of 1 or -1"
    allows: Callable[[float], bool]
    must_be_listed: bool = False  # a recipe has to list them: nothing can be searched


@dataclass(frozen=True)
class Method:
    """One way to steer, as a recipe names it."""

    summary: str  # one line for the table in the docs
    make: Callable[[str, MethodSources], Steering]
    costs: Costs  # the fine-tunes that it is made from at k
    ks: KRule = KRule("any k", lambda _k: True)
    training: Training = "lora"  # other than lora: both sides are trained for it alone, with a recipe's `train_of`
    preset: Mapping[str, float] = field(default_factory=dict)  # its own training settings, below a recipe's `train_of`
    uses_dial_pairs: bool = False  # pairs that the sides are not trained on, by a recipe's `dial`
    needs_pairs: bool = False  # D+ and D- must answer the same prompts
    from_snapshots: bool = False  # the LoRA fine-tunes have to keep snapshots
    strengths_from_checkpoints: bool = False  # a listed |k| is a training of its own, signed by `repair_sign`
    needs_repair_target: bool = False
    scans_layers: bool = False  # it steers at one layer, which a scan has to choose first
    in_memory: str = ""  # why no server can measure it; "": a server of weight vectors can
    needs_package: tuple[str, str] | None = None  # what is imported, and what to install

    @property
    def has_own_training(self) -> bool:
        """Whether a recipe can set its training apart."""
        return self.training != "lora"

    def missing_package(self) -> str | None:
        """What to install, if the method's package is not there."""
        if self.needs_package is None or find_spec(self.needs_package[0]) is not None:
            return None
        return self.needs_package[1]
