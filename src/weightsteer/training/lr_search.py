"""A fine-tune's learning rates, tried one after the other."""

from __future__ import annotations

from collections.abc import Sequence

from ..progress import Progress, part_of
from .job import Job, Outcome
from .one_training import MakeTrainer, run_job


def search(jobs: Sequence[Job], make: MakeTrainer, progress: Progress) -> dict[float, Outcome]:
    """Train every job, and say what came of each, by learning rate.

    Args:
        make: builds the Trainer from the job, the model that is ready to train, and the callbacks.
        progress: called with steps done, steps in all, and the loss.
    """
    return {
        job.learning_rate: run_job(job, make, part_of(progress, number, len(jobs))) for number, job in enumerate(jobs)
    }
