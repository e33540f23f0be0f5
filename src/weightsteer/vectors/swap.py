"""theta + k delta in a parameter's place, where adding to a layer's output would not do: norms, experts, routers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SteerError
from .low_rank import LowRank

SWAPPED = "_weightsteer_swapped"  # marks a parameter that is swapped, and what stands in for it
ONE_NUMBER = (
    "one k per row is not possible for {}: {} is changed in its place, as norms, embeddings, experts and what a model "
    "reads without a call are; give one number"
)


@contextmanager
def swapped(name: str, places: Sequence[tuple[nn.Module, str]], delta: LowRank | Tensor, handle: Any) -> Iterator[None]:
    """Put parameter + k * delta at each (module, name in it) of `places`; the original object on leaving.

    The sum is taken in float32 or finer and rounded once to the parameter's dtype. `handle` is a `SteeringHandle`.

    Raises:
        SteerError: another block has swapped this parameter, or k differs from row to row.
    """
    module, leaf = places[0]
    original = module._parameters[leaf]
    assert original is not None
    if getattr(original, SWAPPED, False):
        raise SteerError(f"another vector is changing {name} in its place; add the vectors and apply the sum")
    plus = _summing(original, delta)

    def follow() -> None:
        if isinstance(handle.k, Tensor):
            raise SteerError(ONE_NUMBER.format("this vector", name))
        shifted = original
        if not handle.is_zero:
            shifted = nn.Parameter(plus(handle.k), requires_grad=False)
            setattr(shifted, SWAPPED, True)
        for holder, its_name in places:
            holder._parameters[its_name] = shifted

    follow()
    handle.on_change.append(follow)
    setattr(original, SWAPPED, True)
    try:
        yield
    finally:
        delattr(original, SWAPPED)
        handle.on_change.remove(follow)
        for holder, its_name in places:
            holder._parameters[its_name] = original


def _summing(original: Tensor, delta: LowRank | Tensor) -> Callable[[float], Tensor]:
    """k -> original + k * delta in the original's dtype; factors stay factors."""
    dtype = torch.promote_types(original.dtype, torch.float32)
    parts = (delta.B, delta.A) if isinstance(delta, LowRank) else (delta,)
    moved = [part.to(device=original.device, dtype=dtype) for part in parts]

    def plus(k: float) -> Tensor:
        theta = original.detach().to(dtype)
        if isinstance(delta, LowRank):
            return torch.addmm(theta, moved[0], moved[1], alpha=k).to(original.dtype)
        return torch.add(theta, moved[0], alpha=k).to(original.dtype)

    return plus
