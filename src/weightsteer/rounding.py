"""What one rounding to 8 or 11 bits leaves of a tiny change, and the two ways to round."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Rounding = Literal["nearest", "stochastic"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def rounded(x: Tensor, dtype: torch.dtype, rounding: Rounding, generator: torch.Generator | None) -> Tensor:
    """float32 `x` in `dtype`: to the nearest, or to either neighbour with a chance that makes the mean exact."""
    near = x.to(dtype)
    if rounding == "nearest" or dtype == torch.float32:
        return near
    miss = x - near.float()
    bits = near.view(torch.int16)
    # the neighbour on x's side: these formats are sign and magnitude, so one bit pattern up is one step away from 0
    other = torch.where(x.abs() > near.float().abs(), bits + 1, bits - 1).view(dtype)
    gap = (other.float() - near.float()).abs()
    chance = torch.rand(x.shape, generator=generator) * gap
    return torch.where((miss.abs() > chance) & torch.isfinite(other), other, near)


@dataclass(frozen=True)
class MergeReport:
    """What rounding left of k w, over the entries that the vector touches.

    `delta_error` is |realised - intended| / |intended|, `unchanged_share` the share of entries that came out as they
    went in; `other_dtypes` holds the same two, rounded to nearest, for other outputs. All are measured on
    `measured_entries` entries, which are spread over all tensors.
    """

    changed_tensors: int
    dtype: str
    rounding: str
    delta_error: float
    unchanged_share: float
    other_dtypes: Mapping[str, Mapping[str, float]]
    measured_entries: int
    vector_sha256: str = ""


@dataclass
class Tally:
    """Sums over measured blocks, one set for each way of writing them."""

    tensors: int = 0
    entries: int = 0
    size: float = 0.0  # |intended|^2
    errors: dict[str, float] = field(default_factory=dict)  # |realised - intended|^2
    unchanged: dict[str, int] = field(default_factory=dict)

    def add(self, theta: Tensor, intended: Tensor, written: Tensor) -> None:
        """Count a block: parameters as stored, k delta in float32, and what was written."""
        before, change = theta.double(), intended.double()
        exact = before + change
        self.entries += theta.numel()
        self.size += float(change.square().sum())
        nearest = {name: exact.float().to(dtype) for name, dtype in DTYPES.items()}
        for name, result in {"written": written, **nearest}.items():
            self.errors[name] = self.errors.get(name, 0.0) + float((result.double() - exact).square().sum())
            self.unchanged[name] = self.unchanged.get(name, 0) + int((result.double() == before).sum())

    def merge(self, other: Tally) -> None:
        """Take in another worker's sums."""
        self.tensors += other.tensors
        self.entries += other.entries
        self.size += other.size
        for name in other.errors:
            self.errors[name] = self.errors.get(name, 0.0) + other.errors[name]
            self.unchanged[name] = self.unchanged.get(name, 0) + other.unchanged[name]

    def report(self, dtype: str, rounding: Rounding, vector_sha256: str) -> MergeReport:
        """The sums as shares."""
        shares = {
            name: {
                "delta_error": math.sqrt(error / self.size) if self.size else 0.0,
                "unchanged_share": self.unchanged[name] / max(self.entries, 1),
            }
            for name, error in self.errors.items()
        }
        written = shares.pop("written", {"delta_error": 0.0, "unchanged_share": 1.0})
        return MergeReport(
            changed_tensors=self.tensors,
            dtype=dtype,
            rounding=rounding,
            other_dtypes=shares,
            measured_entries=self.entries,
            vector_sha256=vector_sha256,
            **written,
        )
