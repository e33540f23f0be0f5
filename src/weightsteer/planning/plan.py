"""A recipe on a device -> what each stage takes: memory by parts, tokens, calls, disk, time; whether it fits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..checkpoints.adapted import tokenizer_folder
from ..checkpoints.embedded_model import EMBEDDED_NAME
from ..checkpoints.load_model import load_tokenizer
from ..errors import SteerError
from ..lm import LM
from ..runs.recipe import Recipe
from ..runs.validate import check_alone, check_names
from .devices import Device
from .numbers import Choices, Memory, Plan, StagePlan
from .passes import ADAM_BYTES, STEP_TRAFFIC, Passes, Reading, Step
from .shaped_model import ShapedModel
from .stages import Stage, Stages

FLOAT = 4  # bytes
SUM = 8  # bytes of a sum in float64


def choices_of(recipe: Recipe, devices: int | None = None) -> Choices:
    """How a recipe itself holds its model.

    Args:
        devices: how many there are; several shard the trainings by FSDP where the recipe says nothing.
    """
    train = recipe.train
    number = devices or int(train.get("processes", 1))
    return Choices(
        quantize=recipe.loading.quantize,
        gradient_checkpointing=bool(train.get("gradient_checkpointing", False)),
        devices=number,
        shard=train.get("shard", "fsdp" if devices else "ddp"),
    )


def plan_recipe(recipe: Recipe, device: Device, choices: Choices | None = None) -> Plan:
    """Plan a run without loading weights.

    Raises:
        SteerError: the model's config cannot be had, its passes cannot be computed without weights, or the recipe's
            trainings have settings that do not go together.
    """
    check_alone(recipe)
    check_names(recipe)
    notes: list[str] = []
    planner = planner_of(recipe, device, choices or Choices(), notes)
    model = planner.model
    lm = planner.lm(recipe)
    judge = None
    if recipe.judge and not recipe.judge.url:
        other = ShapedModel.of(recipe.judge.model, recipe.dtype)
        planner.judge = planner.passes_of(other, _tokenizer_of(recipe.judge.model, notes))
        judge = LM.wrap(other.whole, planner.judge.tokenizer, name=recipe.judge.model)
    checkpointing = planner.choices.gradient_checkpointing
    stages = Stages(recipe, lm, judge, checkpointing=checkpointing, notes=notes)
    planned = tuple(planner.plan(stage) for stage in stages.all())
    if stages.judge.local is not None:
        planned += (planner.judging(stages.judge.local),)
    dtype = str(model.dtype).removeprefix("torch.")
    return Plan(
        recipe.name,
        recipe.model,
        model.parameters,
        dtype,
        device,
        planner.choices,
        planned,
        tuple(dict.fromkeys(notes)),
    )


def planner_of(recipe: Recipe, device: Device, choices: Choices, notes: list[str]) -> Planner:
    """The planner of a recipe's model; what it has to assume goes into `notes`."""
    model = ShapedModel.of(recipe.model, recipe.dtype)
    tokenizer, stands_in = _tokenizer_of(recipe.model, notes)
    return Planner(model, tokenizer, device, choices, stands_in=stands_in)


def _tokenizer_of(name: str, notes: list[str]) -> tuple[Any, bool]:
    """The model's tokenizer, or the embedded model's where it cannot be had; and whether it is that."""
    try:
        return load_tokenizer(name, tokenizer_folder(name), trust_remote_code=False), False
    except SteerError:
        notes.append(f"{name}: its tokenizer is not here; tokens are those of {EMBEDDED_NAME}")
        return load_tokenizer(EMBEDDED_NAME, tokenizer_folder(EMBEDDED_NAME), trust_remote_code=False), True


