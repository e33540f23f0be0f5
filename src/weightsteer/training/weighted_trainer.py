"""The Trainer whose loss has more terms than that on the answers: both signs of w, the even part, the KL to the base.

A batch holds rows of up to three kinds, one after the other:

1. answers that are fitted: of one side at sign 1; or those of D+ at sign 1, then those of D- at sign -1;
2. with a weight on the even part, the same answers at the opposite sign;
3. with a weight on the KL, for each example a neutral prompt with the base's own reply, at each sign that is trained.

The loss is the mean over the answers' tokens of -log p, in nats, plus
`even_weight` times the mean over the answers' tokens of e^2, e = (log p(w) + log p(-w)) / 2 - log p(0), plus
`kl_weight` times the mean over the neutral replies of KL(base || model), each the mean over its tokens, and weighted as
the answer that it belongs to. So the loss of a step is that of its examples, however many of them pass at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from ..batches import pad_right
from ..model_parts import projecting_only
from .job import Encoded, Job
from .neutral import draw, token_kls
from .row_signs import RowSigns
from .trainer import IGNORED, AnswerTrainer, SeededLengthSampler, arguments_of, stay_on_one_device

SIDE = "negative_"  # before the names of D-'s ids in a row of two-way training


def make_weighted_trainer(
    job: Job, model: nn.Module, callbacks: list[TrainerCallback], *, neutral: Sequence[Encoded]
) -> WeightedTrainer:
    """The Trainer of a job whose rows `encode` made (one side), or `encode_pairs` (two-way).

    Args:
        neutral: rows of `neutral_rows`; none where the settings have no weight for them.
    """
    arguments = TrainingArguments(**{**arguments_of(job), "per_device_eval_batch_size": job.rows_at_once})
    stay_on_one_device(arguments)
    settings = job.settings
    trainer = WeightedTrainer(
        model=model,
        args=arguments,
        train_dataset=job.train,
        eval_dataset=job.validation,
        data_collator=_Collator(job.lm.pad_id, settings.even_weight > 0, tuple(neutral)),
        callbacks=callbacks,
    )
    trainer.weights = settings.even_weight, settings.kl_weight
    trainer.grouped_by = settings.batch_size
    trainer.rows = RowSigns(model)
    trainer.remove_callback(PrinterCallback)
    return trainer


@dataclass(frozen=True)
class _Collator:
    """Rows of one side, or pairs of rows, as one batch with the signs of its rows."""

    pad: int
    even: bool
    neutral: tuple[Encoded, ...]

    def __call__(self, features: Sequence[Encoded]) -> dict[str, Tensor]:
        fitted, signs = [_side(row, "") for row in features], [1.0] * len(features)
        two_way = f"{SIDE}input_ids" in features[0]
        if two_way:
            fitted += [_side(row, SIDE) for row in features]
            signs += [-1.0] * len(features)
        opposite = fitted if self.even else []
        keys = [sum(sum(ids) for name, ids in row.items() if name.endswith("input_ids")) for row in features]
        drawn = [row for key in keys for row in draw(self.neutral, 1, key)]
        kept = [(row["input_ids"], row["labels"]) for row in drawn]
        both = kept * (2 if two_way else 1)
        rows = [*fitted, *opposite, *both]
        signs += [-sign for sign in signs] if self.even else []
        signs += [1.0] * len(kept) + [-1.0] * (len(both) - len(kept))
        device = torch.device("cpu")
        ids, mask = pad_right([row for row, _ in rows], self.pad, device)
        targets, _ = pad_right([labels for _, labels in rows], IGNORED, device)
        labels = targets.clone()
        labels[len(fitted) :] = IGNORED  # the Trainer counts the fitted tokens by these
        counts = torch.tensor([len(fitted), len(kept)])
        found = {"input_ids": ids, "attention_mask": mask, "labels": labels, "targets": targets}
        return {**found, "signs": torch.tensor(signs), "counts": counts}


def _side(row: Encoded, prefix: str) -> tuple[list[int], list[int]]:
    return row[f"{prefix}input_ids"], row[f"{prefix}labels"]


class WeightedTrainer(AnswerTrainer):
    """See the module."""

    weights: tuple[float, float]  # of the even part, and of the KL
    rows: RowSigns

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        fitted, kept = inputs["counts"].tolist()
        even_weight, kl_weight = self.weights
        opposite = fitted if even_weight else 0
        read = torch.arange(len(inputs["signs"]))
        still = torch.cat([read[: fitted if even_weight else 0], read[fitted + opposite :][:kept]])
        base = self._without(model, inputs, still.to(inputs["input_ids"].device)) if len(still) else []
        moved = self._logits(model, inputs, read.to(inputs["input_ids"].device), inputs["signs"])
        targets = _targets(inputs)
        own = [_log_probs(moved[i], targets[i]) for i in range(fitted)]
        counted = sum(len(row) for row in own)
        share = counted / (counted if num_items_in_batch is None else num_items_in_batch)  # of a step's tokens
        loss = -torch.cat(own).sum() / counted
        if even_weight:
            other = [_log_probs(moved[fitted + i], targets[i]) for i in range(fitted)]
            rest = [_log_probs(base[i], targets[i]) for i in range(fitted)]
            odd_out = (torch.cat(own) + torch.cat(other)) / 2 - torch.cat(rest)
            loss = loss + even_weight * odd_out.square().mean()
        if kl_weight:
            stand = base[len(base) - kept :]
            found = [token_kls(stand[i % kept], row).mean() for i, row in enumerate(moved[fitted + opposite :])]
            loss = loss + kl_weight * sum(len(mine) * kl for mine, kl in zip(own, found, strict=True)) / counted
        loss = loss * share
        return (loss, {}) if return_outputs else loss

    @torch.no_grad()
    def _without(self, model: nn.Module, inputs: dict[str, Tensor], rows: Tensor) -> list[Tensor]:
        """The base's logits of some rows."""
        return self._logits(model, inputs, rows, torch.zeros(len(rows)))

    def _logits(self, model: nn.Module, inputs: dict[str, Tensor], rows: Tensor, signs: Tensor) -> list[Tensor]:
        """For each of some rows the logits that predict its targets: (tokens, vocabulary)."""
        wanted = inputs["targets"][rows][:, 1:] != IGNORED  # position t predicts token t + 1
        self.rows.signs = signs
        with projecting_only(self.accelerator.unwrap_model(model), nn.functional.pad(wanted, (0, 1))):
            logits = model(
                input_ids=inputs["input_ids"][rows], attention_mask=inputs["attention_mask"][rows], use_cache=False
            ).logits[0]
        return list(logits.split(wanted.sum(dim=1).tolist()))

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        rows: Any = self.train_dataset
        names = ("input_ids", f"{SIDE}input_ids")
        lengths = [max(len(row[name]) for name in names if name in row) for row in rows]
        return SeededLengthSampler(self.grouped_by, lengths, self.args.seed)


def _targets(inputs: dict[str, Tensor]) -> list[Tensor]:
    return [row[row != IGNORED] for row in inputs["targets"][:, 1:]]


def _log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target, in nats: (tokens,)."""
    return -nn.functional.cross_entropy(logits.float(), targets, reduction="none")
