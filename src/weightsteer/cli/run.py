"""Verbs that run recipes, and show what came of them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..errors import SteerError
from ..files import refuse_inputs
from ..places import shareable
from ..progress import show_progress
from ..shown import markdown_text, say, say_columns, say_json
from .loading import loading, typed_options, typed_words
from .options import (
    Device,
    Dtype,
    GpusPerModel,
    Json,
    JudgeUrl,
    KeyEnv,
    Model,
    Ray,
    RemoteCode,
    TemplateVariables,
    TrustCode,
    Vector,
    drop_unset,
    judge_model,
    load_lm,
    number,
    numbers,
    pasteable,
    refuse_beside,
    refuse_without_ray,
    shown_strengths,
    vector_and_lm,
)
from .plan import print_plan, refuse_without_plan
from .yardsticks import KL, KLS, LOOPS, measured_by_all, parts_of, say_parts

if TYPE_CHECKING:
    from ..evaluation.compare import ComparisonAtLoss
    from ..evaluation.metrics import MetricKey
    from ..evaluation.results import Measurement, MetricRow
    from ..runs.pipeline import Run
    from ..runs.recipe import Recipe
    from ..runs.recipe_fields import LoadRecipe


@loading
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML), or the name of a shipped one.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Run folder; default runs/<name>.")] = None,
    seed: Annotated[int | None, typer.Option(help="Another seed; default folder runs/<name>-seed<N>.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="On a tiny random model with a handful of examples, within a minute.")
    ] = False,
    ray: Ray = None,
    gpus_per_model: GpusPerModel = None,
    trust_code: TrustCode = None,
    key_env: KeyEnv = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print memory, tokens and time of each stage; no weights are loaded.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="With --plan: h100, a100-80gb, rtx-4090 and others, or cpu, which is measured.")
    ] = None,
    devices: Annotated[int | None, typer.Option(min=1, help="With --plan: so many devices of that kind.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --plan: print JSON, for programs.")] = False,
) -> None:
    """Run a recipe from start to end: train, subtract, sweep, choose k, report.

    Kill it at any point and run it again: nothing done is done twice. With --ray, many models measure at once.

    Example: weightsteer run recipes/demo.yaml
    """
    from ..runs.recipe import Recipe
    from ..runs.shipped_recipes import find_recipe

    found = find_recipe(recipe)
    loaded = Recipe.load(found)
    name = loaded.name if seed is None else f"{loaded.name}-seed{seed}"
    loaded = loaded.model_copy(update=drop_unset(name=name, seed=seed, loading=_typed_loading(loaded)))
    if plan:
        unused = {"out": out, "dry_run": dry_run, "ray": ray, "gpus_per_model": gpus_per_model}
        refuse_beside("a plan runs nothing", **unused, trust_code=trust_code, key_env=key_env)
        print_plan(loaded, device, devices, as_json=as_json)
        return
    refuse_without_plan(device=device, devices=devices, json=as_json)
    folder = out or Path("runs") / (f"{loaded.name}-dry-run" if dry_run else loaded.name)
    refuse_run_inputs(loaded, found, folder)
    if dry_run:
        loaded = shrink(loaded, folder)
    options = [
        *typed_words(),
        *(["--out", shareable(out)] if out else []),
        *(["--seed", str(seed)] if seed is not None else []),
    ]
    command = shlex.join(["weightsteer", "run", shareable(recipe), *options, *(["--dry-run"] if dry_run else [])])
    from ..runs.pipeline import Run, Trust
    from ..training.job import without_gain

    trust = Trust(trust_code or (), [key_env] if key_env else ())
    started = Run(loaded, folder, show=show_progress, command=command, trust=trust)
    if ray is not None:
        from ..cluster.drive import drive

        page = drive(started, ray, gpus_per_model, show=show_progress, any_outcome=dry_run)
    else:
        refuse_without_ray(gpus_per_model)
        with without_gain() if dry_run else nullcontext():
            page = started.run(_show_replies)
    _print_table(started)
    say(f"report: {page}\nplot:   {started.folder.plot}\nvector: {started.folder.vector}")
    if not dry_run:
        _print_next(started)


def _typed_loading(recipe: Recipe) -> LoadRecipe | None:
    """The recipe's loading with the options that were typed in place of its own; None where none was."""
    from ..runs.recipe_fields import LoadRecipe

    typed = typed_options()
    return LoadRecipe.model_validate({**recipe.loading.model_dump(), **typed.described}) if typed else None


