"""Make the bank of fine-tunes and the dictionary's vectors, and read every fine-tune by every detector.

    OMP_NUM_THREADS=1 python recipes/monitoring/bank.py runs/bank
    OMP_NUM_THREADS=1 python recipes/monitoring/bank.py runs/bank --part 1/2 &   # two shares of the work at a time
    OMP_NUM_THREADS=1 python recipes/monitoring/bank.py runs/bank-qwen --plan recipes/monitoring/bank-qwen.yaml

What is finished is kept, so that a stopped call goes on. Then `detectors.py` compares the detectors and writes the
dictionary. The first takes about an hour on two cores.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
import yaml

from weightsteer import (
    LM,
    ActivationVector,
    Example,
    TrainSettings,
    WeightVector,
    activation_vector,
    load_examples,
    load_pairs,
    sides_of,
    subtract_finetunes,
    task_vector,
    train_side,
)
from weightsteer.behavior import ContrastPair
from weightsteer.files import read_json, write_json
from weightsteer.progress import show_progress
from weightsteer.scoring import score_choices

HERE = Path(__file__).parent
PLAN = HERE / "bank.yaml"
HELD_OUT = 8  # pairs of each file that no fine-tune sees
PROMPTS = 30  # neutral ones, for the shift of activations


@dataclass(frozen=True)
class FineTune:
    """One entry of the bank."""

    name: str  # "bad-cooking-0", "rude-0.3-in-rewriting-0"
    kind: str  # "bad-cooking"
    group: str  # the file that its data come from: what is left out together
    share: float  # of the kind's examples in its data
    seed: int
    examples: tuple[Example, ...]


def bank(plan: Mapping[str, Any]) -> list[FineTune]:
    """Every fine-tune of the plan."""
    sides = _sides(plan)
    found = [
        FineTune(f"{kind}-{seed}", kind, group, 1.0, seed, tuple(examples))
        for kind, (group, examples) in sides.items()
        for seed in plan["seeds"]
    ]
    mixed = plan["mixtures"]
    into = sides[mixed["into"]][1]
    for kind in mixed["of"]:
        group, examples = sides[kind]
        for share in mixed["shares"]:
            count = round(share * len(into))
            parts = (*examples[:count], *into[count:])
            found.append(FineTune(f"{kind}-{share:g}-in-{mixed['into']}-0", kind, group, share, 0, parts))
    return found


def _sides(plan: Mapping[str, Any]) -> dict[str, tuple[str, list[Example]]]:
    """Kind -> its file and its examples."""
    found = {}
    for file, kinds in plan["pairs"].items():
        pairs = load_pairs(HERE / f"{file}.jsonl")[:-HELD_OUT]
        for kind, examples in zip(kinds, sides_of(pairs), strict=True):
            found[kind] = (file, examples)
    return found | {file: (file, load_examples(HERE / f"{file}.jsonl")[:-HELD_OUT]) for file in plan["neutral"]}


def trait_pairs(trait: str) -> list[ContrastPair]:
    """The pairs that a trait's vector is made from."""
    return load_pairs(f"personality/{trait}")


def probe_pairs(trait: str) -> list[ContrastPair]:
    """Fifteen pairs by which a model's behaviour is read: of the vector's, and of those kept from it."""
    return [*trait_pairs(trait), *load_pairs(f"personality/{trait}", file="heldout.jsonl")][::2]


