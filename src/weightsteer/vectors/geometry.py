"""The shape of a vector: where its energy lies, how many directions carry it, how its sides and others relate to it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from .low_rank import ACCUMULATE, LowRank, rank_for
from .parameter_names import layer_of, module_of
from .weight_vector import WeightVector

ENERGY = 0.9  # share of a matrix's squared norm that its main directions hold


@dataclass(frozen=True)
class Geometry:
    """Where a vector's energy (squared norm) lies, and in how many directions.

    Ranks are means over the factored matrices, weighted by their energy; None where there are none.
    """

    norm: float
    parameters: int
    by_layer: Mapping[int | None, float]  # share of the energy
    by_module: Mapping[str, float]
    effective_rank: float | None  # exp of the entropy of the squared singular values (Roy and Vetterli 2007)
    main_rank: float | None  # singular values that hold 90% of the energy
    first_share: float | None  # share of the energy in the largest singular value
    rank: int  # the largest rank that the factors can hold


def geometry(vector: WeightVector) -> Geometry:
    """Read a vector's geometry off its factors (QR and r x r work); dense parts count in the energy only."""
    squares: dict[str, float] = {}
    shapes: list[tuple[float, float, float, float]] = []  # energy, effective rank, main rank, first share
    largest = 0
    for name, delta in vector.deltas.items():
        if isinstance(delta, LowRank):
            values = delta.spectrum()
            energy = float(values.square().sum())
            largest = max(largest, delta.rank)
            if energy > 0.0:
                first = float(values[0]) ** 2 / energy
                shapes.append((energy, effective_rank(values), float(rank_for(values, ENERGY)), first))
        else:
            energy = WeightVector({name: delta}, vector.card).norm() ** 2
        squares[name] = energy
    total = math.fsum(squares.values())
    shares = {name: square / total if total else 0.0 for name, square in squares.items()}
    weight = math.fsum(shape[0] for shape in shapes)
    means = [math.fsum(s[0] * s[i] for s in shapes) / weight if weight else None for i in (1, 2, 3)]
    by_layer: dict[int | None, float] = {}
    by_module: dict[str, float] = {}
    for name, share in shares.items():
        by_layer[layer_of(name)] = by_layer.get(layer_of(name), 0.0) + share
        by_module[module_of(name)] = by_module.get(module_of(name), 0.0) + share
    by_layer = dict(
        sorted(by_layer.items(), key=lambda entry: (entry[0] is None, entry[0] or 0))
    )  # names sort as texts
    return Geometry(math.sqrt(total), len(squares), by_layer, by_module, means[0], means[1], means[2], largest)


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the shares that squared singular values have of their sum: 1 to their number."""
    shares = values.square() / values.square().sum()
    return float(torch.exp(-(shares * torch.log(shares.clamp(min=1e-300))).sum()))


@dataclass(frozen=True)
class Balance:
    """How a vector's two sides relate: opposite (cosine of tau+ and -tau- near 1), or mostly alike (near -1)."""

    cosine: float  # of tau+ and -tau-
    positive: float  # |tau+|
    negative: float  # |tau-|

    @property
    def asymmetry(self) -> float:
        """(|tau+| - |tau-|) / (|tau+| + |tau-|): 0 where both sides moved as far, 1 where only D+ did."""
        return (self.positive - self.negative) / (self.positive + self.negative)


def balance(plus: WeightVector, minus: WeightVector) -> Balance:
    """Compare tau+ and tau-.

    Raises:
        SteerError: two bases, or one of them is zero.
    """
    return Balance(-plus.cosine(minus), plus.norm(), minus.norm())


def facts(found: Geometry, sides: tuple[WeightVector, WeightVector] | None = None) -> dict[str, str]:
    """The geometry in words, for people: norm, ranks, and how the two sides relate where they are given."""
    lines = {"norm": f"{found.norm:.4g} over {found.parameters} parameters"}
    if found.effective_rank is not None:
        lines["rank"] = (
            f"{found.rank} at most; effective {found.effective_rank:.1f}, {found.main_rank:.1f} hold {ENERGY:.0%} of "
            f"the energy, the first {found.first_share:.0%} (means over matrices)"
        )
    if sides and all(side.norm() for side in sides):
        two = balance(*sides)
        lines["sides"] = (
            f"cos(tau+, -tau-) {two.cosine:+.3f}; |tau+| {two.positive:.3g}, |tau-| {two.negative:.3g}, "
            f"asymmetry {two.asymmetry:+.3f}"
        )
    return lines


@dataclass(frozen=True)
class Overlap:
    """How much of the main directions two vectors share, as mean squared cosine of the principal angles.

    1 where one vector's directions lie within the other's, about `chance` where they have nothing to do with another.
    """

    outputs: float  # of the column spaces: what is written
    inputs: float  # of the row spaces: what is read
    chance_outputs: float
    chance_inputs: float


def overlap(first: WeightVector, second: WeightVector, *, energy: float = ENERGY) -> Overlap | None:
    """Principal angles between the directions that hold `energy` of each matrix, averaged over the matrices of both.

    None where no matrix has factors in both.
    """
    rows: list[tuple[float, float, float, float]] = []
    for name in first.deltas:
        if name not in second.deltas:
            continue
        pair = first.deltas[name], second.deltas[name]
        spaces = [_main_spaces(delta, energy) for delta in pair if isinstance(delta, LowRank)]
        if len(spaces) < 2 or any(space is None for space in spaces):
            continue
        (u, v), (x, y) = (space for space in spaces if space is not None)
        larger = max(u.shape[1], x.shape[1])
        rows.append((_shared(u, x), _shared(v, y), min(larger / u.shape[0], 1.0), min(larger / v.shape[0], 1.0)))
    if not rows:
        return None
    return Overlap(*(fmean(column) for column in zip(*rows, strict=True)))


def _main_spaces(delta: LowRank, energy: float) -> tuple[Tensor, Tensor] | None:
    """Orthonormal bases (rows, q) and (columns, q) of the directions that hold `energy`; None of a zero delta."""
    cut, values, keep = delta.cut(None, energy)
    if keep == 0 or float(values[0]) == 0.0:
        return None
    left = torch.linalg.qr(cut.B.to(ACCUMULATE))[0]
    right = torch.linalg.qr(cut.A.to(ACCUMULATE).T)[0]
    return left, right


def _shared(first: Tensor, second: Tensor) -> float:
    """Mean squared cosine of the principal angles between two column spaces."""
    return float((first.T @ second).square().sum()) / min(first.shape[1], second.shape[1])
