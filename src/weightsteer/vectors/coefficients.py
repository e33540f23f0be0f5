"""w(c): a vector weighed by few coefficients, for its two sides, a curve over depth, and each kind of module.

With w = tau+ - tau- and what the sides share, c = (tau+ + tau-) / 2, the delta of a parameter in block l, of kind m, is

    depth(l) * kind(m) * (sides_w * w + sides_c * c),

so that its rank stays that of w. Where all coefficients stand at their start (1, and 0 for c), it is w itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import SteerError
from .delta import Delta, add_deltas, scale_delta
from .low_rank import LowRank
from .parameter_names import layer_of, module_of
from .weight_vector import WeightVector

COEFFICIENTS = "coefficients"  # where a card's settings hold them
KNOTS = 4  # of the curve over depth


@dataclass(frozen=True)
class Coefficients:
    """The numbers by which a vector is weighed; each multiplies, so that 1 changes nothing."""

    w: float  # of tau+ - tau-
    common: float | None  # of (tau+ + tau-) / 2; None for a vector that has no two sides
    depth: tuple[float, ...]  # at equally spaced depths, the first block and the last among them; linear between
    kinds: Mapping[str, float]  # kind of module, such as mlp.up_proj -> its number


class CoefficientForm:
    """Which coefficients a vector has, as one list of numbers: w, common (of two sides), depth, kinds."""

    def __init__(self, names: Sequence[str], *, two_sides: bool, knots: int = KNOTS) -> None:
        """Args:
        names: the vector's parameters.
        knots: of the curve over depth; at most one for each block.
        """
        layers = [layer_of(name) for name in names]
        last = max((layer for layer in layers if layer is not None), default=0)
        self.names, self.two_sides = list(names), two_sides
        self.knots = max(1, min(knots, last + 1))
        self.kinds = sorted({module_of(name) for name in names})
        self.kind_of = torch.tensor([self.kinds.index(module_of(name)) for name in names])
        depths = torch.tensor([(layer or 0) / last if last else 0.0 for layer in layers], dtype=torch.float64)
        places = depths * (self.knots - 1)
        self.below = places.floor().long().clamp(max=max(0, self.knots - 2))
        self.above = (self.below + 1).clamp(max=self.knots - 1)
        self.share = (places - self.below).double()
        self.inside = torch.tensor([layer is not None for layer in layers])

    @property
    def count(self) -> int:
        """How many coefficients there are."""
        return 1 + self.two_sides + self.knots + len(self.kinds)

    def start(self) -> Tensor:
        """The numbers at which the weighed vector is w: (count,), float64."""
        numbers = torch.ones(self.count, dtype=torch.float64)
        if self.two_sides:
            numbers[1] = 0.0
        return numbers

    def scaled(self, numbers: Tensor, times: float) -> Tensor:
        """The numbers of so many times the vector that `numbers` weigh."""
        found = numbers.clone()
        found[: 1 + self.two_sides] *= times
        return found

    def scales(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """By how much tau+ and tau- of each parameter are multiplied: two of (parameters,), differentiable.

        Without two sides the first is that of the vector itself.
        """
        first = 1 + self.two_sides
        depth, kinds = numbers[first : first + self.knots], numbers[first + self.knots :]
        curve = depth[self.below] + self.share * (depth[self.above] - depth[self.below])
        place = torch.where(self.inside, curve, torch.ones_like(curve)) * kinds[self.kind_of]
        if not self.two_sides:
            return place * numbers[0], place * 0.0
        return place * (numbers[0] + numbers[1] / 2), place * (numbers[1] / 2 - numbers[0])

    def named(self, numbers: Tensor) -> Coefficients:
        """The numbers with their names."""
        values = [float(number) for number in numbers]
        first = 1 + self.two_sides
        return Coefficients(
            w=values[0],
            common=values[1] if self.two_sides else None,
            depth=tuple(values[first : first + self.knots]),
            kinds=dict(zip(self.kinds, values[first + self.knots :], strict=True)),
        )


def weigh(
    positive: WeightVector, negative: WeightVector | None, numbers: Tensor, form: CoefficientForm
) -> WeightVector:
    """The vector at these coefficients; its card's settings tell them.

    Args:
        positive: tau+, or a vector without two sides.
        negative: tau-, or None.

    Raises:
        SteerError: the form is of other parameters.
    """
    names = list(dict.fromkeys([*positive.deltas, *(negative.deltas if negative else ())]))
    if set(names) != set(form.names):
        raise SteerError("coefficients: were made for other parameters than this vector has")
    ours, theirs = (dict(zip(form.names, scales.tolist(), strict=True)) for scales in form.scales(numbers))
    deltas = {name: _weighed(name, positive, negative, ours[name], theirs[name]) for name in names}
    whole = positive if negative is None else positive - negative
    coefficients: dict[str, Any] = asdict(form.named(numbers))
    settings = {**whole.card.settings, COEFFICIENTS: {**coefficients, "depth": list(coefficients["depth"])}}
    return WeightVector(deltas, replace(whole.card, settings=settings, strength=None))


def _weighed(name: str, positive: WeightVector, negative: WeightVector | None, ours: float, theirs: float) -> Delta:
    if negative is None or name not in negative.deltas:
        return scale_delta(positive.deltas[name], ours)
    if name not in positive.deltas:
        return scale_delta(negative.deltas[name], theirs)
    first = positive.deltas[name]
    return add_deltas(name, first if ours == 1.0 else scale_delta(first, ours), negative.deltas[name], theirs)


def factors_of(positive: WeightVector, negative: WeightVector | None, name: str) -> tuple[LowRank, LowRank | None]:
    """A parameter's factors on both sides: of rank 0 where D+ left it as it is, None where D- did.

    Raises:
        SteerError: it is dense: coefficients are learned for factored vectors.
    """
    first, second = _factors(positive, name), None if negative is None else _factors(negative, name)
    if first is None:
        assert second is not None, "one side has the parameter"
        first = replace(second, B=second.B[:, :0], A=second.A[:0])
    return first, second


def _factors(side: WeightVector, name: str) -> LowRank | None:
    delta = side.deltas.get(name)
    if delta is None or isinstance(delta, LowRank):
        return delta
    raise SteerError(f"{name}: is dense; coefficients are learned for LoRA vectors")
