"""Parts of a transformers model: its decoder blocks, its keys and values, and its logits at chosen positions only."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import Tensor, nn

from .errors import SteerError


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks, first to last: the outermost ModuleList, the longest if there are several.

    Raises:
        SteerError: the model has no ModuleList.
    """
    lists = [(name.count("."), -len(m), m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise SteerError(f"{type(model).__name__}: no decoder blocks found (no ModuleList in the model)")
    return min(lists, key=lambda entry: entry[:2])[2]


def is_packed(model: nn.Module) -> bool:
    """Whether transformers has quantised the model's weights, or loaded them so."""
    return bool(getattr(model, "is_quantized", False))


def call_on_cache(model: nn.Module, kept: Any, **inputs: Any) -> tuple[Any, Any]:
    """The model's output after the keys and values in `kept` (None: after nothing), and these with the new ones."""
    name = _name_of_cache(type(model).forward)
    out = model(**inputs, **{name: kept}, use_cache=True)
    return out, getattr(out, name)


@cache
def _name_of_cache(forward: Callable[..., Any]) -> str:
    """What a model's call names its argument and the field of its output; transformers 5.24 renamed both."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


@contextmanager
def projecting_only(model: nn.Module, wanted: Tensor) -> Iterator[None]:
    """Compute the vocabulary projection only where `wanted` (batch, length) is true.

    Inside, the model's logits have shape (1, wanted.sum(), vocabulary), in row-major order of the
    wanted positions. The selection happens at the projection's input, so a model's own scaling or
    soft-capping of logits, which acts entry by entry, is untouched.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]

    def select(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]
        return (hidden[wanted.to(hidden.device)].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def width_of(model: Any) -> int:
    """A model's hidden size: its config's, or else that of its input embeddings."""
    size = getattr(model.config.get_text_config(), "hidden_size", None)
    return size if isinstance(size, int) and size > 0 else int(model.get_input_embeddings().weight.shape[1])
