"""One training run at one learning rate, resumed from its last whole checkpoint after a kill."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace

from torch import nn
from transformers import Trainer, TrainerCallback, set_seed

from ..disk import make_folder, telling_of_disk
from ..errors import SteerError
from ..files import read_json, write_text
from ..fitting import free_memory, is_out_of_memory, lower, tokens_within
from ..model_parts import is_packed
from ..progress import Progress
from .callbacks import StepClock, callbacks_of
from .job import Job, Outcome
from .resume import is_sealed, last_checkpoint, seal
from .trainables import trainable

BEST = "best"  # folder of the best point, in the job's
RESULT = "result.json"
MakeTrainer = Callable[[Job, nn.Module, list[TrainerCallback]], Trainer]


def run_job(job: Job, make: MakeTrainer, progress: Progress) -> Outcome:
    """The outcome of a job, training it unless an earlier call finished it; the best point lies in `best`.

    Raises:
        SteerError: PEFT cannot adapt the model, the memory does not suffice, or the disk refuses.
    """
    if (finished := _finished(job)) is not None:
        return finished
    make_folder(job.folder)
    rows: int | None = _rows_to_begin_with(job)
    while rows is not None:
        outcome = _trained(replace(job, rows=rows), make, progress)
        if outcome is not None:
            break
        free_memory()
        rows = _next_fewer(job, rows)
    if rows is None or outcome is None:
        raise _too_little_memory(job)
    for folder in job.folder.glob("checkpoint-*"):
        shutil.rmtree(folder, ignore_errors=True)
    return outcome


def _trained(job: Job, make: MakeTrainer, progress: Progress) -> Outcome | None:
    """Train a job from its last checkpoint on; None where memory does not suffice for its rows at once."""
    checkpoint = last_checkpoint(job)
    set_seed(job.settings.seed)  # before the adapter is made, so that a rerun draws the same adapter
    config = job.lm.model.config
    use_cache = config.use_cache
    try:
        with telling_of_disk(job.folder), trainable(job.lm, job.settings) as (model, save):
            trainer = make(job, model, callbacks_of(job, save, progress))
            config.use_cache = use_cache  # the Trainer turns it off in the config; our passes do without it themselves
            trainer.args.eval_on_start = checkpoint is None
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            outcome = _outcome(trainer, model)
            if outcome.gains:
                save(job.folder / BEST)
                seal(job.folder / BEST)
            write_text(job.folder / RESULT, json.dumps(asdict(outcome)))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    return outcome


def _longest(job: Job) -> int:
    """Tokens of the longest example."""
    return max(len(ids) for row in job.train for ids in row.values())


def _rows_to_begin_with(job: Job) -> int:
    """The largest part of a batch that an estimate, or an earlier training of this run, says there is memory for."""
    settings = job.settings
    most = tokens_within(job.lm.model, "train", checkpointing=settings.gradient_checkpointing)
    fitting = [rows for rows in _divisors(settings.batch_size) if rows * _longest(job) <= most]
    return max(fitting, default=1)


def _next_fewer(job: Job, rows: int) -> int | None:
    """Half as many rows, or the next number below it that divides the batch; it is kept. None below one."""
    fewer = max((n for n in _divisors(job.settings.batch_size) if n <= rows // 2), default=None)
    if fewer is not None:
        lower(job.lm.model, "train", fewer * _longest(job))
    return fewer


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _finished(job: Job) -> Outcome | None:
    """What an earlier call came to; None if the job is to be done, too where what it left is damaged."""
    if not (job.folder / RESULT).exists():
        return None
    try:
        outcome = Outcome(**read_json(job.folder / RESULT))
    except (SteerError, TypeError):
        outcome = None
    if outcome is None or (outcome.gains and not is_sealed(job.folder / BEST)):
        warnings.warn(f"{job.folder}: its result is damaged; the training begins anew", stacklevel=2)
        shutil.rmtree(job.folder)
        return None
    return outcome


def _outcome(trainer: Trainer, model: nn.Module) -> Outcome:
    state = trainer.state
    # A checkpoint keeps the history, so that a run that goes on knows the base's loss.
    losses = [_or_infinite(entry["eval_loss"]) for entry in state.log_history if "eval_loss" in entry]
    clock = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, StepClock))
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    tokens = int(state.num_input_tokens_seen)
    best = _or_infinite(state.best_metric)
    return Outcome(losses[0], best, losses[-1], state.global_step, tokens, clock.seconds, parameters)


def _or_infinite(loss: float | None) -> float:
    return float(loss) if loss is not None and math.isfinite(loss) else math.inf


def _too_little_memory(job: Job) -> SteerError:
    """What to lower where the memory does not suffice for one example at a time."""
    settings = job.settings
    saved = [] if settings.gradient_checkpointing else ["set gradient_checkpointing"]
    lora = ["use kind lora"] if settings.kind == "full" else []
    packed = [] if is_packed(job.lm.model) or settings.kind == "full" else ["load the model with quantize nf4"]
    ways = [*saved, "lower max_length", *lora, *packed]
    return SteerError(
        f"training: the memory of {job.lm.device} does not suffice for one example at a time, with examples of up to "
        f"{_longest(job)} tokens and kind {settings.kind}; {' or '.join(ways)}"
    )
