"""Gradient checkpointing: a block's activations are not kept, but computed again on the way back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..errors import SteerError


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Train with checkpointing until the block is left, and as before then.

    The embeddings' output is made to require gradients, since with frozen weights a block's input would not, and some
    ways to checkpoint then drop the block's gradients. What is computed again runs through the same hooks.

    Raises:
        SteerError: the model cannot do it.
    """
    found: Any = model
    enable = _named(found, "enable")
    try:
        enable({"use_reentrant": False})
    except (ValueError, NotImplementedError) as error:
        raise SteerError(
            f"gradient_checkpointing: {type(model).__name__} does not support it ({' '.join(str(error).split())}); "
            "leave it out, and lower batch_size or max_length"
        ) from None
    found.enable_input_require_grads()
    try:
        yield
    finally:
        found.disable_input_require_grads()
        _named(found, "disable")()


def _named(model: Any, what: str) -> Any:
    """transformers' method; since 5.23 it says activation, where older versions say gradient."""
    return getattr(model, f"activation_checkpointing_{what}", None) or getattr(model, f"gradient_checkpointing_{what}")
