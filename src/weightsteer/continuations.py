"""Summed log-probabilities of continuations of prompts, on a shared cache where a model allows it, else plainly."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .batches import SharedByAllRowsError, one_row_for_all, pad_left, pad_right, rows_of_batch
from .generation import positions, rounding_of, sample_ids, takes_positions
from .model_parts import call_on_cache, projecting_only

if TYPE_CHECKING:
    from .lm import LM

Heads = Sequence[Sequence[int]]  # the prompts of a batch
Tails = Sequence[Sequence[Sequence[int]]]  # the continuations of each

WINDOWS = ("sliding_window", "attention_window_size", "attention_chunk_size", "window_size")  # as configs name them


@dataclass(frozen=True)
class SharedPrefix:
    """The ids that all prompts begin with, as the model's cache; without any, `cache` is None."""

    length: int
    cache: Any
    window: float  # how far the model's shortest attention reaches; padding takes up a part of it

    def fits(self, heads: Heads, tails: Tails) -> bool:
        """Whether every token of a batch is within the reach of every other, padding included."""
        longest = max(map(len, heads)) + max(len(tail) for row in tails for tail in row)
        return longest <= self.window


def shared_prefix(lm: LM, heads: Heads) -> SharedPrefix | None:
    """What the prompts share; None where each continuation needs a plain pass.

    That is so for models that keep a state, count positions by themselves (alibi), or do not agree with a plain pass
    when they are tried, and where one k for each prompt leaves nothing to share.
    """
    try:
        with one_row_for_all():
            return _compute(lm, heads) if _can_share(lm) else None
    except SharedByAllRowsError:
        return None


def _compute(lm: LM, heads: Heads) -> SharedPrefix:
    shared, window = common_prefix(heads), _shortest_window(lm.model)
    if not shared:
        return SharedPrefix(0, None, window)
    tokens = torch.tensor([list(heads[0][:shared])], device=lm.device)
    with projecting_only(lm.model, torch.zeros_like(tokens, dtype=torch.bool)):
        _, cache = call_on_cache(lm.model, None, input_ids=tokens)
    return SharedPrefix(shared, cache, window)


def common_prefix(rows: Heads) -> int:
    """How many leading ids all rows share, leaving at least one id to each row."""
    first, last = min(map(list, rows)), max(map(list, rows))  # in sorted order the two ends differ earliest
    shared = 0
    while shared < min(len(first), len(last)) and first[shared] == last[shared]:
        shared += 1
    return min(shared, min(len(row) for row in rows) - 1)


def _shortest_window(model: PreTrainedModel) -> float:
    config = model.config.get_text_config()
    found = [getattr(config, name, None) for name in WINDOWS]
    return min((size for size in found if isinstance(size, int) and size > 0), default=math.inf)


_CAN_SHARE: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def _can_share(lm: LM) -> bool:
    """Whether scores on a shared cache are those of plain passes; found once for each model."""
    model = lm.model
    if model not in _CAN_SHARE:
        config = model.config.get_text_config()
        tells = takes_positions(model) and not getattr(config, "alibi", False)
        if getattr(model, "_is_stateful", False) or not tells:
            _CAN_SHARE[model] = False
        else:
            agrees = _try_sharing(lm)
            if agrees is None:  # steered so far that there is nothing to compare
                return False
            _CAN_SHARE[model] = agrees
    return _CAN_SHARE[model]


def _try_sharing(lm: LM) -> bool | None:
    """Score a few short rows both ways; None if the model gives no finite numbers now."""
    start = sample_ids(lm.model, 3)
    heads = [[*start, *sample_ids(lm.model, 1, 3)], [*start, *sample_ids(lm.model, 4, 9)]]
    tails = [[sample_ids(lm.model, 2, 20)], [sample_ids(lm.model, 1, 30), sample_ids(lm.model, 3, 40)]]
    try:
        prefix = _compute(lm, heads)
        if not _is_plain_cache(prefix.cache):
            return False
        shared = [total for row in score_on_cache(lm, prefix, heads, tails) for total in row]
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError):  # a cache that cannot do this
        return False
    plain = [total for row in score_plainly(lm, heads, tails, [0, 0], 1, 1) for total in row]
    if not all(map(math.isfinite, [*plain, *shared])):
        return None
    bound = rounding_of(lm.model) * max(map(abs, plain))
    return not prefix.fits(heads, tails) or all(abs(a - b) <= bound for a, b in zip(plain, shared, strict=True))


def _is_plain_cache(cache: Any) -> bool:
    """Whether a cache holds keys and values alone: they can be repeated and picked row by row, a state cannot."""
    return type(cache) is DynamicCache and all(
        type(x) in (DynamicLayer, DynamicSlidingWindowLayer) for x in cache.layers
    )