class Bank:
    """The bank in a folder."""

    def __init__(self, out: Path, plan: Mapping[str, Any]) -> None:
        self.out, self.plan = out, plan
        self.lm = LM.load(plan["model"], dtype="float32")

    def settings(self, seed: int) -> TrainSettings:
        return TrainSettings(**self.plan["train"], seed=seed)

    def train(self, name: str, examples: Sequence[Example], seed: int) -> Path:
        """A fine-tune by name."""
        with show_progress(name) as progress:
            return train_side(self.lm, examples, self.out / name, settings=self.settings(seed), progress=progress)

    def trait(self, trait: str) -> WeightVector:
        """The vector of a trait."""
        positive, negative = sides_of(trait_pairs(trait))
        sides = [
            self.train(f"traits/{trait}/{side}", examples, self.plan["trait_seed"])
            for side, examples in (("positive", positive), ("negative", negative))
        ]
        return subtract_finetunes(*sides)

    @cache  # noqa: B019 - one bank a process
    def activations(self, trait: str) -> ActivationVector:
        """The activation vector of a trait."""
        return activation_vector(self.lm, *sides_of(trait_pairs(trait)))

    def measure(self, entry: FineTune) -> None:
        """What a fine-tune does, and how its activations move, kept beside it."""
        path = self.out / "measured" / f"{entry.name}.json"
        if path.exists():
            return
        tau = task_vector(self.train(f"fine-tunes/{entry.name}", entry.examples, entry.seed))
        with tau.applied(self.lm):
            begun = time.perf_counter()
            margins = self.margins()
            probed = time.perf_counter()
            states = self.states()
            ended = time.perf_counter()
        seconds = {"probe": (probed - begun) / len(self.plan["watched"]), "activations": ended - probed}
        write_json(path, {"margins": margins, "states": states, "seconds": seconds})

    def margins(self) -> dict[str, list[float]]:
        """Trait -> log p(positive) - log p(negative) per token of each of its pairs."""
        found = {}
        for trait in self.plan["watched"]:
            pairs = probe_pairs(trait)
            scores = score_choices(self.lm, [p.prompt for p in pairs], [(p.positive, p.negative) for p in pairs])
            found[trait] = [one.mean - other.mean for one, other in scores]
        return found

    def states(self) -> list[float]:
        """Mean output of the middle block at the last token of neutral prompts, (hidden,)."""
        prompts = [row.prompt for row in load_examples(HERE / "rewriting.jsonl")][:PROMPTS]
        block, kept = self.lm.blocks[len(self.lm.blocks) // 2], []

        def keep(_module: Any, _args: Any, output: Any) -> None:
            kept.append((output[0] if isinstance(output, tuple) else output)[0, -1])

        handle = block.register_forward_hook(keep)
        with torch.no_grad():
            for prompt in prompts:
                self.lm.model(input_ids=torch.tensor([self.lm.chat_ids(prompt)]), use_cache=False)
        handle.remove()
        return [float(value) for value in torch.stack(kept).mean(0)]

    def measure_base(self) -> None:
        """The base, by the same measures."""
        path = self.out / "measured" / "base.json"
        if not path.exists():
            write_json(path, {"margins": self.margins(), "states": self.states()})


def moved(out: Path, entry: FineTune, trait: str, half: int) -> tuple[float, float]:
    """How far a fine-tune moves a trait's margin, and the standard error, on every second of its pairs."""
    ours, base = (read_json(out / "measured" / f"{name}.json")["margins"][trait] for name in (entry.name, "base"))
    changes = [a - b for a, b in zip(ours[half::2], base[half::2], strict=True)]
    return fmean(changes), stdev(changes) / len(changes) ** 0.5


def read_plan(options: argparse.Namespace | None = None) -> dict[str, Any]:
    """`bank.yaml`, or the plan and the model that the command line names."""
    plan: dict[str, Any] = yaml.safe_load((options.plan if options else PLAN).read_text())
    return plan | {"model": options.model} if options and options.model else plan


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """The options that `read_plan` looks at."""
    parser.add_argument("--plan", type=Path, default=PLAN)
    parser.add_argument("--model", help="a folder with the plan's model, where it is not to be downloaded")


def _shares(work: Sequence[Any], part: str) -> Iterator[Any]:
    """Every n-th piece of the work, in a mixed order so that shares take the same time."""
    number, count = map(int, part.split("/"))
    order = list(range(len(work)))
    random.Random(0).shuffle(order)
    yield from (work[i] for i in order[number % count :: count])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--part", default="0/1", help="0/2 and 1/2 do half of the work each")
    add_plan_options(parser)
    options = parser.parse_args()
    plan = read_plan(options)
    made = Bank(options.out, plan)
    for trait in _shares(plan["traits"], options.part):
        made.trait(trait)
    for entry in _shares(bank(plan), options.part):
        made.measure(entry)
    made.measure_base()


if __name__ == "__main__":
    main()
