"""Verbs that serve a model and its vectors: `serve`, and `play`, which also opens the page."""

from __future__ import annotations

import importlib.util
import json
import shlex
import threading
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from ..errors import SteerError
from ..shown import note, say
from .loading import loading
from .options import Device, Dtype, Model, RemoteCode, TemplateVariables, drop_unset, load_lm, require_base, seen_on
from .serve_command import example_name

if TYPE_CHECKING:
    from ..lm import LM
    from ..vectors.weight_vector import WeightVector

PACKAGES = ("fastapi", "uvicorn")

Vectors = Annotated[list[str], typer.Argument(help="Folders of saved vectors, each also as NAME=FOLDER.")]
Host = Annotated[str | None, typer.Option(help="Address to listen on; default: 127.0.0.1, this machine alone.")]
Port = Annotated[int | None, typer.Option(min=0, max=65535, help="Port; 0 takes a free one. Default: 8080.")]
Key = Annotated[
    str | None, typer.Option(envvar="WEIGHTSTEER_API_KEY", help="Key that requests must send; the page asks for it.")
]
OutOfRangeOption = Annotated[
    str | None, typer.Option(help="k beyond the tested range: warn (default), refuse or clamp.")
]
MostRows = Annotated[int | None, typer.Option("--max-batch", min=1, help="Replies written at once. Default: 32.")]
Queue = Annotated[int | None, typer.Option(min=1, help="Requests that may wait; more get 429. Default: 256.")]


@loading
def serve(
    vectors: Vectors,
    model: Model = None,
    host: Host = None,
    port: Port = None,
    api_key: Key = None,
    out_of_range: OutOfRangeOption = None,
    max_batch: MostRows = None,
    queue: Queue = None,
    device: Device = None,
    dtype: Dtype = "auto",
    trust_remote_code: RemoteCode = False,
    chat_template_kwargs: TemplateVariables = None,
) -> None:
    """Serve a model with a dial: OpenAI's API, where the strength is the model's name, `syc@-0.72`.

    Sums are `syc@-0.7+gloomy@0.3`. Requests of different strengths share one batch. Ctrl-C ends.

    Example: weightsteer serve runs/syc/vector polite=runs/formal/vector
    """
    settings = {"host": host, "port": port, "api_key": api_key, "most_rows": max_batch, "most_waiting": queue}
    _serve(
        vectors, (model, device, dtype, trust_remote_code, chat_template_kwargs), settings, out_of_range, opens=False
    )


@loading
def play(
    vectors: Vectors,
    model: Model = None,
    host: Host = None,
    port: Port = None,
    api_key: Key = None,
    out_of_range: OutOfRangeOption = None,
    max_batch: MostRows = None,
    queue: Queue = None,
    device: Device = None,
    dtype: Dtype = "auto",
    trust_remote_code: RemoteCode = False,
    chat_template_kwargs: TemplateVariables = None,
) -> None:
    """Serve as `serve` does, and open the page with the sliders in the browser.

    Example: weightsteer play runs/syc/vector
    """
    settings = {"host": host, "port": port, "api_key": api_key, "most_rows": max_batch, "most_waiting": queue}
    _serve(vectors, (model, device, dtype, trust_remote_code, chat_template_kwargs), settings, out_of_range, opens=True)


def _serve(given: list[str], loading: Any, fields: dict[str, Any], out_of_range: str | None, *, opens: bool) -> None:
    require_packages()
    from ..serving.dial import out_of_range_named
    from ..serving.server import Settings
    from ..serving.server import serve as run

    chosen = out_of_range_named(out_of_range) if out_of_range else None
    settings = Settings(**drop_unset(**fields, out_of_range=chosen))
    vectors, folders = open_vectors(given)
    lm = _model_of(vectors, folders, *loading)
    vectors = {name: seen_on(lm, vector, folders[name]) for name, vector in vectors.items()}
    for name, vector in vectors.items():
        if vector.card.strength is None:
            note(f"{name}: its card has no tested range of k; `weightsteer calibrate` measures one")

    def ready(address: str, server: Any) -> None:
        for line in greeting(address, example_name(folders), settings.api_key is not None):
            say(line, flush=True)
        if opens:
            page = page_address(address, settings.api_key)  # one in a terminal reads it before it comes back
            threading.Thread(target=webbrowser.open, args=(page,), daemon=True).start()

    run(lm, vectors, settings, ready=ready)
    note("stopped")


def require_packages() -> None:
    """Raise if the packages of the extra `serve` are not installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise SteerError(f"serve: needs {' and '.join(missing)}; pip install 'weightsteer[serve]'")


def open_vectors(given: list[str]) -> tuple[dict[str, WeightVector], dict[str, Path]]:
    """The vectors by their names, and their folders; a vector's name is its folder's, unless given as NAME=FOLDER."""
    from ..named_folders import named_folders
    from ..vectors.weight_vector import WeightVector

    folders = named_folders(given)
    return {name: WeightVector.load(folder) for name, folder in folders.items()}, folders


def _model_of(
    vectors: dict[str, WeightVector],
    folders: dict[str, Path],
    model: str | None,
    device: str | None,
    dtype: str,
    trust: bool,
    template: str | None,
) -> LM:
    """The model that is named, else the one base of all vectors."""
    from ..checkpoints.locate import base_of
    from ..vectors.base_identity import require_same_base

    if model:
        return load_lm(model, device, dtype, trust, template)
    first = next(iter(vectors))
    card = vectors[first].card
    for vector in vectors.values():
        require_same_base(card, vector.card)
    require_base(card)
    return load_lm(base_of(card, folders[first]), device, dtype, trust, template, card.base_commit)


def greeting(address: str, strength: str, has_key: bool) -> list[str]:
    """What to say when the server is there: its address, and three ways to try it at a strength such as syc@0.5."""
    key = ' -H "Authorization: Bearer $WEIGHTSTEER_API_KEY"' if has_key else ""
    ask = json.dumps({"model": strength, "messages": [{"role": "user", "content": "Hello!"}]})
    client_key = 'os.environ["WEIGHTSTEER_API_KEY"]' if has_key else '"none"'
    return [
        f"serving at {address}/v1; Ctrl-C ends",
        f"  curl   curl {address}/v1/chat/completions -H 'Content-Type: application/json'{key} -d {shlex.quote(ask)}",
        f'  Python OpenAI(base_url="{address}/v1", api_key={client_key})'
        f'.chat.completions.create(model="{strength}", messages=[...])',
        f"  page   {address}/",
    ]


def page_address(address: str, key: str | None) -> str:
    """Where the browser goes: the key stands after the #, which a browser sends to no server."""
    return f"{address}/" if key is None else f"{address}/#key={quote(key, safe='')}"


VERBS = (serve, play)
