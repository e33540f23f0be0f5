"""The server under test: in a thread of this process, on a free port of this machine."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from queue import Queue
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import uvicorn
from openai import OpenAI

from weightsteer.lm import LM
from weightsteer.serving.server import Settings, serve
from weightsteer.vectors.weight_vector import WeightVector

Headers = Mapping[str, str]


@dataclass(frozen=True)
class Address:
    """Where the server listens, and plain requests to it."""

    url: str

    def client(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def ask(self, path: str, body: object = None, headers: Headers | None = None) -> tuple[int, Headers, Any]:
        """Status, headers and body of a GET, or of a POST of JSON (or of bytes)."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        request = Request(f"{self.url}{path}", data, {"Content-Type": "application/json", **(headers or {})})
        try:
            with urlopen(request, timeout=60) as reply:
                return reply.status, reply.headers, _read(reply.read())
        except HTTPError as error:
            return error.code, error.headers, _read(error.read())

    def events(self, path: str, body: object) -> list[Any]:
        """The events of a stream, which has to end as it should."""
        _, _, text = self.ask(path, body)
        lines = [line.removeprefix("data: ") for line in str(text).splitlines() if line]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]


def _read(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return content.decode()


@contextmanager
def served(lm: LM, vectors: Mapping[str, WeightVector], **settings: Any) -> Iterator[Address]:
    """Serve until the block is left."""
    ready: Queue[tuple[str, uvicorn.Server] | BaseException] = Queue()

    def run() -> None:
        try:
            chosen = replace(Settings(port=0), **settings)
            serve(lm, vectors, chosen, ready=lambda address, server: ready.put((address, server)))
        except BaseException as error:
            ready.put(error)

    thread = threading.Thread(target=run)
    thread.start()
    found = ready.get(timeout=60)
    if isinstance(found, BaseException):
        thread.join()
        raise found
    try:
        yield Address(found[0])
    finally:
        found[1].should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive()
