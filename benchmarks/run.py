"""`make bench`: every benchmark, or those that are named, and docs/benchmarks.md from their results.

python benchmarks/run.py [--root FOLDER] [--mergekit PROGRAM] [--runs 5] [adapters checkpoints memory cosines steering]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch

from measure import machine

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
INTRODUCTION = """# Benchmarks

    make bench

Medians of {runs} runs, contenders in turn in a rotating order, after a round that does not count; page cache warm, disk
synced before each run. Machine: {machine}. {versions}.
The checkpoint is synthetic: Llama-shaped, 22 layers, hidden 2048, feed-forward 5632, 32,000 tokens, untied, 1.26B
parameters in bfloat16, six shards of at most 500 MB; the adapters have rank 32 on all linear layers. Peak memory is the
process's resident set, mapped files included.
"""

LIMITS = """
## What bounds them

A merge from adapters: importing torch 1.0 to 1.2 s; then on each of two cores half of 145 GFLOP at 85 GFLOP/s (0.85 s,
what its float32 units give), half of reading 2.5 GB (0.35 s) and of writing it (0.25 s and the page cache's own work,
0.4 to 1.5 s, which `cp` has too). Rounding, sums and hashes are the remaining 0.3 s.

The table of cosines: 32 vectors of rank 64 are 2048 columns, and the products of one half of all pairs 4 TFLOP; at two
cores' 170 GFLOP/s that is 24 s. Reading 6.4 GB, stacking it and summing the blocks are the rest. Pair by pair it is as
many products, 64 columns wide: slower by what narrow ones are.

Hooks: at rank 64 the factors are 39 MB beside the model's 540, read at every step, in 210 small products on one core.
"""


def main() -> None:
    """Run the named sections and write the page from all that have results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help="adapters, checkpoints, memory, cosines, steering; default: all")
    parser.add_argument("--root", type=Path, default=Path("build/benchmarks"), help="where models are made (40 GB)")
    parser.add_argument(
        "--mergekit", default="mergekit-yaml", help="mergekit's program, from an environment of its own"
    )
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    root, runs = options.root.absolute(), options.runs
    root.mkdir(parents=True, exist_ok=True)
    import merging
    import steering
    import vectors

    sections: dict[str, Callable[[], str]] = {
        "adapters": lambda: merging.from_adapters(root, options.mergekit, runs),
        "checkpoints": lambda: merging.from_checkpoints(root, options.mergekit, runs),
        "memory": lambda: merging.memory(root, runs),
        "cosines": lambda: f"{vectors.many(root, runs)}\n\n{vectors.one(root, runs)}",
        "steering": lambda: f"{steering.hooks(runs)}\n\n{steering.scoring(runs)}",
    }
    for name in options.sections or sections:
        print(name, file=sys.stderr)
        text = sections[name]()
        (root / f"{name}.md").write_text(text + "\n")
        print(text)
    done = [root / f"{name}.md" for name in sections if (root / f"{name}.md").exists()]
    versions = ", ".join(
        f"{p} {importlib.metadata.version(p)}" for p in ("torch", "transformers", "peft", "safetensors")
    )
    introduction = INTRODUCTION.format(runs=runs, machine=machine(), versions=versions)
    PAGE.write_text("\n".join([introduction, *(path.read_text() for path in done)]) + LIMITS)


if __name__ == "__main__":
    main()
