"""LoRA on a mixture's experts, which transformers 5 keeps as one parameter of three dimensions a layer.

Adapters name them in two ways: one LoRA for each expert's matrix (before transformers 5), or PEFT's wrapper around the
fused parameter, whose factors hold all experts (`target_parameters`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..checkpoints.architecture import Architecture, Place
from ..checkpoints.plain_names import plain_name
from ..errors import SteerError
from .delta import Streamed, require_finite
from .low_rank import LowRank

if TYPE_CHECKING:
    from .adapter_config import AdapterConfig
    from .peft_adapter import Lora


@dataclass(frozen=True)
class ExpertPiece:
    """Rows of a fused parameter, and the factors of what is added to them."""

    place: Place  # `rows` rows of the parameter from `at` on; of the factors those from `start` on
    factors: Callable[[], LowRank]


@dataclass(frozen=True, eq=False)
class StackedFactors:
    """A delta of three dimensions whose slices are products of small factors; what no piece covers is zero."""

    shape: tuple[int, ...]
    pieces: tuple[tuple[Place, LowRank], ...]

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of the matrix form in float32: (stop - start, columns)."""
        rows = torch.zeros(stop - start, self.shape[-1])
        for place, factors in self.pieces:
            first, last = max(start, place.at), min(stop, place.at + place.rows)
            if first < last:
                shift = place.start - place.at
                rows[first - start : last - start] += factors.B[first + shift : last + shift] @ factors.A
        return rows


def stacked_delta(name: str, shape: tuple[int, ...], pieces: tuple[ExpertPiece, ...]) -> Streamed:
    """The delta of a fused parameter from the LoRAs of its experts.

    Raises:
        SteerError: factors that do not fit the parameter, or a NaN.
    """
    made = []
    for piece in pieces:
        factors = piece.factors()
        require_finite(name, factors)
        if factors.A.shape[1] != shape[-1] or factors.B.shape[0] < piece.place.start + piece.place.rows:
            raise SteerError(
                f"{name}: has shape {shape}, and the adapter's factors are of shape {factors.shape}; give the base "
                "that was trained"
            )
        made.append((piece.place, factors))
    return Streamed(((1.0, StackedFactors(shape, tuple(made))),), shape)


def require_parameters(folder: Path, config: AdapterConfig, architecture: Architecture | None) -> None:
    """Raise where an adapter trains parameters by name (`target_parameters`) that its base is not known to have."""
    if not config.target_parameters:
        return
    named = ", ".join(config.target_parameters)
    if architecture is None:
        raise SteerError(
            f"{folder}: its config has target_parameters ({named}), whose LoRA is laid out as the base's experts are; "
            "give the base that was trained (--base)"
        )
    for target in config.target_parameters:
        if not any(f".{name}".endswith(f".{target}") for name in architecture.shapes):
            raise SteerError(
                f"{folder}: its config has target_parameters {target}, which its base ({architecture.kind}) does not "
                "have; give the base that was trained (--base)"
            )


def is_expert_module(module: str, architecture: Architecture) -> bool:
    """Whether a LoRA on a module of this name changes fused experts."""
    return bool(_fused_parameters(module, architecture)) or _is_one_expert(module, architecture)


def _is_one_expert(module: str, architecture: Architecture) -> bool:
    places = architecture.files.get(plain_name(f"{module}.weight"))
    return bool(places) and architecture.name_of(plain_name(f"{module}.weight")) is None


def _fused_parameters(module: str, architecture: Architecture) -> list[str]:
    """The parameters of three dimensions that lie in the module itself, in the model's order."""
    inner = plain_name(f"{module}.x").removesuffix(".x").removesuffix(".base_layer")
    return [name for name, shape in architecture.shapes.items() if len(shape) == 3 and name.rpartition(".")[0] == inner]


def expert_pieces(lora: Lora, architecture: Architecture, config: AdapterConfig) -> list[ExpertPiece]:
    """The rows of fused experts that a LoRA changes; [] where its module is none.

    Raises:
        SteerError: a wrapper whose parameter cannot be told.
    """
    if _is_one_expert(lora.module, architecture):
        places = architecture.places(f"{lora.module}.weight") or ()
        return [ExpertPiece(place, lora.factors) for place in places]
    fused = _fused_parameters(lora.module, architecture)
    return _wrapped_pieces(lora, fused, architecture, config) if fused else []


def _wrapped_pieces(
    lora: Lora, fused: list[str], architecture: Architecture, config: AdapterConfig
) -> list[ExpertPiece]:
    """PEFT nests one wrapper for each parameter that is trained, the first in the model's order innermost."""
    trained = [
        name
        for name in fused
        if any(f".{name}".endswith(f".{target}") or target == name for target in config.target_parameters)
    ]
    inside = lora.module.count(".base_layer")  # wrappers between this one and the outermost
    if inside >= len(trained):
        raise SteerError(
            f"{lora.module}: has a LoRA on experts, and target_parameters names {len(trained)} of their parameters "
            f"({', '.join(config.target_parameters)}); the adapter's config and its tensors do not belong together"
        )
    name = trained[len(trained) - 1 - inside]
    count, rows, columns = architecture.shapes[name]
    turned = name.rpartition(".")[0] in architecture.transposed
    expected = (rows, columns) if turned else (columns, rows)
    if (lora.A.shape[1], lora.B.shape[0]) != expected or lora.A.shape[0] % count:
        raise SteerError(
            f"{name}: has shape {(count, rows, columns)}, and the adapter's factors are {lora.A.shape} and "
            f"{lora.B.shape}; give the base that was trained"
        )
    scale = config.scale(name, lora.A.shape[0] // count)
    return [
        ExpertPiece(Place(name, expert * rows, 0, rows), partial(_one_expert, lora, scale, expert, count, turned))
        for expert in range(count)
    ]


def _one_expert(lora: Lora, scale: float, expert: int, count: int, turned: bool) -> LowRank:
    """One expert's factors: A lies expert by expert, B rank by rank."""
    A = lora.A.read().float().reshape(count, -1, lora.A.shape[1])[expert]  # (r, d_in)
    B = lora.B.read().float().reshape(lora.B.shape[0], -1, count)[..., expert] * scale  # (d_out, r)
    return LowRank(A.T, B.T) if turned else LowRank(B, A)
