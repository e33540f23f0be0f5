"""What is done beside the training: its time is taken, snapshots are kept, progress is shown."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from transformers import (
    EarlyStoppingCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

from ..progress import Progress
from ..ranks import agreed, is_first, wait
from ..run_card import new_folder
from .job import Job
from .resume import checkpoint_at, seal
from .trainables import Trained

SNAPSHOTS = "snapshots"  # folder of a fine-tune's snapshots, in the job's and in the fine-tune's


def callbacks_of(job: Job, trained: Trained, progress: Progress) -> list[TrainerCallback]:
    """The callbacks of one job; `trained` writes what is trained, as it stands, into a folder."""
    stopping = [] if job.settings.snapshots else [EarlyStoppingCallback(job.settings.patience)]
    kept = [_SealCheckpoints(job), _KeepSnapshots(job, trained)]
    return [*stopping, StepClock(), *kept, _ReportProgress(progress)]


class StepClock(TrainerCallback, ExportableState):
    """Seconds in training steps; checkpoints carry the sum, so that a resumed run has all of it, each step once."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.started = 0.0

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"seconds": self.seconds}}

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.started = time.perf_counter()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.device.type != "cpu":
            torch.accelerator.synchronize()  # free: the Trainer reads the loss right after
        self.seconds += time.perf_counter() - self.started


class _SealCheckpoints(TrainerCallback):
    """Brings each checkpoint to the disk, and finds the best one where the folder lies now."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.best_global_step:  # the state names the folder by the path that it had when it was saved
            state.best_model_checkpoint = str(checkpoint_at(self.job, state.best_global_step))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        wait()  # each process writes its random state there
        agreed(lambda: seal(checkpoint_at(self.job, state.global_step)))


class _KeepSnapshots(TrainerCallback):
    """Saves the run's snapshots as they are reached; one that an earlier, killed call saved is kept."""

    def __init__(self, job: Job, trained: Trained) -> None:
        self.job, self.trained = job, trained
        self.steps = set(job.snapshot_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        step = state.global_step
        folder = self.job.folder / SNAPSHOTS / f"step-{step}"
        if step not in self.steps or agreed(folder.exists):
            return
        measured = {
            "step": step,
            "steps": self.job.steps,
            "fraction": step / self.job.steps,
            "learning_rate": self.job.learning_rate,
            "tokens": state.num_input_tokens_seen,
        }
        tensors = self.trained.tensors()
        if is_first():
            with new_folder(folder, "finetune") as part:
                self.trained.write(part, tensors)
                replace(self.job.card, measured=measured).save(part)


class _ReportProgress(TrainerCallback):
    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        names = {"loss": "loss", "eval_loss": "validation loss"}
        note = ", ".join(f"{shown} {logs[key]:.3f}" for key, shown in names.items() if logs and key in logs)
        if note and is_first():
            self.progress(state.global_step, state.max_steps, note)
