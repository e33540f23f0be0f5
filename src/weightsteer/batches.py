"""Rows of token ids in batches, and which prompts the rows are, for those who have one k for each prompt."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from .errors import SteerError
from .progress import Progress, silent


def batches_by_length(lengths: Sequence[int], batch_size: int, progress: Progress = silent) -> Iterator[list[int]]:
    """Batches of indices of like length, longest first, so that memory peaks at the start."""
    if batch_size < 1:
        raise SteerError(f"batch size must be at least 1, found {batch_size}")
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    total = math.ceil(len(order) / batch_size)
    for done, start in enumerate(range(0, len(order), batch_size)):
        yield order[start : start + batch_size]
        progress(done + 1, total)


def batches_of_one_length(lengths: Sequence[int], batch_size: int, progress: Progress = silent) -> Iterator[list[int]]:
    """As `batches_by_length`, but a batch holds rows of one length, so that none is padded."""
    done = 0
    for batch in batches_by_length(lengths, batch_size):
        for _, part in groupby(batch, key=lambda index: lengths[index]):
            indices = list(part)
            yield indices
            done += len(indices)
        progress(done, len(lengths))


def pad_left(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of ids -> (ids, mask), both (batch, longest), the padding on the left."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def pad_right(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of ids -> (ids, mask), both (batch, longest), the padding on the right."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([list(row) + [pad] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return ids, mask


class SharedByAllRowsError(SteerError):
    """One row is computed for all prompts, and a value differs from prompt to prompt."""


@dataclass(frozen=True)
class _Rows:
    indices: Sequence[int] | None  # None: one computation serves all prompts
    prompts: int | None = None  # None: as many as there are values


_CURRENT: ContextVar[_Rows | None] = ContextVar("rows of the batch", default=None)


@contextmanager
def rows_of_batch(indices: Sequence[int], prompts: int | None = None) -> Iterator[None]:
    """Inside, row i of each batch is of prompt `indices[i]`, of so many prompts where their number is known."""
    token = _CURRENT.set(_Rows(indices, prompts))
    try:
        yield
    finally:
        _CURRENT.reset(token)


@contextmanager
def one_row_for_all() -> Iterator[None]:
    """Inside, what is computed stands for every prompt: `values_of_rows` raises `SharedByAllRowsError`."""
    token = _CURRENT.set(_Rows(None))
    try:
        yield
    finally:
        _CURRENT.reset(token)


def values_of_rows(values: Tensor) -> Tensor:
    """Values (prompts,) as values of the batch's rows (batch,); as they are where no one has said what the rows are.

    Raises:
        SteerError: another number of values than of prompts.
        SharedByAllRowsError: inside `one_row_for_all`.
    """
    current = _CURRENT.get()
    if current is None:
        return values
    if current.indices is None:
        raise SharedByAllRowsError("one k for each prompt, and a computation that all prompts share")
    if current.prompts is not None and values.shape[:1] != (current.prompts,):
        raise SteerError(
            f"k has shape {tuple(values.shape)} and there are {current.prompts} prompts; "
            "give one number, or a tensor with one k for each prompt"
        )
    return values[torch.tensor(current.indices, dtype=torch.long, device=values.device)]
