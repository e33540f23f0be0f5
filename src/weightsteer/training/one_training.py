"""One training run at one learning rate, resumed from its last whole checkpoint after a kill."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace

from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, set_seed

from ..disk import make_folder, telling_of_disk
from ..errors import SteerError
from ..files import read_json, write_text
from ..progress import Progress
from ..ranks import agreed
from .callbacks import StepClock, callbacks_of
from .job import Job, Outcome
from .resume import is_sealed, last_checkpoint, seal
from .sharded import unsharded
from .trainables import Trained, trainable

BEST = "best"  # folder of the best point, in the job's
RESULT = "result.json"
MakeTrainer = Callable[[Job, nn.Module, list[TrainerCallback]], Trainer]


def run_job(job: Job, make: MakeTrainer, progress: Progress) -> Outcome:
    """The outcome of a job, training it unless an earlier call finished it; the best point lies in `best`.

    Raises:
        SteerError: PEFT cannot adapt the model, the memory does not suffice, or the disk refuses.
    """
    if (finished := agreed(lambda: _finished(job))) is not None:
        return finished
    agreed(lambda: make_folder(job.folder))
    checkpoint = agreed(lambda: last_checkpoint(job))
    job = replace(job, lm=unsharded(job.lm))
    set_seed(job.settings.seed)  # before the adapter is made, so that a rerun draws the same adapter
    config = job.lm.model.config
    use_cache = config.use_cache
    with telling_of_disk(job.folder), _naming_what_takes_memory(job), trainable(job.lm, job.settings) as ready:
        trainer = make(job, ready.model, callbacks_of(job, ready, progress))
        config.use_cache = use_cache  # the Trainer turns it off in the config; our passes do without it themselves
        trainer.args.eval_on_start = checkpoint is None
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        outcome = agreed(lambda: _outcome(trainer, ready.model))
        tensors = ready.tensors() if outcome.gains else {}
        agreed(lambda: _keep(job, outcome, ready, tensors))
    return outcome


def _keep(job: Job, outcome: Outcome, ready: Trained, best: dict[str, Tensor]) -> None:
    """Write what a job came to; its checkpoints go."""
    if outcome.gains:
        ready.write(job.folder / BEST, best)
        seal(job.folder / BEST)
    write_text(job.folder / RESULT, json.dumps(asdict(outcome)))
    for folder in job.folder.glob("checkpoint-*"):
        shutil.rmtree(folder, ignore_errors=True)


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


@contextmanager
def _naming_what_takes_memory(job: Job) -> Iterator[None]:
    """Raise a `SteerError` with what to lower where the memory does not suffice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
            raise
        settings = job.settings
        longest = max(len(ids) for row in job.train for ids in row.values())
        raise SteerError(
            f"training: the memory of {job.lm.device} does not suffice at batch_size {settings.batch_size}, with "
            f"examples of up to {longest} tokens and kind {settings.kind}; lower batch_size (and raise accumulation "
            f"by as much) or max_length{', or use kind lora' if settings.kind == 'full' else ''}"
        ) from None
