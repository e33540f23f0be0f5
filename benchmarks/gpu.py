"""`benchmarks/gpu.sh`: the checks, each of which prints PASS, FAIL or SKIP with its numbers; see docs/gpu.md.

python benchmarks/gpu.py [--tiny] [--seconds 600] [memory speed generation graph nf4 compile]
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from gpu_checks import compiled, generation, graph, nf4
from gpu_model import Bench, Verdict
from gpu_training import memory, speed

CHECKS: dict[str, Callable[[Bench], Iterator[Verdict]]] = {
    "memory": memory,
    "speed": speed,
    "generation": generation,
    "graph": graph,
    "nf4": nf4,
    "compile": compiled,
}
PACKAGES = ("weightsteer", "torch", "transformers", "peft", "bitsandbytes")


@dataclass
class Count:
    """How many checks came out how."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0


def main() -> None:
    """Run the named checks until the time is up; the exit code is 1 if one has failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", help=f"{', '.join(CHECKS)}; default: all")
    parser.add_argument("--tiny", action="store_true", help="at a tiny size, on whatever device there is")
    parser.add_argument("--seconds", type=float, default=600.0, help="no check is begun after so many")
    options = parser.parse_args()
    if unknown := [name for name in options.checks if name not in CHECKS]:
        parser.error(f"unknown check {unknown[0]}; expected some of {', '.join(CHECKS)}")
    if not (options.tiny or torch.cuda.is_available()):
        parser.error("torch finds no GPU; --tiny tries the same steps on the CPU")
    start, count = time.perf_counter(), Count()
    bench = Bench.begin(tiny=options.tiny, scratch=Path("build/gpu").absolute())
    print(f"{bench.machine}; {', '.join(f'{name} {_version(name)}' for name in PACKAGES)}", flush=True)
    for name in options.checks or CHECKS:
        if time.perf_counter() - start > options.seconds:
            _tell(count, "SKIP", name, f"the {options.seconds:.0f} s are over")
            continue
        _run(name, bench, count)
    taken = time.perf_counter() - start
    print(f"{count.passed} passed, {count.failed} failed, {count.skipped} skipped, in {taken:.0f} s")
    sys.exit(1 if count.failed else 0)


def _run(name: str, bench: Bench, count: Count) -> None:
    """One check's verdicts; an error is a failure, and the next check goes on."""
    try:
        for verdict in CHECKS[name](bench):
            word = "SKIP" if verdict.passed is None else "PASS" if verdict.passed else "FAIL"
            _tell(count, word, f"{name}: {verdict.what}", verdict.found)
    except Exception as error:
        traceback.print_exc()
        _tell(count, "FAIL", name, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _tell(count: Count, word: str, what: str, found: str) -> None:
    count.passed += word == "PASS"
    count.failed += word == "FAIL"
    count.skipped += word == "SKIP"
    print(f"{word}  {what}: {found}", flush=True)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


if __name__ == "__main__":
    main()
