"""From where a training that was stopped goes on: its last checkpoint that is whole and on the disk."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

from ..disk import sync_folder, sync_tree
from ..errors import SteerError
from ..files import read_json, sha256_of, write_json
from .job import Job

SEAL = "whole.json"  # file -> SHA-256 of all else in a folder; written last


def checkpoint_at(job: Job, step: int) -> Path:
    """The folder of the checkpoint after a step."""
    return job.folder / f"checkpoint-{step}"


def seal(folder: Path) -> None:
    """Bring a folder to the disk, and write what makes it known as whole."""
    sync_tree(folder)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != SEAL]
    write_json(folder / SEAL, {str(path.relative_to(folder)): sha256_of(path) for path in files})
    sync_folder(folder.parent)


def is_sealed(folder: Path) -> bool:
    """Whether a folder was sealed and is still what it was then."""
    try:
        hashes = read_json(folder / SEAL)
        return bool(hashes) and all(sha256_of(folder / name) == found for name, found in hashes.items())
    except (SteerError, OSError, AttributeError):
        return False


def last_checkpoint(job: Job) -> Path | None:
    """The checkpoint from which the job goes on; None to begin. Later ones are removed, and a warning says so.

    It is the newest that is whole, whose best checkpoint is, and after which there is a step to be made: Trainer
    would make one more after the last, and forgets that a training had been stopped early.
    """
    numbers = (path.name.rpartition("-")[2] for path in job.folder.glob("checkpoint-*"))
    steps = sorted((int(number) for number in numbers if number.isdecimal()), reverse=True)
    whole = {step for step in steps if is_sealed(checkpoint_at(job, step))}
    states = {step: read_json(checkpoint_at(job, step) / "trainer_state.json") for step in whole}
    usable = (
        step for step in steps if step in whole and not _has_ended(states[step]) and _best(states[step]) in {0, *whole}
    )
    found = next(usable, 0)
    damaged = [step for step in steps if step > found and step not in whole]
    if damaged:
        names = ", ".join(f"checkpoint-{step}" for step in damaged)
        way = f"goes on from step {found}" if found else "begins anew"
        warnings.warn(f"{job.folder}: {names} was cut off or is damaged; the training {way}", stacklevel=2)
    for step in steps:
        if step > found:
            shutil.rmtree(checkpoint_at(job, step), ignore_errors=True)
    return checkpoint_at(job, found) if found else None


def _best(state: dict[str, Any]) -> int:
    """The step of the best checkpoint so far; 0 before there is one."""
    return int(state["best_global_step"] or 0)


def _has_ended(state: dict[str, Any]) -> bool:
    control = state["stateful_callbacks"]["TrainerControl"]
    return state["global_step"] >= state["max_steps"] or bool(control["args"]["should_training_stop"])
