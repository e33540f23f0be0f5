"""What a worker does: it says who it is, then does one job a call. A Ray actor is made of it."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import SteerError
from ..run_card import installed_versions
from ..runs.bench import Bench, Job, RunRef


@dataclass(frozen=True)
class Hello:
    """Who a worker is."""

    pid: int
    host: str
    versions: Mapping[str, str]  # of the packages that decide a result


@dataclass(frozen=True)
class Done:
    """What a job gave, and what the user has to hear of it."""

    result: Any
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Failed:
    """A mistake that the user can mend."""

    message: str


class Worker:
    """One model at a time, and the run that it is for."""

    def __init__(self) -> None:
        self.bench: Bench | None = None

    def hello(self, threads: int) -> Hello:
        """Be as many threads as the driver is, since a sum may depend on their number, and say who this is."""
        import torch

        torch.set_num_threads(threads)
        return Hello(os.getpid(), socket.gethostname(), installed_versions())

    def do(self, ref: RunRef, job: Job) -> Done | Failed:
        """Do a job of a run; of another run than the last one, its bench is set up first."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", category=FutureWarning)
            try:
                result = self._bench_of(ref).do(job)
            except SteerError as error:
                return Failed(str(error))
        return Done(result, tuple(dict.fromkeys(str(one.message) for one in caught)))

    def _bench_of(self, ref: RunRef) -> Bench:
        if self.bench is None or self.bench.ref != ref:
            former, self.bench = self.bench, None
            self.bench = Bench(ref, former)
        return self.bench
