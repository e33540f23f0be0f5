"""The options by which a model is put into memory: the same for every verb that loads one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..checkpoints.load_options import LoadOptions

OPTIONS: dict[str, Any] = {  # name of the parameter -> its type and help
    "quantize": Annotated[
        str | None, typer.Option("--quantize", help="nf4 or int8: pack the weights into 4 or 8 bits by bitsandbytes.")
    ],
    "attention": Annotated[
        str | None, typer.Option("--attention", help="sdpa, flash_attention_2 or eager; default: transformers' choice.")
    ],
    "max_memory": Annotated[
        str | None, typer.Option("--max-memory", help="Most memory for weights by device: 0=20GiB,cpu=60GiB.")
    ],
    "device_map": Annotated[
        str | None, typer.Option("--device-map", help="auto, balanced, sequential, or a JSON object of modules.")
    ],
    "batching": Annotated[
        str | None, typer.Option("--batching", help="continuous: a reply that ends makes room for the next; or padded.")
    ],
}
NONE_TYPED: tuple[str | None, ...] = (None,) * len(OPTIONS)
_TYPED: ContextVar[tuple[str | None, ...]] = ContextVar("loading options of the command", default=NONE_TYPED)


def loading(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb with these options too, which `typed_options` gives to what loads the model inside it."""
    own = inspect.signature(verb, eval_str=True)  # typer takes what a given signature holds as it stands

    @functools.wraps(verb)
    def with_options(*args: Any, **given: Any) -> None:
        token = _TYPED.set(tuple(given.pop(name, None) for name in OPTIONS))
        try:
            verb(*args, **given)
        finally:
            _TYPED.reset(token)

    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint)
        for name, hint in OPTIONS.items()
    ]
    with_options.__signature__ = own.replace(parameters=[*own.parameters.values(), *more])  # type: ignore[attr-defined]
    with_options.__annotations__ = {**verb.__annotations__, **OPTIONS}
    return with_options


def typed_options() -> LoadOptions | None:
    """The options of the command that runs; None where none was typed.

    Raises:
        SteerError: a value that no option takes.
    """
    if not any(_TYPED.get()):
        return None
    from ..checkpoints.load_options import LoadOptions

    return LoadOptions.of_texts(*_TYPED.get())


def typed_words() -> list[str]:
    """The options as they were typed, for a command that does the same again."""
    typed = zip(OPTIONS, _TYPED.get(), strict=True)
    return [word for name, value in typed if value for word in (f"--{name.replace('_', '-')}", value)]
