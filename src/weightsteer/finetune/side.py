"""One side of the data -> one fine-tune folder, taken up again after a kill."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import set_seed

from ..behavior import Example, example_rows
from ..errors import SteerError
from ..lm import LM
from ..progress import Progress, silent
from ..records import CARD_FILE, RunCard, digest, is_empty, new_folder, read_json, refuse_foreign, write_text
from .kinds import trainable
from .settings import TrainSettings
from .trainer import IGNORED, Encoded, Job, last_whole_checkpoint, make_trainer


def train_side(
    lm: LM,
    examples: Sequence[Example],
    out: str | Path,
    *,
    settings: TrainSettings | None = None,
    progress: Progress = silent,
) -> Path:
    """Train on one side of the data and save the fine-tune with its card; `lm` is left as it was.

    The output is a PEFT adapter (lora), a file of biases (bias) or a checkpoint (full). While it is
    made, checkpoints lie in `<out>.work`; after a kill the same call goes on from the last one and
    gives the same result. An output that is already there from the same inputs is kept.

    Args:
        progress: called with steps done, steps in all, and the loss.

    Raises:
        SteerError: too few examples, or `out` holds something else.
    """
    settings = settings or TrainSettings()
    out = Path(out)
    _refuse_placement(lm)
    card = RunCard.now(
        "finetune",
        base_model=lm.name,
        base_revision=lm.revision,
        data_sha256={"examples": digest(example_rows(examples))},
        settings=asdict(settings),
        seed=settings.seed,
    )
    work = out.with_name(f"{out.name}.work")
    if is_made_from(out, card):
        shutil.rmtree(work, ignore_errors=True)
        return out
    refuse_foreign(out, "finetune")
    train, validation = split_validation(encode(lm, examples, settings.max_length), settings)
    _claim(work, card)
    losses = {}
    for number, rate in enumerate(settings.learning_rates):
        job = Job(lm, train, validation, settings, rate, work / f"lr-{rate:g}")
        losses[rate] = _trained_loss(job, _part_of(progress, number, len(settings.learning_rates)))
    best = min(losses, key=lambda rate: losses[rate])
    measured = {"validation_loss": {f"{rate:g}": loss for rate, loss in losses.items()}, "learning_rate": best}
    with new_folder(out, "finetune") as part:
        shutil.copytree(work / f"lr-{best:g}" / "best", part, dirs_exist_ok=True)
        RunCard(**{**vars(card), "measured": measured}).save(part)
    shutil.rmtree(work)
    return out


def _refuse_placement(lm: LM) -> None:
    """Raise where the Trainer would place the model elsewhere, or several processes would write one output."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SteerError(
            "training runs in one process, found several (torchrun); start it alone, with device 'auto' to "
            "spread a large model over the GPUs of one machine"
        )
    if lm.device.type == "cuda" and lm.device.index not in (None, 0):
        raise SteerError(
            f"training uses the first visible GPU, found the model on {lm.device}; "
            f"set CUDA_VISIBLE_DEVICES={lm.device.index} and use device cuda"
        )


def is_made_from(folder: Path, card: RunCard) -> bool:
    """True if `folder` is a finished artifact of the same kind, base, data and settings as `card`."""
    if not (folder / CARD_FILE).exists():
        return False
    return _identity(RunCard.load(folder)) == _identity(card)


def _identity(card: RunCard) -> str:
    return digest(
        [card.kind, card.base_model, card.base_revision, dict(card.data_sha256), dict(card.settings), card.seed]
    )


def _claim(work: Path, card: RunCard) -> None:
    """Make the work folder, or keep it if it belongs to the same job; an older job's is cleared."""
    stamp = work / "job.json"
    if stamp.exists() and read_json(stamp) == _identity(card):
        return
    if work.exists() and not stamp.exists() and not is_empty(work):
        raise SteerError(f"{work}: is in the way of the checkpoints; move it")
    shutil.rmtree(work, ignore_errors=True)
    write_text(stamp, json.dumps(_identity(card)))


def _part_of(progress: Progress, number: int, count: int) -> Progress:
    def scaled(done: float, total: float, note: str = "") -> None:
        progress(number * total + done, count * total, note)

    return scaled


def encode(lm: LM, examples: Sequence[Example], max_length: int) -> list[Encoded]:
    """Examples as token ids whose labels are IGNORED up to the answer (loss on the answer only)."""
    rows = []
    for example in examples:
        prompt, answer = lm.chat_ids(example.prompt), lm.answer_ids(example.answer, ended=True)
        ids = (prompt + answer)[:max_length]
        if len(ids) <= len(prompt):
            raise SteerError(
                f"max_length is {max_length} tokens, but the prompt {example.prompt[:60]!r} alone takes "
                f"{len(prompt)}; raise max_length or shorten the prompt"
            )
        labels = ([IGNORED] * len(prompt) + answer)[:max_length]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return rows


def split_validation(rows: Sequence[Encoded], settings: TrainSettings) -> tuple[list[Encoded], list[Encoded]]:
    """(training, validation) rows; the same rows for the same seed, so that both sides hold out alike."""
    held = max(1, round(settings.validation * len(rows)))
    if len(rows) - held < 1:
        raise SteerError(f"training needs at least 2 examples a side, found {len(rows)}")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    return [rows[i] for i in sorted(order[held:])], [rows[i] for i in sorted(order[:held])]


def _trained_loss(job: Job, progress: Progress) -> float:
    """Best validation loss of a job, training it unless an earlier call finished it."""
    result = job.folder / "result.json"
    if result.exists():
        return float(read_json(result))
    set_seed(job.settings.seed)  # before the adapter is made, so that a rerun draws the same adapter
    with trainable(job.lm.model, job.settings) as (model, save_best):
        trainer = make_trainer(job, model, progress)
        trainer.train(resume_from_checkpoint=last_whole_checkpoint(job.folder))
        loss = trainer.state.best_metric
        if loss is None or not torch.isfinite(torch.tensor(loss)):
            raise SteerError(
                f"training at learning rate {job.learning_rate:g} diverged (validation loss {loss}); use a lower one"
            )
        save_best(job.folder / "best")
        write_text(result, json.dumps(loss))
    for checkpoint in job.folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)
    return float(loss)
