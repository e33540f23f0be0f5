"""Workers on a Ray cluster: one for each model that there is room for, also on machines that join late.

A worker that dies gives its job back to the queue, and another is started in its place. What a job gave is kept once,
by the driver alone.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from ..errors import SteerError, first_line
from ..progress import Progress, silent
from ..run_card import installed_versions
from ..shown import note
from .queue import Queue, Ticket, Work
from .worker import Done, Failed, Hello, Worker

LOCAL = "local"  # a cluster of this machine alone, for this command alone
OBJECT_STORE = 100_000_000  # bytes of shared memory for a local cluster: what we pass is small
LOCAL_TRIES = 3  # to start a local cluster
REACHED = 10.0  # seconds in which a cluster's port has to answer
LOOK = 2.0  # seconds between looks at which machines there are
PATIENCE = 30.0  # seconds without any worker, after which the user hears why nothing happens
STARTS = 5  # workers in a row that may die while they start


@dataclass(eq=False)
class _Member:
    """A worker of the pool, what it is at, and the run that it was on."""

    actor: Any
    hello: Hello | None = None  # None: it is starting
    ticket: Ticket | None = None
    last: Work | None = None


class Pool:
    """A cluster's workers, for as long as a `with` block of `open_pool` runs."""

    def __init__(self, ray: Any, gpus: float | None) -> None:
        """Count what there is room for.

        Raises:
            SteerError: no machine of the cluster has as many GPUs as a model is to get.
        """
        import torch

        self.ray, self.threads = ray, torch.get_num_threads()
        self.gpus = float(ray.cluster_resources().get("GPU", 0) > 0) if gpus is None else gpus
        self.cpus = (
            1 if self.gpus else min(self.threads, max((int(r.get("CPU", 1)) for r in self._machines()), default=1))
        )
        self.members: dict[Any, _Member] = {}  # by what is waited for, or by the actor of an idle one
        self.idle: list[_Member] = []
        self.refused: list[_Member] = []  # they keep their room, so that no other is started there
        self.why_refused: dict[str, str] = {}  # host -> why
        self.failed_starts = 0
        if not self.capacity():
            most = max((float(machine.get("GPU", 0)) for machine in self._machines()), default=0)
            raise SteerError(
                f"--gpus-per-model {self.gpus:g}: no machine of the Ray cluster has so many GPUs (at most {most:g}); "
                "give a smaller number, or 0 to measure on CPUs"
            )

    def _machines(self) -> list[Mapping[str, float]]:
        """What each machine that is there has."""
        return [node["Resources"] for node in self.ray.nodes() if node["Alive"]]

    def capacity(self) -> int:
        """How many workers there is room for."""
        wanted = {"GPU": self.gpus, "CPU": float(self.cpus)}
        rooms = [[int(machine.get(n, 0) / need) for n, need in wanted.items() if need] for machine in self._machines()]
        return sum(min(room) for room in rooms)

    def work(self, works: Sequence[Work], progress: Progress = silent) -> None:
        """Do all runs' jobs. A run that fails says so in its `failure`, and the others go on.

        Raises:
            SteerError: no worker can be had.
        """
        queue = Queue(list(works))
        looked = heard = 0.0
        started = time.monotonic()
        while not queue.is_over:
            now = time.monotonic()
            if now - looked > LOOK or not self.members:
                self._grow(queue)
                looked = now
            self._hand_out(queue)
            for place in self.ray.wait(list(self.members), timeout=LOOK / 2)[0] if self.members else ():
                self._take_back(place, queue)
            if not self.members:  # no machine is there
                time.sleep(LOOK / 2)
            ready = len(self.idle) + sum(member.hello is not None for member in self.members.values())
            progress(queue.done, queue.total, self._said(queue, ready))
            if not ready and not heard and time.monotonic() - started > PATIENCE:
                heard = time.monotonic()
                note(f"waits for a worker: the Ray cluster has no {self._room()} free yet, or is still starting one")

    def _said(self, queue: Queue, ready: int) -> str:
        """What goes on, for the progress line."""
        busy = [member.ticket.work for member in self.members.values() if member.ticket]
        names = dict.fromkeys(f"{work.name}: {work.stage.name}" for work in busy if work.stage)
        return f"{ready} workers; {', '.join(names)}" if len(names) < 3 else f"{ready} workers; {len(names)} runs"

    def _room(self) -> str:
        return f"{self.gpus:g} GPU" if self.gpus else f"{self.cpus} CPUs"

    def _grow(self, queue: Queue) -> None:
        """Start workers where there is room and work for them."""
        here = len(self.members) + len(self.idle) + len(self.refused)
        wanted = min(self.capacity(), queue.unfinished + len(self.refused))
        for _ in range(wanted - here):
            make = self.ray.remote(Worker).options(num_gpus=self.gpus, num_cpus=self.cpus, max_restarts=0)
            actor = make.remote()
            self.members[actor.hello.remote(self.threads)] = _Member(actor)

    def _hand_out(self, queue: Queue) -> None:
        """A job for each idle worker, as long as there are any."""
        for member in list(self.idle):
            ticket = queue.take(member.last)
            if ticket is None:
                return
            self.idle.remove(member)
            member.ticket, member.last = ticket, ticket.work
            self.members[member.actor.do.remote(ticket.work.ref, ticket.job)] = member

    def _take_back(self, place: Any, queue: Queue) -> None:
        """What a worker has done, or that it is no more."""
        from ray.exceptions import RayError, RayTaskError

        member = self.members.pop(place)
        try:
            found = self.ray.get(place)
        except RayTaskError as error:  # a mistake of ours, or a machine without our package
            self._broken(member, error, queue)
        except RayError as error:
            self._lost(member, error, queue)
        else:
            if isinstance(found, Hello):
                self._greet(member, found)
            else:
                self._keep(member, found, queue)

    def _greet(self, member: _Member, hello: Hello) -> None:
        """A worker has started; one of another version is left out.

        Raises:
            SteerError: there is no other worker.
        """
        self.failed_starts, member.hello = 0, hello
        mine, theirs = installed_versions(), hello.versions
        if theirs.get("weightsteer") != mine.get("weightsteer"):
            has, wants = theirs.get("weightsteer", "none"), mine.get("weightsteer")
            self._refuse(member, hello.host, f"has weightsteer {has} and the driver {wants}; install the same version")
            return
        for name in (name for name, version in mine.items() if theirs.get(name) != version):
            warnings.warn(
                f"worker on {hello.host}: has {name} {theirs.get(name)} and the driver {mine[name]}; numbers may "
                "differ in their last digits",
                stacklevel=2,
            )
        self.idle.append(member)

    def _refuse(self, member: _Member, host: str, reason: str) -> None:
        """Leave a worker out; an error where none is left."""
        self.refused.append(member)
        text = f"worker on {host}: {reason}"
        if not self.members and not self.idle:
            raise SteerError(text)
        if host not in self.why_refused:
            warnings.warn(f"{text}; it is left out", stacklevel=2)
        self.why_refused[host] = reason

    def _keep(self, member: _Member, found: Done | Failed, queue: Queue) -> None:
        """What a job gave, or why it cannot be done."""
        ticket, host = member.ticket, member.hello.host if member.hello else ""
        assert ticket is not None
        member.ticket = None
        self.idle.append(member)
        if isinstance(found, Failed):
            queue.fail(ticket, f"{ticket.work.name}: worker on {host}: {found.message}")
            return
        for text in found.warnings:
            warnings.warn(f"{ticket.work.name}: {text}", stacklevel=2)
        queue.keep(ticket, found.result)

    def _broken(self, member: _Member, error: Exception, queue: Queue) -> None:
        """A worker raised what is no mistake of the user's: its whole text is needed."""
        if member.ticket is None:
            raise SteerError(f"a worker could not start: {_cause(error)}; is weightsteer installed on its machine?")
        ticket, member.ticket = member.ticket, None
        self.idle.append(member)
        queue.fail(ticket, f"{ticket.work.name}: {ticket.job}: {error}")

    def _lost(self, member: _Member, error: Exception, queue: Queue) -> None:
        """A worker died.

        Raises:
            SteerError: no worker starts at all.
        """
        if member.ticket is not None:
            host = member.hello.host if member.hello else "an unknown machine"
            note(f"the worker on {host} has died; another goes on with its job")
            queue.lose(member.ticket, _cause(error))
            return
        self.failed_starts += 1
        if self.failed_starts >= STARTS:
            raise SteerError(f"no worker starts: {_cause(error)}; is weightsteer installed on every machine?")

    def close(self) -> None:
        """End all workers."""
        for member in [*self.members.values(), *self.idle, *self.refused]:
            self.ray.kill(member.actor)