def _show_replies(prompt: str, replies: Mapping[float, str]) -> None:
    """What the vector does, before it is measured."""
    say(f"\n{prompt}")
    say_columns([f"k = {k:g}" for k in replies], list(replies.values()))
    say()


def _print_next(run: Run) -> None:
    """Commands to try on a finished run, as they can be pasted."""
    from ..run_card import RunCard
    from ..runs.samples import read_samples
    from ..runs.whole_way import commands_for

    vector = run.folder.vector
    prompts = [row.prompt for row in read_samples(run.folder.samples).rows] or ["Hello, who are you?"]
    strength = RunCard.load(vector).strength
    assert strength is not None  # chosen by the run
    say("try next:")
    for command in (*commands_for(vector, strength, prompts[0]), "weightsteer make formal"):
        say(f"  {pasteable(command)}")


def refuse_run_inputs(recipe: Recipe, path: Path, folder: Path) -> None:
    """A run's folder may hold its own recipe, as the run has kept it, but nothing else that the run reads."""
    from ..run_folder import RunFolder

    kept = RunFolder(folder).recipe
    own = kept.exists() and kept.samefile(path)
    refuse_inputs(folder, None if own else path, *recipe.named_files())


def shrink(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe at its smallest size, with its tiny model beside the run's folder."""
    from ..runs.dry_run import shrink_recipe
    from ..runs.tiny_model import make_tiny_model

    folder = folder.absolute()
    return shrink_recipe(recipe, make_tiny_model(recipe, folder.with_name(f"{folder.name}-model")))


def _print_table(run: Run) -> None:
    """The base and every method at its strengths, test items, as a plain table."""
    from ..evaluation.metrics import title_of
    from ..evaluation.results import read_rows
    from ..reporting.charts import main_keys
    from ..reporting.result_tables import summary_table
    from ..run_card import RunCard

    rows = [row for row in read_rows(run.folder.rows) if row.split == "test"]
    metrics = run.recipe.metrics
    keys = main_keys(rows, metrics)
    for column, key in enumerate(keys, start=1):
        say(f"({column}) {title_of(metrics, key)}")
    say(f"{'method':<14} {'k':>7} " + " ".join(f"{f'({n})':>15}" for n in range(1, len(keys) + 1)))
    for line in summary_table(rows, keys):
        say(f"{line['method']:<14} {line['k']:>7} " + " ".join(f"{cell:>15}" for cell in line["cells"]))
    strength = RunCard.load(run.folder.vector).strength
    if strength:
        say(strength.described)


def report(folder: Annotated[Path, typer.Argument(help="Folder of a finished run.")]) -> None:
    """Write a finished run's report again: report.html and its PNG, from what its folder holds.

    Example: weightsteer report runs/sycophancy-demo
    """
    recipe, command = _kept_recipe(folder)
    from ..run_folder import RunFolder
    from ..runs.run_report import write_run_report

    say(f"report: {write_run_report(recipe, RunFolder(folder), command=command)}")


def sweep(
    folder: Annotated[Path, typer.Argument(help="Folder of a run that is trained.")],
    trust_code: TrustCode = None,
    key_env: KeyEnv = None,
) -> None:
    """Measure a run's methods at their strengths and choose k; finished measurements are kept.

    Example: weightsteer sweep runs/sycophancy-demo
    """
    recipe, command = _kept_recipe(folder)
    from ..runs.pipeline import Run, Trust

    trust = Trust(trust_code or (), [key_env] if key_env else ())
    found = Run(recipe, folder, show=show_progress, command=command, trust=trust)
    if not found.folder.vector.exists():
        raise SteerError(f"{folder}: has no vector yet; run `{command}`")
    found.measure_again()
    _print_table(found)


def _kept_recipe(folder: Path) -> tuple[Recipe, str]:
    """The recipe that is kept in a run's folder, and the command that runs it again."""
    from ..run_folder import RunFolder
    from ..runs.recipe import Recipe

    kept = RunFolder(folder).recipe
    if not kept.exists():
        raise SteerError(f"{folder}: not a run's folder (no {kept.name}); make one with `weightsteer run RECIPE`")
    return Recipe.load_kept(kept), shlex.join(["weightsteer", "run", shareable(kept), "--out", shareable(folder)])


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Finished runs of one recipe, such as its seeds.")],
    behavior: Annotated[str, typer.Option(help="task/metric whose change is compared.")] = "false_beliefs/follows",
    capability: Annotated[str, typer.Option(help="task/metric whose rise is the loss increase.")] = "prose/nll",
    reference: Annotated[str, typer.Option(help="The method that the others are compared with.")] = "contrastive",
    loss_increases: Annotated[str, typer.Option(help="Loss increases, nats per token.")] = "0.05,0.1,0.2",
    kls: Annotated[str, typer.Option(help="Token KLs (95th percentile), nats, where token_kl was measured.")] = KLS,
    parts: Annotated[bool, typer.Option("--parts", help="Only the odd and even parts of each method.")] = False,
    as_json: Json = False,
) -> None:
    """Compare methods at the same loss increase, as a Markdown table; errors by bootstrap over items and runs.

    Each number is a change from the model at k = 0. Rows "more" are k above 0, rows "less" are k below 0: there a
    method works if the number is negative. Where the runs measured them, tables at equal token KL and of replies that
    loop follow, and the odd and even parts of methods that have both signs. As JSON, the first table alone.

    Example: weightsteer compare runs/syc runs/syc-seed1 runs/syc-seed2 --behavior false_beliefs/follows
    """
    from ..evaluation.compare import compare_at_loss
    from ..evaluation.metrics import metric_key
    from ..runs.recipe import refuse_other_recipes

    refuse_other_recipes(runs)
    levels = _levels(loss_increases, "--loss-increases")
    key, cost = metric_key(behavior), metric_key(capability)
    if parts:
        say_json(parts_of(runs, key)) if as_json else say_parts(runs, key)
        return
    shown = [(key, cost, levels)]
    if not as_json and cost != KL and measured_by_all(runs, KL):
        shown.append((key, KL, _levels(kls, "--kls")))
    if not as_json and key != LOOPS and measured_by_all(runs, LOOPS):
        shown += [(LOOPS, yardstick, at) for _, yardstick, at in shown]
    for changed, yardstick, at in shown:
        found = compare_at_loss(runs, changed, capability=yardstick, reference=reference, loss_increases=at)
        if as_json:
            say_json([asdict(row) for row in found])
        else:
            _print_comparison(found, changed, yardstick, reference, at)
    if not as_json:
        say_parts(runs, key)


