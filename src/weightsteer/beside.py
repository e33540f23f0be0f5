"""Work that waits for a server, done beside work that keeps this machine busy."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import TypeVar

T = TypeVar("T")

WAITING = 2  # works that wait for a server while others are prepared: more would lose more to a kill
LOOK = 0.1  # seconds between two looks whether work that is to end has ended


def beside(works: Iterable[Callable[[], T]], *, waiting: int, stop: Callable[[], None]) -> Generator[T]:
    """The results of works, in their order.

    One thread does them, one after the other, while `works` goes on to prepare the next in the caller's thread. Results
    are the same as without the thread, and only their time differs.

    Args:
        waiting: how many works may wait or be under way while the next is prepared; 0: each is done at once, in the
            caller's thread.
        stop: called when the caller gives up, by an error or Ctrl-C: it ends the work under way.

    Raises:
        Exception: what a work raised, in its turn.
    """
    if not waiting:
        for work in works:
            yield work()
        return
    pool, pending = ThreadPoolExecutor(1, "weightsteer-beside"), deque[Future[T]]()
    try:
        for work in works:
            pending.append(pool.submit(work))
            while pending and (len(pending) > waiting or pending[0].done()):
                yield _first(pending)
        while pending:
            yield _first(pending)
    finally:
        _end(pending, stop)
        pool.shutdown()


def as_they_end(works: Iterable[Callable[[], T]], *, at_once: int, stop: Callable[[], None]) -> Generator[Future[T]]:
    """Each work once it has ended, with its result or its error; so many are done at once, each in a thread.

    A work that fails ends none of the others. The next is taken from `works` when a thread is free.

    Args:
        stop: as for `beside`.
    """
    pool, under_way, rest = ThreadPoolExecutor(at_once, "weightsteer-at-once"), list[Future[T]](), iter(works)
    try:
        while True:
            under_way += [pool.submit(work) for work in islice(rest, at_once - len(under_way))]
            if not under_way:
                return
            wait(under_way, return_when=FIRST_COMPLETED)
            ended = [future for future in under_way if future.done()]
            under_way = [future for future in under_way if future not in ended]
            yield from ended
    finally:
        _end(under_way, stop)
        pool.shutdown()


def _end(pending: Collection[Future[T]], stop: Callable[[], None]) -> None:
    """Give up what is not done; returns once it has ended."""
    for future in pending:
        future.cancel()
    while not all(future.done() for future in pending):  # one may just begin its next request
        stop()
        wait(pending, timeout=LOOK)


def _first(pending: deque[Future[T]]) -> T:
    """The oldest result, once it is there; until then it counts as under way."""
    made = pending[0].result()
    pending.popleft()
    return made