def _cause(error: Exception) -> str:
    """The last line of what Ray says, which has the reason."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else first_line(error)


@contextmanager
def open_pool(address: str, gpus: float | None = None) -> Iterator[Pool]:
    """Workers on a Ray cluster.

    Args:
        address: "local" starts a cluster of this machine alone, which ends with the block; "auto" is the one that runs
            here already; else a cluster's address, such as 10.0.0.1:6379.
        gpus: GPUs for each model. None: one where the cluster has any, else none.

    Raises:
        SteerError: Ray is not installed, there is no such cluster, or it has not that many GPUs on one machine.
    """
    if find_spec("ray") is None:
        raise SteerError("--ray: needs Ray; pip install 'weightsteer[ray]'")
    if gpus is not None and not 0 <= gpus < 1e4:
        raise SteerError(f"--gpus-per-model: expected 0 or more, found {gpus:g}")
    if gpus is not None and gpus > 1 and not float(gpus).is_integer():
        raise SteerError(f"--gpus-per-model: expected a whole number above 1, or a part of one GPU; found {gpus:g}")
    with _connected(address) as ray:
        pool = Pool(ray, gpus)
        try:
            yield pool
        finally:
            pool.close()


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Ray, connected to the cluster: without its dashboard, its reports of use, and its hold on signals."""
    _refuse_unreachable(address)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # before Ray is imported
    import logging

    import ray

    with _own_signals():
        _start(ray, address, logging.ERROR)
    try:
        yield ray
    finally:
        with _own_signals():
            ray.shutdown()


