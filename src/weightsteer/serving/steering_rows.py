"""Several vectors on one model, each row of a batch at its own strengths where the vectors allow it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Protocol

import torch

from ..batches import pad_left
from ..errors import SteerError
from ..generation import sample_ids
from ..lm import LM
from ..vectors.handle import SteeringHandle
from ..vectors.weight_vector import WeightVector
from .asked import Strengths


class SteeringRows(Protocol):
    """A model whose next calls are steered, row by row."""

    @property
    def mixed(self) -> bool:
        """Whether the rows of one batch may have different strengths."""
        ...

    def set(self, rows: Sequence[Strengths]) -> None:
        """The strengths of the next calls' rows.

        Raises:
            SteerError: they differ, and may not.
        """
        ...


class _RowByRow:
    """One block of `applied` for each vector, one inside the other, so that their changes add up."""

    mixed = True

    def __init__(self, handles: Mapping[str, SteeringHandle]) -> None:
        self.handles = handles

    def set(self, rows: Sequence[Strengths]) -> None:
        """See `SteeringRows`; where all rows are at one k it is one number, which costs less, and 0 costs nothing."""
        for name, handle in self.handles.items():
            ks = [row.get(name, 0.0) for row in rows]
            handle.k = ks[0] if len(set(ks)) == 1 else torch.tensor(ks)


class _OneAtATime:
    """The sum of the vectors at one set of strengths, for vectors that change parameters in their place."""

    mixed = False

    def __init__(self, lm: LM, vectors: Mapping[str, WeightVector], stack: ExitStack) -> None:
        self.lm, self.vectors = lm, vectors
        self._stack = stack
        self._now: dict[str, float] = {}

    def set(self, rows: Sequence[Strengths]) -> None:
        """See `SteeringRows`."""
        wanted = {name: k for name, k in rows[0].items() if k}
        if any({name: k for name, k in row.items() if k} != wanted for row in rows):
            raise SteerError("these vectors cannot have one k per row; ask for one strength at a time")
        if wanted == self._now:
            return
        self._stack.close()
        self._now = {}
        if len(wanted) == 1:
            [(name, k)] = wanted.items()
            self._stack.enter_context(self.vectors[name].applied(self.lm, k))
        elif wanted:
            first, *others = [self.vectors[name] * k for name, k in sorted(wanted.items())]
            self._stack.enter_context(sum(others, first).applied(self.lm, 1.0))
        self._now = wanted


@contextmanager
def steering_rows(lm: LM, vectors: Mapping[str, WeightVector]) -> Iterator[SteeringRows]:
    """Steer the model in this thread until the block is left.

    Raises:
        SteerError: a vector does not fit the model.
    """
    with ExitStack() as stack:
        found = _row_by_row(lm, vectors, stack)
        yield found or _OneAtATime(lm, vectors, stack)


def _row_by_row(lm: LM, vectors: Mapping[str, WeightVector], stack: ExitStack) -> _RowByRow | None:
    """All vectors applied, if two rows at two strengths go through the model; else nothing is left applied."""
    try:
        handles = {name: stack.enter_context(vector.applied(lm, 0.0)) for name, vector in vectors.items()}
        found = _RowByRow(handles)
        found.set([dict.fromkeys(vectors, 1.0), {}])
        tokens, mask = pad_left([sample_ids(lm.model, 2), sample_ids(lm.model, 3)], lm.pad_id, lm.device)
        with torch.no_grad():
            lm.model(input_ids=tokens, attention_mask=mask, use_cache=False)
        found.set([{}])
    except SteerError:
        stack.close()
        for vector in vectors.values():
            with vector.applied(lm, 0.0):  # raises what makes the vector fit this model not at all
                pass
        return None
    return found
