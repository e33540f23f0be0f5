"""A study: recipes x seeds, each a run in the study's folder; what must hold before any of them begins."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from ..errors import SteerError
from ..evaluation.metrics import metric_key
from ..evaluation.study import as_json, study_results
from ..evaluation.sweep import measurements_of
from ..files import digest, read_kept, write_json
from ..locks import hold
from ..places import shareable
from ..reporting.study_page import StudyReport, write_study_page
from ..run_card import RunCard, refuse_foreign
from ..run_folder import RunFolder
from ..schema import suggestion
from ..shown import note
from ..training.job import without_gain
from .models import ShowProgress
from .pipeline import Run, Trust
from .recipe import Recipe
from .run_methods import method_names
from .stages import finish, is_measured

KIND = "study"
Doer = Callable[[list[Run], ShowProgress, bool], dict[str, str]]  # brings runs to their reports; see `one_by_one`
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


def _refuse_reference(reference: str, recipes: Sequence[Recipe]) -> None:
    known = list(dict.fromkeys(name for recipe in recipes for name in method_names(recipe)))
    if reference not in known:
        raise SteerError(
            f"reference {reference!r}: expected one of the recipes' methods, {', '.join(known)}"
            f"{suggestion(reference, known)}"
        )


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


class Study:
    """Recipes x seeds in one folder."""

    def __init__(
        self,
        recipes: Sequence[Recipe],
        seeds: Sequence[int],
        folder: StudyFolder,
        *,
        show: ShowProgress,
        command: str = "",
        trust: Trust | None = None,
        any_outcome: bool = False,
    ) -> None:
        """Plan the runs.

        Args:
            any_outcome: a training need not better its base, as in a dry run.

        Raises:
            SteerError: see `plan_study`.
        """
        self.plan, self.folder = plan_study(recipes, seeds, folder.path), folder
        self.show, self.command, self.trust, self.any_outcome = show, command, trust, any_outcome

    def run(self, doer: Doer, *, reference: str = "contrastive") -> Path:
        """Check all runs, bring those to their reports that have none yet, and write the page; returns its path.

        A run that fails does not stop the others, and the page is of those that are there.

        Args:
            doer: what does the work: `one_by_one`, or the workers of a cluster.
            reference: the method that the others are compared with.

        Raises:
            SteerError: the folder holds something else; a recipe's mistake; or runs that failed.
        """
        _refuse_reference(reference, [run.recipe for run in self.plan])
        with hold(self.folder.path):
            self._claim()
            todo = [run for planned in self.plan if not self._is_finished(run := self._started(planned))]
            names = [run.recipe.name for run in todo]
            failures = doer(todo, self.show, self.any_outcome)
            self._note_finished([name for name in names if name not in failures])
            page = write_study(self.folder, self.plan, failures, reference=reference, command=self.command)
        if failures:
            first = next(iter(failures.values()))
            raise SteerError(f"{len(failures)} of {len(self.plan)} runs failed; {page} is of the others. {first}")
        return page

    def _claim(self) -> None:
        """Make the study's folder, or take up the one that is there: recipes and seeds may be added."""
        refuse_foreign(self.folder.path, KIND)
        self.folder.path.mkdir(parents=True, exist_ok=True)
        settings = {name: sorted({getattr(run, name) for run in self.plan}) for name in ("claim", "seed")}
        RunCard.now(KIND, settings=settings).save(self.folder.path)

    def _started(self, planned: StudyRun) -> Run:
        place = planned.folder
        command = shlex.join(["weightsteer", "run", shareable(RunFolder(place).recipe), "--out", shareable(place)])
        return Run(planned.recipe, planned.folder, show=self.show, command=command, trust=self.trust)

    def _is_finished(self, run: Run) -> bool:
        """Whether a run's report is that of its recipe as it is now; a recipe may change what a report shows."""
        return run.folder.page.is_file() and self._finished().get(run.recipe.name) == digest(run.recipe.model_dump())

    def _finished(self) -> dict[str, str]:
        return read_kept(self.folder.finished, dict[str, str]) or {}

    def _note_finished(self, names: Sequence[str]) -> None:
        made = {run.recipe.name: digest(run.recipe.model_dump()) for run in self.plan if run.recipe.name in names}
        write_json(self.folder.finished, self._finished() | made)


def one_by_one(runs: list[Run], show: ShowProgress, any_outcome: bool) -> dict[str, str]:
    """Bring runs to their reports in this process; returns those that failed, with the reason.

    The list is used up, so that the model of one run is gone before the next one loads its own.
    """
    failures = {}
    while runs:
        run = runs.pop(0)
        note(f"run {run.recipe.name}: {len(runs)} more after it")
        try:
            with without_gain() if any_outcome else nullcontext():
                finish(run) if is_measured(run) else run.run()
        except SteerError as error:
            failures[run.recipe.name] = f"{run.recipe.name}: {error}"
    return failures


def write_study(
    folder: StudyFolder, plan: Sequence[StudyRun], failures: Mapping[str, str], *, reference: str, command: str = ""
) -> Path:
    """The results and the page, from the runs that are there.

    Raises:
        SteerError: there is none.
    """
    there = [run for run in plan if run.recipe.name not in failures]
    if not there:
        raise SteerError(f"every run of the study failed; the first: {next(iter(failures.values()))}")
    by_recipe: dict[str, list[StudyRun]] = {}
    for run in there:
        by_recipe.setdefault(run.claim, []).append(run)
    recipes = {name: runs[0].recipe for name, runs in by_recipe.items()}
    measured = {name: [measurements_of(RunFolder(run.folder)) for run in runs] for name, runs in by_recipe.items()}
    metrics = {name: recipe.metrics for name, recipe in recipes.items()}
    behaviors = {name: [metric_key(text) for text in recipe.plot] for name, recipe in recipes.items()}
    results = study_results(measured, metrics, behaviors, reference=reference)
    seeds = sorted({run.seed for run in there})
    report = StudyReport(
        title=f"Study: {', '.join(recipes)}",
        results=results,
        seeds=seeds,
        metrics=metrics,
        behaviors=behaviors,
        reports={run.recipe.name: f"{run.recipe.name}/{RunFolder(run.folder).page.name}" for run in there},
        missing=failures,
        reference=reference,
        command=command,
    )
    runs = [{"recipe": run.claim, "seed": run.seed, "run": run.recipe.name} for run in there]
    write_json(folder.results, {"runs": runs, "missing": dict(failures), "reference": reference, **as_json(results)})
    return write_study_page(report, folder.page)
