"""Runs driven on a cluster: planned and written here, done by its workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import SteerError
from ..runs.models import ShowProgress
from ..runs.pipeline import Run
from ..runs.stages import ref_of, stages
from ..runs.study import Doer
from .pool import open_pool
from .queue import Work


def drive(run: Run, address: str, gpus: float | None = None, *, show: ShowProgress, any_outcome: bool = False) -> Path:
    """Bring a run to its report; returns the report's path.

    Args:
        address, gpus: see `open_pool`.
        any_outcome: a training need not better its base, as in a dry run.

    Raises:
        SteerError: no cluster or no worker, or the run failed.
    """
    failures = workers(address, gpus)([run], show, any_outcome)
    if failures:
        raise SteerError(next(iter(failures.values())))
    return run.folder.page


def workers(address: str, gpus: float | None = None) -> Doer:
    """What brings runs to their reports on a cluster, all of them at once (see `Study.run`)."""

    def do(runs: list[Run], show: ShowProgress, any_outcome: bool) -> dict[str, str]:
        with _works(runs, any_outcome) as works:
            if works:
                with open_pool(address, gpus) as pool, show("workers") as progress:
                    pool.work(works, progress)
            return {work.name: work.failure for work in works if work.failure}

    return do


@contextmanager
def _works(runs: Sequence[Run], any_outcome: bool) -> Iterator[list[Work]]:
    """The runs' work; their folders are free again at the end, however that comes."""
    works = [Work(run.recipe.name, ref_of(run, any_outcome=any_outcome), stages(run)) for run in runs]
    try:
        yield works
    finally:
        for work in works:
            work.stages.close()
