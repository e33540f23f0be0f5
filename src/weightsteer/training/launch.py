"""Several processes are started by `torch.distributed.run` for one fine-tune, watched, and ended with the caller."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..disk import make_folder
from ..errors import SteerError
from ..files import read_json, write_jsonl
from ..lm import LM
from ..locks import held_by
from ..progress import Progress
from ..shown import one_line
from .combinations import refuse_scarce
from .order import Order

ORDER, DATA, DONE = "order.json", "data.jsonl", "progress.json"  # in the folder of the order
LAST_LINES = 6  # of a process that died, in the message
SECONDS = 0.2  # between two looks at the processes
ENDING = 20.0  # seconds to end by themselves
FAILED = re.compile(r"rank\s*:\s*(\d+).*?exitcode\s*:\s*(-?\d+)", re.DOTALL)  # torchrun's own words, the cause last


def launch(order: Order, data: Sequence[Mapping[str, Any]], lm: LM, progress: Progress) -> Path:
    """Carry out an order in as many processes as its settings say; its output is there when this returns.

    The caller holds the output. While the processes run, `lm` leaves the accelerator.

    Args:
        data: rows of examples, or of pairs for preferences.

    Raises:
        SteerError: what a process has refused, or that one has died, with its last lines.
    """
    out, count = Path(order.out), order.settings.processes
    refuse_scarce(count, (lm.origin or {}).get("device"))
    with _folder_of(out) as folder, _off_the_accelerator(lm):
        order.save(folder / ORDER)
        write_jsonl(folder / DATA, data)
        code = _run(folder, count, held_by(out), progress)
        _tell_warnings(folder)
        if code:
            raise _failure(folder, count, code)
    return out


@contextmanager
def _folder_of(out: Path) -> Iterator[Path]:
    """A folder beside the output for the order and what the processes print; it goes in the end."""
    folder = out.with_name(f".{out.name}.processes")
    shutil.rmtree(folder, ignore_errors=True)  # of a killed call; whoever holds the output may
    make_folder(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _off_the_accelerator(lm: LM) -> Iterator[None]:
    """Give the processes the memory that the caller's own copy of the model takes."""
    device = lm.device
    if device.type in ("cpu", "meta"):
        yield
        return
    model: nn.Module = lm.model
    model.to("cpu")
    torch.accelerator.empty_cache()
    try:
        yield
    finally:
        model.to(device)


def _run(folder: Path, count: int, handles: Sequence[int], progress: Progress) -> int:
    """Run the processes to their end; returns the exit code."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command += [f"--log-dir={folder / 'logs'}", "--redirects=3", "-m", "weightsteer.training.worker", str(folder)]
    threads = max(1, torch.get_num_threads() // count)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    with (folder / "torchrun.log").open("w") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            pass_fds=handles,  # so that the output is held as long as they live
            start_new_session=True,  # Ctrl-C comes to the caller, which ends them in order
        )
        shown: list[Any] = []
        try:
            while process.poll() is None:
                time.sleep(SECONDS)
                shown = _show(folder, shown, progress)
        finally:
            _end(process)
    _show(folder, shown, progress)
    return process.returncode


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the processes, where the caller is stopped before them."""
    if process.poll() is None:
        process.terminate()  # torchrun ends its own
        try:
            process.wait(ENDING)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _show(folder: Path, shown: list[Any], progress: Progress) -> list[Any]:
    """Pass on how far the first process has come, if that is further than what was shown; returns what is shown now."""
    found: list[Any] = read_json(folder / DONE) if (folder / DONE).exists() else shown
    if found != shown:
        progress(*found)
    return found


def _tell_warnings(folder: Path) -> None:
    """Pass on what the first process has warned of."""
    path = folder / "warnings.json"
    for text in read_json(path) if path.exists() else ():
        warnings.warn(text, stacklevel=4)


def _failure(folder: Path, count: int, code: int) -> SteerError:
    """What to tell of processes that have failed: a refusal, or the last lines of the one that died first."""
    for number in range(count):
        if (path := folder / f"refused-{number}.json").exists():
            return SteerError(str(read_json(path)))
    said = (folder / "torchrun.log").read_text(errors="replace")
    failed = [(int(number), int(exit_code)) for number, exit_code in FAILED.findall(said)]
    if not failed:
        return SteerError(f"processes: torch.distributed.run failed with exit code {code}: {_last_lines(said)}")
    # Where one was killed the others lose their connection to it, and torchrun may see that first. It ends them itself
    # by SIGTERM.
    killed = (one for one in failed if one[1] < 0 and one[1] != -signal.SIGTERM)
    number, exit_code = next(killed, failed[-1])
    logs = sorted(folder.glob(f"logs/*/*/{number}/stderr.log"))
    lines = _last_lines(logs[-1].read_text(errors="replace")) if logs else ""
    how = f"was killed by signal {-exit_code}" if exit_code < 0 else f"ended with exit code {exit_code}"
    last = f"; its last lines: {lines}" if lines else "; it printed nothing"
    return SteerError(
        f"process {number} of {count} {how}{last}; the same command goes on from the last checkpoint, with any number "
        "of processes"
    )


def _last_lines(text: str) -> str:
    lines = [one_line(line) for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-LAST_LINES:])
