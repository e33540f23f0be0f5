"""One thread owns the model: it takes jobs from a bounded queue, and hands back what their rows write."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from ..errors import SteerError, first_line
from ..generation import hidden_tokens
from ..lm import LM
from ..vectors.weight_vector import WeightVector
from .asked import Asked, Piece
from .batch import Batch, sharing_of
from .rows import Row
from .steering_rows import SteeringRows, steering_rows

MOST_ROWS = 32  # in one batch, unless more are asked for
MOST_WAITING = 256  # requests in the queue, unless more are asked for
ENDED = "the server is shutting down"

T = TypeVar("T")
Deliver = Callable[[list[Piece]], None]  # called in the worker's thread with what rows have written in a step


class FullError(SteerError):
    """The queue has no room: ask again later."""


class Job:
    """The rows of one request. `together`: they are to run side by side in one batch."""

    def __init__(self, asked: Sequence[Asked], deliver: Deliver, *, together: bool = False) -> None:
        self.asked, self.deliver, self.together = asked, deliver, together
        self.cancelled = False

    def cancel(self) -> None:
        """Nobody waits for it any more: its rows are freed before the next step."""
        self.cancelled = True


class Worker:
    """The model's thread. Use it as a context manager."""

    def __init__(
        self,
        lm: LM,
        vectors: Mapping[str, WeightVector],
        *,
        most_rows: int = MOST_ROWS,
        most_waiting: int = MOST_WAITING,
    ) -> None:
        self.lm, self.vectors = lm, vectors
        self.most_rows, self.most_waiting = most_rows, most_waiting
        self._hidden = frozenset(hidden_tokens(lm.tokenizer))
        self._waiting: deque[Row] = deque()
        self._calls: deque[tuple[Callable[[SteeringRows], Any], Future[Any]]] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._running = 0
        self._started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="weightsteer-worker", daemon=True)

    def __enter__(self) -> Worker:
        """Start; returns once the vectors are on the model.

        Raises:
            SteerError: a vector does not fit the model.
        """
        self._thread.start()
        self._started.result()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop after the step that runs; what is unfinished is told so."""
        self.stop()
        self._thread.join()

    def stop(self) -> None:
        """Ask the thread to end."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    @property
    def load(self) -> dict[str, int]:
        """How many rows run, and how many requests wait."""
        with self._changed:
            return {"running": self._running, "waiting": self._requests_waiting()}

    def submit(self, job: Job) -> None:
        """Put a job into the queue.

        Raises:
            FullError: there is no room.
        """
        rows = [Row(asked, job, place, self.lm.tokenizer, self._hidden) for place, asked in enumerate(job.asked)]
        with self._changed:
            self._refuse_if_full()
            self._waiting.extend(rows)
            self._changed.notify()

    def call(self, compute: Callable[[SteeringRows], T]) -> Future[T]:
        """Have a computation run between two steps of the batch.

        Raises:
            FullError: there is no room.
        """
        found: Future[T] = Future()
        with self._changed:
            self._refuse_if_full()
            self._calls.append((compute, found))
            self._changed.notify()
        return found

    def _refuse_if_full(self) -> None:
        if self._stopping:
            raise FullError(ENDED)
        if self._requests_waiting() >= self.most_waiting:
            raise FullError(f"{self.most_waiting} requests are waiting, and the queue takes no more; try again later")

    def _requests_waiting(self) -> int:
        calls = sum(not future.cancelled() for _, future in self._calls)
        return len({id(row.job) for row in self._waiting}) + calls

    def _run(self) -> None:
        try:
            sharing = sharing_of(self.lm)
            with steering_rows(self.lm, self.vectors) as steering:
                self._started.set_result(None)
                batch = Batch(self.lm, steering, sharing)
                try:
                    self._serve(batch, steering)
                finally:  # no client waits for a row that nobody goes on with
                    _tell([(row, row.fail(ENDED)) for row in batch.clear()])
        except BaseException as error:
            if not self._started.done():
                self._started.set_exception(error)
                return
            raise
        finally:
            self._end_all()

    def _serve(self, batch: Batch, steering: SteeringRows) -> None:
        while True:
            with self._changed:
                while not (self._stopping or self._waiting or self._calls or batch.rows):
                    self._changed.wait()
                if self._stopping:
                    return
                call = self._calls.popleft() if self._calls else None
                self._drop_cancelled()
                _free_done(batch)
                new = batch.admissible(tuple(self._waiting), self.most_rows)
                for row in new:
                    self._waiting.remove(row)
            if call is not None:
                _answer(*call, steering)
            self._advance(batch, new)
            with self._changed:
                self._running = len(batch.rows)

    def _advance(self, batch: Batch, new: list[Row]) -> None:
        """A step of the rows that run, then the new ones start; an error ends the rows that it concerns."""
        if batch.rows:
            try:
                _tell(batch.step())
            except Exception as error:
                _lose(batch.clear(), error)
            _free_done(batch)
        try:
            for written in batch.add(new) if new else ():
                _tell(written)
        except Exception as error:
            _lose([row for row in new if row not in batch.rows], error)
        _free_done(batch)

    def _drop_cancelled(self) -> None:
        for row in [row for row in self._waiting if row.job.cancelled]:
            self._waiting.remove(row)

    def _end_all(self) -> None:
        with self._changed:
            self._stopping = True
            _tell([(row, row.fail(ENDED)) for row in self._waiting])
            self._waiting.clear()
            for _, future in self._calls:
                if future.set_running_or_notify_cancel():
                    future.set_exception(FullError(ENDED))
            self._calls.clear()


def _free_done(batch: Batch) -> None:
    """Free the places of the rows that are done; where there is no memory to move the others, they end too."""
    try:
        batch.drop_done()
    except Exception as error:
        _lose(batch.clear(), error)


def _lose(rows: Sequence[Row], error: Exception) -> None:
    """End rows by an error: strengths that the model cannot take, no memory, or a fault, of which the others go on."""
    _tell([(row, row.fail(first_line(error))) for row in rows if not row.is_done])


def _answer(compute: Callable[[SteeringRows], Any], future: Future[Any], steering: SteeringRows) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(compute(steering))
    except Exception as error:
        future.set_exception(error)


def _tell(written: Sequence[tuple[Row, Piece]]) -> None:
    """Hand each job what its rows have written."""
    jobs: dict[int, tuple[Job, list[Piece]]] = {}
    for row, piece in written:
        jobs.setdefault(id(row.job), (row.job, []))[1].append(piece)
    for job, pieces in jobs.values():
        if not job.cancelled:
            job.deliver(pieces)
