"""The routes: OpenAI's, and those of the dial."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from .. import __version__
from ..errors import SteerError
from ..lm import LM
from ..looping import loops, repeated_share
from ..schema import LONGEST_SHOWN
from .answers import Answers, Choice, error_body, token_text
from .asked import Asked, Piece
from .dial import Dial, RequestError
from .forms import ChatForm, FanForm, KlForm, TextForm
from .page import page
from .requests import Reader
from .rows import NOT_NUMBERS
from .token_kl import token_kl
from .worker import FullError, Job, Worker

WARNING = "X-Weightsteer-Warning"
LISTENING = 0.25  # seconds between two looks whether a client is still there
RETRY = {"Retry-After": "1"}


class RowError(SteerError):
    """A row could not be written to its end."""


@dataclass(frozen=True)
class Served:
    """What the routes work with."""

    lm: LM
    reader: Reader
    worker: Worker

    @property
    def dial(self) -> Dial:
        """The vectors by name."""
        return self.reader.dial

    def start(self, asked: Sequence[Asked], *, together: bool = False) -> Started:
        """Put rows into the queue.

        Raises:
            FullError: it has no room.
        """
        loop, came = asyncio.get_running_loop(), asyncio.Queue[list[Piece]]()

        def deliver(pieces: list[Piece]) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server ends
                loop.call_soon_threadsafe(came.put_nowait, pieces)

        job = Job(asked, deliver, together=together)
        self.worker.submit(job)
        return Started(job, came)


@dataclass(frozen=True)
class Started:
    """Rows in the queue or in the batch; `cancel` frees them."""

    job: Job
    came: asyncio.Queue[list[Piece]]

    def cancel(self) -> None:
        """Free what still waits or runs; nothing if all is done."""
        self.job.cancel()

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """What the rows write, as it comes, until all are finished; leaving early frees them.

        Raises:
            RowError: a row cannot go on.
        """
        left = len(self.job.asked)
        try:
            while left:
                found = await self.came.get()
                while not self.came.empty():
                    found = found + self.came.get_nowait()
                if failed := next((piece.error for piece in found if piece.error), ""):
                    raise RowError(failed)
                left -= sum(bool(piece.finish) for piece in found)
                yield found
        finally:
            self.cancel()


class RowStream(StreamingResponse):
    """Events of rows that are in the queue already, so that a full one was told by the status.

    The rows are freed however it ends, also if the client is gone before the first event.
    """

    def __init__(self, events: AsyncIterator[str], started: Started, warning: str) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no", **_warned(warning)}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.started = started

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See `StreamingResponse`."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.started.cancel()


async def while_there(request: Request, work: Awaitable[Any]) -> Any:
    """The result of some work, which is ended if the client goes away; None then."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait([task], timeout=LISTENING)
            if not task.done() and await request.is_disconnected():
                return None
        return task.result()
    finally:
        task.cancel()


async def _whole(served: Served, asked: Sequence[Asked], answers: Answers) -> Response:
    choices = [Choice() for _ in asked]
    async for pieces in served.start(asked).pieces():
        for piece in pieces:
            choices[piece.row].take(piece)
    return JSONResponse(answers.whole(choices), headers=_warned(answers.warning))