@dataclass(eq=False)
class Planner:
    """Plans stages of one model on one kind of device."""

    model: ShapedModel
    tokenizer: Any
    device: Device
    choices: Choices
    judge: Passes | None = None
    stands_in: bool = False  # whether the tokenizer is the embedded model's, whose template has no such variables
    _passes: dict[torch.dtype, Passes] = field(default_factory=dict)

    def lm(self, recipe: Recipe) -> LM:
        """The model as its tokenizer and sizes are asked for."""
        variables, model = {} if self.stands_in else recipe.chat_template_kwargs, self.model
        if len(self.tokenizer) > model.config.get_text_config().vocab_size:  # one that stands in
            model = model.with_vocabulary(len(self.tokenizer))
        return LM.wrap(model.whole, self.tokenizer, name=self.model.name, chat_template_kwargs=variables)

    def passes_of(self, model: ShapedModel, tokenizer: Any) -> Passes:
        """A model's passes on the device."""
        return Passes(model, tokenizer, self.device)

    def passes(self, stage: Stage) -> Passes:
        """The passes of the model that the stage runs."""
        dtype = torch.float32 if stage.float32 else self.model.dtype
        if dtype not in self._passes:
            self._passes[dtype] = self.passes_of(self.model.in_dtype(dtype), self.tokenizer)
        return self._passes[dtype]

    def plan(self, stage: Stage) -> StagePlan:
        """One stage, and what to set where it does not fit."""
        memory = self.memory(stage, self._choices_for(stage))
        fits = memory.total <= self.device.whole_memory
        work = stage.work
        return StagePlan(
            stage.name,
            memory,
            self.seconds(stage),
            work.trained,
            work.generated,
            work.scored,
            work.judged,
            self.disk(stage),
            fits,
            () if fits else tuple(self.advice(stage)),
        )

    def _choices_for(self, stage: Stage) -> Choices:
        """The run's choices, with what the stage's own training sets."""
        return replace(self.choices, gradient_checkpointing=True) if stage.checkpointing else self.choices

    def judging(self, asked: Any) -> StagePlan:
        """What a judge in memory writes, over the whole run."""
        assert self.judge is not None
        work = asked.work
        seconds = sum(self.judge.seconds(made) * times for made, times in work.passes.items() if times)
        return StagePlan(
            "a local judge's verdicts",
            Memory(weights=self.judge.model.weight_bytes()),
            seconds,
            0,
            work.generated,
            0,
            0,
            0,
            True,
        )

    def memory(self, stage: Stage, choices: Choices) -> Memory:
        """The peak of a stage, from its largest passes."""
        held = self._held(stage, choices)
        largest = [self._memory_of(made, stage, choices, held) for made in _largest(stage, choices)]
        return max(largest, key=lambda memory: memory.total, default=self._spread(held, stage, choices))

    def _held(self, stage: Stage, choices: Choices) -> Memory:
        """What lies in memory whatever the pass: the models, what is trained, the optimizer."""
        weights = self.model.weight_bytes(choices.quantize) * stage.models
        if self.judge is not None:
            weights += self.judge.model.weight_bytes()
        held = Memory(self.device.reserved, weights)
        if stage.sums:
            held = replace(held, sums=float(self.model.blocks * self._width * SUM))
        if stage.training is None:
            return held
        settings, passes = stage.training.settings, self.passes(stage)
        if stage.float32 and passes.model.dtype != self.model.dtype:
            held = replace(held, weights=weights + passes.model.weight_bytes())
        if settings.kind == "full" and self.device.name == "cpu":  # the weights to go back to lie there
            held = replace(held, weights=held.weights + passes.model.weight_bytes())
        count = passes.trained_parameters(settings.kind, settings.rank)
        trained = 0.0 if settings.kind == "full" else count * float(FLOAT)
        return replace(held, trained=trained, optimizer=count * float(ADAM_BYTES), gradients=count * float(FLOAT))

    @property
    def _width(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)

    def _memory_of(self, made: Reading | Step, stage: Stage, choices: Choices, held: Memory) -> Memory:
        cost = self.passes(stage).cost(made)
        work = cost.trace.peak - cost.cache
        if choices.quantize:
            work += self.model.largest_layer * self.model.dtype.itemsize
        if isinstance(made, Reading):
            found = replace(held, cache=cost.cache, work=work)
        else:
            kept = cost.trace.kept
            found = replace(held, activations=kept, work=max(0.0, work - kept - held.gradients))
        return self._spread(found, stage, choices)

    def _spread(self, memory: Memory, stage: Stage, choices: Choices) -> Memory:
        """The part of one device, where several hold a model together."""
        number = choices.devices
        if number == 1 or (stage.training is not None and choices.shard == "ddp"):
            return memory
        if stage.training is None:
            cards = self.cards(memory)
            return replace(memory, weights=memory.weights / cards, cache=memory.cache / cards)
        gathered = 2 * self.model.weight_bytes(choices.quantize) / self.model.blocks  # the block, and the next one
        parts = {name: getattr(memory, name) / number for name in ("weights", "trained", "optimizer", "gradients")}
        return replace(memory, **parts, work=memory.work + gathered)

    def cards(self, memory: Memory) -> int:
        """On how many devices one model is spread for measuring."""
        room = self.device.whole_memory - memory.process - memory.work
        wanted = memory.weights + memory.cache + memory.sums
        return min(self.choices.devices, max(1, math.ceil(wanted / room))) if room > 0 else self.choices.devices

    def seconds(self, stage: Stage) -> float:
        """The time of all passes of a stage, and of the optimizer's steps; devices share the rows and the cells."""
        passes, number = self.passes(stage), self.choices.devices
        found = sum(passes.seconds(made) * times for made, times in stage.work.passes.items() if times)
        if stage.training is None:
            return found / max(1, number // self.cards(self.memory(stage, self.choices)))
        settings = stage.training.settings
        count = passes.trained_parameters(settings.kind, settings.rank)
        found += stage.training.steps * count * STEP_TRAFFIC / self.device.bandwidth
        found /= min(number, settings.batch_size)
        if number > 1 and self.choices.shard == "fsdp":
            moved = self._gathered(stage, number)
            return max(found, moved / self.device.link) if self.device.link else found
        return found

    def _gathered(self, stage: Stage, number: int) -> float:
        """Bytes that come to a device over the links: all weights, in each forward and in each backward pass."""
        weights = self.passes(stage).model.weight_bytes(self.choices.quantize)
        steps = sum(times for made, times in stage.work.passes.items() if isinstance(made, Step))
        reads = sum(times for made, times in stage.work.passes.items() if isinstance(made, Reading))
        again = 3 if self._choices_for(stage).gradient_checkpointing else 2
        return (again * steps + reads) * weights * (number - 1) / number

    def disk(self, stage: Stage) -> float:
        """Bytes that a stage leaves; the two checkpoints of a training that runs come and go."""
        settings = stage.training.settings if stage.training else stage.saved
        if settings is None:
            return 0.0
        passes = self.passes(stage)
        count = passes.trained_parameters(settings.kind, settings.rank)
        whole = passes.model.weight_bytes() if settings.kind == "full" else self.model.weight_bytes()
        return stage.adapters * count * float(FLOAT) + stage.checkpoints * whole

    def advice(self, stage: Stage) -> list[str]:
        """What to set so that the stage fits, each with what it takes then; the mildest first."""
        found = []
        for words, choices in self._ways(stage):
            total = self.memory(stage, choices).total
            if total <= self.device.whole_memory:
                found.append(f"{words}: {total / 1e9:.1f} GB")
        if not found:
            found.append("more devices, with shard: fsdp, or a smaller model")
        return found

    def _ways(self, stage: Stage) -> Sequence[tuple[str, Choices]]:
        now = self.choices
        ways = []
        if stage.training is not None:
            again = replace(now, gradient_checkpointing=True)
            if not stage.checkpointing:
                ways.append(("train.gradient_checkpointing: true", again))
            if not stage.float32:
                ways.append(("load.quantize: nf4", replace(now, quantize="nf4")))
                ways.append(("both of these", replace(again, quantize="nf4")))
            for number in (2, 4, 8):
                if number > now.devices:
                    sharded = replace(again, devices=number, shard="fsdp")
                    ways.append((f"that, and train.processes: {number}, train.shard: fsdp", sharded))
        else:
            ways.append(("load.quantize: nf4", replace(now, quantize="nf4")))
        return ways


def _largest(stage: Stage, choices: Choices) -> list[Reading | Step]:
    """The passes among which the peak is: those of most tokens, with a backward pass if there is one, and logits."""
    steps = [made for made in stage.work.passes if isinstance(made, Step)]
    if steps:
        if choices.shard == "fsdp" or choices.devices > 1:
            steps = [
                replace(s, rows=-(-s.rows // choices.devices), answers=-(-s.answers // choices.devices)) for s in steps
            ]
        steps = [replace(step, checkpointing=choices.gradient_checkpointing) for step in steps]
        return list({max(steps, key=lambda s: s.tokens), max(steps, key=lambda s: s.answers)})
    reads = [made for made in stage.work.passes if isinstance(made, Reading)]
    if not reads:
        return []
    by = (lambda r: r.tokens, lambda r: r.rows * (r.past + r.new), lambda r: r.projected)
    return list({max(reads, key=key) for key in by})
