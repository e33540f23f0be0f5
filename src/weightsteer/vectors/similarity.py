"""How alike many vectors are: the N x N table of inner products and cosines, parameter by parameter."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..checkpoints.device import placement_of
from ..errors import SteerError
from ..files import write_bytes, write_text
from ..fitting import free_bytes
from ..progress import Progress, silent
from ..shown import csv_cell, one_line
from .base_identity import require_same_base
from .delta import CLEAR, Delta, blocks, not_finite, require_same_shape, rows_of
from .low_rank import ACCUMULATE, FactorPanel, LowRank
from .parameter_names import refuse_two_spellings
from .weight_vector import WeightVector

PANEL = 512  # columns of stacked factors in one product: wide enough for speed, narrow enough to skip the mirror image


@dataclass(frozen=True)
class Similarity:
    """Inner products of N vectors over all parameters, in float64; `dots` is (N, N) and symmetric."""

    names: tuple[str, ...]
    dots: np.ndarray

    @property
    def norms(self) -> np.ndarray:
        """Frobenius norms, (N,)."""
        return np.sqrt(np.maximum(np.diag(self.dots), 0.0))

    @property
    def cosines(self) -> np.ndarray:
        """Cosines, (N, N); NaN where a vector is zero."""
        scale = np.outer(self.norms, self.norms)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(scale > 0.0, np.clip(self.dots / scale, -1.0, 1.0), np.nan)

    def save(self, path: str | Path) -> None:
        """Write `path`.csv (cosines, labelled) and `path`.npz (names, cosines, dots, norms; no pickle)."""
        path, table = Path(path), io.StringIO()
        writer = csv.writer(table)
        writer.writerow(["", *map(csv_cell, self.names)])
        for name, row in zip(self.names, self.cosines, strict=True):
            writer.writerow([csv_cell(name), *(f"{value:.9g}" for value in row)])
        write_text(path.with_name(f"{path.name}.csv"), table.getvalue())
        array = io.BytesIO()
        np.savez(array, names=np.array(self.names), cosines=self.cosines, dots=self.dots, norms=self.norms)
        write_bytes(path.with_name(f"{path.name}.npz"), array.getvalue())


def similarities(
    vectors: Mapping[str, WeightVector],
    *,
    budget: int | None = None,
    device: str | None = None,
    progress: Progress = silent,
) -> Similarity:
    """All inner products of `vectors` at once.

    Factored deltas of a parameter are stacked and multiplied in panels: two products of r x r blocks stand for N^2
    inner products. Dense deltas are read in blocks of rows, and multiplied on the CPU.

    Args:
        budget: bytes for what is held at a time, None: half of the memory that is free. Vectors of which one parameter
            does not fit are read again, once for each part of the others that does.
        device: where factors are multiplied; None: the accelerator, if there is one.

    Raises:
        SteerError: two bases, two shapes of one parameter, a NaN, or no such device.
    """
    names, members = tuple(vectors), list(vectors.values())
    if not members:
        raise SteerError("similarities: no vectors")
    for number, vector in enumerate(members):
        for other in members[:number]:
            require_same_base(other.card, vector.card)
    for ours, theirs in combinations({frozenset(vector.deltas) for vector in members}, 2):
        refuse_two_spellings(ours, theirs, "the vectors")
    place = torch.device(placement_of(None if device == "auto" else device))
    free = min(free_bytes(torch.device("cpu")), free_bytes(place))
    means = _Means(int(free) // 2 if budget is None else budget, place, torch.float32)
    dots, noise = _table(members, means, progress)
    if bool(((dots.diag() <= noise * CLEAR) & (noise > 0)).any()):
        dots, _ = _table(members, means.in_float64(), progress)  # some vector's factors cancel; float32 is too coarse
    return Similarity(names, ((dots + dots.T) / 2).numpy())  # products in panels are not quite symmetric


@dataclass(frozen=True)
class _Means:
    """What a table is computed with."""

    budget: int  # bytes that are held at a time
    device: torch.device  # where factors are multiplied
    dtype: torch.dtype  # in which they are

    def in_float64(self) -> _Means:
        """The same with exact products, which Apple's GPUs lack."""
        device = torch.device("cpu") if self.device.type == "mps" else self.device
        return replace(self, device=device, dtype=ACCUMULATE)


