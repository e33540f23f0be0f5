"""A fine-tune's learning rates, tried one after the other; then, at the best one, further fine-tunes of its mean."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

import torch

from ..checkpoints.device import warn_if_slow
from ..errors import SteerError
from ..progress import Progress, part_of
from .job import Job, Outcome
from .mean import further_jobs
from .one_training import MakeTrainer, run_job


def search(jobs: Sequence[Job], make: MakeTrainer, progress: Progress) -> dict[float, Outcome]:
    """Train every job, and say what came of each, by learning rate; one that diverges does not stop the others.

    The jobs of the mean, if one is asked for, are trained at the best rate; their outcomes lie in their folders.

    Args:
        make: builds the Trainer from the job, the model that is ready to train, and the callbacks.
        progress: called with steps done, steps in all, and the loss.

    Raises:
        SteerError: see `run_job`.
    """
    if jobs[0].settings.bf16:
        warn_if_slow(torch.bfloat16, "leave bf16 out")
    runs = len(jobs) + len(jobs[0].further)
    outcomes = {
        job.learning_rate: run_job(job, make, part_of(progress, number, runs)) for number, job in enumerate(jobs)
    }
    best = best_rate(outcomes)
    if outcomes[best].gains:
        chosen = next(job for job in jobs if job.learning_rate == best)
        for number, job in enumerate(further_jobs(chosen), len(jobs)):
            run_job(job, make, part_of(progress, number, runs))
    return outcomes


def best_rate(outcomes: Mapping[float, Outcome]) -> float:
    """The learning rate with the lowest validation loss."""
    return min(outcomes, key=lambda rate: outcomes[rate].loss)


def require_gain(outcomes: Mapping[float, Outcome]) -> None:
    """Check that an outcome is better than the base, and warn of learning rates that diverged.

    Raises:
        SteerError: none is better.
    """
    if not any(outcome.gains for outcome in outcomes.values()):
        raise _without_gain(outcomes)
    if lost := [f"{rate:g}" for rate, outcome in outcomes.items() if outcome.diverged]:
        warnings.warn(f"learning rate {', '.join(lost)}: the loss became infinite or NaN; left out", stacklevel=3)


def _without_gain(outcomes: Mapping[float, Outcome]) -> SteerError:
    best = best_rate(outcomes)
    base, loss, rates = outcomes[best].base_loss, outcomes[best].loss, ", ".join(f"{rate:g}" for rate in outcomes)
    if not math.isfinite(base):
        return SteerError("training: the base's own validation loss is infinite or NaN; load it in another dtype")
    if all(outcome.diverged for outcome in outcomes.values()):
        return SteerError(
            f"training diverged: the loss became infinite or NaN at learning rate {rates}; use lower ones"
        )
    if not any(outcome.moved for outcome in outcomes.values()):
        found, way = f"stayed at the base's, {base:.4g}", "nothing moved; raise the learning rate, or load in float32"
    else:
        last = outcomes[best].last_loss
        found = f"never fell below the base's, {base:.4g} (at best {loss:.4g}, at the end {last:.4g}, at {best:g})"
        way = "use lower ones, more examples or a larger share of them for validation"
    return SteerError(f"training: the validation loss {found}, with learning rate {rates}; {way}")
