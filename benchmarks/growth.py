"""How time grows: everything that runs over cells, replies, items or checkpoints, at n and at 10 n.

python benchmarks/growth.py [SHARE]      1 is the paper's size and ten times that; 0.1 takes a tenth of both
"""

from __future__ import annotations

import asyncio
import gc
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from weightsteer.evaluation.choose_k import recommend
from weightsteer.evaluation.compare import compare_at_loss
from weightsteer.evaluation.metrics import Metric
from weightsteer.evaluation.resampled_curves import _drawn
from weightsteer.evaluation.results import BASE, Measurement, MetricRow, measurements_by_key, read_rows
from weightsteer.evaluation.sweep import _drop_unfinished_replies, keep_measurement
from weightsteer.files import append_jsonl, read_finished, write_jsonl
from weightsteer.judges.reply_cache import ReplyCache
from weightsteer.monitor.checkpoints import checkpoint_products, diagonal_of
from weightsteer.monitor.readings import read_off
from weightsteer.reporting.result_tables import all_numbers
from weightsteer.run_card import RunCard
from weightsteer.run_folder import RunFolder
from weightsteer.vectors.low_rank import LowRank
from weightsteer.vectors.weight_vector import WeightVector

CELLS, ITEMS, REPLIES, CHECKPOINTS, VECTORS = 45, 1300, 20_000, 20, 8  # of the paper's largest experiment
LIMIT = 15.0  # what is clearly worse than linear: tenfold work and half of that again
METRICS = {("trait", "score"): Metric("score", "s"), ("prose", "nll"): Metric("nll", "n", better="lower")}
Timed = Callable[[int, Path], Callable[[], object]]  # size, folder -> what is timed, with its input prepared


def measurements(cells: int, items: int) -> list[Measurement]:
    """A base and so many cells of two tasks, on two sides."""
    rng = np.random.default_rng(0)
    start, found = rng.normal(size=items), []
    for number in range(cells + 1):
        k = 0.0 if number == 0 else (number + 1) // 2 * (1 if number % 2 else -1) / 8
        method = BASE if number == 0 else f"method {(number - 1) % 5}" if number > 10 else "contrastive"
        for task, metric, moved in (("trait", "score", k), ("prose", "nll", 0.02 * k * k)):
            values = [round(float(v), 6) for v in start + moved + 0.1 * rng.normal(size=items)]
            splits = tuple("test" if i % 2 else "validation" for i in range(items))
            found.append(Measurement(method, k, task, tuple(range(items)), splits, {metric: values}))
    return found


def written(folder: Path, cells: int, items: int) -> RunFolder:
    """A run's folder with these measurements."""
    run = RunFolder(folder)
    append_jsonl(run.measurements, [one.as_json() for one in measurements(cells, items)])
    return run


def compare_items(size: int, folder: Path) -> Callable[[], object]:
    run = written(folder, CELLS, size)
    _drawn.cache_clear()
    return lambda: compare_at_loss([run.path], ("trait", "score"), capability=("prose", "nll"))


def compare_cells(size: int, folder: Path) -> Callable[[], object]:
    run = written(folder, size, 200)
    _drawn.cache_clear()
    return lambda: compare_at_loss([run.path], ("trait", "score"), capability=("prose", "nll"))


def keep_cells(size: int, folder: Path) -> Callable[[], object]:
    """Each cell written when it is done, with its replies."""
    turns, cells = [{"prompt": "p", "reply": "r"}] * 20, measurements(size, 20)
    return lambda: [keep_measurement(cell, turns, RunFolder(folder)) for cell in cells]


def take_up_cells(size: int, folder: Path) -> Callable[[], object]:
    """What a sweep does when it starts again: its measurements, and the replies of those that were cut off."""
    keep_cells(size, folder)()
    run = RunFolder(folder)

    def again() -> None:
        done = measurements_by_key(read_finished(run.measurements), "measurements")
        _drop_unfinished_replies(run.replies, done.keys())

    return again


def rows_of(cells: int, items: int = 20) -> list[MetricRow]:
    made = {one.key: one for one in measurements(cells, items)}
    return [row for one in made.values() for row in one.rows(one.base_among(made))]


