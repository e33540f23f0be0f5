"""Runs driven on a cluster: planned and written here, done by its workers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import SteerError
from ..runs.artifacts import ShowProgress
from ..runs.pipeline import Run
from ..runs.stages import ref_of, stages
from .pool import open_pool
from .queue import Work


def drive(
    runs: Sequence[Run],
    address: str,
    gpus: float | None = None,
    *,
    show: ShowProgress,
    any_outcome: bool = False,
) -> list[Path]:
    """Bring all runs to their reports; returns the reports' paths.

    Args:
        address, gpus: see `open_pool`.
        any_outcome: a training need not better its base, as in a dry run.

    Raises:
        SteerError: no cluster or no worker; or runs that failed, which are named once the others have ended.
    """
    works = [Work(run.recipe.name, ref_of(run, any_outcome=any_outcome), stages(run)) for run in runs]
    try:
        with open_pool(address, gpus) as pool, show("workers") as progress:
            pool.work(works, progress)
    finally:
        for work in works:
            work.stages.close()  # the folders are free again
    failures = [work.failure for work in works if work.failure]
    if failures:
        rest = f" ({len(failures) - 1} more of {len(works)} runs failed)" if len(failures) > 1 else ""
        raise SteerError(failures[0] + rest)
    return [run.folder.page for run in runs]
