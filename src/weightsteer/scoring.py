"""Log-probabilities of given text: continuations of a prompt, running text, and KL to another model.

What continuations share is computed once: first the prefix that all prompts have in common (system
prompt and template), then each prompt, then its continuations on the cached prompt.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import SteerError
from .lm import LM, batches_by_length, pad_left, pad_right, projecting_only
from .progress import Progress, silent


@dataclass(frozen=True)
class Score:
    """Log-probability of one continuation, in nats."""

    total: float  # sum over its tokens
    tokens: int

    @property
    def mean(self) -> float:
        """Log-probability per token."""
        return self.total / self.tokens


@torch.no_grad()
def score_choices(
    lm: LM,
    prompts: Sequence[str | Sequence[Mapping[str, str]]],
    choices: Sequence[Sequence[str]],
    *,
    batch_size: int = 8,
    progress: Progress = silent,
) -> list[list[Score]]:
    """Score each prompt's candidate answers as the assistant's reply, in nats.

    Args:
        prompts: user turns, or the turns of talks; the chat template is put around them.
        choices: the candidate answers of each prompt.

    Raises:
        SteerError: a prompt without candidates, or a candidate with no tokens.
    """
    heads = [lm.chat_ids(prompt) for prompt in prompts]
    tails = [[lm.answer_ids(text) for text in texts] for texts in choices]
    if len(heads) != len(tails):
        raise SteerError(f"score_choices: {len(heads)} prompts but {len(tails)} lists of choices")
    for prompt, tail in zip(prompts, tails, strict=True):
        if not tail or not all(tail):
            raise SteerError(f"score_choices: prompt {prompt[:60]!r} has no candidate, or an empty one")
    shared = common_prefix(heads)
    prefix = _cached_prefix(lm, heads[0][:shared]) if shared else None
    scores: list[list[Score]] = [[] for _ in heads]
    for batch in batches_by_length([len(row) for row in heads], batch_size, progress):
        found = _score_batch(lm, prefix, shared, [heads[i] for i in batch], [tails[i] for i in batch])
        for index, row in zip(batch, found, strict=True):
            scores[index] = row
    return scores


def common_prefix(rows: Sequence[list[int]]) -> int:
    """How many leading ids all rows share, leaving at least one id to each row."""
    first, last = min(rows), max(rows)  # in sorted order the two ends differ earliest
    shared = 0
    while shared < min(len(first), len(last)) and first[shared] == last[shared]:
        shared += 1
    return min(shared, min(len(row) for row in rows) - 1)


def _cached_prefix(lm: LM, ids: Sequence[int]) -> Any:
    tokens = torch.tensor([list(ids)], device=lm.device)
    with projecting_only(lm.model, torch.zeros_like(tokens, dtype=torch.bool)):
        return lm.model(input_ids=tokens, use_cache=True).past_key_values


def _score_batch(
    lm: LM, prefix: Any, shared: int, heads: list[list[int]], tails: list[list[list[int]]]
) -> list[list[Score]]:
    """Scores of one batch: prompts on the cached prefix, then continuations on the cached prompts."""
    tokens, mask = pad_left([head[shared:] for head in heads], lm.pad_id, lm.device)
    full = torch.cat([mask.new_ones(len(heads), shared), mask], dim=1)
    cache = None
    if prefix is not None:
        cache = copy.deepcopy(prefix)
        cache.batch_repeat_interleave(len(heads))
    wanted = torch.zeros_like(tokens, dtype=torch.bool)
    wanted[:, -1] = True
    with projecting_only(lm.model, wanted):
        out = lm.model(
            input_ids=tokens,
            attention_mask=full,
            position_ids=positions(full)[:, shared:],
            past_key_values=cache,
            use_cache=True,
        )
    owner = [row for row, texts in enumerate(tails) for _ in texts]
    flat = [text for texts in tails for text in texts]
    log_p = log_softmax(out.logits[0])  # (batch, vocabulary): the first token of every continuation
    first = [float(log_p[row, ids[0]]) for row, ids in zip(owner, flat, strict=True)]
    rest = _continue(lm, out.past_key_values, full, owner, flat)
    scores = [Score(a + b, len(ids)) for a, b, ids in zip(first, rest, flat, strict=True)]
    return [[s for s, r in zip(scores, owner, strict=True) if r == row] for row in range(len(heads))]


def _continue(lm: LM, cache: Any, full: Tensor, owner: list[int], flat: list[list[int]]) -> list[float]:
    """Summed log-probability of every continuation's tokens after its first."""
    if all(len(ids) == 1 for ids in flat):
        return [0.0] * len(flat)
    rows = torch.tensor(owner)  # on the CPU: the cache's layers may lie on several devices
    cache.batch_select_indices(rows)
    tokens, mask = pad_right([ids[:-1] or [lm.pad_id] for ids in flat], lm.pad_id, lm.device)
    targets, real = pad_right([ids[1:] or [lm.pad_id] for ids in flat], lm.pad_id, lm.device)
    real = real.bool() & torch.tensor([[len(ids) > 1] for ids in flat], device=real.device)
    seen = torch.cat([full[rows], mask], dim=1)
    with projecting_only(lm.model, real):
        out = lm.model(
            input_ids=tokens,
            attention_mask=seen,
            position_ids=positions(seen)[:, full.shape[1] :],
            past_key_values=cache,
            use_cache=True,
        )
    picked = target_log_probs(out.logits[0], targets[real])
    sums = torch.zeros(len(flat), dtype=picked.dtype, device=picked.device)
    sums.index_add_(0, real.nonzero()[:, 0].to(picked.device), picked)
    return [float(value) for value in sums]


