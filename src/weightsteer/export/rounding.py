"""What one rounding to 8 or 11 bits leaves of a tiny change, and the two ways to round."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal
from zlib import crc32

import torch
from torch import Tensor

Rounding = Literal["nearest", "stochastic"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def default_rounding(stored: torch.dtype, written: torch.dtype) -> Rounding:
    """What keeps more of a behaviour vector's effect (measured: docs/vectors.md): stochastic in bfloat16.

    Where a finer base is narrowed, rounding to nearest is right on average already, since its weights lie anywhere
    between two bfloat16 numbers; so nearest is taken there.
    """
    return "stochastic" if stored == written == torch.bfloat16 else "nearest"


class Dither:
    """Sixteen random bits an entry for stochastic rounding: drawn once a seed, used from random places.

    Drawing them anew for every entry of a model would take longer than merging it.
    """

    def __init__(self, seed: int, name: str = "") -> None:
        self._bits = _bits_of(seed)
        self._places = torch.Generator().manual_seed(seed ^ crc32(name.encode()))

    def take(self, count: int) -> Tensor:
        """(count,) int32 between 0 and 65535."""
        longest = self._bits.numel()
        if count > longest:
            return torch.cat([self.take(min(longest, count - at)) for at in range(0, count, longest)])
        start = int(torch.randint(longest - count + 1, (1,), generator=self._places))
        return self._bits[start : start + count]


@lru_cache(maxsize=2)
def _bits_of(seed: int) -> Tensor:
    return torch.randint(1 << 16, (1 << 21,), dtype=torch.int32, generator=torch.Generator().manual_seed(seed))


def dither_(x: Tensor, dtype: torch.dtype, dither: Dither) -> Tensor:
    """Move float32 `x`, in place, to either neighbour in `dtype`, with the chance that makes the mean exact."""
    bits = dither.take(x.numel()).view(x.shape)
    if dtype == torch.bfloat16:  # float32's own upper half: a random carry out of the lower half, which is cut off
        x.view(torch.int32).add_(bits).bitwise_and_(-(1 << 16))
    elif dtype == torch.float16:
        near = x.to(dtype)
        pattern = near.view(torch.int16)
        # sign and magnitude: the next pattern is one step further from zero
        other = torch.where(x.abs() > near.float().abs(), pattern + 1, pattern - 1).view(dtype).float()
        crossed = (x - near.float()).abs() * (1 << 16) > bits * (other - near.float()).abs()
        x.copy_(torch.where(crossed & torch.isfinite(other), other, near.float()))
    return x


@dataclass(frozen=True)
class MergeReport:
    """What rounding left of k w, over the entries that the vector touches.

    `delta_error` is |realised - intended| / |intended|, `unchanged_share` the share of entries that came out as they
    went in; `other_dtypes` holds the same two, rounded to nearest, for other outputs. All are measured on
    `measured_entries` entries, spread over all tensors and weighed by their sizes. `vector_sha256` tells vectors
    apart: the hash of factors and, of deltas that lie in files, of their names, forms and first KiB.
    """

    changed_tensors: int
    dtype: str
    rounding: str
    delta_error: float
    unchanged_share: float
    other_dtypes: Mapping[str, Mapping[str, float]]
    measured_entries: int
    vector_sha256: str = ""


def describe_rounding(error: float) -> str:
    """A `delta_error` in words: the size of what rounding adds, beside the size of k w itself."""
    if error >= 1:
        return f"rounding adds an error {error:.1f} times the size of the change, at random over the weights"
    return f"rounding adds an error of {error:.1%} of the size of the change"


@dataclass
class Tally:
    """Sums over measured blocks, one set for each way of writing them."""

    tensors: int = 0
    measured: int = 0
    entries: float = 0.0  # what the measured ones stand for
    size: float = 0.0  # |intended|^2
    errors: dict[str, float] = field(default_factory=dict)  # |realised - intended|^2
    unchanged: dict[str, float] = field(default_factory=dict)

    def add(self, theta: Tensor, intended: Tensor, written: Tensor) -> None:
        """Count a block: parameters as stored, k delta in float32, and what was written.

        Realised is the difference to the parameters in the same dtype: that of a narrowed base is not k w's.
        """
        change = intended.double()
        self.measured += theta.numel()
        self.entries += theta.numel()
        self.size += float(change.square().sum())
        nearest = {name: (theta.double() + change).float().to(dtype) for name, dtype in DTYPES.items()}
        for name, result in {"written": written, **nearest}.items():
            before = theta.to(result.dtype).double()
            missed = float((result.double() - before - change).square().sum())
            self.errors[name] = self.errors.get(name, 0.0) + missed
            self.unchanged[name] = self.unchanged.get(name, 0.0) + float((result.double() == before).sum())

    def weigh(self, entries: int) -> None:
        """Let what was measured stand for a tensor of so many entries."""
        factor = entries / self.measured if self.measured else 0.0
        self.entries *= factor
        self.size *= factor
        self.errors = {name: error * factor for name, error in self.errors.items()}
        self.unchanged = {name: count * factor for name, count in self.unchanged.items()}

    def merge(self, other: Tally) -> None:
        """Take in another tensor's sums."""
        self.tensors += other.tensors
        self.measured += other.measured
        self.entries += other.entries
        self.size += other.size
        for name in other.errors:
            self.errors[name] = self.errors.get(name, 0.0) + other.errors[name]
            self.unchanged[name] = self.unchanged.get(name, 0.0) + other.unchanged[name]

    def report(self, dtype: str, rounding: str, vector_sha256: str) -> MergeReport:
        """The sums as shares."""
        shares = {
            name: {
                "delta_error": math.sqrt(error / self.size) if self.size else 0.0,
                "unchanged_share": self.unchanged[name] / max(self.entries, 1.0),
            }
            for name, error in self.errors.items()
        }
        written = shares.pop("written", {"delta_error": 0.0, "unchanged_share": 1.0})
        return MergeReport(
            changed_tensors=self.tensors,
            dtype=dtype,
            rounding=rounding,
            other_dtypes=shares,
            measured_entries=self.measured,
            vector_sha256=vector_sha256,
            **written,
        )
