"""w as other engines take it: a PEFT adapter with k folded in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .errors import SteerError
from .lowrank import LowRank
from .vector import WeightVector, save_vector


def export_adapter(vector: WeightVector, folder: str | Path, *, k: float, max_rank: int | None = None) -> float:
    """Write k w as a PEFT adapter for vLLM, PEFT or llama.cpp's converter: at their scale 1 it is k.

    `max_rank` cuts what is above the rank that an engine accepts (vLLM: 512 at most) to the nearest of that rank.
    Returns the error of the cut, |cut - w| / |w|: 0 where nothing was cut.

    Raises:
        SteerError: the vector has dense parts, which an adapter cannot hold.
    """
    error = 0.0
    if max_rank is not None:
        vector = vector.truncate(rank=max_rank)
        error = vector.card.measured["truncation_error"]
    for name in vector.deltas:
        if not isinstance(vector.deltas[name], LowRank):
            raise SteerError(
                f"{name}: is dense, which a LoRA adapter cannot hold; cut it to factors with --max-rank, use --to "
                "merged, or steer in memory where the base has no such parameter (a bias)"
            )
    card = replace(vector.card, settings={**vector.card.settings, "k": k}, strength=None)
    save_vector(WeightVector((vector * k).deltas, card), Path(folder))
    return error
