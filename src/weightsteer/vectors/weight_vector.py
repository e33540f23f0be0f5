"""The weight vector: parameter name -> delta, its algebra, and its place on disk."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, SupportsFloat

from ..errors import SteerError
from ..run_card import RunCard
from ..schema import is_finite, require_finite_k, shown
from ..threads import worker_pool
from . import reshape
from .base_identity import require_same_base
from .delta import (
    CLEAR,
    Delta,
    LazyDeltas,
    add_deltas,
    dot,
    not_finite,
    quick_dot,
    require_same_shape,
    scale_delta,
)
from .handle import SteeringHandle
from .hooks import steer
from .low_rank import LowRank
from .parameter_names import refuse_two_spellings
from .vector_folder import open_vector, write_vector

if TYPE_CHECKING:
    import torch

    from .steerable import Steerable


@dataclass(frozen=True, eq=False)
class WeightVector:
    """A direction in weight space: w = theta+ - theta- (paper, section 2), or any sum of such.

    `deltas` maps parameter names of the base model ("model.layers.0.mlp.down_proj.weight") to a `LowRank`, a dense
    Tensor of the parameter's shape, or a `Streamed` delta that stays in its files; a name that is absent is zero.
    Vectors from files, and sums of them, make each delta when it is asked for.
    """

    deltas: Mapping[str, Delta]
    card: RunCard
    name: str = ""  # what people call it: the folder that it was loaded from

    def __add__(self, other: WeightVector) -> WeightVector:
        """Exact sum. Ranks add up; a factored and a dense delta of one parameter give a dense one."""
        return self._plus(other, 1.0) if isinstance(other, WeightVector) else NotImplemented

    def __radd__(self, other: int) -> WeightVector:
        """0 + w, with which `sum` begins."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __sub__(self, other: WeightVector) -> WeightVector:
        """Exact difference; `w - w` has norm exactly 0."""
        return self._plus(other, -1.0) if isinstance(other, WeightVector) else NotImplemented

    def _plus(self, other: WeightVector, scale: float) -> WeightVector:
        self._require_alike(other)
        mine, theirs = self.deltas, other.deltas
        names = [*mine, *(name for name in theirs if name not in mine)]
        found = self._derived(LazyDeltas({name: partial(_sum_of, mine, theirs, scale, name) for name in names}))
        found = replace(found, card=replace(found.card, measured={}))  # of the sum nothing is known that was of a part
        same = self.card.held_out == other.card.held_out  # else they are of another behaviour, or were trained on
        return found if same else replace(found, card=replace(found.card, held_out=()))

    def _require_alike(self, other: WeightVector) -> None:
        """Raise unless both were made on one base, and call its parameters alike."""
        require_same_base(self.card, other.card)
        refuse_two_spellings(self.deltas, other.deltas, f"{self.name or 'a vector'} and {other.name or 'another'}")

    def __mul__(self, scale: float) -> WeightVector:
        """The vector times a number.

        Raises:
            SteerError: a factor that is not finite.
        """
        if not isinstance(scale, SupportsFloat):
            return NotImplemented
        if not is_finite(scale):
            raise SteerError(f"a vector is multiplied by finite numbers, found {shown(scale)}")
        deltas, scale = self.deltas, float(scale)
        return self._derived(LazyDeltas({name: partial(_scaled_of, deltas, name, scale) for name in deltas}))

    __rmul__ = __mul__

    def __truediv__(self, scale: float) -> WeightVector:
        """The vector divided by a number.

        Raises:
            SteerError: by zero, or by what is not finite.
        """
        if not isinstance(scale, SupportsFloat):
            return NotImplemented
        if not is_finite(scale) or scale == 0:
            raise SteerError(f"a vector is divided by finite numbers other than 0, found {shown(scale)}")
        return self * (1.0 / scale)

    def __neg__(self) -> WeightVector:
        return self * -1.0

    def __repr__(self) -> str:
        """Base, size, rank, norm and recommended k; computes the norm, so that a large vector takes a moment."""
        parts = [
            *([repr(self.name)] if self.name else []),
            f"base={self.card.base_model!r}",
            f"parameters={len(self.deltas)}",
            "dense" if (rank := self.rank) is None else f"rank={rank}",
            f"norm={self.norm():.4g}",
        ]
        strength = self.card.strength
        if strength is not None:
            parts.append(f"recommended_k={strength.recommended:g} or {strength.negative:g}")
        return f"WeightVector({', '.join(parts)})"

    @property
    def rank(self) -> int | None:
        """The largest rank of its factored deltas; None where all are dense."""
        deltas = map(self.deltas.__getitem__, self.deltas)
        return max((delta.rank for delta in deltas if isinstance(delta, LowRank)), default=None)

    def _derived(self, deltas: Mapping[str, Delta], **measured: float) -> WeightVector:
        """A result of algebra: same base, but the range of k was measured for other weights."""
        cut = {name: value for name, value in self.card.measured.items() if name == "truncation_error"}
        return WeightVector(deltas, replace(self.card, strength=None, strengths={}, measured={**cut, **measured}))

    def dot(self, other: WeightVector) -> float:
        """Sum over all parameters of the products of entries, in float64.

        Raises:
            SteerError: two shapes of one parameter, or a NaN.
        """
        return math.fsum(self._dots(other).values())

    def _dots(self, other: WeightVector) -> dict[str, float]:
        products = {}
        for name in self.deltas:
            if name in other.deltas:
                delta = self.deltas[name]
                theirs = delta if other is self else other.deltas[name]
                require_same_shape(name, delta, theirs)
                products[name] = dot(delta, theirs)
                if not math.isfinite(products[name]):
                    raise not_finite(name)
        return products

    def norm(self) -> float:
        """Frobenius norm over all parameters."""
        return math.sqrt(max(self.dot(self), 0.0))

    def norms(self) -> dict[str, float]:
        """Frobenius norm of each parameter's delta."""
        return {name: math.sqrt(max(square, 0.0)) for name, square in self._dots(self).items()}

    def cosine(self, other: WeightVector) -> float:
        """Cosine over all parameters, within 1e-5 and mostly 1e-7 (paper, section 6: monitoring).

        Raises:
            SteerError: the bases differ, two shapes of one parameter, a NaN, or one of the vectors is zero.
        """
        self._require_alike(other)
        (square, noise), (product, _), (other_square, other_noise) = self._products(other)
        norms = math.sqrt(max(square, 0.0)) * math.sqrt(max(other_square, 0.0))
        if square <= noise * CLEAR or other_square <= other_noise * CLEAR:  # factors cancel: float32 is too coarse
            norms, product = self.norm() * other.norm(), self.dot(other)
        if norms == 0.0:
            raise SteerError("cosine: one of the vectors is zero, so it has no direction")
        return max(-1.0, min(1.0, product / norms))

    def _products(self, other: WeightVector) -> list[tuple[float, float]]:
        """<w, w>, <w, o>, <o, o> in quick arithmetic, each with the size of its rounding."""
        mine, theirs = self.deltas, other.deltas

        def products(name: str) -> list[tuple[float, float]]:
            ours, others = mine.get(name), theirs.get(name)
            found = []
            for first, second in ((ours, ours), (ours, others), (others, others)):
                if first is not None and second is not None:
                    require_same_shape(name, first, second)
                    found.append(quick_dot(first, second))
                else:
                    found.append((0.0, 0.0))
            if not all(math.isfinite(value) for value, _ in found):
                raise not_finite(name)
            return found

        with worker_pool() as pool:
            rows = list(pool.map(products, mine.keys() | theirs.keys()))
        return [(math.fsum(row[i][0] for row in rows), math.fsum(row[i][1] for row in rows)) for i in range(3)]

    def filter(
        self, *, layers: Collection[int] | str | int | None = None, modules: Collection[str] | str | None = None
    ) -> WeightVector:
        """The part in some layers ("8-20,25" or numbers) and modules ("mlp,q_proj" or names); the rest is zero.

        Raises:
            SteerError: nothing of the vector is there.
        """
        return self._derived(reshape.filter_deltas(self.deltas, layers, modules))

    def truncate(self, *, rank: int | None = None, energy: float | None = None) -> WeightVector:
        """The nearest vector whose matrices have at most `rank`, or hold the share `energy` of their squared norm.

        By QR of the factors; dense matrices inside the blocks are factored by SVD. The card's `truncation_error` is
        |cut - w| / |w|.

        Raises:
            SteerError: neither or both of rank and energy, or one out of range.
        """
        deltas, error = reshape.truncate_deltas(self.deltas, rank, energy)
        return self._derived(deltas, truncation_error=error)

    def project_out(self, other: WeightVector) -> WeightVector:
        """What of this vector is orthogonal to `other`: `w - (<w, o> / <o, o>) o`, over all parameters at once.

        Raises:
            SteerError: the bases differ, or `other` is zero.
        """
        square = other.dot(other)
        if square == 0.0:
            raise SteerError("project_out: the other vector is zero, so it has no direction")
        found = self - other * (self.dot(other) / square)
        return replace(found, card=replace(found.card, held_out=self.card.held_out))  # it is still this behaviour

    def scale_by_depth(self, alpha: float, beta: float) -> WeightVector:
        """LiNeS: layer l of L times alpha + beta l / (L - 1) (Wang et al., arXiv 2410.17146; paper, future work)."""
        return self._derived(reshape.scale_by_depth(self.deltas, alpha, beta))

    def boost_subspace(self, beta: float) -> WeightVector:
        """Subspace boosting: singular values after those that hold `beta` of their sum are raised to the last of these.

        (Skorobogat et al., arXiv 2506.16506; paper, future work.) Of factored deltas only the values that are there
        are raised: the rank does not grow.

        Raises:
            SteerError: beta not within 0 and 1.
        """
        return self._derived(reshape.boost_subspace(self.deltas, beta))

    def applied(self, lm: Steerable, k: float | torch.Tensor = 1.0) -> AbstractContextManager[SteeringHandle]:
        """Steer `lm` to theta + k w inside a `with` block; leaving it restores every bit.

        `lm` is an `LM`, a transformers model, or a `PeftModel`, whose adapters stay in effect.

        `k` is in multiples of w: a number, or a tensor (batch,) with one k per row. The block's
        handle changes it in place: `with w.applied(lm, k=1) as handle: ...; handle.k = 2`.

        Raises:
            SteerError: a parameter is missing in the model, or has another shape.
        """
        return steer(lm, self.deltas, k)

    def save(self, folder: str | Path) -> Path:
        """Write the vector as a PEFT adapter folder with our card beside it (see `vector_folder`)."""
        return write_vector(self.deltas, self.card, Path(folder))

    @classmethod
    def load(cls, folder: str | Path) -> WeightVector:
        """Open a folder that `save` wrote; its numbers are read when they are used.

        Raises:
            SteerError: not a vector's folder, or a damaged file; on use, a NaN or infinite entry.
        """
        path = Path(folder).absolute()
        return cls(*open_vector(Path(folder)), name=path.parent.name if path.name == "vector" else path.name)

    def export_peft(self, folder: str | Path, *, k: float, max_rank: int | None = None) -> float:
        """Write k w as a PEFT adapter for vLLM, PEFT or llama.cpp's converter: at their scale 1 it is k.

        `max_rank` cuts what is above the rank that an engine accepts (vLLM: 512 at most) to the nearest of that rank.
        Returns the error of the cut, |cut - w| / |w|: 0 where nothing was cut.

        Raises:
            SteerError: the vector has dense parts, which an adapter cannot hold.
        """
        require_finite_k(k)
        cut = self if max_rank is None else self.truncate(rank=max_rank)
        for name in cut.deltas:
            if not isinstance(cut.deltas[name], LowRank):
                factored = reshape.has_factors(name, cut.deltas[name])
                cut_first = "weightsteer combine 'truncate(w, rank=16)' w=FOLDER -o OUT"
                way = f"cut it to factors first (`{cut_first}`), " if factored else ""
                raise SteerError(
                    f"{name}: is dense, which a LoRA adapter cannot hold; {way}merge it "
                    "(`weightsteer export merged`), or steer in memory where the base has no such parameter (a bias)"
                )
        card = replace(cut.card, settings={**cut.card.settings, "k": k}, strength=None, held_out=())
        write_vector((cut * k).deltas, card, Path(folder))
        return 0.0 if max_rank is None else float(cut.card.measured["truncation_error"])


def _sum_of(mine: Mapping[str, Delta], theirs: Mapping[str, Delta], scale: float, name: str) -> Delta:
    if name not in theirs:
        return mine[name]
    if name not in mine:
        return scale_delta(theirs[name], scale)
    first = mine[name]
    return add_deltas(name, first, first if theirs is mine else theirs[name], scale)


def _scaled_of(deltas: Mapping[str, Delta], name: str, scale: float) -> Delta:
    return scale_delta(deltas[name], scale)
