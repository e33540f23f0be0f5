"""Faults by the hundred: `make faults`. Prints one line a fault that went wrong, and the counts at the end."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from faults import FAULTS
from harness import Harness

COUNTS = {"kills": 1000, "full disks": 100, "power cuts": 100, "two at once": 50}


def main() -> int:
    """Run the campaign; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of the whole campaign")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="commands, separated by commas")
    chosen = parser.parse_args()
    chance = random.Random(chosen.seed)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        harness = Harness(Path(folder) / "faults")
        names = chosen.only.split(",") if chosen.only else list(harness.commands)
        failed = 0
        for fault, count in COUNTS.items():
            wrong = 0
            wanted = max(1, round(count * chosen.share))
            for number in range(wanted):
                found = FAULTS[fault](harness, harness.commands[names[number % len(names)]], chance)
                wrong += bool(found)
                if found:
                    print(found, flush=True)
            print(f"{fault}: {wanted}, {wrong} of them went wrong", flush=True)
            failed += wrong
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
