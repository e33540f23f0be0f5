"""The forms in which a parameter trains, and the inner products of its change with vectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..vectors.low_rank import FactorPanel

Directions = FactorPanel | Tensor  # all vectors' parts of one parameter: factors, else (vectors, entries)


def gather(tensor: Tensor) -> Tensor:
    """The whole tensor, where a distributed run holds a piece of it."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor.detach() if gather is None else gather().detach()


@dataclass(frozen=True)
class LiveLora:
    """tau = scale B A as it stands in the training; with `turned` its transpose, as Conv1D and embeddings store it."""

    B: Tensor  # (d_out, r)
    A: Tensor  # (r, d_in)
    scale: float
    turned: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.B.shape[0], self.A.shape[1]
        return shape[::-1] if self.turned else shape

    @property
    def device(self) -> torch.device:
        return self.B.device

    def products(self, directions: Directions) -> Tensor:
        """See `Watched.products`."""
        B, A = gather(self.B).float(), gather(self.A).float()
        if self.turned:
            B, A = A.T, B.T
        own = ((B.T @ B) * (A @ A.T)).sum() * self.scale**2
        if isinstance(directions, FactorPanel):
            crossed = ((B.T @ directions.B) * (A @ directions.A.T)).sum(dim=0) @ directions.owners
        else:
            crossed = directions @ (B @ A).flatten()
        return torch.cat([own[None], crossed * self.scale])


@dataclass(frozen=True)
class LiveExperts:
    """tau of experts in one tensor (experts, rows, columns), each with factors of its own, as PEFT stores them.

    tau_e = scale B_e A_e, or its transpose with `turned`. PEFT's B has the experts' columns interleaved: column
    j * experts + e is the j-th of expert e. Its A has them one after the other: row e * r + j.
    """

    B: Tensor  # (d_out, r * experts)
    A: Tensor  # (experts * r, d_in)
    scale: float
    experts: int
    turned: bool

    @property
    def shape(self) -> tuple[int, ...]:
        d_out, d_in = self.B.shape[0], self.A.shape[1]
        return (self.experts, d_in, d_out) if self.turned else (self.experts, d_out, d_in)

    @property
    def device(self) -> torch.device:
        return self.B.device

    def products(self, directions: Directions) -> Tensor:
        """See `Watched.products`."""
        B, A = gather(self.B).float(), gather(self.A).float()
        B = B.reshape(B.shape[0], -1, self.experts).permute(2, 0, 1)  # (experts, d_out, r)
        A = A.reshape(self.experts, -1, A.shape[1])  # (experts, r, d_in)
        own = ((B.mT @ B) * (A @ A.mT)).sum() * self.scale**2
        assert isinstance(directions, Tensor)
        if not directions.shape[1]:  # no vector changes it
            return torch.cat([own[None], own.new_zeros(directions.shape[0])])
        tau = B @ A
        return torch.cat([own[None], directions @ (tau.mT if self.turned else tau).flatten() * self.scale])


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
        tau = gather(self.now).float() - self.start.float()
        if isinstance(directions, FactorPanel):
            crossed = ((tau @ directions.A.T) * directions.B).sum(dim=0) @ directions.owners
        else:
            crossed = directions @ tau.flatten() if directions.shape[1] else tau.new_zeros(directions.shape[0])
        return torch.cat([tau.square().sum()[None], crossed])


Live = LiveLora | LiveExperts | LiveWhole
