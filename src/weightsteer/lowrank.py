"""B @ A without ever forming it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# <B1 A1, B2 A2> cancels hard when the two nearly agree; float64 keeps the sum's last digits.
ACCUMULATE = torch.float64


@dataclass(frozen=True, eq=False)
class LowRank:
    """delta = B @ A; every scale (alpha/r, sign, k) is already folded into B.

    Raises:
        ValueError: the two factors do not share their rank.
    """

    B: Tensor  # (d_out, r)
    A: Tensor  # (r, d_in)

    def __post_init__(self) -> None:
        if self.B.ndim != 2 or self.A.ndim != 2 or self.B.shape[1] != self.A.shape[0]:
            raise ValueError(f"factors do not chain: B {tuple(self.B.shape)}, A {tuple(self.A.shape)}")

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (d_out, d_in) of the delta that the factors stand for."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        """Number of columns of B: an upper bound of the delta's true rank."""
        return self.A.shape[0]

    def dense(self) -> Tensor:
        """The delta itself, (d_out, d_in)."""
        return self.B @ self.A

    def __add__(self, other: LowRank) -> LowRank:
        """Exact sum: the factors side by side, at rank r1 + r2."""
        if self.shape != other.shape:
            raise ValueError(f"shapes differ: {self.shape} and {other.shape}")
        return LowRank(torch.cat([self.B, other.B], dim=1), torch.cat([self.A, other.A], dim=0))

    def __mul__(self, scale: float) -> LowRank:
        """The delta times a number."""
        return LowRank(self.B * scale, self.A)

    def dot(self, other: LowRank | Tensor) -> float:
        """<self, other> = sum of products of entries, in r x r work, accumulated in float64."""
        B, A = self.B.to(ACCUMULATE), self.A.to(ACCUMULATE)
        if isinstance(other, LowRank):
            gram = (B.T @ other.B.to(ACCUMULATE)) * (A @ other.A.to(ACCUMULATE).T)  # (r1, r2)
            return float(gram.sum())
        return float((B.T @ other.to(ACCUMULATE) * A).sum())

    def norm(self) -> float:
        """Frobenius norm of the delta."""
        return math.sqrt(max(self.dot(self), 0.0))

    def truncate(self, rank: int) -> LowRank:
        """The nearest delta of at most `rank` (Eckart-Young), by QR of the factors and an r x r SVD."""
        if rank >= self.rank:
            return self
        q_out, r_out = torch.linalg.qr(self.B.to(ACCUMULATE))
        q_in, r_in = torch.linalg.qr(self.A.to(ACCUMULATE).T)
        u, s, vh = torch.linalg.svd(r_out @ r_in.T, full_matrices=False)
        B = q_out @ u[:, :rank] * s[:rank]
        A = vh[:rank] @ q_in.T
        return LowRank(B.to(self.B.dtype).contiguous(), A.to(self.A.dtype).contiguous())
