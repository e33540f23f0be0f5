"""What stands before every request: whose page it comes from, the key, and how much body is read.

A plain ASGI layer, so that a body that is too large is refused while it comes in and not after.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

MOST_BODY = 16 << 20  # bytes; no model's context holds more text
SLOWEST_BODY = 30.0  # seconds without a further part of the body
LINGER = 2.0  # seconds for which a body that was refused is read and thrown away, so that the client sees why
LOOPBACK = ("localhost", "127.0.0.1", "::1")
GONE: Message = {"type": "http.disconnect"}  # tells an application that no more will come
FREE = ("/",)  # paths without a key: the page, which asks for it


@dataclass(frozen=True)
class Guard:
    """The layer around an application. `hosts`: names under which it may be asked for; None: any."""

    app: App
    key: str | None = None
    hosts: tuple[str, ...] | None = None
    most_body: int = MOST_BODY
    slowest_body: float = SLOWEST_BODY

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer why not."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refused = self._refusal(scope["path"], headers)
        if refused is not None:
            await _refuse(receive, send, *refused)
            return
        await self._pass_on(scope, receive, send)

    def _refusal(self, path: str, headers: dict[bytes, str]) -> tuple[int, str] | None:
        """The status and the reason, if the request is refused before its body is read."""
        if self.hosts is not None and (reason := _foreign(headers, self.hosts)):
            return 403, reason
        if self.key is not None and path not in FREE and not _is_key(headers.get(b"authorization", ""), self.key):
            return 401, "the key is missing or wrong; send it as 'Authorization: Bearer KEY'"
        if headers.get(b"content-length", "0").isdigit() and int(headers.get(b"content-length", "0")) > self.most_body:
            return 413, self._too_large
        return None

    @property
    def _too_large(self) -> str:
        return f"the body is larger than {self.most_body >> 20} MiB"

    async def _pass_on(self, scope: Message, receive: Receive, send: Send) -> None:
        """Run the application on a body that is counted as it comes; what it answers to a cut one is not sent."""
        read, whole = 0, False
        refused: list[tuple[int, str]] = []

        async def counted() -> Message:
            nonlocal read, whole
            if whole:  # only the client's leaving is left to hear of
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), self.slowest_body)
            except TimeoutError:
                refused.append((408, f"no further part of the body came for {self.slowest_body:g} s"))
                return GONE
            read += len(message.get("body", b""))
            if read > self.most_body:
                refused.append((413, self._too_large))
                return GONE
            whole = not message.get("more_body", False)
            return message

        async def passed(message: Message) -> None:
            if not refused:
                await send(message)

        try:
            await self.app(scope, counted, passed)
        except Exception:
            if not refused:
                raise
        if refused:
            await _refuse(receive, send, *refused[0])


def _is_key(header: str, key: str) -> bool:
    """Whether a header holds the key; the comparison takes as long whatever it holds."""
    scheme, _, given = header.partition(" ")
    same = hmac.compare_digest(given.strip().encode("utf-8", "replace"), key.encode())
    return scheme.lower() == "bearer" and same


def _foreign(headers: dict[bytes, str], hosts: tuple[str, ...]) -> str:
    """Why a request seems to come from another site's page, by a name that leads to this machine; "" if it does not."""
    host, origin = headers.get(b"host", ""), headers.get(b"origin")
    asked, page = _split(f"//{host}"), origin and _split(origin)
    if asked is None or asked.hostname not in hosts:
        return f"the Host {host!r} is not this server's; ask for one of {', '.join(hosts)}, or start it with --host"
    if origin is not None and not (page and page.netloc == host):
        return f"a page of {origin!r} may not use this server; start it with --host to allow others"
    return ""


def _split(address: str) -> SplitResult | None:
    try:
        return urlsplit(address)
    except ValueError:
        return None


async def _refuse(receive: Receive, send: Send, status: int, message: str) -> None:
    """Answer at once, then read what still comes for a moment: a client that is cut off sees no answer."""
    kinds = {401: "authentication_error", 403: "permission_error"}
    error = {"message": message, "type": kinds.get(status, "invalid_request_error"), "param": None, "code": None}
    body = json.dumps({"error": error}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    try:
        async with asyncio.timeout(LINGER):
            while (await receive()).get("more_body", False):
                pass
    except TimeoutError:
        pass
    await send({"type": "http.response.body", "body": b"", "more_body": False})
