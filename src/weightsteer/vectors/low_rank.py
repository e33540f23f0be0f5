"""B @ A without ever forming it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

# <B1 A1, B2 A2> cancels hard when the two nearly agree; float64 keeps the sum's last digits.
ACCUMULATE = torch.float64

# The kind of module that a delta belongs to. Engines store the factors of the first three in different ways;
# "embedding" and "module" (a module's own copy, as `modules_to_save` trains it) change one place alone, even where the
# base ties it to another. "shared" is the matrix of an input embedding and an output head that are one.
Layout = Literal["linear", "conv1d", "embedding", "module", "shared"]
ALONE = ("embedding", "module")


@dataclass(frozen=True, eq=False)
class LowRank:
    """delta = B @ A, in the parameter's own orientation; every scale (alpha/r, sign, k) is folded into B.

    Raises:
        ValueError: the two factors do not share their rank.
    """

    B: Tensor  # (rows, r)
    A: Tensor  # (r, columns)
    layout: Layout = "linear"

    def __post_init__(self) -> None:
        if self.B.ndim != 2 or self.A.ndim != 2 or self.B.shape[1] != self.A.shape[0]:
            raise ValueError(f"factors do not chain: B {tuple(self.B.shape)}, A {tuple(self.A.shape)}")

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the delta that the factors stand for."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        """Number of columns of B: an upper bound of the delta's true rank."""
        return self.A.shape[0]

    def dense(self) -> Tensor:
        """The delta itself, of shape `shape`."""
        return self.B @ self.A

    def __add__(self, other: LowRank) -> LowRank:
        """Exact sum: the factors side by side, at rank r1 + r2."""
        if self.shape != other.shape:
            raise ValueError(f"shapes differ: {self.shape} and {other.shape}")
        return replace(self, B=torch.cat([self.B, other.B], dim=1), A=torch.cat([self.A, other.A], dim=0))

    def __mul__(self, scale: float) -> LowRank:
        """The delta times a number."""
        return replace(self, B=self.B * scale)

    def dot(self, other: LowRank) -> float:
        """`<self, other>` = sum of products of entries, in r x r work, accumulated in float64."""
        B, A = self.B.to(ACCUMULATE), self.A.to(ACCUMULATE)
        gram = (B.T @ other.B.to(ACCUMULATE)) * (A @ other.A.to(ACCUMULATE).T)  # (r1, r2)
        return float(gram.sum())

    def spectrum(self) -> Tensor:
        """Singular values, largest first, in float64: (min(rows, columns, r),)."""
        return self._svd()[1]

    def cut(self, rank: int | None, energy: float | None = None) -> tuple[LowRank, Tensor, int]:
        """The nearest delta of at most `rank`, or of the rank that holds `energy`; all singular values; that rank.

        Eckart-Young, by QR of the factors and an r x r SVD.
        """
        u, s, vh = self._svd()
        keep = rank if rank is not None else rank_for(s, 1.0 if energy is None else energy)
        return (self if keep >= self.rank else self._from_svd(u[:, :keep], s[:keep], vh[:keep])), s, keep

    def truncate(self, rank: int) -> LowRank:
        """The nearest delta of at most `rank` (see `cut`)."""
        return self.cut(rank)[0]

    def boost_subspace(self, beta: float) -> LowRank:
        """Singular values after those that hold `beta` of their sum are raised to the last of these.

        Subspace boosting (Skorobogat et al., arXiv 2506.16506). Values that are zero stay zero: the rank that the
        factors can hold does not grow.
        """
        u, s, vh = self._svd()
        return self._from_svd(u, raise_tail(s, beta), vh)

    def _svd(self) -> tuple[Tensor, Tensor, Tensor]:
        q_out, r_out = torch.linalg.qr(self.B.to(ACCUMULATE))
        q_in, r_in = torch.linalg.qr(self.A.to(ACCUMULATE).T)
        u, s, vh = torch.linalg.svd(r_out @ r_in.T, full_matrices=False)
        return q_out @ u, s, vh @ q_in.T

    def _from_svd(self, u: Tensor, s: Tensor, vh: Tensor) -> LowRank:
        B, A = (u * s).to(self.B.dtype), vh.to(self.A.dtype)
        return replace(self, B=B.contiguous(), A=A.contiguous())


@dataclass(frozen=True)
class FactorPanel:
    """The factors of several deltas of one parameter side by side, so that one product serves all of them."""

    B: Tensor  # (rows, R), R the sum of the ranks
    A: Tensor  # (R, columns)
    owners: Tensor  # (R, N) of ones: to which of the N deltas a column of B belongs

    @classmethod
    def of(cls, deltas: Sequence[LowRank | None], shape: tuple[int, int], dtype: torch.dtype) -> FactorPanel:
        """Stack N deltas of `shape`; None stands for a zero."""
        there = [delta for delta in deltas if delta is not None]
        ranks = torch.tensor([0 if delta is None else delta.rank for delta in deltas])
        owner = torch.repeat_interleave(torch.arange(len(deltas)), ranks)
        return cls(
            torch.cat([torch.empty(shape[0], 0, dtype=dtype), *(delta.B.to(dtype) for delta in there)], dim=1),
            torch.cat([torch.empty(0, shape[1], dtype=dtype), *(delta.A.to(dtype) for delta in there)], dim=0),
            torch.nn.functional.one_hot(owner, len(deltas)).to(ACCUMULATE),
        )

    def to(self, device: torch.device, dtype: torch.dtype) -> FactorPanel:
        """The same on another device, owners in `dtype`."""
        return FactorPanel(self.B.to(device), self.A.to(device), self.owners.to(device, dtype))


def raise_tail(s: Tensor, beta: float) -> Tensor:
    """Singular values `s` (largest first) with the tail raised to the value at which their sum reaches `beta`."""
    if not s.numel() or float(s[0]) == 0.0:
        return s
    reached = torch.cumsum(s, 0) / s.sum()
    cutoff = min(int((reached < beta).sum()), s.numel() - 1)  # the sum of all may round to less than 1
    present = s > s[0] * s.numel() * torch.finfo(s.dtype).eps  # what is zero but for rounding
    return torch.where(present, s.clamp(min=float(s[cutoff])), s)


def rank_for(s: Tensor, energy: float) -> int:
    """How many singular values hold the share `energy` of the squared norm."""
    total = s.square().sum()
    if float(total) == 0.0:
        return 0
    kept = torch.cumsum(s.square(), 0) / total
    return min(int((kept < energy - 1e-12).sum()) + 1, s.numel())
