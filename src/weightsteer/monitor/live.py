"""The parameters of a model that trains, as they stand, and their inner products with vectors."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import SteerError
from ..vectors.delta import Delta, dot, read_delta, require_same_shape, to_dense
from ..vectors.low_rank import FactorPanel, LowRank
from ..vectors.weight_vector import WeightVector
from .live_forms import Directions, Live
from .training_parameters import live_parameters


def _directions_of(parts: Mapping[str, Delta | None], shape: tuple[int, ...], device: torch.device) -> Directions:
    """All vectors' parts of a parameter of `shape` in float32; None where a vector has none."""
    if len(shape) == 2 and all(part is None or isinstance(part, LowRank) for part in parts.values()):
        factors = [part if isinstance(part, LowRank) else None for part in parts.values()]
        return FactorPanel.of(factors, (shape[0], shape[1]), torch.float32).to(device, torch.float32)
    if all(part is None for part in parts.values()):
        return torch.zeros(len(parts), 0, device=device)
    rows = [torch.zeros(shape) if part is None else to_dense(part).float() for part in parts.values()]
    return torch.stack([row.flatten() for row in rows]).to(device)


@dataclass(frozen=True)
class Watched:
    """One parameter that trains (`live`) or that a vector changes."""

    name: str
    shape: tuple[int, ...]
    squares: Mapping[str, float]  # vector -> <v, v>
    live: Live | None
    directions: Directions | None  # None where nothing trains

    @property
    def device(self) -> torch.device:
        return self.live.device if self.live else torch.device("cpu")

    def products(self) -> Tensor:
        """<tau, tau>, then <tau, v> of every vector: (1 + vectors,) in float64."""
        if self.live is None or self.directions is None:
            return torch.zeros(1 + len(self.squares), dtype=torch.float64)
        return self.live.products(self.directions).double()


def watched_parameters(model: nn.Module, vectors: Mapping[str, WeightVector]) -> list[Watched]:
    """Every parameter that trains, then those that vectors change besides.

    A warning names what trains in a form that has no numbers here (DoRA, adapters that are no LoRA): |tau| is then
    that of the rest.

    Raises:
        SteerError: two parameters of one name, another shape, or nothing in common.
    """
    live, unknown = live_parameters(model)
    changed = {name for vector in vectors.values() for name in vector.deltas}
    if unknown:
        shown = f"{unknown[0]} and {len(unknown) - 1} more" if len(unknown) > 1 else unknown[0]
        warnings.warn(
            f"SteeringMonitor: leaves out {shown}, which trains in a form that it cannot read; tau_norm and the "
            "cosines are those of the other parameters",
            stacklevel=3,
        )
    if not live:
        raise SteerError(
            "SteeringMonitor: the model has no parameters that train" + (" and can be read" if unknown else "")
        )
    if not live.keys() & changed:
        raise SteerError(
            f"SteeringMonitor: the vectors change {min(changed, default='nothing')} and the like, the training "
            f"{min(live)} and the like: no parameter in common; were they made on another model?"
        )
    return [_watch(name, live.get(name), vectors) for name in dict.fromkeys([*live, *sorted(changed)])]


def _watch(name: str, live: Live | None, vectors: Mapping[str, WeightVector]) -> Watched:
    """One parameter and the vectors' parts of it."""
    parts: dict[str, Delta | None] = {
        label: read_delta(name, vector.deltas[name]) if name in vector.deltas else None
        for label, vector in vectors.items()
    }
    there = [part for part in parts.values() if part is not None]
    shape = live.shape if live else tuple(there[0].shape)
    for part in there:
        require_same_shape(name, torch.empty(shape, device="meta"), part)
    squares = {label: 0.0 if part is None else dot(part, part) for label, part in parts.items()}
    return Watched(name, shape, squares, live, _directions_of(parts, shape, live.device) if live else None)
