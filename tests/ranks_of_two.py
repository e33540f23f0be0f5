"""Two processes of one training on this machine, forked from one that has imported everything (see `killable`)."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import killable


def start_together(folder: Path, work: Callable[..., None], *args: object, count: int = 2) -> list[BaseProcess]:
    """Run `work` in so many processes that find each other; what each prints goes into `folder/RANK.log`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    return [
        killable.start(folder / f"{number}.log", _as_rank, number, count, port, work, args) for number in range(count)
    ]


def run_together(folder: Path, work: Callable[..., None], *args: object, count: int = 2) -> list[str]:
    """Run `work` so until all have ended; returns what each has printed."""
    processes = start_together(folder, work, *args, count=count)
    for process in processes:
        process.join()
    return [(folder / f"{number}.log").read_text() for number in range(count)]


def _as_rank(number: int, count: int, port: int, work: Callable[..., None], args: tuple[object, ...]) -> None:
    there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update(
        {k: str(v) for k, v in {"WORLD_SIZE": count, "RANK": number, "LOCAL_RANK": number, **there}.items()}
    )
    work(*args)
    import torch.distributed as group

    if group.is_initialized():
        group.destroy_process_group()


def until(found: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)
