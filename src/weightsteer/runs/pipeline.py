"""The stages of `run`: D+ and D- -> fine-tunes -> vectors -> sweep -> samples -> k -> costs -> report.

Each stage writes its artifact into the run's folder. What is trained and measured is kept there and not made
again, so that a killed run resumes where it stopped; rows, the choice of k and the report are written anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..behavior import SIDES, example_rows, pair_rows
from ..errors import SteerError
from ..evaluation.choose_k import recommend
from ..evaluation.cost import measure_costs
from ..evaluation.metrics import MetricKey, metric_key
from ..evaluation.packed_check import refuse_unsteered_pack
from ..evaluation.results import BASE, MetricRow, measurements_by_key
from ..evaluation.sweep import planned_cells, run_sweep
from ..evaluation.tasks.task import Task
from ..example_files.checks import refuse_unfit, warn_unfit
from ..example_files.load import load_pairs
from ..files import digest, read_finished, write_jsonl
from ..fitting import kept_in, rows_by_default
from ..judges.endpoint import Endpoint
from ..leftovers import sweep_within
from ..lm import LM
from ..locks import hold
from ..run_card import RunCard, StrengthRange
from ..run_folder import RunFolder
from ..steering.methods import costs_of
from ..steering.several_k import generate_at_strengths, replies_at_strengths
from ..steering.steering import Steering
from ..vectors.vector_folder import save_card
from .artifacts import RunArtifacts, load_judge
from .dial_pairs import dial_sources
from .models import ShowProgress
from .own_data import OWN, behavior_of
from .recipe import Recipe, claim_run
from .run_engine import RunEngine
from .run_methods import methods_with_strengths
from .run_report import write_run_report
from .samples import Samples, read_samples
from .trainings import refuse_here
from .validate import check_alone, require_metrics, validate_recipe

PREVIEWED = (-1.0, 0.0, 1.0)  # strengths of a vector of which nothing is known yet
VALIDATED = ("contrastive",)  # whose k is chosen
Preview = Callable[[str, Mapping[float, str]], None]  # what shows a prompt and its reply at each k


@dataclass(frozen=True)
class Trust:
    """What a recipe cannot allow itself, and its user can."""

    code: Sequence[str] = ()  # task files of lm-evaluation-harness whose code may run
    keys: Sequence[str] = ()  # environment variables whose keys the judge's server may get


class Run:
    """One run of a recipe in one folder."""

    def __init__(
        self, recipe: Recipe, folder: str | Path, *, show: ShowProgress, command: str = "", trust: Trust | None = None
    ) -> None:
        """Check the whole recipe before any work: data, tasks, training settings, the folder.

        Args:
            trust: what the user allows the recipe: files of tasks that bring code, environment variables with keys.
        """
        check_alone(recipe)  # before a judge, or any other model, is loaded
        refuse_here(recipe)
        self.trust = trust = trust or Trust()
        self.recipe, self.folder, self.show, self.command = recipe, RunFolder(Path(folder)), show, command
        self.behavior = behavior_of(recipe)
        self.judge = load_judge(recipe, self.folder, trust.keys)
        self.tasks = recipe.load_tasks(self.judge, trust_code=trust.code)
        by_name = {task.name: task for task in self.tasks}
        self.artifacts = RunArtifacts(
            recipe, self.folder, behavior=self.behavior, tasks=by_name, judge=self.judge, show=show
        )
        wanted = recipe.engine
        self.engine = RunEngine(recipe, wanted, self.folder, trust.keys) if wanted else None
        if "prose" not in by_name:
            raise SteerError(f"recipe {recipe.name}: field 'tasks': needs a task 'prose'")
        self.search_texts = by_name["prose"].of_split("validation").first(recipe.sweep.search_items)
        validate_recipe(recipe, self.behavior, by_name)
        with hold(self.folder.path):
            claim_run(recipe, self.folder, self._inputs())

    def run(self, preview: Preview | None = None) -> Path:
        """Go from the data to the report; returns the report's path.

        Args:
            preview: called once the vector is there, with a prompt and its replies, before anything is measured on it.
        """
        with hold(self.folder.path), kept_in(self.folder.batches):
            sweep_within(self.folder.path)
            self._try_judge()
            self._meet_engine()
            self.check_metrics()
            self.write_data()
            if preview:
                self._preview(preview)
            methods = self.methods()
            rows = self.sweep(methods)
            self.choose(rows, self.samples(methods))
            self.measure_costs(methods)
            return self.report()

    def measure_again(self) -> list[MetricRow]:
        """The sweep of a run that is trained, and the choice of k."""
        with hold(self.folder.path), kept_in(self.folder.batches):
            self._meet_engine()
            self.check_metrics()
            methods = self.methods()
            rows = self.sweep(methods)
            self.choose(rows, self.samples(methods))
            return rows

    def _try_judge(self) -> None:
        """Ask a served judge once, so that one that is down is found before the work."""
        if isinstance(self.judge, Endpoint):
            replace(self.judge, cache=None).generate(["Answer with the number 1."])

    def _meet_engine(self) -> None:
        """Say what the engine will be asked, and compare it with the model here if it is there already."""
        if self.engine is not None:
            lm = self.artifacts.lm()
            self.engine.tell_plan(self.tasks, lm)
            if self.engine.is_there():
                self.engine.meet(lm)

    def check_metrics(self) -> None:
        """The metrics that the recipe names must be measured, which one item of each task shows before any training."""
        found = self.known_metrics()
        with self.show("tasks") as progress:
            for number, task in enumerate(self.tasks):
                progress(number, len(self.tasks), task.name)
                if task.name not in found:
                    found[task.name] = metrics_shown(task, self.artifacts.lm(), self.recipe)
            progress(len(self.tasks), len(self.tasks), "done")
        require_metrics(self.recipe, found)

    def known_metrics(self) -> dict[str, list[str]]:
        """Task -> its metrics, of those that were measured on the base."""
        path = self.folder.measurements
        done = measurements_by_key(read_finished(path), str(path))
        return {task: list(found.values) for (method, _, task), found in done.items() if method == BASE}

    def _inputs(self) -> dict[str, str]:
        """Hashes of all that the recipe reads, shipped or the user's."""
        found = {f"task {task.name}": task.sha256 for task in self.tasks}
        sides = self.recipe.sides()
        if sides is not None:
            found |= {name: digest(example_rows(side)) for name, side in zip(SIDES, sides, strict=True)}
        finetunes = {"first_finetune": self.recipe.first_finetune, "repair_target": self.recipe.repair_target}
        for name, wanted in finetunes.items():
            if wanted is not None:
                found[name] = digest(example_rows(self.recipe.finetune_examples(wanted)))
        found |= {name: digest(pair_rows(load_pairs(source))) for name, source in dial_sources(self.recipe).items()}
        return found if self.recipe.behavior == OWN else {**found, "behavior": digest(asdict(self.behavior))}

    def write_data(self) -> None:
        """D+ and D- as JSONL, as they are trained on."""
        write_sides(self.artifacts)

    def _preview(self, preview: Preview) -> None:
        """One prompt at three strengths, where no measured replies are there yet."""
        vector, wanted = self.artifacts.difference(), self.sample_prompts()[:1]
        if wanted and not self.folder.samples.exists():
            length = self.recipe.samples.max_new_tokens
            lm = self.artifacts.lm()
            replies = generate_at_strengths(vector, lm, wanted[0], PREVIEWED, max_new_tokens=length)
            preview(wanted[0], dict(zip(PREVIEWED, replies, strict=True)))

    def sample_prompts(self) -> list[str]:
        """What the vector is asked at every k."""
        wanted = self.recipe.samples
        return list((wanted.prompts or self.behavior.questions[::-1])[: wanted.count])

    def methods(self) -> list[tuple[Steering, list[float]]]:
        """Every method of the recipe with its strengths; trains what they need."""
        return methods_with_strengths(self.artifacts, self.search_texts)

    def sweep(self, methods: Sequence[tuple[Steering, list[float]]]) -> list[MetricRow]:
        """All measurements, then the rows."""
        lm, engine = self.artifacts.lm(), None
        refuse_unsteered_pack(lm, self.artifacts.difference())
        items_of = self.recipe.sweep.items_of
        if self.engine is not None:
            plan = planned_cells(methods, self.tasks, VALIDATED, items_of, self.engine.meet(lm))
            engine = self.engine.ready(plan, lm)
        with self.show("sweep") as progress:
            batch = batch_size_of(self.recipe, lm)
            return run_sweep(
                lm,
                methods,
                self.tasks,
                self.folder,
                validated=VALIDATED,
                items_of=items_of,
                engine=engine,
                judge_is_served=isinstance(self.judge, Endpoint),
                batch_size=batch,
                progress=progress,
            )

    def choose(self, rows: Sequence[MetricRow], samples: Samples) -> StrengthRange:
        """The recommended k, written into the vector's card; one whose samples are broken more is none."""
        broken = {f"{k:g}" for k in samples.broken_ks()}  # as samples write k
        strength = recommend(
            rows,
            metrics=self.recipe.metrics,
            behavior=metric_key(self.recipe.sweep.behavior),
            budget=self._budget(),
            refused={row.k for row in rows if f"{row.k:g}" in broken},
        )
        path = self.folder.vector
        save_card(RunCard.load(path).with_strength(strength).with_about(self.behavior.description), path)
        return strength

    def _budget(self) -> dict[MetricKey, float]:
        return {metric_key(text): limit for text, limit in self.recipe.budget.items()}

    def measure_costs(self, methods: Sequence[tuple[Steering, list[float]]]) -> list[MetricRow]:
        """What each method costs to make and to use."""
        with self.show("costs") as progress:
            return measure_costs(self.artifacts.lm(), methods, costs_of, self.folder, progress=progress)

    def samples(self, methods: Sequence[tuple[Steering, list[float]]]) -> Samples:
        """Replies to the same prompts at 0 and at every swept k of the vector; those of an earlier version stay."""
        ks = sorted({0.0, *next(ks for method, ks in methods if method.name == "contrastive")})
        kept = self.known_samples(ks)
        if kept is not None:
            return kept
        vector, lm = self.artifacts.difference(), self.artifacts.lm()
        with self.show("samples") as progress:
            length, prompts, found = self.recipe.samples.max_new_tokens, self.sample_prompts(), None
            if self.engine is not None and self.engine.found is not None:
                steered = next(method for method, _ in methods if method.name == "contrastive")
                found = self.engine.found.replies(steered, ks, prompts, max_new_tokens=length, progress=progress)
            if found is None:
                found = replies_at_strengths(vector, lm, prompts, ks, max_new_tokens=length, progress=progress)
        return self.keep_samples(ks, found)

    def known_samples(self, ks: Sequence[float]) -> Samples | None:
        """The samples that there are; None where they have to be made."""
        prompts = self.sample_prompts()
        if not prompts:
            return Samples(())
        kept = read_samples(self.folder.samples)
        if kept.are_of(prompts, ks, self.recipe.samples.max_new_tokens):
            return kept
        if kept.are_former(prompts, RunCard.load(self.folder.vector), self._budget()):
            return replace(kept, former=True)
        return None

    def keep_samples(self, ks: Sequence[float], found: Sequence[Sequence[str]]) -> Samples:
        """Samples of the replies at each k, written into the run's folder."""
        made = Samples.of(self.sample_prompts(), ks, found, self.recipe.samples.max_new_tokens)
        write_jsonl(self.folder.samples, map(asdict, made.rows))
        return made

    def report(self) -> Path:
        """The page and its PNG, from the artifacts of the stages before."""
        with hold(self.folder.path):
            return write_run_report(self.recipe, self.folder, command=self.command)


def batch_size_of(recipe: Recipe, lm: LM) -> int:
    """The most prompts in a batch; memory may allow fewer."""
    return recipe.batch_size or rows_by_default(lm.device)


def metrics_shown(task: Task, lm: LM, recipe: Recipe) -> list[str]:
    """The metrics that a task measures on the base, by one item of each split."""
    try:
        return list(task.first(1).against(lm).measure(lm))
    except SteerError:  # one reply may have no answer; that none has is an error
        return list(task.against(lm).measure(lm, batch_size=batch_size_of(recipe, lm)))


def write_sides(artifacts: RunArtifacts) -> None:
    """D+ and D- as JSONL, as they are trained on."""
    sides = artifacts.sides()
    refuse_unfit(*sides)
    warn_unfit(*sides, artifacts.base().tokenizer)
    for name, side in zip(SIDES, sides, strict=True):
        path = artifacts.folder.examples(name)
        if not path.exists():
            write_jsonl(path, example_rows(side))
