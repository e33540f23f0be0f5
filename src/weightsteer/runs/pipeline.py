"""The stages of `run`: D+ and D- -> fine-tunes -> vectors -> sweep -> k -> costs -> samples -> report.

Each stage writes its artifact into the run's folder. What is trained and measured is kept there and not made
again, so that a killed run resumes where it stopped; rows, the choice of k and the report are written anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..behavior import SIDES, Behavior, example_rows
from ..data_building.sampling import cut_answers, unusable_verdicts
from ..errors import SteerError
from ..evaluation.choose_k import recommend
from ..evaluation.compare import compare_at_loss
from ..evaluation.cost import measure_costs
from ..evaluation.metrics import MetricKey, metric_key
from ..evaluation.results import BASE, MetricRow, measurements_by_key, read_rows
from ..evaluation.sweep import measure_base, run_sweep
from ..example_files.checks import refuse_unfit, warn_unfit
from ..files import digest, read_finished, read_jsonl, write_jsonl
from ..judges.endpoint import Endpoint
from ..leftovers import sweep_within
from ..locks import hold
from ..reporting.report import Report, Sample, write_report
from ..run_card import RunCard, StrengthRange
from ..run_folder import RunFolder
from ..schema import checked
from ..steering.methods import costs_of
from ..steering.several_k import generate_at_strengths
from ..steering.steering import Steering
from ..vectors.difference import task_vector
from ..vectors.geometry import facts, geometry
from .artifacts import RunArtifacts, ShowProgress, load_judge, read_layer
from .recipe import Recipe, claim_run
from .run_methods import methods_with_strengths
from .validate import validate_recipe


@dataclass(frozen=True)
class _Replies:
    """A row of the file of samples: k, as it is written -> the reply."""

    prompt: str
    replies: Mapping[str, str]


class Run:
    """One run of a recipe in one folder."""

    def __init__(self, recipe: Recipe, folder: str | Path, *, show: ShowProgress, command: str = "") -> None:
        """Check the whole recipe before any work: data, tasks, training settings, the folder."""
        self.recipe, self.folder, self.show, self.command = recipe, RunFolder(Path(folder)), show, command
        self.behavior = Behavior.load(recipe.behavior)
        self.judge = load_judge(recipe, self.folder)
        self.tasks = recipe.load_tasks(self.judge)
        by_name = {task.name: task for task in self.tasks}
        self.artifacts = RunArtifacts(
            recipe, self.folder, behavior=self.behavior, tasks=by_name, judge=self.judge, show=show
        )
        if "prose" not in by_name:
            raise SteerError(f"recipe {recipe.name}: field 'tasks': needs a task 'prose'")
        self.search_texts = by_name["prose"].of_split("validation").first(recipe.sweep.search_items)
        validate_recipe(recipe, self.behavior, by_name)
        with hold(self.folder.path):
            claim_run(recipe, self.folder, self._inputs())

    def run(self) -> Path:
        """Go from the data to the report; returns the report's path."""
        with hold(self.folder.path):
            sweep_within(self.folder.path)
            self._try_judge()
            self.measure_base()
            self.write_data()
            methods = self.methods()
            rows = self.sweep(methods)
            strength = self.choose(rows)
            self.measure_costs(methods)
            self.samples(strength)
            return self.report()

    def measure_again(self) -> list[MetricRow]:
        """The sweep of a run that is trained, and the choice of k."""
        with hold(self.folder.path):
            self.measure_base()
            rows = self.sweep(self.methods())
            self.choose(rows)
            return rows

    def _try_judge(self) -> None:
        """Ask a served judge once, so that one that is down is found before the work."""
        if isinstance(self.judge, Endpoint):
            replace(self.judge, cache=None).generate(["Answer with the number 1."])

    def measure_base(self) -> None:
        """Measure the unsteered model, which every recipe needs; the metrics that the recipe names must be there."""
        with self.show("base") as progress:
            batch = self.recipe.batch_size
            measure_base(self.artifacts.lm(), self.tasks, self.folder, batch_size=batch, progress=progress)
        path = self.folder.measurements
        found = measurements_by_key(read_jsonl(path), str(path))
        for text in (self.recipe.sweep.behavior, *self.recipe.budget, *self.recipe.plot):
            task, metric = metric_key(text)
            values = found[BASE, 0.0, task].values
            if metric not in values:
                known = ", ".join(values)
                raise SteerError(f"recipe {self.recipe.name}: {text}: task {task!r} has no such metric; it has {known}")

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
        return {**found, "behavior": digest(asdict(self.behavior))}

    def write_data(self) -> None:
        """D+ and D- as JSONL, as they are trained on."""
        refuse_unfit(*self.artifacts.sides())
        warn_unfit(*self.artifacts.sides(), self.artifacts.base().tokenizer)
        for name, side in zip(SIDES, self.artifacts.sides(), strict=True):
            path = self.folder.examples(name)
            if not path.exists():
                write_jsonl(path, example_rows(side))

    def methods(self) -> list[tuple[Steering, list[float]]]:
        """Every method of the recipe with its strengths; trains what they need."""
        return methods_with_strengths(self.artifacts, self.search_texts)

    def sweep(self, methods: Sequence[tuple[Steering, list[float]]]) -> list[MetricRow]:
        """All measurements, then the rows."""
        with self.show("sweep") as progress:
            return run_sweep(
                self.artifacts.lm(),
                methods,
                self.tasks,
                self.folder,
                validated=("contrastive",),  # whose k is chosen
                items_of=self.recipe.sweep.items_of,
                batch_size=self.recipe.batch_size,
                progress=progress,
            )

    def choose(self, rows: Sequence[MetricRow]) -> StrengthRange:
        """The recommended k, written into the vector's card."""
        strength = recommend(
            rows,
            metrics=self.recipe.metrics,
            behavior=metric_key(self.recipe.sweep.behavior),
            budget={metric_key(text): limit for text, limit in self.recipe.budget.items()},
        )
        path = self.folder.vector
        RunCard.load(path).with_strength(strength).save(path)
        return strength

    def measure_costs(self, methods: Sequence[tuple[Steering, list[float]]]) -> list[MetricRow]:
        """What each method costs to make and to use."""
        with self.show("costs") as progress:
            return measure_costs(self.artifacts.lm(), methods, costs_of, self.folder, progress=progress)

    def samples(self, strength: StrengthRange) -> list[Sample]:
        """Replies to the same prompts at up to five strengths."""
        path, wanted = self.folder.samples, self.recipe.samples
        prompts = list((wanted.prompts or self.behavior.questions[::-1])[: wanted.count])
        if not prompts:
            return []
        ks = {f"{k:g}" for k in strength.shown}
        rows = read_finished(path)
        kept = [checked(_Replies, row, f"{path}, row {number}") for number, row in enumerate(rows, start=1)]
        if [row.prompt for row in kept] != prompts or any(row.replies.keys() != ks for row in kept):
            kept = list(self._generate_samples(prompts, strength))  # anew: the prompts, or the budget and so k, changed
            write_jsonl(path, map(asdict, kept))
        return [Sample(row.prompt, {float(k): text for k, text in row.replies.items()}) for row in kept]

    def _generate_samples(self, prompts: Sequence[str], strength: StrengthRange) -> Iterator[_Replies]:
        length, ks = self.recipe.samples.max_new_tokens, strength.shown
        vector, lm = self.artifacts.difference(), self.artifacts.lm()
        with self.show("samples") as progress:
            for number, prompt in enumerate(prompts):
                progress(number, len(prompts))
                replies = generate_at_strengths(vector, lm, prompt, ks, max_new_tokens=length)
                yield _Replies(prompt, {f"{k:g}": text for k, text in zip(ks, replies, strict=True)})
            progress(len(prompts), len(prompts), "done")

    def report(self) -> Path:
        """The page and its PNG, from the artifacts of the stages before."""
        with hold(self.folder.path):
            return self._write_report()

    def _write_report(self) -> Path:
        vector = self.artifacts.difference()
        strength = vector.card.strength
        if strength is None:
            raise SteerError(f"{self.folder.path}: the sweep is not finished; run `weightsteer run` again")
        rows, plotted = read_rows(self.folder.rows), self._keys_to_plot()
        sides = task_vector(self.folder.finetune("positive")), task_vector(self.folder.finetune("negative"))
        report = Report(
            title=f"Weight steering: {self.behavior.name}",
            description=self.behavior.description,
            rows=rows,
            metrics=self.recipe.metrics,
            costs=read_rows(self.folder.costs),
            comparisons={key: compare_at_loss([self.folder.path], key, draws=200) for key in plotted},
            card=vector.card,
            strength=strength,
            norms=vector.norms(),
            geometry=facts(geometry(vector), sides),
            samples=self.samples(strength),
            command=self.command,
            behaviors=plotted,
            notes=self._notes(),
        )
        return write_report(report, self.folder)

    def _keys_to_plot(self) -> list[MetricKey]:
        """The behaviours to draw, of those that have a value for some item."""
        rows = read_rows(self.folder.rows)
        found = {(row.task, row.metric) for row in rows if row.split == "test" and row.method == BASE}
        return [key for key in map(metric_key, self.recipe.plot) if key in found]

    def _notes(self) -> list[str]:
        """What a reader has to know of how the numbers were made."""
        notes = []
        if self.folder.layer.exists():
            notes.append(self._activation_note(read_layer(self.folder)))
        if lost := unusable_verdicts(self.folder.sampled):
            notes.append(
                f"Of the answers that D+ and D- were chosen from, {lost} are on neither side: no usable verdict."
            )
        if cut := cut_answers(self.folder.sampled):
            notes.append(f"Of the answers that D+ and D- were chosen from, {cut} were cut off and are on neither side.")
        return notes

    def _activation_note(self, layer: int) -> str:
        """How the activation baseline was made, so that a smaller effort for it does not pass unseen."""
        sweep, examples = self.recipe.sweep, len(self.artifacts.sides()[0])
        used = min(sweep.activation_pairs or examples, examples)
        return (
            f"The activation vector comes from {used} of the {examples} examples a side and is added to the output of "
            f"block {layer}, chosen among one block in {sweep.layer_step} on {sweep.search_items} validation items."
        )
