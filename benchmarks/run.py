"""`make bench`: every benchmark, or those that are named; docs/benchmarks.md is written from the tables that come out.

python benchmarks/run.py [--root FOLDER] [--mergekit PROGRAM] [--runs 5] [SECTION ...]
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

SECTIONS = (
    "adapters", "checkpoints", "memory", "widths", "cosines", "counts", "steering", "training", "sweep", "growth",
)  # fmt: skip
HEAD = """Medians of {runs} runs. Machine: {machine}. {versions}.
"""


def main() -> None:
    """Run the named sections, and write the tables of all that have results into one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help=f"{', '.join(SECTIONS)}; default: all")
    parser.add_argument("--root", type=Path, default=Path("build/benchmarks"), help="where models are made (40 GB)")
    parser.add_argument(
        "--mergekit", default="mergekit-yaml", help="mergekit's program, from an environment of its own"
    )
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    root, runs = options.root.absolute(), options.runs
    root.mkdir(parents=True, exist_ok=True)
    import growth
    import merging
    import steering
    import sweeping
    import training
    import vectors

    sections: dict[str, Callable[[], str]] = {
        "adapters": lambda: merging.from_adapters(root, options.mergekit, runs),
        "checkpoints": lambda: merging.from_checkpoints(root, options.mergekit, runs),
        "memory": lambda: merging.memory(root, runs),
        "widths": lambda: merging.widths(root, options.mergekit, runs),
        "cosines": lambda: f"{vectors.many(root, runs)}\n\n{vectors.one(root, runs)}",
        "counts": lambda: vectors.by_count(runs),
        "steering": lambda: f"{steering.hooks(runs)}\n\n{steering.scoring(runs)}",
        "training": lambda: training.against_trl(runs),
        "sweep": lambda: sweeping.sweep(runs),
        "growth": lambda: growth.growth(runs),
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
    tables = root / "tables.md"
    tables.write_text(
        "\n".join([HEAD.format(runs=runs, machine=machine(), versions=versions), *(path.read_text() for path in done)])
    )
    print(f"tables: {tables}")


if __name__ == "__main__":
    main()
