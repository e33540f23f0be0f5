"""The model behind a server that a verb asks instead of one in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from ..engines.kinds import Kind
from ..errors import SteerError
from .options import drop_unset, template_variables

if TYPE_CHECKING:
    from ..engines.served_model import ServedModel

Engine = Annotated[
    str | None, typer.Option(help=f"Kind of the server that answers: {', '.join(get_args(Kind))}.", metavar="KIND")
]
EngineUrl = Annotated[
    str | None,
    typer.Option(help="A server that answers instead of a model in memory: http://localhost:8000; see --engine."),
]
Concurrency = Annotated[int | None, typer.Option(min=1, help="Requests at once to that server.")]


@contextmanager
def served_model(
    url: str, kind: str | None, concurrency: int | None, model: str | None, template: str | None
) -> Iterator[tuple[ServedModel, int]]:
    """The server's base, and how many works may ask it at once; only the tokenizer and template are read here.

    Raises:
        SteerError: no or an unknown kind, a server that cannot be reached, or no such model here.
    """
    if kind not in get_args(Kind):
        raise SteerError(
            f"--engine: expected one of {', '.join(get_args(Kind))} beside --engine-url, found {kind or 'none'}"
        )
    from ..checkpoints.embedded_model import EMBEDDED_NAME
    from ..engines.served_model import ServedModel
    from ..engines.tokens import tokens_of

    local = tokens_of(model or EMBEDDED_NAME, template_variables(template))
    served = ServedModel.connect(url, cast("Kind", kind), local, **drop_unset(concurrency=concurrency))
    with served.connection.shared() as at_once:
        yield served, at_once
