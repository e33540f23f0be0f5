"""Many requests to one server: so many at once, each tried again after what may pass, all ended by the first error."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from .request_errors import PassingError, pause_before

if TYPE_CHECKING:
    from anyio.from_thread import BlockingPortal

LONGEST_PAUSE = 60.0  # seconds before a request is tried again, whatever the server asks for

_under_way: set[Future[Any]] = set()  # of all threads: who gives up may not be who asks

Again = Callable[[int, str], None]  # called with the number of the attempt to come, and why
T = TypeVar("T")


def in_own_thread(work: Callable[..., Awaitable[T]], *arguments: Any) -> T:
    """What `work` gives, in an event loop of its own thread, since a notebook's thread runs one already.

    Ctrl-C or an error leaves the block, which cancels the requests under way instead of waiting for them.
    """
    from anyio.from_thread import start_blocking_portal

    with start_blocking_portal() as portal:
        return in_loop_of(portal, work, *arguments)


def in_loop_of(portal: BlockingPortal, work: Callable[..., Awaitable[T]], *arguments: Any) -> T:
    """What `work` gives, in an event loop that runs in another thread; `stop_asking` ends it."""
    found: Future[T] = portal.start_task_soon(work, *arguments)
    _under_way.add(found)
    try:
        return found.result()
    finally:
        _under_way.discard(found)


def stop_asking() -> None:
    """End the requests that other threads have under way; who waits for them gets a `CancelledError`."""
    for found in tuple(_under_way):
        found.cancel()


async def all_of(jobs: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all jobs, in their order; the first error cancels the others."""
    tasks = [asyncio.create_task(job) for job in jobs]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def tried(once: Callable[[], Awaitable[T]], retries: int, again: Again) -> T:
    """What `once` gives, tried again with growing pauses after what may pass.

    Raises:
        PassingError: it did not pass; the last failure.
    """
    for attempt in range(retries):
        try:
            return await once()
        except PassingError as error:
            failure = error
        again(attempt + 1, str(failure))
        pause = pause_before(attempt) if failure.pause is None else failure.pause
        await asyncio.sleep(min(pause, LONGEST_PAUSE))
    return await once()
