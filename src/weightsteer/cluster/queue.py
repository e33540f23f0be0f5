"""Which job is next: one queue over many runs, each a row of stages. Knows nothing of processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

from ..errors import SteerError
from ..runs.bench import Job, RunRef
from ..runs.stages import Stage

TRIES = 3  # of a job whose worker died each time


@dataclass(eq=False)
class Work:
    """A run on its way: the stage that it is in, and what of it waits or is being done."""

    name: str
    ref: RunRef
    stages: Generator[Stage, None, None]
    stage: Stage | None = None
    waiting: deque[Job] = field(default_factory=deque)
    out: int = 0  # jobs that workers have
    failure: str = ""

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come of it."""
        return self.stage is None or bool(self.failure)


@dataclass(eq=False)
class Ticket:
    """A job that a worker has."""

    work: Work
    job: Job


class Queue:
    """All runs that are under way. A run that fails does not stop the others."""

    def __init__(self, works: list[Work]) -> None:
        self.works, self.done, self.total = works, 0, 0
        self._lost: dict[tuple[int, Job], int] = {}
        for work in works:
            self._advance(work)

    @property
    def is_over(self) -> bool:
        """Whether every run has ended."""
        return all(work.is_over for work in self.works)

    @property
    def unfinished(self) -> int:
        """Jobs that wait or that workers have."""
        return sum(len(work.waiting) + work.out for work in self.works if not work.is_over)

    def take(self, last: Work | None) -> Ticket | None:
        """The next job for a worker: of the run that it was on, else of the run that has most left."""
        ready = [work for work in self.works if work.waiting and not work.is_over]
        if not ready:
            return None
        work = last if last in ready else max(ready, key=lambda work: len(work.waiting) / (work.out + 1))
        work.out += 1
        return Ticket(work, work.waiting.popleft())

    def keep(self, ticket: Ticket, result: Any) -> None:
        """A job is done; the last one of a stage leads to the next."""
        work = ticket.work
        work.out -= 1
        if work.is_over:  # the run has failed meanwhile
            return
        self.done += 1
        assert work.stage is not None
        try:
            work.stage.keep(ticket.job, result)
        except SteerError as error:
            self._fail(work, str(error))
            return
        if not work.waiting and not work.out:
            self._advance(work)

    def lose(self, ticket: Ticket, reason: str) -> None:
        """The worker died: another does the job, unless it has cost several workers already."""
        work, key = ticket.work, (id(ticket.work), ticket.job)
        work.out -= 1
        self._lost[key] = self._lost.get(key, 0) + 1
        if self._lost[key] >= TRIES:
            self._fail(work, f"{ticket.job}: its worker died {TRIES} times ({reason}); is there enough memory for it?")
        elif not work.is_over:
            work.waiting.appendleft(ticket.job)

    def fail(self, ticket: Ticket, reason: str) -> None:
        """The job cannot be done, and so neither can its run."""
        ticket.work.out -= 1
        self._fail(ticket.work, reason)

    def _fail(self, work: Work, reason: str) -> None:
        work.failure = work.failure or reason
        self.total -= len(work.waiting)
        work.waiting.clear()
        work.stages.close()  # it gives the run's folder free

    def _advance(self, work: Work) -> None:
        """Go on to the next stage that has jobs."""
        try:
            work.stage = next((stage for stage in work.stages if stage.jobs), None)
        except SteerError as error:
            work.failure = str(error)
            return
        if work.stage is not None:
            work.waiting.extend(work.stage.jobs)
            self.total += len(work.stage.jobs)
