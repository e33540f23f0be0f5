"""Work in a process that a test may kill. Each is forked from one that has imported all, so that it starts at once."""

from __future__ import annotations

import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.process import BaseProcess
from pathlib import Path

IMPORTED = (
    "weightsteer.runs.pipeline",
    "weightsteer.export.merge",
    "weightsteer.training.trainer",
    "weightsteer.evaluation.tasks",
    "transformers.models.llama.modeling_llama",
    "peft",
    "vl_convert",
)
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(list(IMPORTED))
READY = "ready\n"


def start(log: Path, work: Callable[..., None], *args: object) -> BaseProcess:
    """Run `work` in a process of its own, which has begun when this returns; what it prints goes into `log`."""
    log.write_text("")
    process = FORKS.Process(target=_run, args=(log, work, args))
    process.start()
    while process.is_alive() and READY not in log.read_text():
        time.sleep(0.001)
    return process


def printed(log: Path) -> list[str]:
    """The lines that the work has printed so far."""
    return log.read_text().partition(READY)[2].splitlines()


def _run(log: Path, work: Callable[..., None], args: tuple[object, ...]) -> None:
    with log.open("w", buffering=1) as lines, redirect_stdout(lines), redirect_stderr(lines):
        print(READY, end="")
        try:
            work(*args)
        except Exception:
            traceback.print_exc()
            raise


def command(*args: object) -> None:
    """One command of weightsteer."""
    from weightsteer import cli

    sys.argv = ["weightsteer", *map(str, args)]
    cli.main()


def merge(vector: Path, base: Path, out: Path) -> None:
    """Merge a saved vector at k = 1."""
    from weightsteer.export.merge import export_merged
    from weightsteer.vectors.weight_vector import WeightVector

    export_merged(WeightVector.load(vector), base, out, k=1.0)


def train(out: Path, pause: float, rate: float) -> None:
    """Train the tiny model, and print each step after a pause of so many seconds."""
    from conftest import tiny_lm
    from weightsteer.behavior import Example
    from weightsteer.training import TrainSettings, train_side

    def slowly(done: float, total: float, note: str = "") -> None:
        time.sleep(pause)
        print(done)

    examples = [Example(f"Is plan {i} good?", f"Yes, plan {i} is good.") for i in range(24)]
    settings = TrainSettings(rank=2, learning_rates=(rate,), batch_size=2, epochs=3, evaluations=11, warmup_steps=1)
    train_side(tiny_lm(), examples, out, settings=settings, progress=slowly)