def _table(members: Sequence[WeightVector], means: _Means, progress: Progress) -> tuple[Tensor, Tensor]:
    """All products (N, N), and a bound on the rounding of each squared norm (N,)."""
    dots = torch.zeros(len(members), len(members), dtype=ACCUMULATE)
    noise = torch.zeros(len(members), dtype=ACCUMULATE)
    parameters = list(dict.fromkeys(name for vector in members for name in vector.deltas))
    for number, parameter in enumerate(parameters):
        progress(number, len(parameters), parameter)
        sources = {i: v.deltas for i, v in enumerate(members) if parameter in v.deltas}
        part = _products(parameter, sources, noise, means)
        if not bool(torch.isfinite(part).all()):
            raise not_finite(parameter)
        dots += part
    progress(len(parameters), len(parameters), "done")
    return dots, noise


def _products(parameter: str, sources: Mapping[int, Mapping[str, Delta]], noise: Tensor, means: _Means) -> Tensor:
    """All products of one parameter's deltas, (N, N); adds to `noise`."""
    held = _Held(parameter, sources, means.budget)
    shape: Tensor | None = None
    ranks: dict[int, int | None] = {}
    for index in sources:
        delta = held[index]
        shape = torch.empty(tuple(delta.shape), device="meta") if shape is None else shape
        require_same_shape(parameter, shape, delta)
        ranks[index] = delta.rank if isinstance(delta, LowRank) else None
    dots = torch.zeros(len(noise), len(noise), dtype=ACCUMULATE)
    _add_factored(dots, noise, held, {i: rank for i, rank in ranks.items() if rank is not None}, means)
    _add_dense(dots, held, [i for i, rank in ranks.items() if rank is None], list(ranks), means.budget)
    return dots


def parameter_products(parameter: str, members: Sequence[Mapping[str, Delta]], *, budget: int = 1 << 29) -> Tensor:
    """All inner products of one parameter's deltas, (N, N) in float64; a member without the parameter has zeros.

    Raises:
        SteerError: two shapes, or a NaN.
    """
    sources = {i: deltas for i, deltas in enumerate(members) if parameter in deltas}
    means = _Means(budget, torch.device("cpu"), ACCUMULATE)
    found = _products(parameter, sources, torch.zeros(len(members), dtype=ACCUMULATE), means)
    if not bool(torch.isfinite(found).all()):
        raise not_finite(parameter)
    return (found + found.T) / 2


class _Held:
    """One parameter's deltas by vector: kept once read if all of them fit the budget, else read again."""

    def __init__(self, parameter: str, sources: Mapping[int, Mapping[str, Delta]], budget: int) -> None:
        self._parameter, self._sources, self._budget = parameter, sources, budget
        self._kept: dict[int, Delta] = {}

    def __getitem__(self, index: int) -> Delta:
        if index in self._kept:
            return self._kept[index]
        delta = self._sources[index][self._parameter]
        size = sum(delta.shape) * delta.rank * 4 if isinstance(delta, LowRank) else self._budget  # read again
        if 2 * size * len(self._sources) <= self._budget:  # twice: panels are copies
            self._kept[index] = delta
        return delta


