"""The keys and values of a running batch: rows join it and leave it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


def fresh_cache() -> DynamicCache:
    """A cache that keeps all tokens, in layers with a window too: their mask does what the window does."""
    return DynamicCache()


def can_join(cache: object) -> bool:
    """Whether every layer keeps the keys and values of all tokens: others could not be padded later."""
    return type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)


def _layers(cache: DynamicCache) -> list[DynamicLayer]:
    """The layers of a cache that others can join, which are all of one kind (see `can_join`)."""
    return [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]


def join(cache: DynamicCache, mask: Tensor, other: DynamicCache, other_mask: Tensor) -> Tensor:
    """Put the other cache's rows below this one's, the shorter of the two padded on the left.

    Masks are (batch, length), 1 where a token is; returns that of the joined cache.
    """
    width = max(mask.shape[1], other_mask.shape[1])
    found = []
    for mine, theirs in zip(_layers(cache), _layers(other), strict=True):
        keys = torch.cat([_widened(mine.keys, width), _widened(theirs.keys, width)])
        found.append((keys, torch.cat([_widened(mine.values, width), _widened(theirs.values, width)])))
    for layer, (keys, values) in zip(_layers(cache), found, strict=True):  # only once there was memory for all
        layer.keys, layer.values = keys, values
    masks = [pad(each, (width - each.shape[1], 0)) for each in (mask, other_mask)]
    return torch.cat(masks)


def _widened(states: Tensor | None, width: int) -> Tensor:
    """States (batch, heads, length, d) of that length, with zeros on the left."""
    assert states is not None
    return pad(states, (0, 0, width - states.shape[2], 0))


def keep_rows(cache: DynamicCache, mask: Tensor, rows: Sequence[int]) -> Tensor:
    """Drop all other rows, and the places on the left at which no row has a token; returns the mask."""
    mask = mask[torch.tensor(rows, device=mask.device)]
    skipped = int(mask.any(dim=0).long().argmax())
    for layer in _layers(cache):
        assert layer.keys is not None
        assert layer.values is not None
        index = torch.tensor(rows, device=layer.keys.device)
        layer.keys = layer.keys[index, :, skipped:]
        layer.values = layer.values[index, :, skipped:]
    return mask[:, skipped:]
