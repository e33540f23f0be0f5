"""The weight vector: parameter name -> delta, its algebra, and its place on disk."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from . import reshape
from .adapter import ADAPTER_CONFIG, ADAPTER_FILE, adapter_config, adapter_tensors, read_adapter
from .apply import Dial, steered
from .delta import (
    CLEAR,
    Delta,
    LazyDeltas,
    Streamed,
    added,
    blocks,
    dot,
    layout_of,
    not_finite,
    quick_dot,
    require_finite,
    require_same_shape,
    rows_of,
    scaled,
)
from .errors import SteerError
from .lowrank import Layout, LowRank
from .records import CARD_FILE, RunCard, new_folder
from .tensorfile import Planned, SafeFile, write_stream
from .workers import worker_pool

if TYPE_CHECKING:
    import torch

    from .apply import HasModel

DENSE_FILE = "delta.safetensors"


@dataclass(frozen=True, eq=False)
class WeightVector:
    """A direction in weight space: w = theta+ - theta- (paper, section 2), or any sum of such.

    `deltas` maps parameter names of the base model ("model.layers.0.mlp.down_proj.weight") to a `LowRank`, a dense
    Tensor of the parameter's shape, or a `Streamed` delta that stays in its files; a name that is absent is zero.
    Vectors from files, and sums of them, make each delta when it is asked for.
    """

    deltas: Mapping[str, Delta]
    card: RunCard

    def __add__(self, other: WeightVector) -> WeightVector:
        """Exact sum. Ranks add up; a factored and a dense delta of one parameter give a dense one."""
        return self._plus(other, 1.0)

    def __sub__(self, other: WeightVector) -> WeightVector:
        """Exact difference; `w - w` has norm exactly 0."""
        return self._plus(other, -1.0)

    def _plus(self, other: WeightVector, scale: float) -> WeightVector:
        require_same_base(self.card, other.card)
        mine, theirs = self.deltas, other.deltas

        def total(name: str) -> Delta:
            if name not in theirs:
                return mine[name]
            if name not in mine:
                return scaled(theirs[name], scale)
            first = mine[name]
            return added(name, first, first if theirs is mine else theirs[name], scale)

        names = [*mine, *(name for name in theirs if name not in mine)]
        return self._derived(LazyDeltas({name: partial(total, name) for name in names}))

    def __mul__(self, scale: float) -> WeightVector:
        """The vector times a number."""
        deltas = self.deltas
        return self._derived(LazyDeltas({name: partial(_scaled_of, deltas, name, scale) for name in deltas}))

    __rmul__ = __mul__

    def __neg__(self) -> WeightVector:
        return self * -1.0

    def _derived(self, deltas: Mapping[str, Delta], **measured: float) -> WeightVector:
        """A result of algebra: same base, but the range of k was measured for other weights."""
        cut = {name: value for name, value in self.card.measured.items() if name == "truncation_error"}
        return WeightVector(deltas, replace(self.card, strength=None, measured={**cut, **measured}))

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
        require_same_base(self.card, other.card)
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
        self, *, layers: Collection[int] | str | None = None, modules: Collection[str] | str | None = None
    ) -> WeightVector:
        """The part in some layers ("8-20,25" or numbers) and modules ("mlp,q_proj" or names); the rest is zero.

        Raises:
            SteerError: nothing of the vector is there.
        """
        return self._derived(reshape.filtered(self.deltas, layers, modules))

    def truncate(self, *, rank: int | None = None, energy: float | None = None) -> WeightVector:
        """The nearest vector whose matrices have at most `rank`, or hold the share `energy` of their squared norm.

        By QR of the factors; dense matrices inside the blocks are factored by SVD. The card's `truncation_error` is
        |cut - w| / |w|.

        Raises:
            SteerError: neither or both of rank and energy, or one out of range.
        """
        deltas, error = reshape.truncated(self.deltas, rank, energy)
        return self._derived(deltas, truncation_error=error)

    def project_out(self, other: WeightVector) -> WeightVector:
        """What of this vector is orthogonal to `other`: w - (<w, o> / <o, o>) o, over all parameters at once.

        Raises:
            SteerError: the bases differ, or `other` is zero.
        """
        square = other.dot(other)
        if square == 0.0:
            raise SteerError("project_out: the other vector is zero, so it has no direction")
        return self - other * (self.dot(other) / square)

    def lines(self, alpha: float, beta: float) -> WeightVector:
        """LiNeS: layer l of L times alpha + beta l / (L - 1) (Wang et al., arXiv 2410.17146; paper, future work)."""
        return self._derived(reshape.lines(self.deltas, alpha, beta))

    def boost(self, beta: float) -> WeightVector:
        """Subspace boosting: singular values after those that hold `beta` of their sum are raised to the last of these.

        (Skorobogat et al., arXiv 2506.16506; paper, future work.) Of factored deltas only the values that are there
        are raised: the rank does not grow.

        Raises:
            SteerError: beta not within 0 and 1.
        """
        return self._derived(reshape.boost(self.deltas, beta))

    def applied(self, lm: HasModel, k: float | torch.Tensor = 1.0) -> AbstractContextManager[Dial]:
        """Steer `lm` to theta + k w inside a `with` block; leaving it restores every bit.

        `k` is in multiples of w: a number, or a tensor (batch,) with one k per row. The block's
        handle changes it in place: `with w.applied(lm, k=1) as dial: ...; dial.k = 2`.

        Raises:
            SteerError: a parameter is missing in the model, or has another shape.
        """
        return steered(lm.model, self.deltas, k)

    def save(self, folder: str | Path) -> Path:
        """Write the vector as a PEFT adapter folder plus our card (see `save_vector`)."""
        return save_vector(self, Path(folder))

    @classmethod
    def load(cls, folder: str | Path) -> WeightVector:
        """Open a folder that `save` wrote; its numbers are read when they are used.

        Raises:
            SteerError: not a vector's folder, or a damaged file; on use, a NaN or infinite entry.
        """
        return load_vector(Path(folder))


def _scaled_of(deltas: Mapping[str, Delta], name: str, scale: float) -> Delta:
    return scaled(deltas[name], scale)


def require_same_base(first: RunCard, second: RunCard) -> None:
    """Raise unless both artifacts were made on the same base model."""
    known = first.base_revision and second.base_revision
    ours, theirs = (card.base_revision if known else card.base_model for card in (first, second))
    if ours and theirs and ours != theirs:
        raise SteerError(
            f"the vectors have different bases: {first.base_model} ({first.base_revision[:12]}) and "
            f"{second.base_model} ({second.base_revision[:12]}); only vectors of one base can be combined"
        )


def save_vector(vector: WeightVector, folder: Path) -> Path:
    """Write a vector so that `PeftModel.from_pretrained(base, folder)` is theta + 1 w.

    Factored weights go to `adapter_model.safetensors` with lora_alpha = r (scale 1, everything in
    B; lower ranks are padded with zeros, since engines differ in how they scale them), other deltas
    to `delta.safetensors` in float32, which PEFT ignores; the card to `weightsteer.json`. One parameter is in memory
    at a time.

    Raises:
        SteerError: a NaN or infinite entry, or a folder that holds something else.
    """
    factored: dict[str, LowRank] = {}  # the shapes only: meta tensors
    dense: dict[str, tuple[int, ...]] = {}
    layouts: dict[str, str] = {}
    for name, delta in vector.deltas.items():
        if isinstance(delta, LowRank):
            require_finite(name, delta)
            assert name.endswith(".weight"), f"{name}: an adapter's factors belong to a weight"
            factored[name] = LowRank(delta.B.to("meta"), delta.A.to("meta"), delta.layout)
        else:
            dense[name] = tuple(delta.shape)
            if layout_of(delta) != "linear":
                layouts[name] = layout_of(delta)
    with new_folder(folder, "vector") as part:
        if factored or not dense:
            _write_adapter(vector, factored, part)
        if dense:
            plan = {name: Planned("F32", shape) for name, shape in dense.items()}
            write_stream(part / DENSE_FILE, plan, _dense_blocks(vector, plan), layouts=json.dumps(layouts))
        vector.card.save(part)
    return folder


def _write_adapter(vector: WeightVector, factored: Mapping[str, LowRank], part: Path) -> None:
    rank = max([1, *(delta.rank for delta in factored.values())])
    plan = {
        key: Planned("F32", tuple(tensor.shape))
        for name, delta in factored.items()
        for key, tensor in adapter_tensors(name, delta, rank).items()
    }
    write_stream(part / ADAPTER_FILE, plan, _adapter_blocks(vector, factored, rank))
    config = adapter_config({name: delta.layout for name, delta in factored.items()}, rank, vector.card)
    (part / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _adapter_blocks(vector: WeightVector, names: Mapping[str, LowRank], rank: int) -> Iterator[Tensor]:
    for name in names:
        delta = vector.deltas[name]
        assert isinstance(delta, LowRank)
        yield from adapter_tensors(name, delta, rank).values()


def _dense_blocks(vector: WeightVector, plan: Mapping[str, Planned]) -> Iterator[Tensor]:
    for name in plan:
        delta = vector.deltas[name]
        for start, stop in blocks(delta.shape):
            block = rows_of(delta, start, stop)
            require_finite(name, block)
            yield block


def load_vector(folder: Path) -> WeightVector:
    """Open what `save_vector` wrote (see `WeightVector.load`)."""
    if not (folder / CARD_FILE).is_file():
        raise SteerError(
            f"{folder}: not a saved weight vector (no {CARD_FILE}); "
            "make one with `weightsteer subtract PLUS MINUS -o OUT`"
        )
    card = RunCard.load(folder)
    if card.kind != "vector":
        raise SteerError(f"{folder}: holds a {card.kind}, expected a vector; see `weightsteer show`")
    makers = dict(read_adapter(folder).deltas) if (folder / ADAPTER_FILE).exists() else {}
    if (folder / DENSE_FILE).exists():
        dense = dense_file(folder / DENSE_FILE)
        makers |= {name: partial(dense.__getitem__, name) for name in dense}
    return WeightVector(LazyDeltas(makers), card)


def dense_file(path: Path) -> dict[str, Streamed]:
    """The deltas of a file of dense deltas, which stay there until they are used."""
    file = SafeFile(path)
    layouts: dict[str, Layout] = json.loads(file.metadata.get("layouts", "{}"))
    return {
        name: Streamed(((1.0, tensor),), tensor.shape, layouts.get(name, "linear"))
        for name, tensor in file.tensors.items()
    }
