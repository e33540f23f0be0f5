"""A study: recipes x seeds, each a run in the study's folder; what must hold before any of them begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import SteerError
from ..files import digest, read_kept, write_json
from ..run_card import RunCard, refuse_foreign
from ..run_folder import RunFolder
from .pipeline import Run
from .recipe import Recipe
from .stages import finish, is_measured

KIND = "study"
LONGEST = 80  # characters of a default folder's name


@dataclass(frozen=True)
class StudyRun:
    """One recipe with one seed."""

    claim: str  # the recipe's own name, which its seeds share
    seed: int
    recipe: Recipe
    folder: Path


@dataclass(frozen=True)
class StudyFolder:
    """Where everything of a study lies, beside its runs."""

    path: Path

    @property
    def page(self) -> Path:
        """The page of the study."""
        return self.path / "study.html"

    @property
    def results(self) -> Path:
        """What the page says (JSON)."""
        return self.path / "study.json"

    @property
    def finished(self) -> Path:
        """Run -> the digest of the recipe by which its report was written last (JSON)."""
        return self.path / "finished.json"


def default_folder(recipes: Sequence[Recipe]) -> Path:
    """`studies/`, and the names of the recipes."""
    return Path("studies") / "-".join(recipe.name for recipe in recipes)[:LONGEST]


def plan_study(recipes: Sequence[Recipe], seeds: Sequence[int], folder: Path) -> list[StudyRun]:
    """The runs, recipe by recipe.

    Raises:
        SteerError: no seed, a seed that is given twice, or two recipes of one name.
    """
    if not recipes or not seeds:
        raise SteerError("a study: expected at least one recipe and one seed")
    for what, given in (("--seeds", seeds), ("recipes", [recipe.name for recipe in recipes])):
        twice = next((one for number, one in enumerate(given) if one in given[:number]), None)
        if twice is not None:
            way_out = "give each recipe a 'name' of its own" if what == "recipes" else "give it once"
            raise SteerError(f"{what}: {twice!r} is given twice; {way_out}")
    return [
        StudyRun(recipe.name, seed, recipe.model_copy(update={"name": name, "seed": seed}), folder / name)
        for recipe in recipes
        for seed in seeds
        for name in [f"{recipe.name}-seed{seed}"]
    ]


def claim_study(folder: StudyFolder, plan: Sequence[StudyRun]) -> None:
    """Make the study's folder, or take up the one that is there: recipes and seeds may be added.

    Raises:
        SteerError: the folder holds something else.
    """
    refuse_foreign(folder.path, KIND)
    folder.path.mkdir(parents=True, exist_ok=True)
    settings = {"recipes": sorted({run.claim for run in plan}), "seeds": sorted({run.seed for run in plan})}
    RunCard.now(KIND, settings=settings).save(folder.path)


def is_finished(folder: StudyFolder, run: Run) -> bool:
    """Whether a run's report is that of its recipe as it is now; a recipe may change what a report shows."""
    known = read_kept(folder.finished, dict[str, str]) or {}
    return run.folder.page.is_file() and known.get(run.recipe.name) == digest(run.recipe.model_dump())


def note_finished(folder: StudyFolder, run: Run) -> None:
    """Keep that a run has its report."""
    known = read_kept(folder.finished, dict[str, str]) or {}
    write_json(folder.finished, {**known, run.recipe.name: digest(run.recipe.model_dump())})


def run_here(folder: StudyFolder, run: Run) -> None:
    """Bring a run to its report in this process."""
    if is_measured(run):
        finish(run)
    else:
        run.run()
    note_finished(folder, run)


def runs_of(plan: Sequence[StudyRun]) -> Mapping[str, list[RunFolder]]:
    """Recipe -> the folders of its runs, seed by seed."""
    found: dict[str, list[RunFolder]] = {}
    for run in plan:
        found.setdefault(run.claim, []).append(RunFolder(run.folder))
    return found
