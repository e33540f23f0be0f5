"""Runs of commands and of functions in turn, their medians, and a Markdown table of them."""

from __future__ import annotations

import gc
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Usage:
    """What one run took: seconds of wall and processor, and peak resident memory in GiB (mapped files included)."""

    wall: float
    cpu: float = 0.0
    peak: float = 0.0


def run_command(command: Sequence[str], out: Path) -> Usage:
    """Run a command as its own process; `out` is removed first."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()  # or the disk would still be writing what the contender before left
    # through this file as a small process: a child's peak memory starts at that of the process that forked it
    done = subprocess.run([sys.executable, __file__, *command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return Usage(*json.loads(done.stdout))


def main() -> None:
    """Run the command of the arguments; print its wall and processor seconds and peak memory."""
    start = time.perf_counter()
    process = subprocess.Popen(sys.argv[1:], stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    print(json.dumps([wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20]))
    sys.exit(1 if status else 0)


def time_function(function: Callable[[], object]) -> Usage:
    """Time one call in this process."""
    gc.collect()
    cpu, start = time.process_time(), time.perf_counter()
    function()
    return Usage(time.perf_counter() - start, time.process_time() - cpu)


def in_turn(contenders: Mapping[str, Callable[[], Usage]], runs: int, *, warm: int = 1) -> dict[str, Usage]:
    """Run every contender in turn, `runs` times in a rotating order, after `warm` rounds that do not count; medians."""
    seen: dict[str, list[Usage]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(-warm, runs):
        names = [*names[1:], names[0]]  # what a contender leaves in memory and on disk falls on each of the others
        for name in names:
            usage = contenders[name]()
            print(
                f"  {number + 1}/{runs} {name}: {usage.wall:.3f} s, {usage.peak:.2f} GiB", file=sys.stderr, flush=True
            )
            if number >= 0:
                seen[name].append(usage)
    return {
        name: Usage(*(statistics.median(getattr(u, part) for u in usages) for part in ("wall", "cpu", "peak")))
        for name, usages in seen.items()
    }


def table(medians: Mapping[str, Usage], ours: str, *, unit: str = "s") -> str:
    """Medians and their ratios to ours, as Markdown."""
    scale = 1000.0 if unit == "ms" else 1.0
    base = medians[ours]
    lines = [
        f"| | wall, {unit} | cpu, {unit} | peak, GiB | wall, times ours | peak, times ours |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, usage in medians.items():
        peak = (
            f"{usage.peak:.2f} | {usage.wall / base.wall:.2f} | {usage.peak / base.peak:.2f}"
            if base.peak
            else (f"- | {usage.wall / base.wall:.2f} | -")
        )
        lines.append(f"| {name} | {usage.wall * scale:.2f} | {usage.cpu * scale:.2f} | {peak} |")
    return "\n".join(lines)


def machine() -> str:
    """The machine in one line."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{os.cpu_count()} cores of {model}, {memory:.0f} GiB, {platform.system()}, Python {platform.python_version()}"
    )


if __name__ == "__main__":
    main()
