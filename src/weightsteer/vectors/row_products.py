"""One delta against many of the same parameter: a row of inner products, in which each delta is read once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..checkpoints.safetensors_file import matrix_shape
from .delta import Delta, blocks, dot, not_finite, require_same_shape, rows_of
from .low_rank import ACCUMULATE, LowRank

Deltas = Mapping[str, Delta]  # parameter -> delta


@dataclass(frozen=True)
class Row:
    """Inner products of one parameter's delta, in float64: with itself, and by name with others."""

    size: float  # entries of the parameter
    own: float
    crossed: Mapping[str, float]


def row_of_products(parameter: str, deltas: Deltas, others: Mapping[str, Deltas]) -> Row:
    """The row of `deltas[parameter]`; 0 with one that lacks the parameter.

    Factored against factored is r x r work, one vector in memory at a time. A dense delta is read in blocks of rows,
    once for all of the others, whose factors are held meanwhile.

    Raises:
        SteerError: two shapes, or a NaN.
    """
    delta = deltas[parameter]
    there = {name: other for name, other in others.items() if parameter in other}
    if isinstance(delta, LowRank):
        wide = replace(delta, B=delta.B.to(ACCUMULATE), A=delta.A.to(ACCUMULATE))
        own = dot(wide, wide)
        crossed = {name: _checked_dot(parameter, wide, other[parameter]) for name, other in there.items()}
    else:
        own, crossed = _dense_row(parameter, delta, {name: other[parameter] for name, other in there.items()})
    if not all(map(math.isfinite, (own, *crossed.values()))):
        raise not_finite(parameter)
    return Row(_entries_of(delta), own, {name: crossed.get(name, 0.0) for name in others})


def _checked_dot(parameter: str, first: Delta, second: Delta) -> float:
    require_same_shape(parameter, first, second)
    return dot(first, second)


def _dense_row(parameter: str, delta: Delta, others: Mapping[str, Delta]) -> tuple[float, dict[str, float]]:
    for other in others.values():
        require_same_shape(parameter, delta, other)
    own: list[float] = []
    crossed: dict[str, list[float]] = {name: [] for name in others}
    for start, stop in blocks(tuple(delta.shape)):
        rows = rows_of(delta, start, stop).to(ACCUMULATE)
        own.append(float((rows * rows).sum()))
        for name, other in others.items():
            crossed[name].append(_block_product(rows, other, start, stop))
    return math.fsum(own), {name: math.fsum(parts) for name, parts in crossed.items()}


def _block_product(rows: Tensor, other: Delta, start: int, stop: int) -> float:
    """<rows, rows `start` to `stop` of the other>; those of factors are never formed."""
    if isinstance(other, LowRank):
        return float((other.B[start:stop].to(ACCUMULATE).T @ rows * other.A.to(ACCUMULATE)).sum())
    return float((rows * rows_of(other, start, stop).to(ACCUMULATE)).sum())


@dataclass(frozen=True)
class Squares:
    """<v, v> of vectors in one parameter, by name: 0 of a vector that lacks it."""

    size: float  # entries of the parameter
    by_name: Mapping[str, float]


@dataclass
class Diagonal:
    """<v, v> of vectors, parameter by parameter: computed when it is first asked for, and then kept."""

    vectors: Mapping[str, Deltas]
    _kept: dict[str, Squares] = field(default_factory=dict)

    def of(self, parameter: str) -> Squares:
        """The squares in a parameter that some vector changes, or that none does: then the size is 0.

        Raises:
            SteerError: two shapes, or a NaN.
        """
        if parameter not in self._kept:
            self._kept[parameter] = _squares_of(parameter, self.vectors)
        return self._kept[parameter]


def _squares_of(parameter: str, vectors: Mapping[str, Deltas]) -> Squares:
    by_name, shape = dict.fromkeys(vectors, 0.0), None
    for name, deltas in vectors.items():
        if parameter in deltas:
            delta = deltas[parameter]
            shape = torch.empty(tuple(delta.shape), device="meta") if shape is None else shape
            require_same_shape(parameter, shape, delta)
            by_name[name] = dot(delta, delta)
    if not all(map(math.isfinite, by_name.values())):
        raise not_finite(parameter)
    return Squares(0.0 if shape is None else _entries_of(shape), by_name)


def _entries_of(delta: Delta) -> float:
    return float(math.prod(matrix_shape(tuple(delta.shape))))