def _levels(text: str, option: str) -> list[float]:
    """The levels of a list, each once."""
    return list(dict.fromkeys(number(part, option) for part in text.split(",")))


def _print_comparison(
    found: Sequence[ComparisonAtLoss],
    behavior: MetricKey,
    capability: MetricKey,
    reference: str,
    levels: Sequence[float],
) -> None:
    """What the numbers are, then a Markdown table of them."""
    from ..reporting.result_tables import comparison_table

    changed, cost = "/".join(behavior), "/".join(capability)
    say(
        f"Change of {changed} from k = 0, ± standard error, where {cost} has risen by what the column says.\n"
        "Side more is k above 0. Side less is k below 0: there a method that works has a negative number. n: items.\n"
        "In brackets: even the strongest k that was measured costs less than that.\n"
    )
    rises = [f"at {level:+g} nats per token" for level in levels]
    against = [f"minus {markdown_text(reference)}, {rise}" for rise in rises]
    heads = ["method", "side", "n", *(f"change {rise}" for rise in rises), *against]
    say("| " + " | ".join(heads) + " |\n" + "| --- " * len(heads) + "|")
    for line in comparison_table(found):
        cells = [
            markdown_text(line["method"]),
            line["side"],
            str(line["n"]),
            *line["cells"].values(),
            *line["against"].values(),
        ]
        say("| " + " | ".join(cells) + " |")
    say()


