"""A recipe -> its stages in their order, each with its passes and tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from ..behavior import SIDES, Behavior
from ..data_building.sampling import asked_questions
from ..errors import SteerError
from ..evaluation import cost
from ..evaluation.metrics import metric_key
from ..evaluation.task_spec import TaskSpec
from ..evaluation.tasks import load_task
from ..evaluation.tasks.task import Task
from ..fitting import ON_CPU
from ..lm import LM
from ..model_parts import width_of
from ..runs.own_data import OWN, behavior_of, held_out_pairs
from ..runs.recipe import Recipe
from ..runs.recipe_fields import FinetuneRecipe
from ..runs.trainings import DENSE, train_fields, trainings_of
from ..steering.method import Training as TrainingName
from ..steering.methods import METHODS, SHARES, TWO_WAY
from ..steering.several_k import TOGETHER
from ..training.defaults import resolve
from ..training.settings import RESOURCES, TrainSettings
from .assumed import (
    behavior_or_stand_in,
    is_here,
    task_or_stand_in,
)
from .counting import CountingJudge, CountingModel, Work, harness_work
from .passes import Reading
from .rows import PlannedRows
from .trainings import Training, encoded, plan_training
from .weighted import activation_work, coefficient_work, longer_rows

TRIES = 6  # of the search for k, at most, after the base's own loss
BATCH = 8  # of the sampling, the searches and the activations


@dataclass
class Stage:
    """One stage of a run."""

    name: str
    work: Work = field(default_factory=Work)
    training: Training | None = None
    checkpointing: bool = False  # its training computes activations again
    float32: bool = False  # a copy of the base in float32 is what is trained
    models: int = 1  # models in memory, this one counted: the base, and the fine-tune of it that is repaired
    sums: bool = False  # the activations of every block are summed
    adapters: int = 0  # that it leaves on the disk, each of the rank of one training; a vector of two sides is two
    saved: TrainSettings | None = None  # how they were trained, where not by the stage's own training
    checkpoints: int = 0  # whole models that it leaves


class Stages:
    """The stages of one recipe, counted with the model's tokenizer."""

    def __init__(self, recipe: Recipe, lm: LM, judge: LM | None, *, checkpointing: bool, notes: list[str]) -> None:
        self.recipe, self.lm, self.checkpointing, self.notes = recipe, lm, checkpointing, notes
        self.judge = CountingJudge(CountingModel(judge) if judge else None)
        self.behavior = self._behavior()
        self.models = 2 if recipe.repair_target else 1
        self._tasks = self._load_tasks()
        self._costs: dict[tuple[str, tuple[int, ...]], Work] = {}
        self.rows = PlannedRows(recipe, lm, self.behavior, notes)

    def all(self) -> Iterator[Stage]:
        """Every stage, in the order in which a run goes through them."""
        recipe, methods = self.recipe, self.recipe.sweep.methods
        yield Stage("load the model")
        for name, wanted in (("first fine-tune", recipe.first_finetune), ("repair target", recipe.repair_target)):
            if wanted:
                yield self._finetune(name, wanted)
        if recipe.data.sampling:
            yield self._sampling()
        for training in trainings_of(recipe):
            yield from self._trainings(training)
        for copies in sorted({abs(round(k)) for k in methods.get("joint training") or ()}):
            assert recipe.repair_target is not None
            yield self._finetune(f"joint training, {copies} copies", recipe.repair_target, copies)
        layers = [name for name in methods if METHODS[name].scans_layers]
        if layers or "activation all layers" in methods:
            yield self._activations()
        if layers:
            yield self._layer_scan()
        yield from self._learned()
        if search := self._search():
            yield search
        yield from self._sweep()
        if self._samples_count():
            yield self._samples()
        yield self._costs_stage()

    # Trainings

    def _finetune(self, name: str, wanted: FinetuneRecipe, copies: int = 0) -> Stage:
        examples, stand_ins = self.rows.examples(wanted)
        settings = self.recipe.train_settings(_plain(wanted.train))
        rows = encoded(self.lm, examples, settings, stand_ins=stand_ins)
        if copies:
            desired = self.rows.sides()[SIDES.index(getattr(wanted, "desired_side", "positive"))]
            rows = [*rows, *desired[: getattr(wanted, "desired_examples", None)] * copies]
        again = self.checkpointing or bool(wanted.train.get("gradient_checkpointing"))
        made = plan_training(self.lm, rows, settings, examples=len(rows), checkpointing=again)
        left, models = (0, 2) if copies else (1, 1)
        kept = settings.finetunes
        return Stage(name, made.work, made, checkpointing=again, adapters=kept, checkpoints=left, models=models)

    def _trainings(self, training: TrainingName) -> Iterator[Stage]:
        """Both sides of a training, or the one adapter of a two-way training."""
        fields = train_fields(self.recipe, training)
        settings = self.recipe.train_settings(_plain(fields))
        again, two_way = self.checkpointing or bool(fields.get("gradient_checkpointing")), training in TWO_WAY
        own, name = self.rows.of(training, settings), "" if training == "lora" else f"{training} "
        named = {name.strip(): longer_rows(*own)} if two_way else dict(zip(SIDES, own, strict=True))
        for side, rows in named.items():
            made = plan_training(
                self.lm,
                rows,
                settings,
                examples=len(rows),
                preferences=training == "DPO",
                two_way=two_way,
                checkpointing=again,
            )
            yield Stage(
                f"train {side}" if two_way else f"train {name}{side}",
                made.work,
                made,
                float32=training in DENSE,
                checkpointing=again,
                # the side's own, which its vector holds once more
                adapters=0 if training == "full" else 2 * settings.finetunes + settings.snapshots,
                checkpoints=1 if training == "full" else 0,
            )

    def _learned(self) -> Iterator[Stage]:
        """Coefficients, and an activation, that are learned on pairs."""
        methods, recipe = self.recipe.sweep.methods, self.recipe
        named = [name for name in ("learned dial", "random dial", "activation trained") if name in methods]
        if named and not self.rows.has_pairs:
            self.notes.append(f"{', '.join(named)}: what is learned on pairs is not counted, since they are not here")
            return
        for name in named:
            if name == "activation trained":
                pairs, given = self.rows.pairs(), recipe.train_settings(_plain(recipe.train))
                settings = resolve(given, examples=len(pairs), width=width_of(self.lm.model))
                yield Stage("train an activation", activation_work(self.lm, pairs, settings))
            else:
                work = coefficient_work(self.lm, *self.rows.dial_pairs(), recipe.dial)
                saved = recipe.train_settings(_plain(recipe.train))
                yield Stage(f"coefficients of the {name}", work, adapters=2 * saved.finetunes, saved=saved)

    # Data that the model writes, and what is summed and searched

    def _sampling(self) -> Stage:
        sampling = self.recipe.data.sampling
        assert sampling is not None
        model, questions = CountingModel(self.lm), asked_questions(self.behavior, sampling.questions)
        prompts = (*self.behavior.positive_prompts, *self.behavior.negative_prompts)
        for text in prompts:
            once = CountingModel(self.lm.with_system_prompt(text))
            once.replies(questions, max_new_tokens=sampling.max_new_tokens, batch_size=ON_CPU)
            model.work.add(once.work, sampling.samples)
        answers = len(questions) * len(prompts) * sampling.samples
        if self.recipe.judge and not sampling.likelihood:
            model.work.judged += answers
        return Stage("sample answers", model.work)

    def _activations(self) -> Stage:
        stage, limit = Stage("activations", sums=True), self.recipe.sweep.activation_pairs
        for rows in self.rows.sides():
            lengths = sorted((len(row["input_ids"]) for row in rows[:limit]), reverse=True)
            for start in range(0, len(lengths), BATCH):
                stage.work.make(Reading(len(lengths[start : start + BATCH]), lengths[start]))
        return stage

    def _layer_scan(self) -> Stage:
        sweep = self.recipe.sweep
        blocks = len(self.lm.blocks)
        layers = len(range(sweep.layer_step // 2, blocks, sweep.layer_step))
        stage = Stage("layer of the activations", models=self.models)
        task = next((t for t in self._tasks if t[0] == metric_key(sweep.behavior)[0]), None)
        if task is not None and task[1] is not None:
            few = task[1].of_split("validation").first(sweep.search_items)
            stage.work.add(self._work_of(task[0], few, BATCH), 2 * layers)
        return stage

    def _search(self) -> Stage | None:
        sweep = self.recipe.sweep
        texts = next((task for name, task, _ in self._tasks if name == "prose" and task), None)
        searched = [n for n in (*sweep.variants, *sweep.methods) if self._is_searched(n)]
        if not searched or texts is None:
            return None
        few = texts.of_split("validation").first(sweep.search_items)
        stage = Stage(f"search for k of {len(searched)} methods", models=self.models)
        for name in searched:
            work = self._work_of("prose", few, BATCH)
            stage.work.add(work, len(sweep.sides))
            stage.work.add(work, TRIES * len(sweep.sides), rank=self._rank(name))
        return stage

    def _is_searched(self, name: str) -> bool:
        return self.recipe.sweep.methods.get(name) is None and name not in ("fine-tuned", "DPO")

    # Measurements

    def _sweep(self) -> Iterator[Stage]:
        base = Stage("measure the base", models=self.models)
        rows = self.recipe.batch_size or ON_CPU  # where the recipe leaves it open, an accelerator takes what fits
        for name, task, factor in self._tasks:
            base.work.add(self._work_of(name, task, rows), factor)
        yield base
        for method, ks in self._strengths().items():
            stage = Stage(f"measure {method} at {ks} k", models=self.models)
            for name, task, factor in self._tasks:
                part = self._part(method, task)
                if part is not None or task is None:
                    work = self._work_of(name, part, rows)
                    stage.work.add(work, factor * ks, rank=self._rank(method))
            yield stage

    def _part(self, method: str, task: Task | None) -> Task | None:
        """The items that a method is measured on: see `planned_cells`."""
        if task is None:
            return None
        if method != "contrastive":
            if "test" not in task.splits:
                return None
            task = task.of_split("test")
        count = self.recipe.sweep.items_of.get(method)
        return task.first(count) if count else task

    def _strengths(self) -> Mapping[str, int]:
        """At how many k other than 0 each variant and method is measured."""
        sweep, found = self.recipe.sweep, {}
        for name in (*sweep.variants, *sweep.methods):
            listed = sweep.methods.get(name)
            if listed is not None:
                found[name] = len({k for k in listed if k})
            elif name in ("fine-tuned", "DPO"):
                found[name] = 2 * len(SHARES)
            else:
                found[name] = len(sweep.sides) * len(sweep.fractions_of.get(name, sweep.fractions))
        return found

    def _work_of(self, name: str, task: Task | None, batch_size: int) -> Work:
        """What a task asks, judges included; one of the harness, whose data are elsewhere, by its known sizes."""
        key = (
            name,
            tuple(task.ids) if task else (),
        )
        if key not in self._costs:
            if task is None:
                spec = next(task for task in self.recipe.tasks if task.shown_name == name)
                self._costs[key] = harness_work(spec, batch_size)
            else:
                model, before = CountingModel(self.lm), self.judge.calls
                with suppress(SteerError):  # what it finds in the replies is nothing
                    task.measure(model, batch_size=batch_size)
                model.work.judged = self.judge.calls - before
                self._costs[key] = model.work
        return self._costs[key]

    def _load_tasks(self) -> list[tuple[str, Task | None, float]]:
        """Each task's name, its items or None for those of the harness, and how often its work counts."""
        found: list[tuple[str, Task | None, float]] = []
        held = tuple(held_out_pairs(self.recipe)) if all(map(is_here, _names(self.recipe))) else ()
        for fields in self.recipe.tasks:
            name = fields.shown_name
            if fields.task == "harness":
                self.notes.append(f"task {name}: documents of the harness are counted by known or assumed sizes")
                found.append((name, None, 1.0))
                continue
            standing, wanted = task_or_stand_in(fields, self.notes)
            own = None if held or self.recipe.behavior == OWN else self.recipe.behavior
            about = standing.behavior or (own if own and is_here(own) else self._shipped_behavior())
            spec = TaskSpec(**vars(standing), judge=self.judge if self.recipe.judge else None, held_out=held)
            task = load_task(replace(spec, behavior=None if held else about))
            found.append((name, task, wanted / len(task.ids) if standing.data != fields.data else 1.0))
        return found

    def _shipped_behavior(self) -> str:
        from ..behavior import SHIPPED

        return SHIPPED[0]

    def _behavior(self) -> Behavior:
        if self.recipe.behavior == OWN:
            return behavior_of(self.recipe)
        return behavior_or_stand_in(self.recipe.behavior, self.notes)

    def _rank(self, method: str) -> int:
        """The rank of the product that steers; 0 where none is added to the layers."""
        if method in ("system prompt", "bias-only", "full") or method.startswith("activation"):
            return 0
        training = METHODS[method].training if method in METHODS else "lora"
        settings = self.recipe.train_settings(_plain(train_fields(self.recipe, training)))
        rank = settings.rank * settings.finetunes
        one = ("tau+", "tau-", "fine-tuned", "negated task vector", "DPO")
        return rank if method in one or training in TWO_WAY else 2 * rank

    def _samples_count(self) -> int:
        wanted = self.recipe.samples
        return len((wanted.prompts or self.behavior.questions[::-1])[: wanted.count])

    def _samples(self) -> Stage:
        wanted, model = self.recipe.samples, CountingModel(self.lm)
        prompts = list((wanted.prompts or self.behavior.questions[::-1])[: wanted.count])
        ks = 1 + self._strengths()["contrastive"]
        rows = [prompt for prompt in prompts for _ in range(ks)]
        model.replies(rows, max_new_tokens=wanted.max_new_tokens, batch_size=TOGETHER)
        stage = Stage(f"samples at {ks} k", models=self.models)
        stage.work.add(model.work, rank=self._rank("contrastive"))
        return stage

    def _costs_stage(self) -> Stage:
        stage = Stage("costs", models=self.models)
        width = len(self.lm.chat_ids(cost.PROMPT))
        for method in self._strengths():
            for rank in (0, self._rank(method)):
                stage.work.make(Reading(cost.BATCH, width, 0, cost.BATCH, rank, cached=True), cost.TRIALS)
                step = Reading(cost.BATCH, 1, width + cost.NEW_TOKENS, cost.BATCH, rank)
                stage.work.make(step, cost.TRIALS * (cost.NEW_TOKENS - 1))
            stage.work.generated += 2 * cost.TRIALS * cost.BATCH * cost.NEW_TOKENS
        return stage


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A training's fields without those that change no token: these are in the plan's `Choices`."""
    return {name: value for name, value in fields.items() if name not in RESOURCES}


def _names(recipe: Recipe) -> Sequence[str]:
    """The recipe's own files of pairs."""
    data = recipe.data
    return [name for name in (data.pairs, data.positive, data.negative) if name]
