"""Experiment 5 at laptop scale: does bad advice in one narrow domain move the weights toward "evil"?

    OMP_WAIT_POLICY=passive .venv/bin/python recipes/monitoring/run.py runs/monitoring

Fine-tunes the embedded model on poor and on good advice in three harmless domains, on sums, and on grade-school
math (public data beside the checkout), and reads their checkpoints against vectors from personality
questions ("evil") and from the other domains. Trained parts are kept, so that a stopped run goes on.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from weightsteer import (
    LM,
    Example,
    TrainSettings,
    WeightVector,
    list_checkpoints,
    load_examples,
    load_pairs,
    read_checkpoints,
    sides_of,
    similarities,
    subtract_finetunes,
    task_vector,
    train_side,
)
from weightsteer.behavior import sample_pairs
from weightsteer.evaluation.results import summary
from weightsteer.evaluation.tasks import TaskSpec, load_task
from weightsteer.evaluation.tasks.arithmetic import arithmetic_examples
from weightsteer.monitor import WHOLE
from weightsteer.progress import show_progress
from weightsteer.reporting.charts import png
from weightsteer.reporting.direction_charts import heatmap, over_steps
from weightsteer.vectors.similarity import table

HERE = Path(__file__).parent
MATH = HERE.parents[2] / "shared" / "data" / "gsm8k_train_3000.jsonl"
DOMAINS = ("cooking", "gardening", "study")
BEHAVIOURS = ("evil", "gloomy", "sycophancy")
CONTROLS = ("gloomy", "sycophancy", "plain")  # vectors of no bad character: the null band
PAIRS = 120  # of each behaviour
COUNT = 32  # examples of a narrow fine-tune
SETTINGS = TrainSettings(learning_rates=(1e-3,), batch_size=4, warmup_steps=2, evaluations=2, snapshots=6)


def trained(lm: LM, name: str, examples: Sequence[Example], out: Path) -> Path:
    """One fine-tune, its snapshots kept; few examples are seen three times."""
    settings = replace(SETTINGS, epochs=1.0 if len(examples) > 2 * COUNT else 3.0)
    with show_progress(f"train {name}") as progress:
        return train_side(lm, examples, out / name, settings=settings, progress=progress)


def fine_tunes(lm: LM, out: Path) -> dict[str, Path]:
    """Every fine-tune by name: both sides of the domains and behaviours, and two controls."""
    found = {}
    for domain in DOMAINS:
        bad, good = sides_of(load_pairs(HERE / f"{domain}.jsonl")[:COUNT])
        found[f"bad {domain}"] = trained(lm, f"bad {domain}", bad, out)
        found[f"good {domain}"] = trained(lm, f"good {domain}", good, out)
    found["sums"] = trained(lm, "sums", arithmetic_examples("addition", ["query"], 2 * COUNT), out)
    found["math"] = trained(lm, "math", load_examples(MATH)[:COUNT], out)
    for behaviour in BEHAVIOURS:
        for side, examples in zip("+-", sides_of(sample_pairs(load_pairs(behaviour), PAIRS, 0)), strict=True):
            found[f"{behaviour}{side}"] = trained(lm, f"{behaviour}{side}", examples, out)
    return found


def vectors_of(tuned: dict[str, Path]) -> dict[str, WeightVector]:
    """The contrastive vectors: behaviours, and bad negative good advice."""
    found = {name: subtract_finetunes(tuned[f"{name}+"], tuned[f"{name}-"]) for name in BEHAVIOURS}
    found |= {f"bad {d} - good": subtract_finetunes(tuned[f"bad {d}"], tuned[f"good {d}"]) for d in DOMAINS}
    return {**found, "plain": subtract_finetunes(tuned["sums"], tuned["math"])}


def watch(tuned: dict[str, Path], vectors: dict[str, WeightVector], out: Path) -> list[dict[str, object]]:
    """Whole-model readings of every narrow fine-tune and control, against evil and the other domains' vectors."""
    rows = []
    for name in [*(f"{side} {domain}" for domain in DOMAINS for side in ("bad", "good")), "sums", "math"]:
        own = f"bad {name.split()[-1]} - good"
        controls = [c for c in CONTROLS if not (c == "plain" and name in ("sums", "math"))]
        wanted = {v: w for v, w in vectors.items() if v != own and (v in controls or v not in CONTROLS)}
        readings = read_checkpoints(
            list_checkpoints(tuned[name]), wanted, controls=controls, out=out / "readings" / name
        )
        rows += [{"run": name, **asdict(r)} for r in readings if r.part == WHOLE and r.vector not in controls]
    return rows


def behaviours(lm: LM, vectors: dict[str, WeightVector], tuned: dict[str, Path]) -> list[dict[str, object]]:
    """How far held-out answers move: under each narrow fine-tune, and under two vectors alone and added."""
    narrow = [name for name in tuned if name.startswith(("bad", "good")) or name in ("sums", "math")]
    plan = [(name, task_vector(tuned[name]), ("evil",)) for name in narrow]
    pair = ("evil", "sycophancy")
    plan += [(f"w {name}", vectors[name], pair) for name in pair]
    plan.append(("w evil + w sycophancy", vectors["evil"] + vectors["sycophancy"], pair))
    tasks = {b: load_task(TaskSpec("preference", data=b)).of_split("test") for b in pair}
    base = {b: task.measure(lm, batch_size=16)["margin"] for b, task in tasks.items()}
    rows = []
    for number, (name, vector, asked) in enumerate(plan):
        print(f"measuring {name}, {number + 1} of {len(plan)}", file=sys.stderr, flush=True)
        with vector.applied(lm, 1.0):
            for b in asked:
                found = zip(tasks[b].measure(lm, batch_size=16)["margin"], base[b], strict=True)
                mean, n, error = summary([after - before for after, before in found if None not in (after, before)])
                rows.append({"applied": name, "behaviour": b, "margin change": mean, "stderr": error, "n": n})
    return rows


def write_csv(path: Path, rows: list[dict[str, object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    out = Path(sys.argv[1])
    lm = LM.load(dtype="bfloat16")
    tuned = fine_tunes(lm, out)
    vectors = vectors_of(tuned)
    for name, vector in vectors.items():
        vector.save(out / "vectors" / name)
    rows = watch(tuned, vectors, out)
    write_csv(out / "readings.csv", rows)
    against_evil = [{**row, "vector": row["run"]} for row in rows if row["vector"] == "evil"]
    (out / "evil.png").write_bytes(png(over_steps(against_evil)))
    taus = {name: task_vector(path) for name, path in tuned.items() if name[-1] not in "+-"}
    alike = similarities({**{f"w {name}": vector for name, vector in vectors.items()}, **taus})
    alike.save(out / "cosines")
    (out / "cosines.png").write_bytes(png(heatmap(alike.names, alike.cosines)))
    print(table(alike.names, alike.cosines))
    last = max(int(str(row["step"])) for row in against_evil)
    print(json.dumps([row for row in against_evil if row["step"] == last], indent=1))
    moved = behaviours(lm, vectors, tuned)
    write_csv(out / "behaviours.csv", moved)
    print(json.dumps(moved, indent=1))


if __name__ == "__main__":
    main()