@loading
def measure(
    folder: Vector,
    task: Annotated[str, typer.Option(help="A task, such as false_beliefs; an unknown name lists them.")],
    data: Annotated[str | None, typer.Option(help="Items instead of the shipped ones.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many items of each split.")] = None,
    half: Annotated[
        Literal["choose", "report"] | None, typer.Option(help="One half of the items, by a fixed hash.")
    ] = None,
    behavior: Annotated[str | None, typer.Option(help="What a trait task is about: a name or a trait file.")] = None,
    judge: Annotated[str | None, typer.Option(help="Model that judges; verdicts are not kept.")] = None,
    judge_url: JudgeUrl = None,
    key_env: KeyEnv = None,
    trust_code: TrustCode = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest reply, for tasks with open replies.")] = None,
    k: Annotated[str | None, typer.Option("--k", help="Strengths, e.g. -2,2; default: the card's.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts in a batch.")] = 16,
    as_json: Json = False,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = "auto",
    trust_remote_code: RemoteCode = False,
    chat_template_kwargs: TemplateVariables = None,
) -> None:
    """Measure a vector on one task: each k against the base, item by item.

    Example: weightsteer measure runs/syc/vector --task false_beliefs --data questions.jsonl --k=-2,2
    """
    wanted = list(dict.fromkeys(numbers(k))) if k is not None else None
    from ..evaluation.measure import measure_strengths
    from ..evaluation.tasks import TaskSpec, load_task

    load = partial(load_lm, device=device, dtype=dtype, trust=trust_remote_code)
    judging = judge_model(judge, judge_url, None, load, key_env)
    spec = TaskSpec(task, data, limit, half=half, behavior=behavior, max_new_tokens=max_new_tokens, judge=judging)
    items = load_task(replace(spec, trust_code=tuple(trust_code or ())))
    vector, lm = vector_and_lm(folder, model, device, dtype, trust_remote_code, chat_template_kwargs)
    ks = wanted or [k for k in shown_strengths(vector) if k]
    with show_progress(task) as progress:
        found = []
        for measurement, rows in measure_strengths(vector, lm, items, ks, batch_size=batch_size, progress=progress):
            found += [asdict(row) for row in rows]
            if not as_json:
                _print_measured(measurement, rows)
    if as_json:
        say_json(found)


def _print_measured(measurement: Measurement, rows: Sequence[MetricRow]) -> None:
    """One line a metric: its value and its change from the base."""
    from ..reporting.tables import estimate

    found = {(row.metric, row.change): row for row in rows}
    for metric in measurement.values:
        row, change = found.get((metric, False)), found.get((metric, True))
        start = f"k = {measurement.k:<6g} {metric:<9}"
        if row is None or change is None:  # an item that counts at this k need not count for the base
            say(f"{start} no item counts")
            continue
        value, moved = estimate(row.value, row.stderr, ".4f"), estimate(change.value, change.stderr, "+.4f")
        say(f"{start} {value.text:>15}   change {moved.text}   n = {row.n}", flush=True)


VERBS = (run, report, sweep, compare, measure)
