"""The handle of a running `applied` block: the strength k, a number or one for each row of the batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..batches import values_of_rows
from ..errors import SteerError
from ..schema import LARGEST_FLOAT, shown


class SteeringHandle:
    """The handle of a running `applied` block; set `k` to change the strength.

    `k` is a number, or a tensor (batch,) with one k per row of the batch. `lm` is what to generate with: what was
    given to `applied`, or for a system prompt the same under that prompt.
    """

    def __init__(self, k: float | Tensor, lm: Any = None) -> None:
        self.lm = lm
        self.on_change: list[Callable[[], None]] = []  # called after each change of k
        self.grid: tuple[int, int] | None = None  # (batch, length) of the model's running call, where that is known
        self.k = k

    @property
    def k(self) -> float | Tensor:
        """Multiples of the vector; 0 is the base model bit for bit."""
        return self._k

    @k.setter
    def k(self, k: float | Tensor) -> None:
        before = getattr(self, "_k", k)
        self._k = _checked(k)
        try:
            for follow in self.on_change:
                follow()
        except SteerError:  # one of them refuses it: all go back
            self._k = before
            for follow in self.on_change:
                with suppress(SteerError):
                    follow()
            raise

    def add_to(self, output: Tensor, delta: Tensor) -> Tensor:
        """output + k * delta, with k spread over rows where it is a tensor."""
        if isinstance(self._k, float):
            return torch.add(output, delta, alpha=self._k)
        return output + self.per_row(output) * delta

    def per_row(self, output: Tensor) -> Tensor:
        """k (batch,) shaped so that it multiplies output: (batch, ..., d), or (batch * length, d) where that is known.

        Raises:
            SteerError: the output has other rows than k.
        """
        assert isinstance(self._k, Tensor)
        k, rows = values_of_rows(self._k), output.shape[0]
        if self.grid is not None and output.ndim == 2 and rows == self.grid[0] * self.grid[1]:
            k = k.repeat_interleave(self.grid[1])
        elif output.ndim == 2 and self.grid is not None:
            raise SteerError(
                f"one k per row: a layer sees {rows} tokens of a batch of {self.grid[0]} x {self.grid[1]}, and not to "
                "which rows they belong; give one number"
            )
        if k.shape != (rows,):
            raise _other_rows(self._k, rows)
        return k.to(output).reshape(-1, *[1] * (output.ndim - 1))

    @property
    def is_zero(self) -> bool:
        """True when nothing is to be added, so that outputs stay bit-identical."""
        return isinstance(self._k, float) and self._k == 0.0


def _checked(k: float | Tensor) -> float | Tensor:
    if isinstance(k, Tensor) and k.ndim == 1:
        if not bool(torch.isfinite(k).all()):
            raise SteerError("k: expected finite numbers, found NaN or infinity among the rows")
        return k
    if isinstance(k, Tensor) and k.ndim > 1:
        raise SteerError(f"k has shape {tuple(k.shape)}; give one number, or a tensor (batch,) with one k per row")
    try:
        number = float(k)
    except OverflowError:  # a whole number that no float holds
        number = math.inf
    except (TypeError, ValueError, RuntimeError):
        raise SteerError(
            f"k: expected a number, or a tensor (batch,) with one k per row; found {type(k).__name__} {shown(k)}"
        ) from None
    if not abs(number) <= LARGEST_FLOAT:
        raise SteerError(f"k: expected a finite number up to {LARGEST_FLOAT:.3g}, found {shown(k)}")
    return number


def _other_rows(k: Tensor, rows: int) -> SteerError:
    return SteerError(
        f"k has shape {tuple(k.shape)} and the batch {rows} rows; give one number, or a tensor with one k per row"
    )


@contextmanager
def noting_the_batch(model: nn.Module, handle: SteeringHandle) -> Iterator[None]:
    """Tell the handle the batch and length of each call of the model, where k differs from row to row.

    Some layers see the tokens of all rows as one long list, and can be given each row's k only if the length is known.
    Beam search and several replies to one prompt make more rows than there are ks: the call is refused.
    """

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not isinstance(handle.k, Tensor):
            handle.grid = None
            return
        inputs = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args]
        rows = [t.shape[:2] for t in inputs if isinstance(t, Tensor) and t.ndim >= 2]  # the first is the tokens'
        handle.grid = (rows[0][0], rows[0][1]) if rows else None
        if handle.grid is not None and values_of_rows(handle.k).shape != (handle.grid[0],):
            raise _other_rows(handle.k, handle.grid[0])

    registered = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        registered.remove()