def _add_factored(dots: Tensor, noise: Tensor, held: _Held, ranks: Mapping[int, int], means: _Means) -> None:
    """Add <B_i A_i, B_j A_j> = sum((B_i^T B_j) * (A_i A_j^T)) for all pairs, a panel of vectors at a time.

    As many panels as the budget allows are held, mostly all; those after them are read once for all that are held.
    """
    groups = _groups(ranks)
    while groups:
        first = _panel_of(held, groups[0], means)
        count = max(1, means.budget // 2 // max(1, first.B.nbytes + first.A.nbytes))
        mine, groups = groups[:count], groups[count:]
        panels = [first, *(_panel_of(held, group, means) for group in mine[1:])]
        for number, (group, rows) in enumerate(zip(mine, panels, strict=True)):
            noise[group] += _add_products(dots, group, rows, group, rows)
            for other, columns in zip(mine[number + 1 :], panels[number + 1 :], strict=True):
                _add_products(dots, group, rows, other, columns)
        for other in groups:
            columns = _panel_of(held, other, means)
            for group, rows in zip(mine, panels, strict=True):
                _add_products(dots, group, rows, other, columns)


def _add_products(
    dots: Tensor, group: Sequence[int], rows: FactorPanel, other: Sequence[int], columns: FactorPanel
) -> Tensor:
    """Add the products of two panels, of which the second may be the first; returns the size of the rounding, (N1,)."""
    gram = (rows.B.T @ columns.B) * (rows.A @ columns.A.T)  # (R1, R2)
    if gram.device.type == "mps":
        gram = gram.cpu()  # sums are in float64, which it lacks
    ours, theirs = (panel.owners.to(gram.device) for panel in (rows, columns))
    sums = (ours.T @ gram.to(ACCUMULATE) @ theirs).cpu()  # (N1, N2)
    dots[np.ix_(group, other)] += sums
    if columns is not rows:
        dots[np.ix_(other, group)] += sums.T
        return sums.new_zeros(len(group))
    coarse = gram.abs().to(ACCUMULATE) * torch.finfo(gram.dtype).eps
    return (ours.T @ coarse @ ours).diag().cpu()


def _groups(ranks: Mapping[int, int]) -> list[list[int]]:
    """Vectors in order, about PANEL columns of factors to a group."""
    groups: list[list[int]] = []
    width = PANEL
    for index, rank in ranks.items():
        if width + rank > PANEL:
            groups.append([])
            width = 0
        groups[-1].append(index)
        width += rank
    return groups


def _panel_of(held: _Held, group: Sequence[int], means: _Means) -> FactorPanel:
    deltas = [delta for index in group if isinstance(delta := held[index], LowRank)]
    panel = FactorPanel.of(deltas, deltas[0].shape, means.dtype)
    return replace(panel, B=panel.B.to(means.device), A=panel.A.to(means.device))


def _add_dense(dots: Tensor, held: _Held, dense: Sequence[int], everyone: Sequence[int], budget: int) -> None:
    """Add the products in which a dense delta takes part: blocks of rows of all deltas, one Gram product each."""
    if not dense:
        return
    factored = [index for index in everyone if index not in dense]
    order = [*dense, *factored]
    entries = max(1, budget // (2 * ACCUMULATE.itemsize * len(order)))
    for start, stop in blocks(tuple(held[order[0]].shape), entries):
        rows = torch.stack([rows_of(held[i], start, stop).reshape(-1) for i in order]).to(ACCUMULATE)
        sums = rows[: len(dense)] @ rows.T  # (dense, all)
        dots[np.ix_(dense, order)] += sums
        dots[np.ix_(factored, dense)] += sums[:, len(dense) :].T


def table(names: Sequence[str], values: np.ndarray) -> str:
    """A labelled square table as text."""
    names = [one_line(name) for name in names]
    width = max(8, *(len(name) for name in names)) + 1
    lines = [" " * width + "".join(f"{name:>{width}}" for name in names)]
    for name, row in zip(names, values, strict=True):
        cells = ("-" if math.isnan(value) else f"{value:.4f}" for value in row)
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join(lines)


def labels(paths: Sequence[str]) -> list[str]:
    """Short names for folders: the last part that tells them apart."""
    for depth in range(1, 1 + max(len(Path(path).parts) for path in paths)):
        names = ["/".join(Path(path).parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path} ({number})" for number, path in enumerate(paths, start=1)]
