"""The parameters of a model that trains, as they stand, and their inner products with vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..errors import SteerError
from ..vectors.delta import Delta, dot, read_delta, require_same_shape, to_dense
from ..vectors.low_rank import FactorPanel, LowRank
from ..vectors.parameter_names import base_name
from ..vectors.weight_vector import WeightVector

Directions = FactorPanel | Tensor  # all vectors' parts of one parameter: factors, or if any is dense (vectors, entries)


def _directions_of(parts: Mapping[str, Delta | None], shape: tuple[int, ...], device: torch.device) -> Directions:
    """All vectors' parts of a parameter of `shape` in float32; None where a vector has none."""
    if len(shape) == 2 and all(part is None or isinstance(part, LowRank) for part in parts.values()):
        factors = [part if isinstance(part, LowRank) else None for part in parts.values()]
        return FactorPanel.of(factors, (shape[0], shape[1]), torch.float32).to(device, torch.float32)
    rows = [torch.zeros(shape) if part is None else to_dense(part).float() for part in parts.values()]
    return torch.stack([row.flatten() for row in rows]).to(device)


@dataclass(frozen=True)
class LiveLora:
    """tau = scale B A as it stands in the training."""

    B: Tensor  # (d_out, r)
    A: Tensor  # (r, d_in)
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.B.shape[0], self.A.shape[1]

    @property
    def device(self) -> torch.device:
        return self.B.device

    def products(self, directions: Directions) -> Tensor:
        """See `Watched.products`."""
        B, A = _gather(self.B).float(), _gather(self.A).float()
        own = ((B.T @ B) * (A @ A.T)).sum() * self.scale**2
        if isinstance(directions, FactorPanel):
            crossed = ((B.T @ directions.B) * (A @ directions.A.T)).sum(dim=0) @ directions.owners
        else:
            crossed = directions @ (B @ A).flatten()
        return torch.cat([own[None], crossed * self.scale])


@dataclass(frozen=True)
class LiveWhole:
    """tau = theta - theta at the start, of a parameter that trains itself."""

    now: Tensor
    start: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.start.shape)

    @property
    def device(self) -> torch.device:
        return self.start.device

    def products(self, directions: Directions) -> Tensor:
        """See `Watched.products`."""
        tau = _gather(self.now).float() - self.start.float()
        if isinstance(directions, FactorPanel):
            crossed = ((tau @ directions.A.T) * directions.B).sum(dim=0) @ directions.owners
        else:
            crossed = directions @ tau.flatten()
        return torch.cat([tau.square().sum()[None], crossed])


Live = LiveLora | LiveWhole


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


def _gather(tensor: Tensor) -> Tensor:
    """The whole tensor, where a distributed run holds a piece of it."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor.detach() if gather is None else gather().detach()


def watched_parameters(model: nn.Module, vectors: Mapping[str, WeightVector]) -> list[Watched]:
    """Every parameter that trains, then those that vectors change besides.

    Raises:
        SteerError: a kind of adapter that is not plain LoRA, another shape, or nothing in common.
    """
    model = getattr(model, "module", model)  # a distributed wrapper's own model
    live = {**_lora_of(model), **_whole_of(model)}
    changed = {name for vector in vectors.values() for name in vector.deltas}
    if not live:
        raise SteerError("SteeringMonitor: the model has no parameters that train")
    if not live.keys() & changed:
        raise SteerError(
            f"SteeringMonitor: the vectors change {min(changed, default='nothing')} and the like, the training "
            f"{min(live)} and the like: no parameter in common; were they made on another model?"
        )
    return [_watch(name, live.get(name), vectors) for name in dict.fromkeys([*live, *sorted(changed)])]


def _lora_of(model: nn.Module) -> dict[str, Live]:
    found: dict[str, Live] = {}
    for path, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        name = f"{base_name(path)}.weight"
        active = [adapter for adapter in module.active_adapters if adapter in module.lora_A]
        if len(active) != 1 or module.use_dora.get(active[0]) or getattr(module, "fan_in_fan_out", False):
            raise SteerError(f"SteeringMonitor: {name}: expected one plain LoRA on a linear layer (no DoRA, no Conv1D)")
        (adapter,) = active
        factors: Any = module.lora_B[adapter], module.lora_A[adapter]
        found[name] = LiveLora(factors[0].weight, factors[1].weight, float(module.scaling[adapter]))
    return found


def _whole_of(model: nn.Module) -> dict[str, Live]:
    found: dict[str, Live] = {}
    for path, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" not in path:
            found[base_name(path)] = LiveWhole(parameter, _gather(parameter).clone())
    return found


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
