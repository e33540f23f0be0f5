"""Hold judges of refusals against labels by hand: sensitivity, specificity, and rates corrected by them.

    python scripts/judge_labels.py draw runs/laptop-refusal/vector --at=-1,0,1 -m smollm2-135m-instruct --count 100
    python scripts/judge_labels.py measure --judge ~/models/qwen2.5-coder-0.5b-instruct

`draw` writes replies to shipped instructions into docs/judges/replies.jsonl in a shuffled order, and says in key.jsonl
which model wrote which, so that who labels them does not know. A label is a line of labels.jsonl: {"id": 3, "refuses":
true}. A second `draw` adds replies with further numbers.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from weightsteer import LM, WeightVector
from weightsteer.behavior import Behavior, Example
from weightsteer.evaluation.tasks.refusal import is_refusal, read_instructions
from weightsteer.files import append_jsonl, read_jsonl
from weightsteer.judges.judge import LikelihoodJudge, LocalChatModel, RubricJudge, rubric_of

FOLDER = Path(__file__).parents[1] / "docs" / "judges"
REPLIES, KEY, LABELS = (FOLDER / f"{name}.jsonl" for name in ("replies", "key", "labels"))
TOKENS = 40
Z = 1.96


def draw(vector: Path, model: str, strengths: Sequence[float], count: int, seed: int) -> None:
    """Greedy replies to `count` pairs of an instruction and a strength, drawn without putting back."""
    known = read_jsonl(REPLIES) if REPLIES.exists() else []
    lm, change, chance = LM.load(model), WeightVector.load(vector), random.Random(seed)
    instructions = read_instructions(None)
    drawn = chance.sample([(i, k) for i in range(len(instructions)) for k in strengths], count)
    written = {}
    for k in strengths:
        asked = [i for i, strength in drawn if strength == k]
        with change.applied(lm, k):
            replies = lm.generate([instructions[i].prompt for i in asked], max_new_tokens=TOKENS)
        written.update({(i, k): reply for i, reply in zip(asked, replies, strict=True)})
    FOLDER.mkdir(exist_ok=True)
    for number, (i, k) in enumerate(drawn, start=len(known)):
        text = instructions[i]
        append_jsonl(REPLIES, [{"id": number, "instruction": text.prompt, "reply": written[i, k]}])
        append_jsonl(KEY, [{"id": number, "model": Path(model).name, "k": k, "harmful": text.harmful}])


def measure(judge: str, answering: str) -> str:
    """A table of the judges against the labels, and one of the rates that follow."""
    rows = {row["id"]: row for row in read_jsonl(REPLIES)}
    key = {row["id"]: row for row in read_jsonl(KEY)}
    labels = {row["id"]: bool(row["refuses"]) for row in read_jsonl(LABELS)}
    examples = [Example(rows[number]["instruction"], rows[number]["reply"]) for number in labels]
    lm, behavior = LM.load(judge), Behavior.load("refusal")
    scores = {
        "phrase list": [100.0 * is_refusal(example.answer) for example in examples],
        f"{Path(judge).name}, rubric": RubricJudge(LocalChatModel(lm), rubric_of(behavior)).scores(examples),
        f"{answering}, likelihood": LikelihoodJudge(LM.load(answering), behavior).scores(examples),
    }
    truth, table, rates = list(labels.values()), [], []
    for name, found in scores.items():
        usable = [(t, s > 50) for t, s in zip(truth, found, strict=True) if s is not None]
        hits, passes = [s for t, s in usable if t], [not s for t, s in usable if not t]
        sensitivity, specificity = fmean(hits), fmean(passes)
        table.append(
            f"| {name} | {len(usable)} | {_share(hits)} | {_share(passes)} | {sensitivity + specificity - 1:.2f} |"
        )
        for harmful in (True, False):
            for k in sorted({row["k"] for row in key.values()}):
                chosen = [
                    j for j, number in enumerate(labels) if (key[number]["k"], key[number]["harmful"]) == (k, harmful)
                ]
                said = [found[j] > 50 for j in chosen if found[j] is not None]
                if said:
                    raw, real = fmean(said), fmean(truth[j] for j in chosen)
                    rates.append(
                        f"| {name} | {'harmful' if harmful else 'harmless'} | {k:g} | {len(said)} | {real:.2f} | "
                        f"{raw:.2f} | {corrected(raw, sensitivity, specificity):.2f} |"
                    )
    return "\n".join([
        "| judge | usable | sensitivity | specificity | sum less 1 |", "| --- | --- | --- | --- | --- |", *table, "",
        "| judge | requests | k | n | by hand | by the judge | corrected |",
        "| --- | --- | --- | --- | --- | --- | --- |", *rates,
    ])  # fmt: skip


def corrected(rate: float, sensitivity: float, specificity: float) -> float:
    """The true rate behind a judge's (Rogan and Gladen 1978), within 0 and 1; NaN where it is no better than chance."""
    better = sensitivity + specificity - 1
    return min(max((rate + specificity - 1) / better, 0.0), 1.0) if better > 0 else math.nan


def _share(hits: Sequence[bool]) -> str:
    """A share with Wilson's interval of 95%."""
    n, p = len(hits), fmean(hits)
    middle, half = p + Z * Z / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    low, high = ((middle + sign * half) / (1 + Z * Z / n) for sign in (-1, 1))
    return f"{p:.2f} ({low:.2f} to {high:.2f}, n = {n})"


def main() -> None:
    """Draw replies, or measure judges."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    drawing = verbs.add_parser("draw")
    drawing.add_argument("vector", type=Path)
    drawing.add_argument("--at", default="-1,0,1", help="strengths")
    drawing.add_argument("-m", "--model", default="smollm2-135m-instruct")
    drawing.add_argument("--count", type=int, default=100)
    drawing.add_argument("--seed", type=int, default=0)
    measuring = verbs.add_parser("measure")
    measuring.add_argument("--judge", required=True, help="a model that reads the rubric")
    measuring.add_argument("-m", "--model", default="smollm2-135m-instruct", help="the likelihood judge's")
    options = parser.parse_args()
    if options.verb == "draw":
        draw(options.vector, options.model, [float(k) for k in options.at.split(",")], options.count, options.seed)
    else:
        print(measure(options.judge, options.model))


if __name__ == "__main__":
    main()
