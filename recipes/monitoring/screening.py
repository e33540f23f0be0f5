"""Does `screen` find the examples that were planted? Precision by gradients, by likelihood, and by activations.

    OMP_NUM_THREADS=1 python recipes/monitoring/screening.py runs/bank --dictionary recipes/monitoring/dictionary

Examples of a trait are planted into two kinds of data: those of neutral tasks, and the other answers to the same
kinds of questions ("good advice" for "bad advice"). A score ranks all of them, and its precision is the share of
planted ones among so many at the top as were planted. No score sees the trait's own data: vectors come from
personality questions. About fifteen minutes on one core.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from bank import HERE, Bank, read_plan

from weightsteer import LM, Example, load_examples, load_pairs, sides_of
from weightsteer.behavior import Behavior
from weightsteer.files import write_json
from weightsteer.monitor import Dictionary, screen
from weightsteer.progress import show_progress
from weightsteer.scoring import score_choices

COUNT = 16  # examples of each side and of each neutral task
PLANTED = (2, 8)  # of a kind
DRAWS = 200
SCORES = ("gradient", "likelihood under S+ and S-", "activations")


def planted(plan: Mapping[str, Any]) -> dict[str, tuple[str, list[Example], list[Example]]]:
    """Kind -> its trait, its examples, and those of the other side of its file."""
    traits = {kind: trait for trait, kinds in plan["by_design"].items() for kind in kinds}
    found = {}
    for file, (kind, _) in plan["pairs"].items():
        if kind in traits:
            ours, theirs = sides_of(load_pairs(HERE / f"{file}.jsonl")[:COUNT])
            found[kind] = (traits[kind], ours, theirs)
    return found


def likelihoods(lm: LM, examples: Sequence[Example], trait: str) -> list[float]:
    """log p(answer | S+) - log p(answer | S-), nats per token, with the trait's first pair of system prompts."""
    behavior = Behavior.load(f"personality/{trait}")
    sides = []
    for system in (behavior.positive_prompts[0], behavior.negative_prompts[0]):
        asked = lm.with_system_prompt(system)
        sides.append(score_choices(asked, [e.prompt for e in examples], [(e.answer,) for e in examples]))
    return [ours[0].mean - theirs[0].mean for ours, theirs in zip(*sides, strict=True)]


def states(lm: LM, examples: Sequence[Example]) -> torch.Tensor:
    """Mean output of the middle block over each answer's tokens, (examples, hidden)."""
    kept: list[torch.Tensor] = []

    def keep(_module: Any, _args: Any, output: Any) -> None:
        kept.append((output[0] if isinstance(output, tuple) else output)[0])

    handle = lm.blocks[len(lm.blocks) // 2].register_forward_hook(keep)
    found = []
    with torch.no_grad():
        for example in examples:
            exchange = lm.exchange(example.prompt, example.answer)
            lm.model(input_ids=torch.tensor([exchange.head + exchange.answer]), use_cache=False)
            found.append(kept.pop()[len(exchange.head) :].mean(0))
    handle.remove()
    return torch.stack(found)


def precision(scores: Mapping[int, float], ours: Sequence[int], rest: Sequence[int], count: int) -> float:
    """Share of planted examples among the `count` highest scores, `count` of `ours` being drawn and planted."""
    drawn, found = random.Random(0), []
    for _ in range(DRAWS):
        planted = set(drawn.sample(list(ours), count))
        top = sorted([*planted, *rest], key=lambda i: -scores[i])[:count]
        found.append(len(planted.intersection(top)) / count)
    return fmean(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bank", type=Path)
    parser.add_argument("--dictionary", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    plan = read_plan()
    made, dictionary, kinds = Bank(options.bank, plan), Dictionary.load(options.dictionary), planted(plan)
    neutral = [e for file in plan["neutral"] for e in load_examples(HERE / f"{file}.jsonl")[:COUNT]]
    examples, places = list(neutral), {"neutral": list(range(len(neutral)))}
    for kind, (_, ours, theirs) in kinds.items():
        for name, part in ((kind, ours), (f"not {kind}", theirs)):
            places[name] = list(range(len(examples), len(examples) + len(part)))
            examples += part
    with show_progress("screen") as progress:
        pushes = screen(made.lm, examples, dictionary.vectors, progress=progress)
    found, middle = states(made.lm, examples), len(made.lm.blocks) // 2
    rows = []
    likely: dict[str, dict[int, float]] = {}  # trait -> example -> likelihood, of those that are ranked by it
    for kind, (trait, _, _) in kinds.items():
        ranked = [i for name in ("neutral", kind, f"not {kind}") for i in places[name]]
        known = likely.setdefault(trait, {})
        fresh = [i for i in ranked if i not in known]
        known |= dict(zip(fresh, likelihoods(made.lm, [examples[i] for i in fresh], trait), strict=True))
        along = (found @ made.activations(trait).layers[middle]).tolist()
        by: dict[str, Mapping[int, float]] = {
            "gradient": dict(enumerate(pushes.pushes[:, pushes.names.index(trait)].tolist())),
            "likelihood under S+ and S-": known,
            "activations": dict(enumerate(along)),
        }
        for score in SCORES:
            for rest in ("neutral", f"not {kind}"):
                for count in PLANTED:
                    value = precision(by[score], places[kind], places[rest], count)
                    among = len(places[rest])
                    row = {"kind": kind, "trait": trait, "score": score, "among": rest, "of": among}
                    rows.append(row | {"planted": count, "precision": value, "chance": count / (among + count)})
    write_json(options.bank / "screening.json", {"rows": rows})
    print("| score | among | planted | precision | chance |")
    for score in SCORES:
        for other in (False, True):
            for count in PLANTED:
                these = [
                    r for r in rows
                    if r["score"] == score and r["planted"] == count and (r["among"] != "neutral") == other
                ]  # fmt: skip
                among = "the same questions" if other else "neutral tasks"
                values = fmean(r["precision"] for r in these), fmean(r["chance"] for r in these)
                print(f"| {score} | {among} | {count} | {values[0]:.2f} | {values[1]:.2f} |")
    for row in rows:
        if row["planted"] == PLANTED[-1]:
            print(f"{row['kind']} -> {row['trait']}, {row['score']}, among {row['among']}: {row['precision']:.2f}")


if __name__ == "__main__":
    main()
