"""The Trainer of one run, with loss at answer positions only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..fitting import in_parts
from ..model_parts import projecting_only
from ..ranks import own_device, world
from .job import Job
from .sharded import fsdp_arguments
from .together import TrainsTogether, loss_of_all

IGNORED = -100  # label of a position without loss


def make_trainer(job: Job, model: nn.Module, callbacks: list[TrainerCallback]) -> Trainer:
    """The Trainer of a job whose rows `encode` made."""
    arguments = TrainingArguments(**arguments_of(job))
    stay_on_one_device(arguments)
    trainer = AnswerTrainer(
        model=model,
        args=arguments,
        train_dataset=job.train,
        eval_dataset=job.validation,
        data_collator=DataCollatorForSeq2Seq(job.lm.tokenizer, label_pad_token_id=IGNORED),
        callbacks=callbacks,
    )
    trainer.grouped_by = job.settings.batch_size
    trainer.remove_callback(PrinterCallback)  # progress is ours to show
    return trainer


def arguments_of(job: Job) -> dict[str, Any]:
    """The arguments that every Trainer of ours has in common, by `TrainingArguments`' names."""
    settings = job.settings
    device = own_device() if world() > 1 else job.lm.device
    return {
        "output_dir": str(job.folder),
        "max_steps": job.steps,
        "per_device_train_batch_size": job.rows_at_once,
        "per_device_eval_batch_size": settings.batch_size,
        "gradient_accumulation_steps": job.passes,
        "learning_rate": job.learning_rate,
        "weight_decay": settings.weight_decay,
        "lr_scheduler_type": "linear",
        "warmup_steps": min(settings.warmup_steps, job.steps // 2),
        "logging_steps": 1,
        "bf16": settings.bf16,
        "include_num_input_tokens_seen": "non_padding",
        "eval_on_start": True,  # the base's own loss; `run_job` turns it off for a run that goes on
        "eval_strategy": "steps",
        "eval_steps": job.every,
        "save_strategy": "steps",
        "save_steps": job.every,
        "save_total_limit": 2,
        "load_best_model_at_end": True,
        "restore_callback_states_from_checkpoint": True,  # the patience of early stopping, the clock
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "prediction_loss_only": True,
        "remove_unused_columns": False,
        "seed": settings.seed,
        "data_seed": settings.seed,
        "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": device.type == "cuda",
        "report_to": "none",
        "disable_tqdm": True,
        **(fsdp_arguments(job.lm.model) if world() > 1 and settings.shard == "fsdp" else {}),
    }


def stay_on_one_device(arguments: TrainingArguments) -> None:
    """Let the Trainer know of one GPU at most: else it splits batches by DataParallel."""
    arguments._n_gpu = min(arguments.n_gpu, 1)


class AnswerTrainer(TrainsTogether):
    """Trainer whose loss projects only the answer positions onto the vocabulary, in length-sorted batches."""

    grouped_by: int  # rows of a batch, whose order does not depend on how many of them pass at once

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.model_accepts_loss_kwargs = True  # `compute_loss` is given how many tokens the whole step has

    def without_loss(self, row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "labels": [IGNORED] * len(row["labels"])}

    def weight_of(self, inputs: Mapping[str, Any]) -> int:
        return int((inputs["labels"][:, 1:] != IGNORED).sum())

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        if torch.is_grad_enabled() or self.is_fsdp_enabled:  # under FSDP all processes pass through it equally often
            loss = self._summed_loss(model, inputs)
        else:
            loss = self._summed_in_parts(model, inputs)
        if num_items_in_batch is None:
            loss = loss / (inputs["labels"][:, 1:] != IGNORED).sum()
        else:
            loss = loss_of_all(loss, num_items_in_batch)
        return (loss, {}) if return_outputs else loss

    def _summed_in_parts(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """The summed loss of a validation batch, which passes in as many parts as memory asks for."""
        count, length = inputs["input_ids"].shape
        names = ("input_ids", "attention_mask", "labels")

        def part_of_it(rows: list[int]) -> list[Tensor]:
            return [self._summed_loss(model, {name: inputs[name][rows] for name in names})]

        unwrapped = self.accelerator.unwrap_model(model)
        return torch.stack(in_parts(unwrapped, "validate", range(count), [length] * count, part_of_it)).sum()

    def _summed_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """The loss in nats, summed over the tokens of the answers."""
        targets = inputs["labels"][:, 1:]
        wanted = targets != IGNORED  # (batch, length - 1): position t predicts token t + 1
        with projecting_only(self.accelerator.unwrap_model(model), nn.functional.pad(wanted, (0, 1))):
            logits = model(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
            ).logits[0]
        return nn.functional.cross_entropy(logits.float(), targets[wanted], reduction="sum")

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        rows: Any = self.train_dataset
        lengths = [len(row["input_ids"]) for row in rows]
        return SeededLengthSampler(self.grouped_by, lengths, self.args.seed)


class SeededLengthSampler(LengthGroupedSampler):
    """Batches of like length whose order depends on seed and epoch alone, so that a resumed run repeats it."""

    def __init__(self, batch_size: int, lengths: Sequence[int], seed: int) -> None:
        super().__init__(batch_size, lengths=list(lengths), generator=torch.Generator())
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self.seed + epoch)
