"""The stages of `run`: pairs -> D+ and D- fine-tunes -> vector -> sweep -> k -> samples -> report.

Each stage writes its artifact into the run's folder and is passed over where that is there, so a
killed run goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

from .activations import ActivationVector, activation_vector
from .behavior import Behavior, example_rows
from .choose import Budget, recommend
from .embedded import EMBEDDED_NAME
from .errors import SteerError
from .extract import contrast_vector, task_vector
from .fan import fan
from .finetune import train_side
from .lm import LM
from .methods import Direction, Steering, SystemPrompt, best_layer
from .progress import Progress
from .recipe import Recipe, claim_run, save_json
from .records import Row, RunCard, StrengthRange, digest, read_json, read_jsonl, write_jsonl
from .report import Report, Sample, write_report
from .sweep import ROWS_FILE, run_sweep, strength_at_damage
from .tasks.task import Task
from .vector import WeightVector

STAGES = ("data", "train D+", "train D-", "vector", "activations", "strengths", "sweep", "samples", "report")


class Show(Protocol):
    """How a stage shows its progress: `with show(label) as progress`."""

    def __call__(self, label: str) -> AbstractContextManager[Progress]: ...


class Road:
    """One run of a recipe in one folder."""

    def __init__(self, recipe: Recipe, source: Path, folder: Path, *, show: Show, command: str = "") -> None:
        """Check the whole recipe before any work: data, tasks, training settings, the folder."""
        self.recipe, self.folder, self.show, self.command = recipe, folder, show, command
        self.behavior = Behavior.load(recipe.behavior)
        self.tasks = recipe.load_tasks()
        self.settings = recipe.train_settings()
        self.sides = recipe.sides()
        self.probe = self._task("prose").of_split("validation").first(recipe.sweep.probe_items)
        self._task("preference"), self._task("facts")  # choosing k needs them
        if "contrastive" not in recipe.sweep.methods:
            raise SteerError(f"recipe {recipe.name}: field 'sweep.methods': needs 'contrastive', whose k is chosen")
        self.card = claim_run(recipe, source, folder, self._inputs())

    def run(self) -> Path:
        """Go the whole road; returns the report's path."""
        self.write_data()
        self.train()
        self.vector()
        methods = self.methods()
        rows = self.sweep(methods)
        strength = self.choose(rows)
        self.samples(strength)
        return self.report()

    @cached_property
    def lm(self) -> LM:
        """The base model, loaded when a stage first needs it."""
        with self.show("load the model") as progress:
            progress(0, 1, "the embedded model is converted once" if self.recipe.model == EMBEDDED_NAME else "")
            lm = LM.load(self.recipe.model, device=self.recipe.device, dtype=self.recipe.dtype)
            progress(1, 1)
        made = self.folder / "plus"
        if made.exists() and RunCard.load(made).base_revision != lm.revision:
            raise SteerError(f"{made}: was trained on another state of {lm.name}; choose another --out")
        return lm

    def _label(self, stage: str) -> str:
        return f"[{STAGES.index(stage) + 1}/{len(STAGES)}] {stage}"

    def _task(self, name: str) -> Task:
        found = next((task for task in self.tasks if task.name == name), None)
        if found is None:
            raise SteerError(f"recipe {self.recipe.name}: field 'tasks': needs a task {name!r}")
        return found

    def _inputs(self) -> dict[str, str]:
        """Hashes of all that the recipe reads, shipped or the user's."""
        positive, negative = (digest(example_rows(side)) for side in self.sides)
        tasks = {f"task {task.name}": task.sha256 for task in self.tasks}
        return {"positive": positive, "negative": negative, "behavior": digest(asdict(self.behavior)), **tasks}

    def write_data(self) -> None:
        """D+ and D- as JSONL, as they are trained on."""
        for name, side in zip(("positive", "negative"), self.sides, strict=True):
            path = self.folder / f"{name}.jsonl"
            if not path.exists():
                write_jsonl(path, example_rows(side))

    def train(self) -> None:
        """Both fine-tunes, on one base held in memory."""
        if (self.folder / "vector").exists():
            return
        stages = (("plus", "train D+"), ("minus", "train D-"))
        for side, (name, stage) in zip(self.sides, stages, strict=True):
            with self.show(self._label(stage)) as progress:
                train_side(self.lm, side, self.folder / name, settings=self.settings, progress=progress)

    def vector(self) -> WeightVector:
        """w = tau+ - tau-, saved as an adapter."""
        path = self.folder / "vector"
        if not path.exists():
            contrast_vector(self.folder / "plus", self.folder / "minus").save(path)
        return WeightVector.load(path)

    def activations(self) -> Direction:
        """The single-layer activation baseline, its layer chosen by a scan on validation items."""
        path, scan = self.folder / "activations", self.folder / "layer.json"
        sweep = self.recipe.sweep
        if not path.exists():
            positive, negative = (side[: sweep.activation_pairs] for side in self.sides)
            with self.show(self._label("activations")) as progress:
                activation_vector(self.lm, positive, negative, progress=progress).save(path)
        vector = ActivationVector.load(path)
        if not scan.exists():
            items = self._task("preference").of_split("validation").first(sweep.probe_items)
            with self.show(f"{self._label('activations')}: layer") as progress:
                layer = best_layer(self.lm, vector, items, step=sweep.layer_step, progress=progress)
            save_json(scan, layer)
        return Direction("activation", vector.only(int(read_json(scan))))

    def methods(self) -> list[tuple[Steering, list[float]]]:
        """Every method of the recipe with its strengths."""
        methods = {name: self._method(name) for name in self.recipe.sweep.methods}
        path = self.folder / "strengths.json"
        known: dict[str, list[float]] = read_json(path) if path.exists() else {}
        with self.show(self._label("strengths")) as progress:
            for number, (name, ks) in enumerate(self.recipe.sweep.methods.items()):
                progress(number, len(self.recipe.sweep.methods), name)
                if name not in known:
                    known[name] = list(ks) if ks is not None else self._search(methods[name])
                    save_json(path, known)
            progress(len(methods), len(methods), "done")
        return [(method, known[name]) for name, method in methods.items()]

    def _method(self, name: str) -> Steering:
        match name:
            case "contrastive":
                return Direction(name, self.vector())
            case "tau+":
                return Direction(name, task_vector(self.folder / "plus"))
            case "tau-":  # k > 0 adds the behaviour, so away from tau-
                return Direction(name, -task_vector(self.folder / "minus"))
            case "activation":
                return self.activations()
        return SystemPrompt(name, self.behavior)

    def _search(self, method: Steering) -> list[float]:
        """Fractions of the k at which the recipe's damage is reached, on both sides."""
        sweep = self.recipe.sweep
        fractions = {str(name): own for name, own in sweep.fractions_of.items()}.get(method.name, sweep.fractions)
        ends = [strength_at_damage(self.lm, method, self.probe, damage=sweep.damage, sign=s) for s in (-1, 1)]
        return sorted(float(f"{end * fraction:.3g}") for end in ends for fraction in fractions)

    def sweep(self, methods: Sequence[tuple[Steering, list[float]]]) -> list[Row]:
        """All cells, then the rows."""
        with self.show(self._label("sweep")) as progress:
            return run_sweep(
                self.lm,
                methods,
                self.tasks,
                self.folder,
                validated=("contrastive",),  # whose k is chosen
                batch_size=self.recipe.batch_size,
                progress=progress,
            )

    def choose(self, rows: Sequence[Row]) -> StrengthRange:
        """The recommended k, written into the vector's card."""
        budget = self.recipe.budget
        limits = {("facts", "accuracy"): budget.accuracy, ("prose", "nll"): budget.nll}
        strength = recommend(rows, budget=Budget(limits))
        path = self.folder / "vector"
        RunCard.load(path).with_strength(strength).save(path)
        return strength

    def samples(self, strength: StrengthRange) -> list[Sample]:
        """Replies to the same prompts at five strengths."""
        path = self.folder / "samples.jsonl"
        if not path.exists():
            write_jsonl(path, list(self._sampled(strength)))
        return [
            Sample(row["prompt"], {float(k): text for k, text in row["replies"].items()})
            for row in (read_jsonl(path) if self.recipe.samples.count else [])
        ]

    def _sampled(self, strength: StrengthRange) -> Iterator[dict[str, object]]:
        wanted = self.recipe.samples
        prompts = (wanted.prompts or self.behavior.questions[::-1])[: wanted.count]
        ks, vector = strength.shown, self.vector()
        with self.show(self._label("samples")) as progress:
            for number, prompt in enumerate(prompts):
                progress(number, len(prompts))
                replies = fan(vector, self.lm, prompt, ks, max_new_tokens=wanted.max_new_tokens)
                yield {"prompt": prompt, "replies": {f"{k:g}": text for k, text in zip(ks, replies, strict=True)}}
            progress(len(prompts), len(prompts), "done")

    def report(self) -> Path:
        """The page and its PNG, from the artifacts of the stages before."""
        vector = self.vector()
        strength = vector.card.strength
        if strength is None:
            raise SteerError(f"{self.folder}: the sweep is not finished; run `weightsteer run` again")
        rows = [Row(**row) for row in read_jsonl(self.folder / ROWS_FILE)]
        layer = self.folder / "layer.json"
        notes = [self._activation_note(int(read_json(layer)))] if layer.exists() else []
        report = Report(
            title=f"Weight steering: {self.behavior.name}",
            description=self.behavior.description,
            rows=rows,
            card=replace(vector.card, strength=strength),
            strength=strength,
            norms=vector.norms(),
            samples=self.samples(strength),
            command=self.command,
            notes=notes,
        )
        return write_report(report, self.folder)

    def _activation_note(self, layer: int) -> str:
        """How the activation baseline was made, so that a smaller effort for it does not pass unseen."""
        sweep, examples = self.recipe.sweep, len(self.sides[0])
        used = min(sweep.activation_pairs or examples, examples)
        return (
            f"The activation vector comes from {used} of the {examples} examples a side and is added to the output of "
            f"block {layer}, chosen among every {sweep.layer_step}. block on {sweep.probe_items} validation items."
        )
