"""The next token of each row of a batch: the likeliest, or drawn by the row's own generator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..continuations import log_softmax
from ..continuous_batching import COLDEST
from .asked import Asked, Chance

SEEDS = 1 << 63  # seeds lie below


def generator_of(asked: Asked) -> torch.Generator:
    """A row's own source of chance, so that its neighbours do not change what it draws."""
    return torch.Generator().manual_seed(asked.seed % SEEDS)


@torch.no_grad()
def choose(logits: Tensor, rows: Sequence[Asked], generators: Sequence[torch.Generator]) -> list[int]:
    """(batch, vocabulary) float32 logits -> a token for each row."""
    chosen = logits.argmax(dim=-1).tolist()
    drawn = [place for place, asked in enumerate(rows) if asked.temperature >= COLDEST]
    if not drawn:
        return chosen
    temperatures = _column([rows[place].temperature for place in drawn], logits)
    scores = logits[torch.tensor(drawn, device=logits.device)]
    scores = scores - scores.max(dim=-1, keepdim=True).values  # so that a small temperature does not overflow
    probs = torch.softmax(scores / temperatures, dim=-1)
    shares = [rows[place].top_p for place in drawn]
    if min(shares) < 1:
        probs = _likeliest(probs, _column(shares, logits))
    for place, token in zip(drawn, _draw(probs, [generators[place] for place in drawn]), strict=True):
        chosen[place] = token
    return chosen


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _likeliest(probs: Tensor, shares: Tensor) -> Tensor:
    """Probabilities (rows, vocabulary) without all but the likeliest tokens that hold a share (rows, 1)."""
    ordered, order = probs.sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    kept = torch.where((before < shares) | (shares >= 1), ordered, torch.zeros_like(ordered))
    kept[:, 0] = ordered[:, 0]  # a share of 0 keeps the likeliest
    return torch.zeros_like(probs).scatter_(-1, order, kept)


def _draw(probs: Tensor, generators: Sequence[torch.Generator]) -> list[int]:
    """A token for each row of probabilities, by one number of its generator: where the sum first exceeds it."""
    sums = probs.cumsum(dim=-1, dtype=torch.float64)
    numbers = torch.stack([torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators])
    found = torch.searchsorted(sums, numbers.to(sums.device) * sums[:, -1:], right=True)
    return found[:, 0].clamp(max=probs.shape[-1] - 1).tolist()


@torch.no_grad()
def chances(logits: Tensor, tokens: Sequence[int], tops: Sequence[int]) -> list[Chance]:
    """How likely tokens (n) were by logits (n, vocabulary), each with so many of the likeliest beside it."""
    log_p = log_softmax(logits)
    picked = log_p.gather(1, torch.tensor(tokens, device=log_p.device)[:, None])
    ranks = (log_p > picked).sum(dim=-1) + 1
    count = min(max(tops), log_p.shape[-1])
    values, ids = log_p.topk(count, dim=-1) if count else (log_p[:, :0], log_p[:, :0].long())
    rows = zip(tokens, picked[:, 0].tolist(), ranks.tolist(), ids.tolist(), values.tolist(), tops, strict=True)
    return [
        Chance(token, value, rank, tuple(zip(likely[:top], theirs[:top], strict=True)))
        for token, value, rank, likely, theirs, top in rows
    ]
