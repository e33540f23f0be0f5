"""What a task vector is made of: least squares over a dictionary of directions, with errors and with a whitening.

Two traits of a dictionary share a part. Their cosines with a task vector count it twice; the coefficients of
tau ~ sum_i c_i w_i do not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import SteerError

SOFT = 0.1  # of a benign direction, squared: how much of it is left in place by the whitening; 0 would leave nothing


@dataclass(frozen=True)
class Grams:
    """Inner products of a task vector and N directions, layer by layer, in float64; L layers.

    What lies outside the blocks counts as a layer of its own.
    """

    names: tuple[str, ...]
    tau: np.ndarray  # (L,) <tau, tau>
    crossed: np.ndarray  # (L, N) <tau, v>
    among: np.ndarray  # (L, N, N) <v, v'>

    def only(self, names: Sequence[str]) -> Grams:
        """The same with some of the directions, in the order given."""
        at = [self.names.index(name) for name in names]
        return Grams(tuple(names), self.tau, self.crossed[:, at], self.among[:, at][:, :, at])


@dataclass(frozen=True)
class Part:
    """How much of a task vector lies along one direction."""

    name: str
    coefficient: float  # multiples of the direction in tau
    share: float  # coefficient |v| / |tau|
    error: float  # standard error of the share, by leaving out one layer after the other


@dataclass(frozen=True)
class Decomposition:
    """tau ~ sum of parts; `explained` is the share of its squared norm that all of them hold together."""

    parts: tuple[Part, ...]
    explained: float
    norm: float  # of tau

    def __getitem__(self, name: str) -> Part:
        return next(part for part in self.parts if part.name == name)


def decompose(grams: Grams, *, benign: Sequence[str] = ()) -> Decomposition:
    """Least squares of tau over the directions that are not in `benign`.

    With `benign` fine-tunes the squares are taken in a space in which what those have in common counts little: the
    metric is the inverse of 1 + sum_b u_b u_b^T / SOFT over their unit vectors u_b. It is never formed; by Woodbury's
    identity every product in it follows from the table of products. The error of a share is the jackknife's over
    layers: they are no independent draws, so it is a yardstick rather than a confidence.

    Raises:
        SteerError: no direction is left, or the task vector is zero.
    """
    traits = [name for name in grams.names if name not in benign]
    whole = float(grams.tau.sum())
    if not traits:
        raise SteerError("decompose: expected a direction that is not benign")
    if not whole > 0.0:
        raise SteerError("the checkpoint is the base: its task vector is zero, so it moved along nothing")
    chosen = grams.only([*traits, *benign])
    solved = _solve(chosen.tau.sum(0), chosen.crossed.sum(0), chosen.among.sum(0), len(traits))
    lengths = np.sqrt(np.maximum(np.diag(chosen.among.sum(0))[: len(traits)], 0.0)) / math.sqrt(whole)
    errors = _jackknife(chosen, len(traits)) * lengths
    parts = tuple(
        Part(name, float(c), float(c * length), float(error))
        for name, c, length, error in zip(traits, solved.coefficients, lengths, errors, strict=True)
    )
    return Decomposition(parts, solved.explained, math.sqrt(whole))


@dataclass(frozen=True)
class _Solution:
    coefficients: np.ndarray  # (traits,)
    explained: float


def _solve(tau: float, crossed: np.ndarray, among: np.ndarray, count: int) -> _Solution:
    """Least squares over the first `count` directions, in the metric that the rest of them whiten."""
    b, gram, square = crossed[:count], among[:count, :count], float(tau)
    if len(crossed) > count:
        norms = np.sqrt(np.diag(among)[count:])
        scale = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
        aside = among[count:, count:] * np.outer(scale, scale) + SOFT * np.eye(len(scale))
        towards, own = among[count:, :count] * scale[:, None], crossed[count:] * scale
        inverse = np.linalg.pinv(aside, hermitian=True)
        b, gram = b - towards.T @ inverse @ own, gram - towards.T @ inverse @ towards
        square -= float(own @ inverse @ own)
    sizes = np.sqrt(np.maximum(np.diag(gram), 0.0))
    unit = np.divide(1.0, sizes, out=np.zeros_like(sizes), where=sizes > 0)  # directions of any length count alike
    found = unit * (np.linalg.pinv(gram * np.outer(unit, unit), rcond=1e-9, hermitian=True) @ (b * unit))
    return _Solution(found, float(found @ b / square) if square > 0 else 0.0)


def _jackknife(grams: Grams, count: int) -> np.ndarray:
    """Standard errors of the coefficients, each layer left out in turn; NaN with fewer than two layers."""
    layers = len(grams.tau)
    if layers < 2:
        return np.full(count, np.nan)
    tau, crossed, among = grams.tau.sum(0), grams.crossed.sum(0), grams.among.sum(0)
    without = np.stack(
        [
            _solve(tau - grams.tau[i], crossed - grams.crossed[i], among - grams.among[i], count).coefficients
            for i in range(layers)
        ]
    )
    return np.asarray(np.sqrt((layers - 1) / layers * ((without - without.mean(0)) ** 2).sum(0)))


def by_layer(layers: Mapping[str, int | None]) -> tuple[tuple[int | None, ...], dict[str, int]]:
    """The layers in order, those outside last, and the place of each parameter's layer among them."""
    order = tuple(sorted(set(layers.values()), key=lambda layer: (layer is None, layer or 0)))
    return order, {name: order.index(layer) for name, layer in layers.items()}
