"""How many threads: several tensors at once, and small products on one core."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

SMALL = 2_000_000  # multiply-adds: a product that one core ends before a second one has woken up
MOST = 16  # more threads than this wait for memory, not for processors


@contextmanager
def worker_pool(workers: int | None = None) -> Iterator[ThreadPoolExecutor]:
    """Threads in which torch runs single-threaded; by default as many as torch had."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # for all of MKL; OpenMP's setting is each thread's own
    try:
        count = workers or min(before, MOST)
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


@contextmanager
def one_thread_if_small(work: int, device: torch.device) -> Iterator[None]:
    """Run products of `work` multiply-adds on one core if they are small: waking another costs more than they do."""
    if torch.compiler.is_compiling() or device.type != "cpu" or work > SMALL or torch.get_num_threads() == 1:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
