"""One training run at one learning rate: the Trainer, with loss at answer positions only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import (
    DataCollatorForSeq2Seq,
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..lm import LM, projecting_only
from ..progress import Progress
from .settings import TrainSettings

IGNORED = -100  # label of a position without loss

Encoded = dict[str, list[int]]  # input_ids, attention_mask, labels of one example


@dataclass(frozen=True)
class Job:
    """One training run at one learning rate, in its own folder."""

    lm: LM
    train: list[Encoded]
    validation: list[Encoded]
    settings: TrainSettings
    learning_rate: float
    folder: Path


def last_whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end: the Trainer writes trainer_state.json last."""
    whole = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").exists()]
    newest = max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    return str(newest) if newest else None


def make_trainer(job: Job, model: nn.Module, progress: Progress) -> Trainer:
    settings = job.settings
    batches = -(-len(job.train) // (settings.batch_size * settings.accumulation))
    steps = settings.max_steps or max(1, round(batches * settings.epochs))
    every = max(1, steps // settings.evaluations)
    arguments = TrainingArguments(
        output_dir=str(job.folder),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=job.learning_rate,
        weight_decay=settings.weight_decay,
        lr_scheduler_type="linear",
        warmup_steps=min(settings.warmup_steps, steps // 2),
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=True,
        restore_callback_states_from_checkpoint=True,  # the patience of early stopping
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        prediction_loss_only=True,
        remove_unused_columns=False,
        seed=settings.seed,
        data_seed=settings.seed,
        use_cpu=job.lm.device.type == "cpu",
        dataloader_pin_memory=job.lm.device.type == "cuda",
        report_to="none",
        disable_tqdm=True,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # else the Trainer splits batches by DataParallel
    trainer = _AnswerTrainer(
        model=model,
        args=arguments,
        train_dataset=job.train,
        eval_dataset=job.validation,
        data_collator=DataCollatorForSeq2Seq(job.lm.tokenizer, label_pad_token_id=IGNORED),
        callbacks=[EarlyStoppingCallback(settings.patience), _ReportProgress(progress)],
    )
    trainer.remove_callback(PrinterCallback)  # progress is ours to show
    return trainer


class _AnswerTrainer(Trainer):
    """Trainer whose loss projects only the answer positions onto the vocabulary, in length-sorted batches."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        targets = inputs["labels"][:, 1:]
        wanted = targets != IGNORED  # (batch, length - 1): position t predicts token t + 1
        with projecting_only(self.accelerator.unwrap_model(model), nn.functional.pad(wanted, (0, 1))):
            logits = model(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
            ).logits[0]
        loss = nn.functional.cross_entropy(logits.float(), targets[wanted], reduction="sum")
        loss = loss / (wanted.sum() if num_items_in_batch is None else num_items_in_batch)
        return (loss, {}) if return_outputs else loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return _SeededLengthSampler(self.args.train_batch_size, self.train_dataset, self.args.seed)


class _SeededLengthSampler(LengthGroupedSampler):
    """Batches of like length whose order depends on seed and epoch alone, so that a resumed run repeats it."""

    def __init__(self, batch_size: int, rows: Any, seed: int) -> None:
        super().__init__(batch_size, lengths=[len(row["input_ids"]) for row in rows], generator=torch.Generator())
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self.seed + epoch)


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
        if note:
            self.progress(state.global_step, state.max_steps, note)
