"""Compare rules for the defaults of a training on small data, and write docs/training-defaults.md's table.

    python scripts/defaults.py runs/defaults
    python scripts/defaults.py runs/defaults --model ~/models/qwen2.5-coder-0.5b-instruct --rules rule,half,double

For five shipped behaviours of 20 pairs, each rule trains both sides and subtracts. What is measured is kept in the
output folder, so that a stopped call goes on; a table over all that is there is printed at the end. The default model
takes some 25 minutes on two cores.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from weightsteer import LM, TrainSettings, WeightVector, load_pairs, train_vector
from weightsteer.behavior import Behavior
from weightsteer.evaluation.tasks import TaskSpec, load_task
from weightsteer.files import read_json, write_json
from weightsteer.looping import loops
from weightsteer.model_parts import width_of
from weightsteer.progress import show_progress
from weightsteer.scoring import mean_kl, prompt_log_probs, score_choices
from weightsteer.training import PAPER
from weightsteer.training.defaults import LEAST_STEPS, learning_rates

BEHAVIOURS = ("formal", "concise", "candid", "plain", "cheerful")
RULES = {  # factor of the learning rate's rule, steps
    "rule": (1.0, LEAST_STEPS),
    "half": (0.5, LEAST_STEPS),
    "double": (2.0, LEAST_STEPS),
    "short": (1.0, LEAST_STEPS // 2),
    "long": (1.0, LEAST_STEPS * 2),
    "paper": (0.0, 0),
}
STRENGTHS = (-1.0, 1.0)
TEXTS, PROMPTS, TOKENS = 6, 5, 40


def settings_of(rule: str, width: int) -> TrainSettings:
    """What a rule trains with; "paper" is the paper's settings as they are."""
    factor, steps = RULES[rule]
    if rule == "paper":
        return PAPER
    if rule == "rule":
        return TrainSettings()
    rate = float(f"{factor * learning_rates('lora', width)[0]:.2g}")
    return TrainSettings(learning_rates=(rate,), max_steps=steps)


def margins(lm: LM, behaviour: str) -> list[float]:
    """log p(positive) - log p(negative) per token of each pair that no training saw, in nats."""
    pairs = load_pairs(behaviour, file="heldout.jsonl")
    scores = score_choices(lm, [pair.prompt for pair in pairs], [(pair.positive, pair.negative) for pair in pairs])
    return [positive.mean - negative.mean for positive, negative in scores]


def measure(lm: LM, vector: WeightVector, behaviour: str, strengths: Sequence[float]) -> dict[str, Any]:
    """What a vector does at each k, beside the base."""
    texts = load_task(TaskSpec("prose", limit=TEXTS))
    prompts = Behavior.load(behaviour).questions[:PROMPTS]
    base_loss = fmean(texts.measure(lm)["nll"])  # type: ignore[arg-type]
    base_replies, reference = lm.generate(prompts, max_new_tokens=TOKENS), prompt_log_probs(lm, prompts)
    found: dict[str, Any] = {"norm": vector.norm(), "base": {"replies": base_replies, "loss": base_loss}}
    for k in strengths:
        with vector.applied(lm, k):
            replies = lm.generate(prompts, max_new_tokens=TOKENS)
            found[f"{k:g}"] = {
                "margins": margins(lm, behaviour),
                "loss": fmean(texts.measure(lm)["nll"]),  # type: ignore[arg-type]
                "kl": mean_kl(reference, lm, prompts),
                "replies": replies,
                "changed": fmean(reply != base for reply, base in zip(replies, base_replies, strict=True)),
                "looping": fmean(map(loops, replies)),
            }
    return found


def measured(lm: LM, model: str, behaviour: str, rule: str, out: Path) -> dict[str, Any]:
    """One behaviour under one rule, from the output folder if it is there."""
    folder = out / model / f"{behaviour}-{rule}"
    path = folder / "measured.json"
    if not path.exists():
        with show_progress(f"{model} {behaviour} {rule}") as progress:
            settings = settings_of(rule, width_of(lm.model))
            vector = train_vector(lm, behaviour, out=folder, settings=settings, progress=progress)
        write_json(path, measure(lm, vector, behaviour, STRENGTHS))
    found: dict[str, Any] = read_json(path)
    return found


def row_of(model: str, rule: str, found: Sequence[dict[str, Any]]) -> list[str]:
    """A rule's line of the table: means over the behaviours."""
    moved = [
        fmean(plus - minus for plus, minus in zip(one["1"]["margins"], one["-1"]["margins"], strict=True))
        for one in found
    ]
    error = stdev(moved) / math.sqrt(len(moved)) if len(moved) > 1 else math.nan
    sides = [one[side] for one in found for side in ("1", "-1")]
    rises = [one[side]["loss"] - one["base"]["loss"] for one in found for side in ("1", "-1")]
    return [
        model,
        rule,
        f"{fmean(one['norm'] for one in found):.2g}",
        f"{fmean(moved):+.2f} ± {error:.2f}",
        f"{min(moved):+.2f}",
        f"{fmean(rises):+.3f}",
        f"{fmean(side['kl'] for side in sides):.3f}",
        f"{fmean(side['changed'] for side in sides):.0%}",
        f"{fmean(side['looping'] for side in sides):.0%}",
    ]


HEAD = (
    "model",
    "rule",
    "norm of w",
    "margin, nats per token",
    "least behaviour",
    "loss rise",
    "KL",
    "replies changed",
    "looping",
)


def table(out: Path) -> str:
    """Every model and rule of which all five behaviours are measured."""
    rows = [HEAD, tuple("---" for _ in HEAD)]
    for model in sorted(path.name for path in out.iterdir() if path.is_dir()):
        for rule in RULES:
            paths = [out / model / f"{behaviour}-{rule}" / "measured.json" for behaviour in BEHAVIOURS]
            if all(path.exists() for path in paths):
                rows.append(tuple(row_of(model, rule, [read_json(path) for path in paths])))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", help="name or folder; default: the embedded model")
    parser.add_argument("--rules", default=",".join(RULES), help="some of " + ", ".join(RULES))
    parser.add_argument("--behaviours", default=",".join(BEHAVIOURS), help="some of " + ", ".join(BEHAVIOURS))
    parser.add_argument("--dtype", default="float32", help="as `weightsteer train --dtype`")
    options = parser.parse_args()
    lm = LM.load(options.model, dtype=options.dtype) if options.model else LM.load(dtype=options.dtype)
    name = Path(lm.name).name
    for rule in options.rules.split(","):
        for behaviour in options.behaviours.split(","):
            measured(lm, name, behaviour, rule, options.out)
    print(table(options.out))


if __name__ == "__main__":
    main()
