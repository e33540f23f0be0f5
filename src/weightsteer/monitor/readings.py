"""What is read off a training run: cosine, projection and norm of tau, and how far chance would carry the cosine."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import fmean, stdev
from typing import Any, ClassVar

from ..errors import SteerError
from ..schema import shown
from ..vectors.parameter_names import layer_of, module_of

WHOLE = "all"
FEWEST_CONTROLS = 3  # control vectors from which a mean and a spread are taken


@dataclass(frozen=True)
class Products:
    """Inner products of one parameter: of tau with itself and with every vector, and of the vectors with themselves."""

    parameter: str
    size: float  # entries of the parameter, (d_out x d_in)
    tau: float  # <tau, tau>
    crossed: Mapping[str, float]  # vector -> <tau, v>
    squares: Mapping[str, float]  # vector -> <v, v>


@dataclass(frozen=True)
class Reading:
    """One vector seen in one checkpoint, over the whole model or one part of it.

    `band` is the standard deviation that the cosine has by chance, around `centre`, under the null that makes it least
    surprising (see `read_off`); `z` is how many of these the cosine is away from there.
    """

    checkpoint: str
    step: int
    vector: str
    part: str  # "all", "layer 3", or a kind of module, "mlp.down_proj"
    cosine: float
    projection: float  # <tau, v> / <v, v>: multiples of the vector that lie in tau
    norm: float  # of tau
    centre: float
    band: float
    z: float
    share: float | None = None  # of tau's norm, along this vector and no other of a dictionary (see `decompose`)
    error: float | None = None  # of the share


@dataclass(frozen=True, kw_only=True)
class KeptReading(Reading):
    """A reading as a file keeps it."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    key: str  # of the vectors that were read off
    weights: str  # hash of the checkpoint's
    folder: str = ""  # hash of where the checkpoint lies; "" in a file of an older version

    @property
    def reading(self) -> Reading:
        """The reading alone."""
        return Reading(**{part.name: getattr(self, part.name) for part in fields(Reading)})


def read_off(
    products: Sequence[Products], *, checkpoint: str, step: int, controls: Iterable[str] = (), parts: bool = True
) -> list[Reading]:
    """Readings of one checkpoint: of the whole model, then of each layer and kind of module.

    What a cosine is by chance, three ways; the one under which it is least surprising counts:

    - *random directions*: v replaced by a vector of the same singular values and random singular directions, matrix by
      matrix. Then <tau, v> has mean 0 and variance |tau|^2 |v|^2 / (d_out d_in) in each matrix, exactly, whatever the
      rank, and matrices are independent; so nothing has to be drawn.
    - *flipped layers*: v with the sign of each layer drawn at random, so that a few layers that agree with tau strongly
      do not pass for agreement everywhere. Variance: the sum of the layers' <tau, v>^2, exactly.
    - *controls*: the cosines of the same tau with the vectors named in `controls` (three or more): their mean and
      standard deviation. Fine-tunes have much in common that is no behaviour; only this null sees it.

    The last two are over several layers, so a single layer has the first alone.
    """
    named = tuple(controls)
    groups = {WHOLE: list(products)}
    if parts:
        for product in products:
            layer = layer_of(product.parameter)
            groups.setdefault("outside the layers" if layer is None else f"layer {layer}", []).append(product)
        for product in products:
            groups.setdefault(module_of(product.parameter), []).append(product)
    return [
        reading
        for part, members in groups.items()
        for reading in _readings_of(members, part, checkpoint, step, named if part == WHOLE else ())
    ]


def refuse_zero(squares: Iterable[Mapping[str, float]]) -> None:
    """Raise where a vector is zero in all of its parameters: nothing can be read along it.

    Args:
        squares: of each parameter, vector -> <v, v>.
    """
    total: Counter[str] = Counter()
    for found in squares:
        total.update(found)
    if zero := [name for name, square in total.items() if not square]:
        raise SteerError(f"monitor: the vector {shown(zero[0])} is zero, so it has no direction; leave it out")


def _readings_of(
    products: Sequence[Products], part: str, checkpoint: str, step: int, controls: tuple[str, ...]
) -> list[Reading]:
    tau = math.sqrt(max(math.fsum(p.tau for p in products), 0.0))
    names = list(products[0].crossed)
    cosines: dict[str, float] = {}
    for name in names:
        length = tau * math.sqrt(_sum_of(products, name))
        cosines[name] = _sum_crossed(products, name) / length if length else 0.0
    found = []
    for name in names:
        square = _sum_of(products, name)
        if not square:
            continue
        others = [cosines[control] for control in controls if control != name]
        centre, band = _chance(products, name, tau * math.sqrt(square), others)
        found.append(
            Reading(
                checkpoint,
                step,
                name,
                part,
                cosine=cosines[name],
                projection=_sum_crossed(products, name) / square,
                norm=tau,
                centre=centre,
                band=band,
                z=(cosines[name] - centre) / band if band else 0.0,
            )
        )
    return found


def _sum_of(products: Sequence[Products], name: str) -> float:
    return max(math.fsum(p.squares[name] for p in products), 0.0)


def _sum_crossed(products: Sequence[Products], name: str) -> float:
    return math.fsum(p.crossed[name] for p in products)


def _chance(products: Sequence[Products], name: str, length: float, controls: Sequence[float]) -> tuple[float, float]:
    """(centre, standard deviation) of the cosine by chance, of the null under which it is least surprising."""
    if not length:
        return 0.0, 0.0
    nulls = [(0.0, math.sqrt(random_variance(products, name)) / length)]
    by_layer: dict[int | None, float] = {}
    for product in products:
        layer = layer_of(product.parameter)
        by_layer[layer] = by_layer.get(layer, 0.0) + product.crossed[name]
    if len(by_layer) > 1:
        nulls.append((0.0, math.sqrt(math.fsum(part**2 for part in by_layer.values())) / length))
    if len(controls) >= FEWEST_CONTROLS:
        nulls.append((fmean(controls), stdev(controls)))
    cosine = _sum_crossed(products, name) / length
    return min(
        (null for null in nulls if null[1]), key=lambda null: abs(cosine - null[0]) / null[1], default=(0.0, 0.0)
    )


def random_variance(products: Sequence[Products], name: str) -> float:
    """Variance of <tau, v> where each matrix of v keeps its singular values and gets random singular directions."""
    return math.fsum(p.tau * p.squares[name] / p.size for p in products)


def require_known(names: Iterable[str], vectors: Collection[str], what: str) -> None:
    """Raise if a vector is named that is not there."""
    if unknown := [name for name in names if name not in vectors]:
        raise SteerError(f"{what}: {unknown[0]!r} is not among the vectors, {', '.join(vectors)}")
