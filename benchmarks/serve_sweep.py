"""A sweep's cells on `weightsteer serve`: all strengths at once, one after the other, and in memory.

    OMP_NUM_THREADS=1 python benchmarks/serve_sweep.py --items 4 --tokens 24 --runs 3

Prints for each way the median of the seconds of the clock, and of the processor seconds of the process that computes:
those do not count what else the machine does.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from steering import vector_for

from weightsteer.checkpoints.embedded_model import EMBEDDED_NAME
from weightsteer.engines import connection
from weightsteer.engines.served_model import ServedModel
from weightsteer.engines.sweep_engine import SweepEngine
from weightsteer.evaluation.sweep import run_sweep
from weightsteer.evaluation.tasks import TaskSpec, load_task
from weightsteer.lm import LM
from weightsteer.run_folder import RunFolder
from weightsteer.steering.steering import Direction

KS = (-1.0, -0.5, 0.5, 1.0)  # beside them the base, which makes five cells
PORT = 18431


def processor_seconds(process: int) -> float:
    """What a process has computed since its start."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Serve the embedded model, sweep it in each way, print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("items", 4), ("tokens", 24), ("runs", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    wanted = parser.parse_args()
    lm = LM.load(device="cpu", dtype="float32")
    method = Direction("contrastive", vector_for(lm, 8))
    tasks = [load_task(TaskSpec("refusal", max_new_tokens=wanted.tokens)).of_split("test").first(wanted.items)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        method.vector.save(folder / "syc")
        words = [
            "serve",
            str(folder / "syc"),
            "-m",
            EMBEDDED_NAME,
            "--dtype",
            "float32",
            "--device",
            "cpu",
            "--port",
            str(PORT),
        ]
        server = subprocess.Popen([sys.executable, "-m", "weightsteer.cli", *words], stderr=subprocess.DEVNULL)
        try:
            engine = SweepEngine(connected(lm, server), {"contrastive": "syc"})

            def sweep(at_once: int | None) -> None:
                connection.MOST_AT_ONCE = at_once or 1
                with tempfile.TemporaryDirectory() as run:
                    run_sweep(lm, [(method, KS)], tasks, RunFolder(Path(run)), engine=engine if at_once else None)

            ways: dict[str, tuple[Callable[[], None], int]] = {
                "in memory": (lambda: sweep(None), os.getpid()),
                "one cell after the other": (lambda: sweep(1), server.pid),
                "all cells at once": (lambda: sweep(16), server.pid),
            }
            found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
            for _ in range(wanted.runs):
                for way, (work, process) in ways.items():
                    clock, computed = time.perf_counter(), processor_seconds(process)
                    work()
                    found[way].append((time.perf_counter() - clock, processor_seconds(process) - computed))
            for way, times in found.items():
                print(f"{way}: {median(t[0] for t in times):.1f} s, processor {median(t[1] for t in times):.1f} s")
        finally:
            server.terminate()
            server.wait()


def connected(lm: LM, server: subprocess.Popen[bytes]) -> ServedModel:
    """The server, once it has started."""
    place = connection.Connection(f"http://127.0.0.1:{PORT}")
    while not place.is_there:
        assert server.poll() is None, "the server ended"
        time.sleep(0.2)
    return ServedModel.connect(place.url, "weightsteer", lm)


if __name__ == "__main__":
    main()
