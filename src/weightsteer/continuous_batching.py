"""Replies by transformers' continuous batching: a reply that ends makes room for the next prompt at once.

On a GPU this keeps the batch full where replies differ in length. transformers packs the tokens of all rows into one,
so that a k for each prompt cannot be told apart, and it samples by itself. A model is believed only after a trial
against padded batches.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from .batches import SharedByAllRowsError, one_row_for_all
from .errors import SteerError, first_line

COLDEST = 1e-5  # temperatures below it mean the likeliest token, as 0 does: divided by less, scores overflow
Written = tuple[list[int], bool]  # the ids of a reply, and whether its logits were not numbers
PAGE = 256  # tokens of a block, as transformers has them by default
DIFFERS = "batching continuous: it does not write what padded batches write"
LOGGER = "ContinuousBatchingLogger"  # transformers' own name for it
_TRIED: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()  # "" or why it is not believed


@torch.no_grad()
def write_packed(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    stops: Sequence[int],
    pad: int,
    most: int,
) -> list[Written]:
    """What follows each row of ids, at most `most` of them at once; the likeliest token at temperature 0.

    Raises:
        SteerError: the model cannot be written with so, or transformers gave a row up.
    """
    drawn = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature >= COLDEST else {}
    ends: dict[str, Any] = {"eos_token_id": list(stops) or [-1], "pad_token_id": pad}
    settings = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=bool(drawn), **ends, **drawn)
    room: dict[str, Any] = {}
    if model.device.type == "cpu":  # by itself it takes most of the memory that is free, which there is everybody's
        longest = max(map(len, rows)) + max_new_tokens
        blocks = min(len(rows), most) * math.ceil(longest / PAGE) + 1
        room = {"num_blocks": blocks, "max_batch_tokens": max(longest, most)}
    packing = ContinuousBatchingConfig(
        max_requests_per_batch=most,
        auto_switch_to_flash=False,  # which would fetch code from the Hub
        return_logprobs=True,
        seed=int(torch.randint(2**31, ())),  # drawn, so that torch's own seed decides
        **room,
    )
    try:
        with _quiet():
            made = model.generate_batch(  # type: ignore[operator]
                inputs=[list(row) for row in rows], generation_config=settings, continuous_batching_config=packing
            )
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise SteerError(
            f"batching continuous: transformers does not take this model so ({first_line(error)})"
        ) from None
    failed = [one.error for one in made.values() if one.error]
    if failed or len(made) != len(rows):
        reason = str(failed[0]) if failed else f"{len(rows) - len(made)} of {len(rows)} replies are missing"
        raise SteerError(f"batching continuous: transformers could not write the replies ({reason})")
    return [(list(one.generated_tokens), any(map(math.isnan, one.logprobs))) for one in made.values()]


def why_not(
    model: PreTrainedModel, pad: int, row: Sequence[int], plainly: Callable[[], Sequence[Tensor]], rounding: float
) -> str:
    """Why a model is not written with so, tried once; empty if it is.

    Args:
        plainly: gives the logits (vocabulary,) of each token that a padded batch writes after `row`.
        rounding: of the model's logits, as a share of the largest.
    """
    if model not in _TRIED:
        steps = plainly()
        try:
            with torch.random.fork_rng():  # a trial is no draw
                ((found, _),) = write_packed(
                    model, [row], max_new_tokens=len(steps), temperature=0.0, stops=(), pad=pad, most=1
                )
            _TRIED[model] = "" if _follows(found, steps, rounding) else DIFFERS
        except SteerError as error:
            _TRIED[model] = str(error)
    return _TRIED[model]


def _follows(found: Sequence[int], steps: Sequence[Tensor], rounding: float) -> bool:
    """Whether the tokens are the likeliest ones, up to the first that is so but for rounding: there the two part."""
    for token, logits in zip(found, steps, strict=False):
        best = float(logits.max())
        if best > float(logits[token]):
            return best - float(logits[token]) <= rounding * float(logits.abs().max())
    return len(found) == len(steps)


def has_one_k(model: PreTrainedModel, row: Sequence[int]) -> bool:
    """Whether all prompts are steered alike, so that their tokens may lie in one row."""
    try:
        with one_row_for_all(), torch.no_grad():
            model(input_ids=torch.tensor([list(row[:1])], device=model.device))
    except SharedByAllRowsError:
        return False
    return True


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' lines about its own batches."""
    logger = logging.getLogger(LOGGER)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