async def _streamed(started: Started, answers: Answers, usage: bool) -> AsyncIterator[str]:
    """OpenAI's events; an error is the last one."""
    asked = started.job.asked
    choices = [Choice() for _ in asked]
    head = answers.head(streamed=True)
    no_usage = {"usage": None} if usage else {}
    try:
        if answers.kind == "chat":
            for index in range(len(asked)):
                first = {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                yield _event({**head, "choices": [first], **no_usage})
        async for pieces in started.pieces():
            for index in dict.fromkeys(piece.row for piece in pieces):
                mine = [piece for piece in pieces if piece.row == index]
                made = answers.pieces(index, mine, choices[index])
                for piece in mine:
                    choices[index].take(piece)
                if (
                    made.get("text")
                    or made.get("delta", {}).get("content")
                    or made["finish_reason"]
                    or made["logprobs"]
                ):
                    yield _event({**head, "choices": [made], **no_usage})
        if usage:
            yield _event({**head, "choices": [], "usage": answers.usage(choices)})
    except SteerError as error:
        yield _event(error_body(str(error), _status_of(error)))
    yield "data: [DONE]\n\n"


async def _fan(started: Started) -> AsyncIterator[str]:
    """The events of `/dial/fan`."""
    texts = [""] * len(started.job.asked)
    try:
        async for pieces in started.pieces():
            for piece in pieces:
                texts[piece.row] += piece.text
                if piece.text:
                    yield _event({"index": piece.row, "delta": piece.text})
                if piece.finish:
                    text = texts[piece.row]
                    end = {"finish_reason": piece.finish, "loops": loops(text), "repeated": repeated_share(text)}
                    yield _event({"index": piece.row, **end})
    except SteerError as error:
        yield _event(error_body(str(error), _status_of(error)))
    yield "data: [DONE]\n\n"


async def _kl(served: Served, form: KlForm) -> Response:
    head, reply, setting = await asyncio.to_thread(served.reader.exchange, form)
    lm, worker = served.lm, served.worker
    future = worker.call(lambda steering: token_kl(lm, steering, head, reply, setting.strengths))
    try:
        found = await asyncio.wrap_future(future)
    finally:
        future.cancel()
    tokens = [{"text": token_text(lm.tokenizer, token), "kl": kl} for token, kl in zip(reply, found, strict=True)]
    return JSONResponse({"kl": sum(found) / len(found), "tokens": tokens}, headers=_warned(setting.warning))


def _event(value: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _warned(warning: str) -> dict[str, str]:
    """The header for a warning, in ASCII on one line."""
    return {WARNING: warning.encode("ascii", "replace").decode().replace("\n", " ")} if warning else {}


def _status_of(error: Exception) -> int:
    if isinstance(error, RequestError):
        return error.status
    if isinstance(error, FullError):
        return 503 if "shutting down" in str(error) else 429
    own = isinstance(error, RowError) and str(error) != NOT_NUMBERS  # those come of the strengths that were asked for
    return 500 if own else 400


def make_app(served: Served) -> FastAPI:
    """The application."""
    app = FastAPI(title="weightsteer", version=__version__, docs_url=None, redoc_url=None)  # those load scripts
    _add_errors(app)
    _add_openai(app, served)
    _add_dial(app, served)
    return app


def _add_openai(app: FastAPI, served: Served) -> None:
    reader = served.reader

    async def answer(request: Request, form: ChatForm | TextForm, read: Callable[[Any], Any]) -> Response:
        asked, answers = await asyncio.to_thread(read, form)
        if not form.stream:
            found = await while_there(request, _whole(served, asked, answers))
            return found if found is not None else Response(status_code=499)
        usage = form.stream_options is not None and form.stream_options.include_usage
        started = served.start(asked)
        return RowStream(_streamed(started, answers, usage), started, answers.warning)

    @app.post("/v1/chat/completions")
    async def chat(request: Request, form: ChatForm) -> Response:
        return await answer(request, form, reader.chat)

    @app.post("/v1/completions")
    async def text(request: Request, form: TextForm) -> Response:
        return await answer(request, form, reader.text)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(served.dial, name) for name in served.dial.models]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        served.dial.setting(name)
        return _model(served.dial, name)


def _model(dial: Dial, name: str) -> dict[str, Any]:
    parent = {} if name == dial.base else {"parent": dial.base}
    return {"id": name, "object": "model", "created": 0, "owned_by": "weightsteer", **parent}


def _add_dial(app: FastAPI, served: Served) -> None:
    @app.get("/")
    async def playground() -> Response:
        text, headers = page()
        return HTMLResponse(text, headers=headers)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", **served.worker.load}

    @app.get("/dial")
    async def dial() -> dict[str, Any]:
        return served.dial.described()

    @app.post("/dial/fan")
    async def fan(form: FanForm) -> Response:
        asked, warning = await asyncio.to_thread(served.reader.fan, form)
        started = served.start(asked, together=True)
        return RowStream(_fan(started), started, warning)

    @app.post("/dial/kl")
    async def kl(request: Request, form: KlForm) -> Response:
        found = await while_there(request, _kl(served, form))
        return found if found is not None else Response(status_code=499)


def _add_errors(app: FastAPI) -> None:
    """Every mistake in OpenAI's shape."""

    @app.exception_handler(SteerError)
    async def ours(request: Request, error: SteerError) -> Response:
        status = _status_of(error)
        param, code = getattr(error, "param", None), getattr(error, "code", None)
        headers = RETRY if status in (429, 503) else None
        return JSONResponse(error_body(str(error), status, param, code), status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        message, param = _first_mistake(error)
        return JSONResponse(error_body(message, 400, param), 400)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(error_body(message, error.status_code), error.status_code)


def _first_mistake(error: RequestValidationError) -> tuple[str, str | None]:
    """What is wrong with a request's body, and in which field."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "no such field here"
    if first["type"] == "json_invalid":
        return f"the body is no JSON: {first.get('ctx', {}).get('error', message)}"[:1000], None
    if not place:
        if isinstance(first.get("input"), bytes):
            message = "expected JSON; send the header 'Content-Type: application/json'"
        return message[:1000], None
    return f"{'.'.join(place)}: {message}"[:1000], place[0][:LONGEST_SHOWN]
