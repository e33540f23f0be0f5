"""What our Trainers do otherwise than `transformers.Trainer`, so that several processes train as one does.

Every process draws the same batch and takes its rows of it. Losses are summed over all processes before they are
divided, whatever number of rows or tokens each has; so the gradient, and the validation loss, is that of one process.
A checkpoint holds what is trained, whole, so that a training goes on with any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer

from ..checkpoints.safetensors_file import save_tensors
from ..ranks import is_first, share_of, world
from .sharded import optimizer_state, put_optimizer_state, put_trained, trained_tensors

TRAINED = "trained.safetensors"  # in a checkpoint: what is trained, by the parameter's name
OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"  # the Trainer's names
ROWS, OWN = "rows_of_all", "own_rows"  # in a process's part of a batch: how many rows all have, and this one
Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]


class TrainsTogether(Trainer):
    """A Trainer of one or several processes; see above."""

    def without_loss(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row for a process that has none of a batch: it computes with the others, and adds nothing."""
        raise NotImplementedError

    def weight_of(self, inputs: Mapping[str, Any]) -> int:
        """Over how many units, such as tokens, `compute_loss` takes the mean."""
        raise NotImplementedError

    @property
    def _trained_model(self) -> nn.Module:
        """The model itself, not wrapped for several processes."""
        assert self.model is not None
        return self.model

    def create_accelerator_and_postprocess(self) -> None:
        """Let accelerate spread weights on CPUs as well, which it does by itself on accelerators alone."""
        super().create_accelerator_and_postprocess()
        if self.args.fsdp_plugin_args is not None and not self.is_fsdp_enabled:
            self.accelerator.state.distributed_type = DistributedType.FSDP
            self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    def get_train_dataloader(self) -> DataLoader[Any]:
        if world() == 1:
            return super().get_train_dataloader()
        sampler: Any = self._get_train_sampler()
        return _SharedBatches(self.train_dataset, self._train_batch_size, sampler, self._collate_own)

    def _collate_own(self, batch: list[dict[str, Any]]) -> dict[str, Any]:
        """This process's part of a batch."""
        own = share_of(batch)
        inputs: dict[str, Any] = self.data_collator(own or [self.without_loss(batch[0])])
        return {**inputs, ROWS: torch.tensor(len(batch)), OWN: torch.tensor(len(own))}

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        if world() > 1 and not inputs[OWN]:
            inputs = {**inputs, "attention_mask": torch.zeros_like(inputs["attention_mask"])}
        super()._track_num_input_tokens(inputs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The mean loss over all validation rows; each unit counts alike, in whatever batch and process it is."""
        rows: Any = self.eval_dataset
        size, total, count = self.args.per_device_eval_batch_size, 0.0, 0.0
        model = self._trained_model
        model.eval()
        for start in range(0, len(rows), size):
            batch = [rows[place] for place in range(start, min(start + size, len(rows)))]
            inputs = self._prepare_inputs(self._collate_own(batch))
            with torch.no_grad(), self.compute_loss_context_manager():
                found = self.compute_loss(model, inputs)
            loss = float(found[0] if isinstance(found, tuple) else found)
            if inputs[OWN]:
                weight = self.weight_of(inputs)
                total, count = total + loss * weight, count + weight
        if world() > 1:
            sums = torch.tensor([total, count], dtype=torch.float64, device=self.args.device)
            total, count = self.accelerator.reduce(sums).tolist()
        metrics = {f"{metric_key_prefix}_loss": total / count}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """What is trained, and nothing of what the base has."""
        assert output_dir is not None
        tensors = trained_tensors(self._trained_model)
        if is_first():
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_tensors(tensors, Path(output_dir) / TRAINED)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        state = optimizer_state(self.optimizer)
        if is_first():
            torch.save(state, Path(output_dir) / OPTIMIZER)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        path = Path(resume_from_checkpoint) / TRAINED
        if path.exists():
            put_trained(self._trained_model, load_file(path))
        else:  # an earlier version's, of one process
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        path = Path(str(self.state.best_model_checkpoint)) / TRAINED
        if path.exists():
            put_trained(self._trained_model, load_file(path))
        else:
            super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        folder = Path(checkpoint)
        state = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
        put_optimizer_state(self.optimizer, state)
        self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER, weights_only=True))


class _SharedBatches(DataLoader[Any]):
    """The batches of one process, of which `collate` takes this process's rows."""

    def __init__(self, rows: Any, batch_size: int, sampler: Sampler[int], collate: Collate) -> None:
        super().__init__(rows, batch_size=batch_size, sampler=sampler, collate_fn=collate)

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of a pass over the data."""
        self.sampler.set_epoch(epoch)  # type: ignore[attr-defined]


def loss_of_all(own: Tensor, units: Tensor | int) -> Tensor:
    """A sum of this process's losses as its part of a mean over all: DDP and FSDP take the mean of the processes."""
    return own * world() / units
