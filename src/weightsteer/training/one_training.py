"""One training run at one learning rate, resumed from its last whole checkpoint after a kill."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, set_seed

from ..disk import make_folder, telling_of_disk
from ..errors import SteerError
from ..files import read_json, write_text
from ..fitting import free_memory, is_out_of_memory, lower, tokens_within
from ..model_parts import is_packed
from ..progress import Progress
from ..ranks import agreed, least_of_all, own_device, rank, world
from .callbacks import StepClock, callbacks_of
from .job import Job, Outcome
from .mean import FURTHER
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
    job = replace(job, lm=unsharded(job.lm))
    rows: int | None = _rows_to_begin_with(job)
    while rows is not None:
        outcome = _trained(replace(job, rows=rows), make, progress)
        if outcome is not None:
            return outcome
        free_memory()
        fewer = _next_fewer(job, rows)
        if fewer is not None and world() > 1:  # the others wait for this process, in the midst of a step
            raise _too_many_rows(job, rows)
        rows = fewer
    raise _too_little_memory(job)


def _trained(job: Job, make: MakeTrainer, progress: Progress) -> Outcome | None:
    """Train a job from its last checkpoint on; None where memory does not suffice for its rows at once."""
    checkpoint = agreed(lambda: last_checkpoint(job))
    set_seed(job.settings.seed)  # before the adapter is made, so that a rerun draws the same adapter
    config = job.lm.model.config
    use_cache = config.use_cache
    try:
        with telling_of_disk(job.folder), trainable(job.lm, job.settings) as ready:
            trainer = make(job, ready.model, callbacks_of(job, ready, progress))
            config.use_cache = use_cache  # the Trainer turns it off in the config; our passes do without it themselves
            trainer.args.eval_on_start = checkpoint is None
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            outcome = agreed(lambda: _outcome(trainer, ready.model))
            tensors = ready.tensors() if outcome.gains else {}
            agreed(lambda: _keep(job, outcome, ready, tensors))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    return outcome


def _keep(job: Job, outcome: Outcome, ready: Trained, best: dict[str, Tensor]) -> None:
    """Write what a job came to; its checkpoints go."""
    if outcome.gains:
        ready.write(job.folder / BEST, best)
        seal(job.folder / BEST)
    write_text(job.folder / RESULT, json.dumps(asdict(outcome)))
    for folder in job.folder.glob("checkpoint-*"):
        shutil.rmtree(folder, ignore_errors=True)


def _longest(job: Job) -> int:
    """Tokens of the longest example."""
    return max(len(ids) for row in job.train for ids in row.values())


def _rows_to_begin_with(job: Job) -> int:
    """The largest part of a batch that an estimate, or an earlier training of this run, says there is memory for.

    All processes take the same: of what they find, the least.
    """
    settings = job.settings
    most = tokens_within(job.lm.model, "train", checkpointing=settings.gradient_checkpointing)
    parts = _parts(settings.batch_size)
    return least_of_all(max((rows for rows in parts if _tokens(job, rows) <= most), default=parts[0]))


def _next_fewer(job: Job, rows: int) -> int | None:
    """Half as many rows, or the next number below it that divides the batch; it is kept. None if there is none."""
    fewer = max((n for n in _parts(job.settings.batch_size) if n <= rows // 2), default=None)
    if fewer is not None:
        lower(job.lm.model, "train", _tokens(job, fewer))
    return fewer


def _tokens(job: Job, rows: int) -> int:
    """The most tokens that so many rows of a batch are in one process."""
    return math.ceil(rows / world()) * _longest(job)


def _parts(batch_size: int) -> list[int]:
    """In parts of how many rows a batch may pass: each process has one at least."""
    return [n for n in range(world(), batch_size + 1) if batch_size % n == 0]


def _finished(job: Job) -> Outcome | None:
    """What an earlier call came to; None if the job is to be done, too where what it left is damaged."""
    if not (job.folder / RESULT).exists():
        return None
    try:
        outcome = outcome_in(job.folder)
    except (SteerError, TypeError):
        outcome = None
    if outcome is None or (outcome.gains and not is_sealed(job.folder / BEST)):
        warnings.warn(f"{job.folder}: its result is damaged; the training begins anew", stacklevel=2)
        _begin_anew(job.folder)
        return None
    return outcome


def _begin_anew(folder: Path) -> None:
    """Remove all that a training left, but not the further fine-tunes of its mean, which lie in its folder."""
    for path in folder.iterdir():
        if path.name.startswith(FURTHER):
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def outcome_in(folder: Path) -> Outcome:
    """What the job in a folder came to, when it was finished."""
    return Outcome(**read_json(folder / RESULT))


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


def _too_many_rows(job: Job, rows: int) -> SteerError:
    """What to do where one of several processes has too little memory; the number that is kept holds from then on."""
    return SteerError(
        f"training: the memory of process {rank()} does not suffice for {math.ceil(rows / world())} examples at a time "
        f"of up to {_longest(job)} tokens; run the same command again, which takes fewer at once"
    )


def _too_little_memory(job: Job) -> SteerError:
    """What to lower where the memory does not suffice for one example at a time."""
    settings = job.settings
    saved = [] if settings.gradient_checkpointing else ["set gradient_checkpointing"]
    lora = ["use kind lora"] if settings.kind == "full" else []
    whole = is_packed(job.lm.model) or settings.kind == "full" or settings.shard == "fsdp"
    packed = [] if whole else ["load the model with quantize nf4"]
    spread = ["use shard fsdp"] if world() > 1 and settings.shard == "ddp" else []
    ways = [*saved, "lower max_length", *lora, *spread, *packed]
    device = own_device() if world() > 1 else job.lm.device
    return SteerError(
        f"training: the memory of {device} does not suffice for one example at a time, with examples of up to "
        f"{_longest(job)} tokens and kind {settings.kind}; {' or '.join(ways)}"
    )
