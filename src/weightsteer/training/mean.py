"""The mean of several fine-tunes of one side, each on its own part of the answers with an adapter of its own.

They agree in the behaviour that the answers share and differ in the rest, which costs the model elsewhere. With as many
passes they are trained on as many tokens as one fine-tune. Averaging weights after training is the idea of model soups
(arXiv 2203.05482).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.checkpoint import ADAPTER_CONFIG, ADAPTER_FILE
from ..checkpoints.safetensors_file import load_tensors, save_tensors
from ..errors import SteerError
from ..files import read_json, write_json
from .job import Encoded, Job
from .settings import LARGEST_SEED

ENOUGH = 50  # rows of one part; 23 were too few, and 98 enough (docs/bench.md)
STRIDE = 1_000_003  # between the seeds, so that none is that of another training
FURTHER = "again-"  # before the number of a further fine-tune, in the folder of the first


def further_jobs(job: Job) -> list[Job]:
    """The other fine-tunes of a job's mean: other rows, another adapter and order, and the same held-out rows."""
    return [
        replace(
            job,
            train=part,
            further=(),
            settings=replace(job.settings, seed=(job.settings.seed + number * STRIDE) % (LARGEST_SEED + 1)),
            folder=job.folder / f"{FURTHER}{number}",
        )
        for number, part in enumerate(job.further, 1)
    ]


def parts_of(rows: list[Encoded], count: int) -> list[list[Encoded]]:
    """So many parts of the rows, of one size but for one row; of both sides they hold the answers of the same pairs.

    A warning tells of parts of few rows.

    Raises:
        SteerError: fewer rows than parts.
    """
    refuse_empty_parts(len(rows), count)
    if count > 1 and len(rows) < ENOUGH * count:
        most = len(rows) // ENOUGH
        better = f"with {most} each would have at least {ENOUGH}" if most > 1 else "leave finetunes at 1"
        warnings.warn(
            f"finetunes: {len(rows) // count} rows for each of {count}; with so few the mean can be worse than one "
            f"fine-tune on all of them: {better}",
            stacklevel=3,
        )
    return [rows[number::count] for number in range(count)]


def refuse_empty_parts(rows: int, count: int) -> None:
    """Raise for more fine-tunes than rows that are trained on."""
    if rows < 1:
        raise SteerError("validation: all examples are held out and none is left to train on; lower it")
    if rows < count:
        raise SteerError(f"finetunes: expected at most {rows}, one for each row that is trained on, found {count}")


def further_folders(folder: Path) -> list[Path]:
    """Where they lie beside the job in `folder`, in their order."""
    return sorted(folder.glob(f"{FURTHER}*"), key=lambda path: int(path.name.removeprefix(FURTHER)))


def write_mean(adapters: Sequence[Path], out: Path) -> None:
    """Put the mean of LoRA adapters of one shape into `out`, which holds the first of them.

    The factors are put side by side: m adapters of rank r make one of rank m r. PEFT scales by alpha / rank, so that
    the same alpha gives the mean, (alpha / r) (1 / m) sum of B A, and no number is rounded.

    Raises:
        SteerError: an adapter holds something else than LoRA's factors.
    """
    first, *others = [load_tensors(adapter / ADAPTER_FILE) for adapter in adapters]
    joined = {name: _joined(name, [first[name], *(other[name] for other in others)]) for name in first}
    config: dict[str, Any] = read_json(out / ADAPTER_CONFIG)
    write_json(out / ADAPTER_CONFIG, {**config, "r": config["r"] * len(adapters)})
    save_tensors(joined, out / ADAPTER_FILE)


def _joined(name: str, tensors: list[Tensor]) -> Tensor:
    """Factors of one layer, A (rank, in) or B (out, rank), along their rank."""
    if name.endswith("lora_A.weight"):
        return torch.cat(tensors, dim=0)
    if name.endswith("lora_B.weight"):
        return torch.cat(tensors, dim=1)
    raise SteerError(f"{name}: no factor of a LoRA on a linear layer, of which finetunes takes the mean; set it to 1")
