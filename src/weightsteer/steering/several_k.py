"""Prompts at several strengths, side by side, in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch

from ..chat_template import PromptLike
from ..errors import SteerError
from ..generation import TokenCount
from ..lm import LM
from ..progress import Progress, part_of, silent
from ..vectors.weight_vector import WeightVector

LONGEST = 100  # tokens of a reply, unless more are asked for
TOGETHER = 36  # replies: a step of one reads every weight, a step of many hardly takes longer


def generate_at_strengths(
    vector: WeightVector,
    lm: LM,
    prompt: str,
    ks: Sequence[float],
    *,
    max_new_tokens: int = LONGEST,
    temperature: float = 0.0,
    seed: int = 0,
    progress: Progress = silent,
) -> list[str]:
    """The reply to `prompt` at each k, by the likeliest token or sampled; one k per row of a single batch.

    A vector that changes norms, embeddings or experts cannot have one k per row; it goes through the ks in turn.
    `progress` hears of each token.
    """

    def replies(count: int, told: Progress) -> list[str]:
        return lm.generate(
            [prompt] * count,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            batch_size=count,
            streamer=TokenCount(told, max_new_tokens),
        )

    with suppress(SteerError), vector.applied(lm, torch.tensor(list(ks))):
        return replies(len(ks), progress)
    found = []
    with vector.applied(lm, 0.0) as handle:
        for number, k in enumerate(ks):
            handle.k = k
            found += replies(1, part_of(progress, number, len(ks), f"k = {k:g}"))
    return found


def replies_at_strengths(
    vector: WeightVector,
    lm: LM,
    prompts: Sequence[PromptLike],
    ks: Sequence[float],
    *,
    max_new_tokens: int = LONGEST,
    batch_size: int = TOGETHER,
    progress: Progress = silent,
) -> list[list[str]]:
    """For each k the greedy replies to all prompts; the rows of a batch are of any prompts and strengths.

    A vector that cannot have one k per row (see `generate_at_strengths`) goes through the ks in turn.
    """
    rows = [prompt for prompt in prompts for _ in ks]  # neighbours are of one length
    places = list(ks) * len(prompts)
    with suppress(SteerError), vector.applied(lm, torch.tensor(places)):
        replies = lm.generate(rows, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress)
        return [replies[number :: len(ks)] for number in range(len(ks))]
    found = []
    with vector.applied(lm, 0.0) as handle:
        for number, k in enumerate(ks):
            handle.k = k
            part = part_of(progress, number, len(ks))
            found.append(lm.generate(prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=part))
    return found