def positions(mask: Tensor) -> Tensor:
    """Position ids (batch, length) that count real tokens only; padding takes position 0 or repeats."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities in float32 whatever the model's dtype."""
    return torch.log_softmax(logits.float(), dim=-1)


def target_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """(n, vocabulary) logits and (n,) ids -> (n,) log-probabilities."""
    logits = logits.float()
    picked = logits.gather(1, targets.to(logits.device)[:, None])[:, 0]
    return picked - logits.logsumexp(dim=-1)


@torch.no_grad()
def score_texts(lm: LM, texts: Sequence[str], *, batch_size: int = 8) -> list[Score]:
    """Log-probability of running text without a chat template; its first token is context only.

    Raises:
        SteerError: a text of fewer than two tokens.
    """
    ids = [list(lm.tokenizer(text)["input_ids"]) for text in texts]  # with the BOS of models that have one
    if any(len(row) < 2 for row in ids):
        raise SteerError("score_texts: a text has fewer than two tokens, so there is nothing to predict")
    scores = [Score(0.0, 1)] * len(ids)
    for batch in batches_by_length([len(row) for row in ids], batch_size):
        tokens, mask = pad_right([ids[i] for i in batch], lm.pad_id, lm.device)
        wanted = mask[:, 1:].bool()
        with projecting_only(lm.model, torch.nn.functional.pad(wanted, (0, 1))):
            logits = lm.model(input_ids=tokens, attention_mask=mask, use_cache=False).logits[0]
        picked = target_log_probs(logits, tokens[:, 1:][wanted])
        for index, part in zip(batch, picked.split(wanted.sum(dim=1).tolist()), strict=True):
            scores[index] = Score(float(part.sum()), len(part))
    return scores


@torch.no_grad()
def prompt_log_probs(lm: LM, prompts: Sequence[str]) -> list[Tensor]:
    """Next-token log-probabilities at every position of each prompt's chat form: (length, vocabulary).

    Kept whole for `mean_kl`: vocabulary x 4 bytes a token (0.2 MB for a vocabulary of 49k).
    """
    rows = []
    for prompt in prompts:
        tokens = torch.tensor([lm.chat_ids(prompt)], device=lm.device)
        rows.append(log_softmax(lm.model(input_ids=tokens, use_cache=False).logits[0]))
    return rows


def mean_kl(reference: Sequence[Tensor], lm: LM, prompts: Sequence[str]) -> float:
    """Mean over tokens of KL(reference || lm) on `prompts`, in nats.

    `reference` is `prompt_log_probs` of the other model, or of the same one before it was steered.

    Raises:
        SteerError: the two do not see the same tokens (another tokenizer or another template).
    """
    total, count = 0.0, 0
    for log_p, log_q in zip(reference, prompt_log_probs(lm, prompts), strict=True):
        if log_p.shape != log_q.shape:
            raise SteerError(
                f"mean_kl: shapes differ, {tuple(log_p.shape)} and {tuple(log_q.shape)}; "
                "both models need the same tokenizer, template and prompts"
            )
        log_p = log_p.to(log_q.device)
        total += float((log_p.exp() * (log_p - log_q)).sum())
        count += log_p.shape[0]
    return total / count
