"""One training run at one learning rate, resumed from its last whole checkpoint after a kill."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from torch import nn
from transformers import Trainer, TrainerCallback, set_seed

from ..errors import SteerError
from ..files import read_json, write_text
from ..progress import Progress
from .callbacks import StepClock, callbacks_of
from .job import Job, Outcome
from .trainables import trainable

MakeTrainer = Callable[[Job, nn.Module, list[TrainerCallback]], Trainer]


def run_job(job: Job, make: MakeTrainer, progress: Progress) -> Outcome:
    """The outcome of a job, training it unless an earlier call finished it; the best point lies in `best`."""
    result = job.folder / "result.json"
    if result.exists():
        return Outcome(**read_json(result))
    set_seed(job.settings.seed)  # before the adapter is made, so that a rerun draws the same adapter
    config = job.lm.model.config
    use_cache = config.use_cache
    with trainable(job.lm, job.settings) as (model, save):
        trainer = make(job, model, callbacks_of(job, save, progress))
        config.use_cache = use_cache  # the Trainer turns it off in the config; our passes do without it themselves
        trainer.train(resume_from_checkpoint=_last_whole_checkpoint(job.folder))
        outcome = _outcome(job, trainer, model)
        save(job.folder / "best")
        write_text(result, json.dumps(asdict(outcome)))
    for checkpoint in job.folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)
    return outcome


def _outcome(job: Job, trainer: Trainer, model: nn.Module) -> Outcome:
    state, loss = trainer.state, trainer.state.best_metric
    if loss is None or not math.isfinite(loss):
        raise SteerError(
            f"training at learning rate {job.learning_rate:g} diverged (validation loss {loss}); use a lower one"
        )
    clock = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, StepClock))
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Outcome(float(loss), state.global_step, int(state.num_input_tokens_seen), clock.seconds, parameters)


def _last_whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end: the Trainer writes trainer_state.json last."""
    whole = [path for path in folder.glob("checkpoint-*") if _is_json(path / "trainer_state.json")]
    newest = max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    return str(newest) if newest else None


def _is_json(path: Path) -> bool:
    """Whether the file is there and whole."""
    try:
        read_json(path)
    except SteerError:
        return False
    return True