def score_on_cache(lm: LM, prefix: SharedPrefix, heads: Heads, tails: Tails) -> list[list[float]]:
    """Totals of one batch: prompts on the cached prefix, then continuations on the cached prompts."""
    tokens, mask = pad_left([head[prefix.length :] for head in heads], lm.pad_id, lm.device)
    full = torch.cat([mask.new_ones(len(heads), prefix.length), mask], dim=1)
    cache = None
    if prefix.cache is not None:
        cache = copy.deepcopy(prefix.cache)
        cache.batch_repeat_interleave(len(heads))
    wanted = torch.zeros_like(tokens, dtype=torch.bool)
    wanted[:, -1] = True
    with projecting_only(lm.model, wanted):
        placed = positions(full)[:, prefix.length :]
        out, cache = call_on_cache(lm.model, cache, input_ids=tokens, attention_mask=full, position_ids=placed)
    owner = [row for row, texts in enumerate(tails) for _ in texts]
    flat = [text for texts in tails for text in texts]
    log_p = log_softmax(out.logits[0])  # (batch, vocabulary): the first token of every continuation
    rows = torch.tensor(owner, device=log_p.device)
    first = log_p[rows, torch.tensor([ids[0] for ids in flat], device=log_p.device)]
    rest = _continue(lm, cache, full, owner, flat)
    totals = iter((first.double() + rest.to(first.device)).tolist())
    return [[next(totals) for _ in texts] for texts in tails]


def _continue(lm: LM, cache: Any, full: Tensor, owner: list[int], flat: Sequence[Sequence[int]]) -> Tensor:
    """Summed log-probability of every continuation's tokens after its first: (continuations,)."""
    if all(len(ids) == 1 for ids in flat):
        return torch.zeros(len(flat))
    rows = torch.tensor(owner)  # on the CPU: the cache's layers may lie on several devices
    cache.batch_select_indices(rows)
    tokens, mask = pad_right([ids[:-1] or [lm.pad_id] for ids in flat], lm.pad_id, lm.device)
    targets, real = pad_right([ids[1:] or [lm.pad_id] for ids in flat], lm.pad_id, lm.device)
    real = real.bool() & torch.tensor([[len(ids) > 1] for ids in flat], device=real.device)
    seen = torch.cat([full[rows], mask], dim=1)
    with projecting_only(lm.model, real):
        placed = positions(seen)[:, full.shape[1] :]
        out, _ = call_on_cache(lm.model, cache, input_ids=tokens, attention_mask=seen, position_ids=placed)
    return sums_of_rows(target_log_probs(out.logits[0], targets[real]), real)


def score_plainly(
    lm: LM, heads: Heads, tails: Tails, prompts: Sequence[int], count: int, batch_size: int
) -> list[list[float]]:
    """Totals of one batch by whole rows, padded on the right: there, no causal model sees the padding.

    `prompts`: which of `count` prompts each head is.
    """
    rows = [(place, [*head, *tail], len(tail)) for place, head in enumerate(heads) for tail in tails[place]]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][1]))
    totals = [0.0] * len(rows)
    for part in _chunks(order, batch_size):
        with rows_of_batch([prompts[rows[i][0]] for i in part], count):
            found = _plain_totals(lm, [rows[i][1] for i in part], [rows[i][2] for i in part])
        for index, total in zip(part, found, strict=True):
            totals[index] = total
    given = iter(totals)
    return [[next(given) for _ in texts] for texts in tails]


def _chunks(order: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _plain_totals(lm: LM, rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[float]:
    """Summed log-probability of the last so many ids of each row."""
    tokens, mask = pad_right(rows, lm.pad_id, lm.device)
    ends = torch.tensor([[len(row)] for row in rows], device=tokens.device)
    place = torch.arange(1, tokens.shape[1], device=tokens.device)  # of the token that each position predicts
    wanted = (place < ends) & (place >= ends - torch.tensor(lengths, device=tokens.device)[:, None])
    with projecting_only(lm.model, torch.nn.functional.pad(wanted, (0, 1))):
        logits = lm.model(input_ids=tokens, attention_mask=mask, use_cache=False).logits[0]
    totals: list[float] = sums_of_rows(target_log_probs(logits, tokens[:, 1:][wanted]), wanted).tolist()
    return totals


def sums_of_rows(values: Tensor, where: Tensor) -> Tensor:
    """Values at the true places of `where` (batch, length), in row-major order, summed over each row: (batch,)."""
    sums = torch.zeros(len(where), dtype=values.dtype, device=values.device)
    return sums.index_add_(0, where.nonzero()[:, 0].to(values.device), values)


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities in float32 whatever the model's dtype."""
    return torch.log_softmax(logits.float(), dim=-1)


def target_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """(n, vocabulary) logits and (n,) ids -> (n,) log-probabilities."""
    logits = logits.float()
    picked = logits.gather(1, targets.to(logits.device)[:, None])[:, 0]
    return picked - logits.logsumexp(dim=-1)
