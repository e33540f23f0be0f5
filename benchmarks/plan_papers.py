"""The plan of every recipe of the paper on one device, as a table: does it fit, how long, how many tokens.

python benchmarks/plan_papers.py [RECIPE ...] [--device h100]
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from weightsteer.planning.named_device import device_named
from weightsteer.planning.plan import Planner, choices_of, plan_recipe, planner_of
from weightsteer.planning.stages import Stage, Stages
from weightsteer.runs.recipe import Recipe
from weightsteer.runs.shipped_recipes import find_recipe

RECIPES = ("sycophancy", "evil", "refusal", "refusal_from_evil", "gcd", "trait")
HEADS = (
    "recipe",
    "LoRA, GB",
    "with checkpointing",
    "bias-only, GB",
    "with checkpointing",
    "full, GB",
    "most of the rest, GB",
    "as it stands",
    "hours",
    "trained",
    "generated",
    "scored",
    "judge calls",
)


def row(name: str, device_name: str) -> list[str]:
    """One recipe: peaks without and with checkpointing, and the sums of its plan as it stands."""
    recipe, device = Recipe.load(find_recipe(Path(f"paper/{name}"))), device_named(device_name)
    plan = plan_recipe(recipe, device, choices_of(recipe))
    planner = planner_of(recipe, device, choices_of(recipe), [])
    stages = list(Stages(recipe, planner.lm(recipe), None, checkpointing=False, notes=[]).all())
    peaks = {
        kind: [_peak(planner, stages, kind, again) for again in (False, True)] for kind in ("lora", "bias", "full")
    }
    rest = max(stage.memory.total for stage in plan.stages if not stage.trained)
    fits = "fits" if all(stage.fits for stage in plan.stages) else "does not fit"
    sums = [sum(getattr(s, name) for s in plan.stages) for name in ("trained", "generated", "scored", "judged")]
    sizes = [*peaks["lora"], *peaks["bias"], peaks["full"][0], rest / 1e9]
    cells = [f"{size:.1f}" if size else "" for size in sizes]
    return [f"`{name}`", *cells, f"{fits}, {plan.peak / 1e9:.1f} GB", f"{plan.seconds / 3600:.1f}", *map(_count, sums)]


def _peak(planner: Planner, stages: list[Stage], kind: str, again: bool) -> float:
    """GB of the largest training of a kind; 0 where there is none."""
    choices = replace(planner.choices, gradient_checkpointing=again)
    found = [s for s in stages if s.training is not None and s.training.settings.kind == kind]
    return max((planner.memory(stage, choices).total for stage in found), default=0.0) / 1e9


def _count(number: float) -> str:
    return f"{number:,.0f}" if number else ""


def main() -> None:
    """One line a recipe, as soon as it is planned."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    parser.add_argument("--device", default="h100")
    options = parser.parse_args()
    print("| " + " | ".join(HEADS) + " |\n" + "| --- " * len(HEADS) + "|", flush=True)
    for name in options.recipes:
        print("| " + " | ".join(row(name, options.device)) + " |", flush=True)


if __name__ == "__main__":
    main()
