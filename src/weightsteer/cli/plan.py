"""What `run --plan` prints: a table of stages, what does not fit and what to set, and the assumptions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import SteerError
from ..shown import say, say_json, say_table

if TYPE_CHECKING:
    from ..planning.numbers import Choices, Plan, StagePlan
    from ..runs.recipe import Recipe

HEADS = (
    "stage",
    "GB",
    "weights",
    "training",
    "kept",
    "cache",
    "work",
    "trained",
    "generated",
    "scored",
    "judge",
    "disk",
)


def print_plan(recipe: Recipe, device: str | None, devices: int | None, *, as_json: bool) -> None:
    """Plan a recipe on a device, by default this machine's CPU, and print it."""
    from ..planning.devices import CPU
    from ..planning.named_device import device_named
    from ..planning.plan import choices_of, plan_recipe

    found = plan_recipe(recipe, device_named(device or CPU), choices_of(recipe, devices))
    if as_json:
        say_json(found.as_json())
    else:
        _print(found)


def refuse_without_plan(**options: object) -> None:
    """Raise where an option that belongs to --plan stands without it."""
    for name, value in options.items():
        if value:
            raise SteerError(f"--{name.replace('_', '-')}: belongs to --plan; add --plan")


def _print(plan: Plan) -> None:
    number = plan.choices.devices
    where = f"{number} x {plan.device.name}" if number > 1 else plan.device.name
    say(f"{plan.recipe}: {plan.model}, {plan.parameters:,} parameters in {plan.dtype}, on {where}{_held(plan.choices)}")
    say(
        f"the device: {plan.device.memory / 1e9:.0f} GB, {plan.device.bandwidth / 1e9:,.0f} GB/s, "
        f"{plan.device.float32 / 1e12:.3g} and {plan.device.bfloat16 / 1e12:.3g} TFLOP/s in float32 and bfloat16, "
        f"used to {plan.device.utilisation:.0%} ({plan.device.source})\n"
    )
    say_table([(*HEADS, "time"), *(_row(stage) for stage in plan.stages), _sum(plan)])
    say("\nGB is the peak on one device with what the process itself takes; kept: activations for the backward pass.")
    say("Generated tokens, and with them judge calls, are at most so many; the judge's time is not counted.")
    for note in plan.notes:
        say(f"assumed: {note}")
    _print_misfits(plan)


def _held(choices: Choices) -> str:
    said = [choices.quantize or "", "gradient checkpointing" if choices.gradient_checkpointing else ""]
    said.append(choices.shard if choices.devices > 1 else "")
    return "".join(f", {word}" for word in said if word)


def _row(stage: StagePlan) -> Sequence[str]:
    memory = stage.memory
    training = memory.trained + memory.optimizer + memory.gradients
    sizes = (memory.total, memory.weights, training, memory.activations, memory.cache + memory.sums, memory.work)
    counts = (stage.trained, stage.generated, stage.scored, stage.judged)
    mark = "" if stage.fits else " !"
    cells = [f"{size / 1e9:.1f}" if size >= 5e7 else "" for size in sizes]
    return (
        f"{stage.name}{mark}",
        *cells,
        *(_count(number) for number in counts),
        f"{stage.disk / 1e9:.2g} GB" if stage.disk else "",
        duration(stage.seconds),
    )


def _sum(plan: Plan) -> Sequence[str]:
    totals = [sum(getattr(s, name) for s in plan.stages) for name in ("trained", "generated", "scored", "judged")]
    disk = sum(stage.disk for stage in plan.stages)
    counts = [_count(total) for total in totals]
    return ("in all", f"{plan.peak / 1e9:.1f}", *[""] * 5, *counts, f"{disk / 1e9:.2g} GB", duration(plan.seconds))


def _count(number: float) -> str:
    return f"{number:,.0f}" if number else ""


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 0.5 else ""


def _print_misfits(plan: Plan) -> None:
    misfits = [stage for stage in plan.stages if not stage.fits]
    if not misfits:
        say(f"it fits: {plan.peak / 1e9:.1f} of {plan.device.memory / 1e9:.0f} GB at the peak")
        return
    for stage in misfits:
        say(f"! {stage.name}: {stage.memory.total / 1e9:.1f} GB do not fit into {plan.device.memory / 1e9:.0f} GB; set")
        for way in stage.advice:
            say(f"    {way}")
