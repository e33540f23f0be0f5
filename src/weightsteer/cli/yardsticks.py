"""What `compare` prints beside the comparison at equal loss: at equal KL, replies that loop, odd and even parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..evaluation.metrics import MetricKey
from ..shown import markdown_text, say

KL: MetricKey = ("token_kl", "p95")
LOOPS: MetricKey = ("loops", "loops")
KLS = "0.2,0.5,1"  # nats, at which methods are compared


def measured_by_all(runs: Sequence[Path], key: MetricKey) -> bool:
    """Whether every run has measured the base on a task and metric."""
    from ..evaluation.results import BASE, measurements_by_key
    from ..files import read_jsonl
    from ..run_folder import RunFolder

    paths = [RunFolder(run).measurements for run in runs]
    found = [measurements_by_key(read_jsonl(path), str(path)).get((BASE, 0.0, key[0])) for path in paths]
    return all(base is not None and key[1] in base.values for base in found)


def say_parts(runs: Sequence[Path], behavior: MetricKey) -> None:
    """A Markdown table of each method's odd and even part, where both signs are measured."""
    rows = parts_of(runs, behavior)
    if not rows:
        return
    say(
        f"\nOdd and even parts of the change of {'/'.join(behavior)}: (f(k) - f(-k)) / 2, and "
        "(f(k) + f(-k)) / 2 - f(0), which comes whichever way k goes.\n\n"
        "| method | k | n | odd | even |\n| --- | --- | --- | --- | --- |"
    )
    for row in rows:
        parts = [f"{row[part]:+.3f} ± {row[f'{part}_stderr']:.3f}" for part in ("odd", "even")]
        say(f"| {markdown_text(row['method'])} | {row['k']:g} | {row['n']} | {' | '.join(parts)} |")


def parts_of(runs: Sequence[Path], behavior: MetricKey) -> list[dict[str, Any]]:
    """The same as rows of JSON."""
    from ..evaluation.odd_even import odd_and_even

    return [asdict(row) for row in odd_and_even(runs, behavior)]