def _start(ray: Any, address: str, level: int) -> None:
    """Connect, and start a local cluster before that; on a busy machine Ray may give up too early, so try again.

    Raises:
        SteerError: nothing is there, or Ray does not start.
    """
    local = {"include_dashboard": False, "object_store_memory": OBJECT_STORE} if address == LOCAL else {}
    tries = LOCAL_TRIES if address == LOCAL else 1
    for left in reversed(range(tries)):
        try:
            ray.init(address, log_to_driver=False, logging_level=level, **local)
            return
        except Exception as error:  # Ray raises bare ones here
            ray.shutdown()
            if left:
                continue
            if address != LOCAL:
                raise _no_cluster(address, error) from None
            raise SteerError(f"--ray {address}: Ray does not start here ({first_line(error)}); try again") from None


def _no_cluster(address: str, error: Exception) -> SteerError:
    return SteerError(
        f"--ray {address}: no Ray cluster can be reached there ({first_line(error)}); start one with "
        "`ray start --head`, or use --ray local"
    )


def _refuse_unreachable(address: str) -> None:
    """Raise where nothing listens at HOST:PORT; Ray itself would go on trying for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdecimal()):
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACHED).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, error) from None


@contextmanager
def _own_signals() -> Iterator[None]:
    """Give Ctrl-C and SIGTERM back to the command line, which Ray takes when it starts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
