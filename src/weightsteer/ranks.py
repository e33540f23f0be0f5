"""Several processes that train one model: how many they are, who writes, and what each is given.

They are started by `torchrun` or `accelerate launch`, or by `training/launch.py`, which set the environment variables
`WORLD_SIZE`, `RANK` and `LOCAL_RANK`. Rank 0, the first process, writes all files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, TypeVar

from .errors import SteerError, first_line

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
MEETING = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what a launcher sets beside WORLD_SIZE


def world() -> int:
    """How many processes train together; 1 for a process that was started alone.

    Raises:
        SteerError: the environment gives no number.
    """
    count = os.environ.get("WORLD_SIZE") or "1"
    if not count.isdecimal() or int(count) < 1:
        raise SteerError(f"WORLD_SIZE: expected a number of processes, found {count!r}; unset it, or use torchrun")
    return int(count)


def rank() -> int:
    """The number of this process among them, from 0."""
    return int(os.environ.get("RANK", "0")) if world() > 1 else 0


def is_first() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


def join(*, on_cpu: bool) -> None:
    """Meet the other processes; nothing where there are none, or they have met.

    Args:
        on_cpu: train on the CPU (gloo), also where there is an accelerator.

    Raises:
        SteerError: a launcher left `WORLD_SIZE` without what leads to the others.
    """
    import torch.distributed as group
    from accelerate import PartialState

    if world() > 1 and not group.is_initialized():
        if missing := [name for name in MEETING if name not in os.environ]:
            raise SteerError(
                f"WORLD_SIZE is {world()}, but {', '.join(missing)} say nothing of the other processes; start all by "
                "torchrun or accelerate launch, or unset WORLD_SIZE to train in this process alone"
            )
        PartialState(cpu=on_cpu)


def own_device() -> torch.device:
    """Where this process trains, once it has met the others: its own accelerator, or the CPU."""
    from accelerate import PartialState

    device: torch.device = PartialState().device
    return device


def wait() -> None:
    """Wait until all processes are here."""
    if world() > 1:
        import torch.distributed as group

        group.barrier()


def agreed(make: Callable[[], T]) -> T:
    """What the first process makes, known to all; what it raises there is raised in all.

    The value and the error go from process to process by torch, and into no file.
    """
    if world() == 1:
        return make()
    import torch.distributed as group

    box: list[tuple[str, T | None, str]] = [("", None, "")]
    raised: Exception | None = None
    if is_first():
        try:
            box = [("made", make(), "")]
        except Exception as error:
            raised, told = error, str(error) if isinstance(error, SteerError) else first_line(error)
            box = [("refused" if isinstance(error, SteerError) else "failed", None, told)]
    group.broadcast_object_list(box)
    if raised is not None:
        raise raised
    how, value, told = box[0]
    if how == "refused":
        raise SteerError(told)
    if how == "failed":
        raise RuntimeError(f"process 0: {told}")
    return value  # type: ignore[return-value]


@contextmanager
def by_first(context: AbstractContextManager[None]) -> Iterator[None]:
    """Enter a context in the first process alone; what refuses there refuses in all."""
    with ExitStack() as stack:
        agreed(lambda: stack.enter_context(context))
        yield


def share_of(rows: Sequence[T]) -> list[T]:
    """The rows of a batch that this process takes; none where the batch has fewer rows than there are processes."""
    return list(rows[rank() :: world()])


def least_of_all(own: int) -> int:
    """The smallest of the numbers that the processes have."""
    if world() == 1:
        return own
    import torch.distributed as group

    everyone: list[int] = [own] * world()
    group.all_gather_object(everyone, own)
    return min(everyone)


def refuse_differences(known: Mapping[str, str]) -> None:
    """Check that every process has the same of something, such as versions: name -> value.

    Raises:
        SteerError: one that has not; the first name in which it differs is told.
    """
    if world() == 1:
        return
    import torch.distributed as group

    everyone: list[dict[str, str]] = [{} for _ in range(world())]
    group.all_gather_object(everyone, dict(known))
    for number, theirs in enumerate(everyone):
        for name, value in everyone[0].items():
            if theirs.get(name) != value:
                raise SteerError(
                    f"process {number} has {name} {theirs.get(name)}, process 0 has {value}; give all the same"
                )
