"""`make fuzz`: many inputs of every format, each in a process that a watcher ends; counts at the end.

python tests/fuzz/campaign.py [--count 20000] [--start 0] [--formats card recipe]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
os.environ.setdefault("WEIGHTSTEER_CACHE", tempfile.mkdtemp(prefix="fuzz-cache-"))

import torch  # noqa: E402 - after the cache's place is set
from formats import FORMATS, seeds  # noqa: E402
from outcomes import GOOD, SECONDS, outcome_of  # noqa: E402

WEIGHTS = {"run_files": 0.15, "recipe": 0.5}  # less of what takes 2 s and 0.2 s an input; all others have weight 1


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=20_000, help="inputs of all formats together")
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--formats", nargs="*", default=list(FORMATS), choices=list(FORMATS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    seeds()
    failures = 0
    print(f"{'format':<20}{'inputs':>8}{'right':>8}{'refused':>9}{'seconds':>9}  failures", flush=True)
    for name, count in shares_of(given.count, given.formats).items():
        began = time.monotonic()
        counts, bad = run_format(name, range(given.start, given.start + count))
        failures += len(bad)
        rest = {kind: found for kind, found in counts.items() if kind not in GOOD}
        numbers = (sum(counts.values()), counts["right"], counts["refused"], round(time.monotonic() - began))
        print(name.ljust(20) + "{:>8}{:>8}{:>9}{:>9}".format(*numbers) + f"  {rest or 0}", flush=True)
        for line in bad:
            print(f"    {line}", flush=True)
    return 1 if failures else 0


def shares_of(count: int, formats: Sequence[str]) -> dict[str, int]:
    """How many inputs each format gets, by its weight; together at least `count`."""
    weights = {name: WEIGHTS.get(name, 1.0) for name in formats}
    return {name: math.ceil(count * weight / sum(weights.values())) for name, weight in weights.items()}


def run_format(name: str, numbers: range) -> tuple[Counter[str], list[str]]:
    """Read the inputs of these seeds; a process that hangs in foreign code is ended, and the next seed goes on."""
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as log:
        path, todo = Path(log.name), list(numbers)
        while todo:
            child = os.fork()
            if child == 0:
                _work(name, todo, path)
            ended = _watch(child, path)
            done = {row["seed"] for row in _rows(path)}
            if left := [seed for seed in todo if seed not in done]:
                _note(path, left[0], "hang" if ended == "late" else "crash", ended)
            todo = left[1:]
        rows = _rows(path)
    bad = [f"seed {row['seed']}: {row['kind']}: {row['detail']}" for row in rows if row["kind"] not in GOOD]
    return Counter(row["kind"] for row in rows), bad


def _work(name: str, todo: list[int], path: Path) -> None:
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    for seed in todo:
        found = outcome_of(name, seed)
        _note(path, seed, found.kind, found.detail[:300])
    os._exit(0)


def _note(path: Path, seed: int, kind: str, detail: str) -> None:
    with path.open("a") as file:
        file.write(json.dumps({"seed": seed, "kind": kind, "detail": detail}) + "\n")


def _rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _watch(child: int, path: Path) -> str:
    """Wait for a child; end it where it has noted nothing for long."""
    size, since = -1, time.monotonic()
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return f"status {status}"
        if path.stat().st_size != size:
            size, since = path.stat().st_size, time.monotonic()
        if time.monotonic() - since > 3 * SECONDS:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "late"
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
