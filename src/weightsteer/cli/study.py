"""The verb that runs many recipes and seeds, and compares the methods over all of them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import SteerError
from ..places import shareable
from ..progress import show_progress
from ..schema import parse_number
from ..shown import say
from .options import GpusPerModel, KeyEnv, Ray, TrustCode, refuse_without_ray
from .run import refuse_run_inputs, shrink

if TYPE_CHECKING:
    from ..runs.recipe import Recipe
    from ..runs.study import StudyFolder


def study(
    recipes: Annotated[list[Path], typer.Argument(help="Recipes (YAML), or names of shipped ones.")],
    seeds: Annotated[str, typer.Option(help="Seeds of every recipe.")] = "0,1,2",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Study folder; default studies/<names of the recipes>.")
    ] = None,
    reference: Annotated[str, typer.Option(help="The method that the others are compared with.")] = "contrastive",
    ray: Ray = None,
    gpus_per_model: GpusPerModel = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="On a tiny random model with a handful of examples.")
    ] = False,
    trust_code: TrustCode = None,
    key_env: KeyEnv = None,
) -> None:
    """Run every recipe with every seed, and compare the methods over all of them on one page.

    Kill it at any point and run it again: nothing done is done twice. Recipes and seeds can be added later. With --ray
    all runs are one queue of work; without it one run follows the other.

    Example: weightsteer study recipes/demo.yaml recipes/laptop/evil.yaml --seeds 0,1,2
    """
    if ray is None:
        refuse_without_ray(gpus_per_model)
    wanted = _seeds(seeds)
    loaded, folder = _load(recipes, out)
    if dry_run:
        here = folder.path.absolute()
        loaded = [shrink(recipe, here.with_name(f"{here.name}-{recipe.name}")) for recipe in loaded]
    from ..cluster.drive import workers
    from ..runs.pipeline import Trust
    from ..runs.study import Study, one_by_one

    options = ["--seeds", seeds, *(["--out", shareable(out)] if out else []), *(["--dry-run"] if dry_run else [])]
    options += ["--reference", reference] if reference != "contrastive" else []
    command = shlex.join(["weightsteer", "study", *map(shareable, recipes), *options])
    trust = Trust(trust_code or (), [key_env] if key_env else ())
    began = Study(loaded, wanted, folder, show=show_progress, command=command, trust=trust, any_outcome=dry_run)
    page = began.run(one_by_one if ray is None else workers(ray, gpus_per_model), reference=reference)
    say(f"study:   {page}\nresults: {folder.results}")


def _load(paths: list[Path], out: Path | None) -> tuple[list[Recipe], StudyFolder]:
    """The recipes, and the study's folder, which is none of their inputs."""
    from ..runs.recipe import Recipe
    from ..runs.shipped_recipes import find_recipe
    from ..runs.study import StudyFolder, default_folder

    found = [find_recipe(path) for path in paths]
    loaded = [Recipe.load(path) for path in found]
    folder = StudyFolder(out or default_folder(loaded))
    for recipe, path in zip(loaded, found, strict=True):
        refuse_run_inputs(recipe, path, folder.path)
    return loaded, folder


def _seeds(text: str) -> list[int]:
    """Whole numbers between commas."""
    found = [parse_number(part, "--seeds") for part in text.split(",")]
    if odd := [number for number in found if not number.is_integer()]:
        raise SteerError(f"--seeds: expected whole numbers such as 0,1,2; found {odd[0]:g}")
    return [int(number) for number in found]


VERBS = (study,)
