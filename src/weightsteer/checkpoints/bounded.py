"""A config's sizes against what is stored: a model that a config makes up is not built."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..errors import SteerError
from .checkpoint import is_checkpoint, stored_tensors

MOST_MODULES = 200_000  # where it is not known how many tensors there are
MODULES_PER_TENSOR = 4  # a layer with its own module, its activation, and the blocks around it
MOST_ROWS = 1 << 30  # of all parameters together, where no files tell more: a trillion parameters have a third of it
SMALL = 2_000  # modules that are built in a moment


@contextmanager
def bounded_modules(tensors: int | None) -> Iterator[None]:
    """Stop the building of a model that has far more modules than there are tensors to fill them.

    A config may ask for a billion layers, under any of the names that architectures have for their number; so what is
    counted is what is built.

    Args:
        tensors: how many tensors the model's files hold; None where that is not known.

    Raises:
        SteerError: in the block, when the bound is passed.
    """
    most = MOST_MODULES if tensors is None else SMALL + MODULES_PER_TENSOR * tensors
    built = 0

    def count(parent: nn.Module, name: str, module: Any) -> None:
        nonlocal built
        built += 1
        if built > most:
            held = "" if tensors is None else f", and its files hold {tensors} tensors"
            raise SteerError(
                f"its config asks for a model of more than {most} modules{held}; check its numbers of layers and "
                "experts, or download it again"
            )

    registered = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        registered.remove()


def count_stored(folder: Path) -> int | None:
    """How many tensors a folder's safetensors hold; None where there are none, or they cannot be read."""
    if not is_checkpoint(folder):
        return None
    try:
        return len(stored_tensors(folder))
    except SteerError:  # told of by what needs the tensors
        return None


def require_stored(folder: Path, rows: int) -> None:
    """Check that a folder's files can hold so many rows of parameters: each takes one number at least.

    Raises:
        SteerError: they hold fewer numbers.
    """
    held = MOST_ROWS
    if is_checkpoint(folder):
        with suppress(SteerError):  # told of by what needs the tensors
            held = sum(math.prod(tensor.shape) for tensor in stored_tensors(folder).values())
    if rows > held:
        raise SteerError(
            f"its config asks for parameters of {rows} rows, more than its files can hold; check its sizes, or "
            "download it again"
        )
