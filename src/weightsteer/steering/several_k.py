"""One prompt at several strengths, side by side, in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch

from ..errors import SteerError
from ..lm import LM
from ..vectors.weight_vector import WeightVector


def generate_at_strengths(
    vector: WeightVector, lm: LM, prompt: str, ks: Sequence[float], *, max_new_tokens: int = 100
) -> list[str]:
    """The reply to `prompt` at each k, greedy; one k per row of a single batch.

    A vector that changes norms, embeddings or experts cannot have one k per row; it goes through the ks in turn.
    """
    rows = [prompt] * len(ks)
    with suppress(SteerError), vector.applied(lm, torch.tensor(list(ks))):
        return lm.generate(rows, max_new_tokens=max_new_tokens, batch_size=len(rows))
    replies = []
    with vector.applied(lm, 0.0) as handle:
        for k in ks:
            handle.k = k
            replies += lm.generate([prompt], max_new_tokens=max_new_tokens)
    return replies
