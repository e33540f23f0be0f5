"""Several threads, one tensor each: better than several threads on one small tensor."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

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
