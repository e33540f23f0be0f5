"""What changes a vector's shape but not its base: choose parts, cut the rank, weigh the layers or the spectrum."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from functools import partial

import torch
from torch import Tensor

from ..errors import SteerError
from .delta import Delta, LazyDeltas, Streamed, dot, layout_of, read_delta, scale_delta, to_dense
from .low_rank import ACCUMULATE, Layout, LowRank, raise_tail
from .parameter_names import is_in, layer_numbers, layer_of

Deltas = Mapping[str, Delta]


def filter_deltas(
    deltas: Deltas, layers: Collection[int] | str | int | None, modules: Collection[str] | str | None
) -> Deltas:
    """The parameters of these layers and modules; the rest is zero."""
    numbers = layer_numbers(str(layers)) if isinstance(layers, str | int) else layers
    kinds = [part.strip() for part in modules.split(",")] if isinstance(modules, str) else modules
    kept = [
        name
        for name in deltas
        if (numbers is None or layer_of(name) in numbers) and (kinds is None or is_in(name, kinds))
    ]
    if not kept:
        known = sorted({layer for name in deltas if (layer := layer_of(name)) is not None})
        found = f"layers {known[0]} to {known[-1]}" if known else "no layers"
        raise SteerError(
            f"filter: no parameter of the vector is in layers {layers} and modules {modules}; the vector has {found} "
            f"and parameters such as {next(iter(deltas), 'none')}"
        )
    return LazyDeltas({name: partial(deltas.__getitem__, name) for name in kept})


def truncate_deltas(deltas: Deltas, rank: int | None, energy: float | None) -> tuple[dict[str, Delta], float]:
    """The nearest deltas of at most `rank`, or of the rank that holds `energy` of each squared norm, and the error.

    Dense matrices inside the blocks are factored too; all else that is dense stays. The error is
    |cut - whole| / |whole|.
    """
    if (rank is None) == (energy is None):
        raise SteerError("truncate: expected one of rank= and energy=")
    if rank is not None and (isinstance(rank, bool) or not 1 <= rank < math.inf or rank != int(rank)):
        raise SteerError(f"truncate: rank must be a whole number of at least 1, found {rank}")
    rank = None if rank is None else int(rank)  # 16.0, and what an expression gives
    if energy is not None and not 0.0 < energy <= 1.0:
        raise SteerError(f"truncate: energy must be above 0 and at most 1, found {energy}")
    kept: dict[str, Delta] = {}
    total, lost = 0.0, 0.0
    for name, delta in deltas.items():
        if not isinstance(delta, LowRank) and not has_factors(name, delta):
            kept[name] = delta  # engines store the factors of embeddings in ways of their own
            total += dot(delta, delta)
            continue
        whole = delta if isinstance(delta, LowRank) else _factored(name, delta)
        kept[name], s, keep = whole.cut(rank, energy)
        total += float(s.square().sum())
        lost += float(s[keep:].square().sum())
    return kept, math.sqrt(lost / total) if total else 0.0


def _factored(name: str, delta: Delta) -> LowRank:
    held = read_delta(name, delta)
    return held if isinstance(held, LowRank) else factor_matrix(held, layout_of(delta))


def has_factors(name: str, delta: Delta) -> bool:
    """Whether a dense delta can be cut to factors: a matrix inside a block."""
    return len(delta.shape) == 2 and name.endswith(".weight") and layer_of(name) is not None


def factor_matrix(matrix: Tensor, layout: Layout) -> LowRank:
    """A dense matrix as exact factors of full rank, by SVD."""
    u, s, vh = torch.linalg.svd(matrix.to(ACCUMULATE), full_matrices=False)
    return LowRank((u * s).float(), vh.float(), layout)


def scale_by_depth(deltas: Deltas, alpha: float, beta: float) -> Deltas:
    """Layer l of L times alpha + beta l / (L - 1): LiNeS (Wang et al., arXiv 2410.17146); L - 1 is the vector's last.

    Early layers hold what is general, so they move less. What stands outside the blocks is scaled by alpha.
    """
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in (alpha, beta)):
        raise SteerError(f"scale_by_depth: alpha and beta must be numbers, found {alpha!r} and {beta!r}")
    last = max((layer for name in deltas if (layer := layer_of(name)) is not None), default=0)

    depths = {name: (layer_of(name) or 0) / last if last else 0.0 for name in deltas}
    return LazyDeltas({name: partial(_scaled, deltas, name, alpha + beta * depth) for name, depth in depths.items()})


def _scaled(deltas: Deltas, name: str, scale: float) -> Delta:
    return scale_delta(deltas[name], scale)


def boost_subspace(deltas: Deltas, beta: float) -> Deltas:
    """Raise each matrix's small singular values: subspace boosting (Skorobogat et al., arXiv 2506.16506)."""
    if not isinstance(beta, int | float) or not 0.0 <= beta <= 1.0:
        raise SteerError(f"boost_subspace: beta must lie between 0 and 1, found {beta!r}")
    return LazyDeltas({name: partial(_boost_delta, deltas, name, beta) for name in deltas})


def _boost_delta(deltas: Deltas, name: str, beta: float) -> Delta:
    delta = deltas[name]
    if isinstance(delta, LowRank):
        return delta.boost_subspace(beta)
    if len(delta.shape) != 2:
        return delta
    matrix = to_dense(read_delta(name, delta))
    u, s, vh = torch.linalg.svd(matrix.to(ACCUMULATE), full_matrices=False)
    raised = ((u * raise_tail(s, beta)) @ vh).to(matrix.dtype)
    return Streamed(((1.0, raised),), tuple(delta.shape), layout_of(delta))