def rows_of_cells(size: int, folder: Path) -> Callable[[], object]:
    made = {one.key: one for one in measurements(size, 200)}
    return lambda: [row for one in made.values() for row in one.rows(one.base_among(made))]


def choose_k(size: int, folder: Path) -> Callable[[], object]:
    rows = rows_of(size)

    budget: Mapping[tuple[str, str], float] = {("prose", "nll"): 0.1}
    return lambda: recommend(rows, metrics=METRICS, behavior=("trait", "score"), budget=budget)


def tables(size: int, folder: Path) -> Callable[[], object]:
    """The report's table of all numbers, from its file."""
    path, rows = folder / "rows.jsonl", rows_of(size)
    write_jsonl(path, [vars(row) for row in rows])
    return lambda: all_numbers(read_rows(path), [("trait", "score"), ("prose", "nll")], METRICS)


def judge_replies(size: int, folder: Path) -> Callable[[], object]:
    """Replies kept as they come, then read by the next process."""

    async def keep() -> None:
        cache = ReplyCache(folder / "replies.jsonl")
        async with cache.writing():
            for number in range(size):
                cache.add(str(number), "yes")
                if number % 500 == 0:
                    await asyncio.sleep(0.02)

    def run() -> None:
        asyncio.run(keep())
        assert len(ReplyCache(folder / "replies.jsonl").replies()) == size

    return run


def vector(seed: int, layers: int = 4) -> WeightVector:
    g = torch.Generator().manual_seed(seed)
    names = [f"model.layers.{i}.mlp.{m}_proj.weight" for i in range(layers) for m in ("up", "gate")]
    return WeightVector(
        {n: LowRank(torch.randn(256, 16, generator=g), torch.randn(16, 128, generator=g)) for n in names},
        RunCard("vector"),
    )


def checkpoints(size: int, folder: Path) -> Callable[[], object]:
    vectors, tau = {str(i): vector(i) for i in range(VECTORS)}, vector(99)
    diagonal = diagonal_of(vectors)
    return lambda: [
        read_off(checkpoint_products(tau, vectors, diagonal=diagonal), checkpoint="c", step=step)
        for step in range(size)
    ]


def watched_vectors(size: int, folder: Path) -> Callable[[], object]:
    vectors, tau = {str(i): vector(i) for i in range(size)}, vector(99)
    return lambda: read_off(checkpoint_products(tau, vectors), checkpoint="c", step=0)


LOOPS: Mapping[str, tuple[int, Timed]] = {
    "compare, by items": (ITEMS, compare_items),
    "compare, by cells": (CELLS, compare_cells),
    "cells kept, one by one": (CELLS, keep_cells),
    "a sweep taken up, by cells": (CELLS, take_up_cells),
    "rows, by cells": (CELLS, rows_of_cells),
    "the recommended k, by cells": (CELLS, choose_k),
    "the report's numbers, by cells": (CELLS, tables),
    "judge replies, kept and read": (REPLIES, judge_replies),
    "monitor, by checkpoints": (CHECKPOINTS, checkpoints),
    "monitor, by vectors": (VECTORS, watched_vectors),
}


def growth(runs: int, share: float = 1.0) -> str:
    """The table, in seconds of the processor; the least of `runs` times, since what disturbs only adds."""
    lines = ["| what | n | s at n | s at 10 n | growth |", "| --- | --- | --- | --- | --- |"]
    for name, (full, make) in LOOPS.items():
        size = max(2, int(full * share))
        small, large = _seconds(make, size, runs), _seconds(make, 10 * size, max(1, runs // 2))
        mark = " (!)" if large / small > LIMIT else ""
        lines.append(f"| {name} | {size} | {small:.3f} | {large:.3f} | {large / small:.1f}{mark} |")
        print(lines[-1], file=sys.stderr, flush=True)
    head = f"Seconds of the processor at n and at 10 n; linear is 10, and (!) marks more than {LIMIT:g}:"
    return f"## Growth\n\n{head}\n\n" + "\n".join(lines)


def _seconds(make: Timed, size: int, runs: int) -> float:
    times = []
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            work = make(size, Path(folder))
            gc.collect()
            start = time.process_time()
            work()
            times.append(time.process_time() - start)
    return min(times)


if __name__ == "__main__":
    print(growth(1, float(sys.argv[1]) if len(sys.argv) > 1 else 1.0))
