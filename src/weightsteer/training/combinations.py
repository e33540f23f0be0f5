"""Which settings of a training go together: with each other, with how the base is loaded, with its kind.

Nothing here takes a model. So a recipe is checked by the same rules, and in the same words, before one is loaded.
"""

from __future__ import annotations

from typing import Literal

import torch

from ..checkpoints.load_options import LoadOptions
from ..errors import SteerError
from ..ranks import world
from .settings import TrainSettings, refuse_weights

Way = Literal["side", "two-way", "preference"]  # what a training's rows are: answers, pairs of them, preferences


def refuse_combination(given: TrainSettings, way: Way, load: LoadOptions, *, base: str) -> None:
    """Raise for settings that no such training takes.

    Args:
        load: how the base is loaded.
        base: its name.

    Raises:
        SteerError: the first field that does not go with the others, and what to set instead.
    """
    {"side": _refuse_on_side, "two-way": _refuse_two_way, "preference": _refuse_preference}[way](given)
    _refuse_mean(given)
    _refuse_processes(given, load)
    refuse_packed(given, base, packed=load.quantize is not None)
    if given.max_steps is not None:
        refuse_snapshots(given.snapshots, given.max_steps)
    if given.batch_size is not None:
        refuse_crowded(given, given.batch_size)


def _refuse_on_side(given: TrainSettings) -> None:
    refuse_weights(given, "training on one side", "even_weight")
    if given.kl_weight:
        _refuse_several(given, "a training with kl_weight")
    if given.kl_weight and given.kind != "lora":
        raise SteerError(f"kl_weight: needs kind lora, whose base stays at hand, found {given.kind!r}; leave it out")


def _refuse_mean(given: TrainSettings) -> None:
    """Raise where several fine-tunes are to become one, and there is no mean of what they keep."""
    if given.finetunes > 1 and given.kind != "lora":
        raise SteerError(f"finetunes: the mean is that of lora, found kind {given.kind}; set finetunes 1 for it")
    if given.finetunes > 1 and given.snapshots:
        raise SteerError("finetunes: a mean has no snapshots; set finetunes 1 for them, or snapshots 0")


def _refuse_two_way(given: TrainSettings) -> None:
    if given.kind != "lora":
        raise SteerError(f"kind: two-way training trains lora, found {given.kind!r}")
    _refuse_several(given, "two-way training")


def _refuse_preference(given: TrainSettings) -> None:
    if given.kind != "lora":
        raise SteerError(f"kind: preference tuning trains lora, found {given.kind!r}")
    refuse_weights(given, "preference tuning")


def _count(given: TrainSettings) -> int:
    """How many processes train: as many as are asked for, or as this one was started with."""
    return max(given.processes, world())


def _refuse_several(given: TrainSettings, training: str) -> None:
    """Raise where several processes are to do a training whose rows are no mere sum."""
    if (found := _count(given)) > 1:
        raise SteerError(
            f"processes: {training} runs in one process, found {found}; set processes 1 and shard ddp for it"
        )


def _refuse_processes(given: TrainSettings, load: LoadOptions) -> None:
    """Raise where as many processes are not there as are asked for, or the base cannot be loaded for them."""
    if given.processes not in (1, world()) and world() > 1:
        raise SteerError(f"processes: expected {world()}, as many as were started, found {given.processes}")
    if given.shard == "fsdp" and _count(given) == 1:
        raise SteerError("shard fsdp: spreads a model over several processes, found one; set processes as well")
    if _count(given) == 1:
        return
    if load.device_map or load.max_memory:
        raise spread_already()
    if load.quantize and given.shard == "fsdp":
        raise SteerError(
            f"quantize {load.quantize}: shard fsdp does not split weights that are packed; use shard ddp, in which "
            "each process holds the packed model, or load it without quantize"
        )


def spread_already() -> SteerError:
    """What to say where one model lies on several devices, and several processes are to train it."""
    return SteerError(
        "device auto, device_map and max_memory: spread the model of one process; for several, leave them out, "
        "and use shard fsdp where the model does not fit on one GPU"
    )


def refuse_packed(given: TrainSettings, base: str, *, packed: bool) -> None:
    """Raise if the base's own weights are to be trained and are quantised: what is packed takes no gradient."""
    if given.kind != "lora" and packed:
        raise SteerError(
            f"kind {given.kind}: trains weights of the model itself, and those of {base} are quantised; use kind "
            "lora, or load the model without quantize"
        )


def refuse_snapshots(wanted: int, steps: int) -> None:
    """Raise for more snapshots than steps."""
    if wanted > steps:
        raise SteerError(f"snapshots: expected at most one a step, found {wanted} for the {steps} steps of the run")


def refuse_crowded(given: TrainSettings, batch_size: int) -> None:
    """Raise for more processes than a batch has rows: some would have nothing to do."""
    if (processes := _count(given)) > batch_size:
        raise SteerError(
            f"processes: expected at most {batch_size}, the rows of a batch, found {processes}; start fewer, or raise "
            "batch_size"
        )


def refuse_scarce(count: int, device: str | None) -> None:
    """Raise where this machine has fewer accelerators than processes are to be started.

    Args:
        device: where the model is to lie; None: on the accelerator, if there is one.
    """
    if torch.accelerator.is_available() and device != "cpu" and count > torch.accelerator.device_count():
        raise SteerError(
            f"processes: expected at most {torch.accelerator.device_count()}, the GPUs of this machine, found {count}; "
            "start fewer, or start them on several machines with torchrun (docs/many-gpus.md)"
        )
