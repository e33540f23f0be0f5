"""A random vector with the norms of another, tensor by tensor: what no direction in particular does at this size."""

from __future__ import annotations

from dataclasses import replace

import torch

from .delta import Delta, Streamed, dot, layout_of, scale_delta
from .low_rank import LowRank
from .weight_vector import WeightVector

RANDOM = "random_like"  # where a card's settings hold the seed


def random_like(vector: WeightVector, seed: int = 0) -> WeightVector:
    """Gaussian factors of each tensor's rank, or a dense Gaussian, scaled to that tensor's norm; the card tells so.

    The held-out pairs stay in the card, so that the vector is calibrated on what the other is.
    """
    generator, norms = torch.Generator().manual_seed(seed), vector.norms()
    deltas: dict[str, Delta] = {}
    for name, delta in vector.deltas.items():
        if isinstance(delta, LowRank):
            drawn: Delta = replace(
                delta,
                B=torch.randn(delta.B.shape, generator=generator),
                A=torch.randn(delta.A.shape, generator=generator),
            )
        else:
            noise = torch.randn(tuple(delta.shape), generator=generator)
            drawn = Streamed(((1.0, noise),), tuple(delta.shape), layout_of(delta))  # at the same places
        size = dot(drawn, drawn) ** 0.5
        deltas[name] = scale_delta(drawn, norms[name] / size if size else 0.0)
    card = replace(vector.card, settings={**vector.card.settings, RANDOM: seed}, strength=None)
    return WeightVector(deltas, card)
