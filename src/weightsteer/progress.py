"""How far long work has come, and how long it still takes: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

LINE_SECONDS = 5.0  # in a log: one line at most this often


class Progress(Protocol):
    """Called as work goes on: how many units are done, of how many, and what to say beside it."""

    def __call__(self, done: float, total: float, note: str = "") -> None: ...


def silent(done: float, total: float, note: str = "") -> None:
    """The progress of callers that want none."""


@contextmanager
def shown(label: str) -> Iterator[Progress]:
    """Show progress on stderr under `label` until the block is left."""
    if sys.stderr.isatty():
        with _bar(label) as progress:
            yield progress
    else:
        yield _lines(label)


@contextmanager
def _bar(label: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = [
        TextColumn("{task.description:<24}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    ]
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(label, total=None, note="")

        def update(done: float, total: float, note: str = "") -> None:
            bars.update(task, completed=done, total=total, note=note)

        yield update


def _lines(label: str) -> Progress:
    start = time.monotonic()
    last_line = 0.0

    def update(done: float, total: float, note: str = "") -> None:
        nonlocal last_line
        now = time.monotonic()
        if now - last_line < LINE_SECONDS and done < total:
            return
        last_line = now
        elapsed = now - start
        left = elapsed * (total - done) / done if done else 0.0
        text = f"{label:<24} {done:.0f}/{total:.0f}  {elapsed:4.0f} s, about {left:.0f} s left  {note}"
        print(text.rstrip(), file=sys.stderr, flush=True)

    return update
