"""TRL's DPOTrainer on our tokens and in our order; imported only where a preference is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from ..ranks import world
from .job import Job
from .together import OWN, ROWS, TrainsTogether, loss_of_all
from .trainer import SeededLengthSampler, arguments_of, stay_on_one_device

REFERENCE = "ref"  # TRL's name for the copy of an adapter that it compares with


def make_dpo_trainer(job: Job, model: nn.Module, callbacks: list[TrainerCallback], *, beta: float) -> Trainer:
    """TRL's trainer of a job whose rows `encode_preferences` made; `model` is a fresh PEFT model."""
    assert isinstance(model, PeftModel)
    config = DPOConfig(
        **{**arguments_of(job), "per_device_eval_batch_size": job.rows_at_once},
        beta=beta,
        max_length=None,  # the rows are cut already
        gradient_checkpointing=False,  # `trainable` turns it on
    )
    stay_on_one_device(config)
    trainer = _PreferenceTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(job.train),
        eval_dataset=Dataset.from_list(job.validation),
        processing_class=job.lm.tokenizer,
        callbacks=callbacks,
    )
    trainer.grouped_by, trainer.parts = job.settings.batch_size, job.settings.batch_size // job.rows_at_once
    for parameter in model.parameters():
        if parameter.requires_grad:  # over a quantised base TRL makes the adapter bfloat16, and small steps are lost
            parameter.data = parameter.data.float()
    if REFERENCE in model.peft_config:  # a copy of an adapter that is still zero: the base without it is the same
        model.delete_adapter(REFERENCE)
    trainer.remove_callback(PrinterCallback)
    return trainer


def weights_of_parts(sizes: Sequence[int], parts: int) -> list[float]:
    """By what to multiply the mean loss of each part of a step, so that the step is the one of whole batches.

    The Trainer takes the mean over all parts, and a batch's last parts may be smaller than the others.

    Args:
        sizes: of the parts of one step, in order.
        parts: in how many a whole batch is split.
    """
    batches = [sizes[start : start + parts] for start in range(0, len(sizes), parts)]
    share = len(sizes) / len(batches)
    return [size * share / sum(batch) for batch in batches for size in batch]


@contextmanager
def undo_trl_changes(model: PreTrainedModel) -> Iterator[None]:
    """Take back on leaving what TRL changes in a model: tags, padding ids, dropout of 0; `trainable` what it adds."""
    tags = list(model.model_tags or [])
    configs = [config for config in (model.config.get_text_config(), model.generation_config) if config]
    padding = [config.pad_token_id for config in configs]
    dropout = {module: module.p for module in model.modules() if isinstance(module, nn.Dropout)}
    try:
        yield
    finally:
        if "model_tags" in vars(model):
            model.model_tags = tags
        for config, token in zip(configs, padding, strict=True):
            config.pad_token_id = token
        for module, share in dropout.items():
            module.p = share


class _PreferenceTrainer(TrainsTogether, DPOTrainer):
    """DPOTrainer that takes rows of token ids as they are, in an order that a resumed run repeats."""

    grouped_by: int  # rows of a batch
    parts: int  # in how many a whole batch passes through the model
    weights: Iterator[float] = iter(())  # of the next parts

    def without_loss(self, row: dict[str, Any]) -> dict[str, Any]:
        return row  # its loss is weighed with 0 rows

    def weight_of(self, inputs: Mapping[str, Any]) -> int:
        return len(inputs["input_ids"]) // 2  # of each pair both answers

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        sizes = [int(sample[ROWS]) if ROWS in sample else self.weight_of(sample) for sample in samples]
        self.weights = iter(weights_of_parts(sizes, self.parts))
        return samples, items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """TRL's mean over this process's pairs; in training, as its part of the mean over those of all processes."""
        own, of_all = (int(inputs[name]) if name in inputs else 0 for name in (OWN, ROWS))
        with _not_gathered(self.accelerator):
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if return_outputs or not torch.is_grad_enabled():
            return loss
        return (loss_of_all(loss * own, of_all) if world() > 1 else loss) * next(self.weights)

    def _prepare_dataset(self, dataset: Dataset, processing_class: Any, args: DPOConfig, dataset_name: str) -> Dataset:
        return dataset  # TRL would tokenize texts anew, by a template that is not `LM.chat_ids`

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        rows: Any = self.train_dataset
        lengths = [len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in rows]
        return SeededLengthSampler(self.grouped_by, lengths, self.args.seed)

    def _send_telemetry(self) -> None:
        """TRL would tell its makers of every run; ours are the user's own business."""


@contextmanager
def _not_gathered(accelerator: Any) -> Iterator[None]:
    """Keep TRL's metrics, which we do not show, to each process: it gathers them by row, and processes' rows differ."""
    accelerator.gather = accelerator.gather_for_metrics = lambda value, *_, **__: value
    try:
        yield
    finally:
        del accelerator.gather, accelerator.gather_for_metrics
