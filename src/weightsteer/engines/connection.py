"""Requests to an engine's server: many at once, tried again after what may pass, bounded in time."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from ..errors import SteerError
from ..judges.asking import all_of, in_loop_of, in_own_thread, tried
from ..judges.keys import NO_KEY, Key
from ..judges.request_errors import PassingError, meaning_of, shorten
from ..progress import Progress, silent

if TYPE_CHECKING:
    from anyio.from_thread import BlockingPortal

MOST_BYTES = 1 << 28  # of one answer: the log-probabilities of a long prompt are megabytes
KNOCKING = 10.0  # seconds
MOST_AT_ONCE = 16  # threads that ask: several short works fill a server only together, and a kill loses all of them
T = TypeVar("T")

Read = Callable[[Any], T]  # what an answer holds; what is not of the expected form raises one of `MALFORMED`
MALFORMED = (KeyError, IndexError, TypeError, ValueError, AttributeError)
Ask = Callable[[str, Mapping[str, Any], Read[Any]], Awaitable[Any]]  # path, body, and how its answer is read
Job = Callable[[Ask], Awaitable[T]]  # one or more requests, one after the other


class StatusError(Exception):
    """An answer that says that something went wrong, as `meaning_of` reads it."""

    def __init__(self, response: Any, said: str) -> None:
        super().__init__(said)
        self.status_code: int = response.status_code
        self.response = response


@dataclass
class _Line:
    """An HTTP client, and how much goes through it at once."""

    client: Any
    gate: asyncio.Semaphore
    checks: asyncio.Semaphore  # for requests that are not to wait behind all others
    failed: str = ""  # why no further request is worth trying


@dataclass(frozen=True)
class Connection:
    """A server's address, and how much it is asked at once.

    Lost connections, timeouts, 408, 409, 429, 5xx and malformed answers are tried again with growing pauses.
    """

    url: str  # without a path, such as http://localhost:8000; an end of /v1 is taken off
    concurrency: int = 64  # requests under way at once
    key_env: str = "VLLM_API_KEY"  # the environment variable that holds the key; it may be absent
    retries: int = 12  # about a minute of pauses
    timeout: float = 300.0  # seconds for one request, from its start to the last byte of its answer
    lost: list[str] = field(default_factory=list, compare=False)  # why connections failed, of each that did
    _shared: list[tuple[BlockingPortal, _Line]] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and self.url.isprintable()
        except ValueError:
            usable = False
        if not usable or parts.username is not None or parts.query or parts.fragment:
            raise SteerError(
                f"engine's url {self.url.rpartition('@')[2].partition('?')[0]!r}: expected a server's address such as "
                "http://localhost:8000, without user name, password, '?' and '#'"
            )
        if self.concurrency < 1 or self.retries < 0 or self.timeout <= 0:
            raise SteerError("engine: expected concurrency of at least 1, retries of at least 0 and a timeout above 0")

    @property
    def root(self) -> str:
        """The address that paths are added to."""
        return self.url.rstrip("/").removesuffix("/v1").rstrip("/")

    @property
    def is_there(self) -> bool:
        """Whether anything listens at the address."""
        parts = urlsplit(self.root)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            with socket.create_connection((parts.hostname, port), timeout=KNOCKING):
                return True
        except OSError:
            return False

    def get(self, path: str, read: Read[T]) -> T:
        """What the answer to a GET holds.

        Raises:
            SteerError: the server cannot be reached, or refuses.
        """

        async def job(ask: Ask) -> T:
            found: T = await ask(path, {}, read)
            return found

        return self.all_of([job], method="GET", check=True)[0]

    @contextmanager
    def shared(self) -> Iterator[int]:
        """Until the block is left, the requests of all threads go through one client, `concurrency` at once in all.

        The value is how many threads are of use. One place is kept for the looks that each takes between its own
        requests. Once the server is given up, all that is asked fails at once, and is not tried for another minute.
        """
        from anyio.from_thread import start_blocking_portal

        with start_blocking_portal() as portal:
            line = portal.call(self._line, 1)
            self._shared.append((portal, line))
            try:
                yield min(self.concurrency, MOST_AT_ONCE)
            finally:
                self._shared.clear()
                portal.call(line.client.aclose)

    def give_up(self, error: SteerError) -> None:
        """Let all that is asked at once fail for this reason."""
        for _, line in self._shared:
            line.failed = line.failed or str(error)

    def all_of(
        self, jobs: Sequence[Job[T]], *, method: str = "POST", check: bool = False, progress: Progress = silent
    ) -> list[T]:
        """The results of all jobs, in their order.

        Args:
            check: do not wait behind what other threads ask.

        Raises:
            SteerError: the server cannot be reached, refuses, or goes on answering what is none of its answers.
        """
        if not jobs:
            return []
        for portal, line in self._shared:
            return in_loop_of(portal, self._through, line, jobs, method, check, progress)
        return in_own_thread(self._all_of, jobs, method, progress)

    async def _all_of(self, jobs: Sequence[Job[T]], method: str, progress: Progress) -> list[T]:
        line = await self._line()
        async with line.client:
            return await self._through(line, jobs, method, False, progress)

    async def _line(self, for_checks: int = 0) -> _Line:
        """A client for the event loop that runs this; so many of its places are for checks, if it has several."""
        import httpx2

        limits = httpx2.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
        key = Key.read(self.key_env)
        headers = {} if key.value == NO_KEY else {"Authorization": f"Bearer {key.value}"}
        # It follows no redirection, which would carry the prompts, or the key, to another server.
        client = httpx2.AsyncClient(base_url=self.root, headers=headers, timeout=None, limits=limits)
        apart = min(for_checks, self.concurrency - 1)
        gate = asyncio.Semaphore(self.concurrency - apart)
        return _Line(client, gate, asyncio.Semaphore(apart) if apart else gate)

    async def _through(
        self, line: _Line, jobs: Sequence[Job[T]], method: str, check: bool, progress: Progress
    ) -> list[T]:
        done, key = 0, Key.read(self.key_env)

        def again(attempt: int, reason: str) -> None:
            progress(done, len(jobs), f"{reason}; try {attempt + 1} of {self.retries + 1}")

        async def ask(path: str, body: Mapping[str, Any], read: Read[Any]) -> Any:
            if line.failed:
                raise SteerError(line.failed)
            try:
                return await tried(lambda: self._once(line.client, method, path, body, read, key), self.retries, again)
            except PassingError as failure:
                error = self._gave_up(failure)
                line.failed = str(error)
                raise error from None

        async def one(job: Job[T]) -> T:
            nonlocal done
            async with line.checks if check else line.gate:
                found = await job(ask)
            done += 1
            progress(done, len(jobs), "requests")
            return found

        return await all_of(one(job) for job in jobs)

    async def _once(self, client: Any, method: str, path: str, body: Mapping[str, Any], read: Read[T], key: Key) -> T:
        """One request, and what its answer holds; what went wrong is raised as what it means."""
        import httpx2

        try:
            async with asyncio.timeout(self.timeout):
                answer = await _answer(client, method, path, body)
        except TimeoutError:
            self.lost.append("the request timed out")
            raise PassingError("the request timed out") from None
        except (httpx2.HTTPError, StatusError) as error:
            meaning = meaning_of(error, self.root, str(body.get("model", "")), self.key_env, key)
            if isinstance(error, httpx2.HTTPError):
                self.lost.append(str(meaning))
            if isinstance(meaning, (PassingError, SteerError)):
                raise meaning from None
            raise SteerError(f"{self.root}: {shorten(error, key)}") from None  # it refuses a parameter of ours
        try:
            return read(json.loads(answer))
        except MALFORMED as error:
            found = f"{type(error).__name__}: {shorten(error, key)}"
            raise PassingError(
                f"{path}: its answer is malformed ({found})", advice="is this the kind of server that the recipe names?"
            ) from None

    def _gave_up(self, failure: PassingError) -> SteerError:
        question = f"is the server running, and quick enough for {self.concurrency} requests at once?"
        return SteerError(
            f"engine at {self.root}: {failure}, tried {self.retries + 1} times at up to {self.timeout:g} s; "
            f"{failure.advice or question} What was measured is kept; the same command goes on from there."
        )


async def _answer(client: Any, method: str, path: str, body: Mapping[str, Any]) -> bytes:
    """The body of an answer.

    Raises:
        StatusError: its status is none of success.
        PassingError: it is too long to be one of ours.
    """
    async with client.stream(method, path, json=dict(body) if method == "POST" else None) as response:
        found = bytearray()
        async for part in response.aiter_bytes():
            found += part
            if len(found) > MOST_BYTES:
                raise PassingError(f"{path}: its answer is longer than {MOST_BYTES} bytes")
    if response.status_code != 200:
        raise StatusError(response, _message(bytes(found)) or f"HTTP {response.status_code}")
    return bytes(found)


def _message(body: bytes) -> str:
    """What an error says, in OpenAI's form or in any other."""
    text = body.decode("utf-8", "replace")
    try:
        error = json.loads(text)
    except ValueError:
        return text
    inner = error.get("error", error) if isinstance(error, dict) else error
    return str(inner.get("message", inner)) if isinstance(inner, dict) else str(inner)
