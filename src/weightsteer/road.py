"""The stages of `run`: D+ and D- -> fine-tunes -> vectors -> sweep -> k -> costs -> samples -> report.

Each stage writes its artifact into the run's folder and is passed over where that is there, so a
killed run goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .behavior import Behavior, example_rows
from .cells import BASE, CELLS_FILE, cell_from
from .choose import Budget, recommend
from .contrast import unusable_verdicts
from .cost import COSTS_FILE, measure_costs
from .endpoint import Endpoint
from .errors import SteerError
from .extract import task_vector
from .fan import fan
from .geometry import facts, geometry
from .lineup import SIDES, Lineup
from .matched import matched
from .methods import Steering
from .precheck import refuse_what_cannot_run
from .recipe import Recipe, claim_run, metric_key
from .records import Row, RunCard, StrengthRange, digest, locked, read_finished, read_json, read_jsonl, write_jsonl
from .report import Report, Sample, write_report
from .sweep import ROWS_FILE, run_sweep
from .tasks.task import Task
from .vector import WeightVector
from .workshop import CONTRAST_FOLDER, Show, Workshop


class Road:
    """One run of a recipe in one folder."""

    def __init__(self, recipe: Recipe, folder: Path, *, show: Show, command: str = "") -> None:
        """Check the whole recipe before any work: data, tasks, training settings, the folder."""
        self.recipe, self.folder, self.show, self.command = recipe, folder, show, command
        self.behavior = Behavior.load(recipe.behavior)
        self.shop = Workshop(recipe, folder, self.behavior, show)
        self.tasks = recipe.load_tasks(self.shop.reader)
        self.probe = self._task("prose").of_split("validation").first(recipe.sweep.probe_items)
        refuse_what_cannot_run(recipe, self.behavior, {task.name: task for task in self.tasks})
        self.card = claim_run(recipe, folder, self._inputs())
        self.lineup = Lineup(self.shop, self.behavior, {task.name: task for task in self.tasks})

    def run(self) -> Path:
        """Go the whole road; returns the report's path."""
        with locked(self.folder):
            self._try_judge()
            self.base()
            self.write_data()
            self.vector()
            methods = self.methods()
            rows = self.sweep(methods)
            strength = self.choose(rows)
            self.costs(methods)
            self.samples(strength)
            return self.report()

    def measure_again(self) -> list[Row]:
        """The sweep of a run that is trained, and the choice of k."""
        with locked(self.folder):
            self.base()
            rows = self.sweep(self.methods())
            self.choose(rows)
            return rows

    def _task(self, name: str) -> Task:
        found = next((task for task in self.tasks if task.name == name), None)
        if found is None:
            raise SteerError(f"recipe {self.recipe.name}: field 'tasks': needs a task {name!r}")
        return found

    def _try_judge(self) -> None:
        """Ask a served judge once, so that one that is down is found before the work."""
        if isinstance(self.shop.reader, Endpoint):
            self.shop.reader.ask(["Answer with the number 1."])

    def base(self) -> None:
        """The unsteered model's cells, which every recipe needs; the metrics that the recipe names must be in them."""
        with self.show("base") as progress:
            batch = self.recipe.batch_size
            run_sweep(self.shop.lm, [], self.tasks, self.folder, batch_size=batch, progress=progress)
        cells = {
            cell.task: cell for cell in map(cell_from, read_jsonl(self.folder / CELLS_FILE)) if cell.method == BASE
        }
        for text in (self.recipe.sweep.behavior, *self.recipe.budget, *self.recipe.plot):
            task, metric = metric_key(text)
            if metric not in cells[task].values:
                known = ", ".join(cells[task].values)
                raise SteerError(f"recipe {self.recipe.name}: {text}: task {task!r} has no such metric; it has {known}")

    def _inputs(self) -> dict[str, str]:
        """Hashes of all that the recipe reads, shipped or the user's."""
        found = {f"task {task.name}": task.sha256 for task in self.tasks}
        sides = self.recipe.sides()
        if sides is not None:
            found |= {
                name: digest(example_rows(side)) for name, side in zip(("positive", "negative"), sides, strict=True)
            }
        for name, tune in (("start", self.recipe.start), ("drift", self.recipe.drift)):
            if tune is not None:
                found[name] = digest(example_rows(self.recipe.tune_examples(tune)))
        return {**found, "behavior": digest(asdict(self.behavior))}

    def write_data(self) -> None:
        """D+ and D- as JSONL, as they are trained on."""
        for name, side in zip(("positive", "negative"), self.shop.sides, strict=True):
            path = self.folder / f"{name}.jsonl"
            if not path.exists():
                write_jsonl(path, example_rows(side))

    def vector(self) -> WeightVector:
        """w = tau+ - tau-."""
        return self.lineup.vector()

    def methods(self) -> list[tuple[Steering, list[float]]]:
        """Every method of the recipe with its strengths; trains what they need."""
        self.shop.lm  # noqa: B018  the drift, which some of them change
        return self.lineup.all(self.probe)

    def sweep(self, methods: Sequence[tuple[Steering, list[float]]]) -> list[Row]:
        """All cells, then the rows."""
        with self.show("sweep") as progress:
            return run_sweep(
                self.shop.lm,
                methods,
                self.tasks,
                self.folder,
                validated=("contrastive",),  # whose k is chosen
                items_of=self.recipe.sweep.items_of,
                batch_size=self.recipe.batch_size,
                progress=progress,
            )

    def choose(self, rows: Sequence[Row]) -> StrengthRange:
        """The recommended k, written into the vector's card."""
        limits = {metric_key(text): limit for text, limit in self.recipe.budget.items()}
        strength = recommend(rows, behavior=metric_key(self.recipe.sweep.behavior), budget=Budget(limits))
        path = self.folder / "vector"
        RunCard.load(path).with_strength(strength).save(path)
        return strength

    def costs(self, methods: Sequence[tuple[Steering, list[float]]]) -> list[Row]:
        """What each method costs to make and to use."""
        with self.show("costs") as progress:
            return measure_costs(self.shop.lm, methods, self.lineup.trainings, self.folder, progress=progress)

    def samples(self, strength: StrengthRange) -> list[Sample]:
        """Replies to the same prompts at five strengths."""
        path, wanted = self.folder / "samples.jsonl", self.recipe.samples
        prompts = list((wanted.prompts or self.behavior.questions[::-1])[: wanted.count])
        if not prompts:
            return []
        ks = {f"{k:g}" for k in strength.shown}
        kept = read_finished(path)
        if [row["prompt"] for row in kept] != prompts or any(row["replies"].keys() != ks for row in kept):
            kept = list(self._sampled(prompts, strength))  # anew: the prompts, or the budget and so k, have changed
            write_jsonl(path, kept)
        return [Sample(row["prompt"], {float(k): text for k, text in row["replies"].items()}) for row in kept]

    def _sampled(self, prompts: Sequence[str], strength: StrengthRange) -> Iterator[dict[str, Any]]:
        wanted, ks, vector = self.recipe.samples, strength.shown, self.vector()
        with self.show("samples") as progress:
            for number, prompt in enumerate(prompts):
                progress(number, len(prompts))
                replies = fan(vector, self.shop.lm, prompt, ks, max_new_tokens=wanted.max_new_tokens)
                yield {"prompt": prompt, "replies": {f"{k:g}": text for k, text in zip(ks, replies, strict=True)}}
            progress(len(prompts), len(prompts), "done")

    def report(self) -> Path:
        """The page and its PNG, from the artifacts of the stages before."""
        vector = self.vector()
        strength = vector.card.strength
        if strength is None:
            raise SteerError(f"{self.folder}: the sweep is not finished; run `weightsteer run` again")
        rows, costs = ([Row(**row) for row in read_jsonl(self.folder / name)] for name in (ROWS_FILE, COSTS_FILE))
        layer = self.folder / "layer.json"
        notes = [self._activation_note(int(read_json(layer)))] if layer.exists() else []
        if lost := unusable_verdicts(self.folder / CONTRAST_FOLDER):
            notes.append(
                f"Of the answers that D+ and D- were chosen from, {lost} are on neither side: no usable verdict."
            )
        plus, minus = (self.folder / side for side in SIDES)
        report = Report(
            title=f"Weight steering: {self.behavior.name}",
            description=self.behavior.description,
            rows=rows,
            costs=costs,
            matched={key: matched([self.folder], key, draws=200) for key in self._plotted()},
            card=replace(vector.card, strength=strength),
            strength=strength,
            norms=vector.norms(),
            geometry=facts(geometry(vector), (task_vector(plus), task_vector(minus))),
            samples=self.samples(strength),
            command=self.command,
            behaviors=self._plotted(),
            notes=notes,
        )
        return write_report(report, self.folder)

    def _plotted(self) -> list[tuple[str, str]]:
        """The behaviours to draw, of those that have a value for some item."""
        rows = [Row(**row) for row in read_jsonl(self.folder / ROWS_FILE)]
        found = {(row.task, row.metric) for row in rows if row.split == "test" and row.method == BASE}
        return [key for key in map(metric_key, self.recipe.plot) if key in found]

    def _activation_note(self, layer: int) -> str:
        """How the activation baseline was made, so that a smaller effort for it does not pass unseen."""
        sweep, examples = self.recipe.sweep, len(self.shop.sides[0])
        used = min(sweep.activation_pairs or examples, examples)
        return (
            f"The activation vector comes from {used} of the {examples} examples a side and is added to the output of "
            f"block {layer}, chosen among every {sweep.layer_step}. block on {sweep.probe_items} validation items."
        )
