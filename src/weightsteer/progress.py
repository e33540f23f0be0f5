"""How far long work has come, and how long it still takes: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Protocol

from .shown import console, is_quiet, one_line, say

if TYPE_CHECKING:
    from rich.console import Console

LINE_SECONDS = 5.0  # in a log: one line at most this often


class Progress(Protocol):
    """Called as work goes on: how many units are done, of how many, and what to say beside it."""

    def __call__(self, done: float, total: float, note: str = "") -> None: ...


def silent(done: float, total: float, note: str = "") -> None:
    """The progress of callers that want none."""


def part_of(progress: Progress, number: int, count: int, label: str = "") -> Progress:
    """The progress of one of `count` equal parts of the work, counted from 0; `label` goes before its notes."""

    def report(done: float, total: float, note: str = "") -> None:
        progress(number * total + done, count * total, f"{label} {note}".strip())

    return report


@contextmanager
def show_progress(label: str) -> Iterator[Progress]:
    """Show progress on stderr under `label` until the block is left."""
    if is_quiet():
        yield silent
    elif sys.stderr.isatty():
        with _bar(label) as progress:
            yield progress
    else:
        yield _lines(label)


@cache
def _console() -> Console:
    """One console for all bars, so that one bar may run inside another."""
    return console(error=True)


@contextmanager
def _bar(label: str) -> Iterator[Progress]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = [
        TextColumn("{task.description:<24}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    ]
    with Progress(*columns, console=_console()) as bars:
        task = bars.add_task(one_line(label), total=None, note="")

        def update(done: float, total: float, note: str = "") -> None:
            bars.update(task, completed=done, total=total, note=one_line(note))

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
        left = f"about {elapsed * (total - done) / done:.0f} s left" if done else "just begun"
        text = f"{one_line(label):<24} {done:.0f}/{total:.0f}  {elapsed:4.0f} s, {left}  {one_line(note)}"
        say(text.rstrip(), error=True, flush=True)

    return update


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' own tables, bars and deprecations out of ours; downloads still show their bars."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
