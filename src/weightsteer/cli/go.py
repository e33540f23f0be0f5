"""Verbs that go the whole road, and show what came of it."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import SteerError
from ..progress import shown
from .options import (
    Device,
    Dtype,
    JudgeUrl,
    Model,
    RemoteCode,
    Vector,
    given,
    load_lm,
    number,
    numbers,
    reader_of,
    shown_strengths,
    vector_and_lm,
)

if TYPE_CHECKING:
    from ..recipe import Recipe


def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML).")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Run folder; default runs/<name>.")] = None,
    seed: Annotated[int | None, typer.Option(help="Another seed; default folder runs/<name>-seed<N>.")] = None,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="On a tiny random model with a handful of examples, within a minute.")
    ] = False,
) -> None:
    """Go the whole road of a recipe: train, subtract, sweep, choose k, report.

    Kill it at any point and run it again: nothing done is done twice.

    Example: weightsteer run recipes/demo.yaml
    """
    from ..recipe import Recipe

    loaded = Recipe.load(recipe)
    name = loaded.name if seed is None else f"{loaded.name}-seed{seed}"
    loaded = loaded.model_copy(update=given(name=name, seed=seed))
    if rehearse:
        loaded = _rehearsed(loaded, out)
    folder = out or Path("runs") / loaded.name
    options = [*(["--out", str(out)] if out else []), *(["--seed", str(seed)] if seed is not None else [])]
    command = shlex.join(["weightsteer", "run", str(recipe), *options, *(["--rehearse"] if rehearse else [])])
    from ..road import Road

    page = Road(loaded, folder, show=shown, command=command).run()
    _print_table(folder)
    print(f"report: {page}\nplot:   {page.parent / 'behaviour_against_capability.png'}\nvector: {folder / 'vector'}")


def _rehearsed(recipe: Recipe, out: Path | None) -> Recipe:
    """The recipe at its smallest size, with its tiny model beside the run's folder."""
    from ..rehearse import rehearsal, tiny_model_of

    folder = out or Path("runs") / f"{recipe.name}-rehearsal"
    return rehearsal(recipe, tiny_model_of(recipe, folder.with_name(f"{folder.name}-model")))


def _print_table(folder: Path) -> None:
    """The base and every method at its strengths, test items, as a plain table."""
    from ..charts import main_keys, title_of
    from ..records import Row, RunCard, read_jsonl
    from ..report import summary_table

    rows = [Row(**row) for row in read_jsonl(folder / "rows.jsonl")]
    rows = [row for row in rows if row.split == "test"]
    keys = main_keys(rows)
    for column, key in enumerate(keys, start=1):
        print(f"({column}) {title_of(*key)}")
    print(f"{'method':<14} {'k':>7} " + " ".join(f"{f'({n})':>15}" for n in range(1, len(keys) + 1)))
    for line in summary_table(rows, keys):
        print(f"{line['method']:<14} {line['k']:>7} " + " ".join(f"{cell:>15}" for cell in line["cells"]))
    strength = RunCard.load(folder / "vector").strength
    if strength:
        print(f"recommended k: {strength.recommended:g} (more) and {strength.negative:g} (less)")


def report(folder: Annotated[Path, typer.Argument(help="Folder of a finished run.")]) -> None:
    """Write a finished run's report.html and PNG again.

    Example: weightsteer report runs/sycophancy-demo
    """
    page = _road_of(folder).report()
    print(f"report: {page}")


def sweep(folder: Annotated[Path, typer.Argument(help="Folder of a run that is trained.")]) -> None:
    """Measure a run's methods at their strengths and choose k; finished cells are kept.

    Example: weightsteer sweep runs/sycophancy-demo
    """
    road = _road_of(folder)
    if not (folder / "vector").exists():
        raise SteerError(f"{folder}: has no vector yet; run `weightsteer run {folder / 'recipe.yaml'}`")
    road.measure_again()
    _print_table(folder)


def _road_of(folder: Path) -> Any:
    """The road of a run's folder, with the recipe that is kept in it."""
    from ..recipe import RECIPE_FILE, Recipe

    if not (folder / RECIPE_FILE).exists():
        raise SteerError(f"{folder}: not a run's folder (no {RECIPE_FILE}); make one with `weightsteer run RECIPE`")
    from ..road import Road

    source = folder / RECIPE_FILE
    command = shlex.join(["weightsteer", "run", str(source), "--out", str(folder)])
    return Road(Recipe.load(source), folder, show=shown, command=command)


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Finished runs of one recipe, such as its seeds.")],
    behavior: Annotated[str, typer.Option(help="task/metric whose change is compared.")] = "false_beliefs/follows",
    capability: Annotated[str, typer.Option(help="task/metric whose rise is the damage.")] = "prose/nll",
    reference: Annotated[str, typer.Option(help="The method that the others are compared with.")] = "contrastive",
    damages: Annotated[str, typer.Option(help="Damages, nats per token.")] = "0.05,0.1,0.2",
) -> None:
    """Methods at the same loss of capability, as a Markdown table; errors by bootstrap over items and runs.

    Example: weightsteer compare runs/syc runs/syc-seed1 runs/syc-seed2 --behavior false_beliefs/follows
    """
    from ..matched import matched
    from ..recipe import metric_key, refuse_other_recipes
    from ..report import matched_table

    refuse_other_recipes(runs)
    levels = [number(text, "--damages") for text in damages.split(",")]
    found = matched(runs, metric_key(behavior), capability=metric_key(capability), reference=reference, damages=levels)
    names = [f"{level:g}" for level in levels]
    heads = ["method", "side", "n", *names, *(f"against {reference}, {name}" for name in names)]
    print("| " + " | ".join(heads) + " |\n" + "| --- " * len(heads) + "|")
    for line in matched_table(found):
        cells = [line["method"], line["side"], str(line["n"]), *line["cells"].values(), *line["against"].values()]
        print("| " + " | ".join(cells) + " |")


def measure(
    folder: Vector,
    task: Annotated[str, typer.Option(help="A task, such as false_beliefs; an unknown name lists them.")],
    data: Annotated[str | None, typer.Option(help="Items instead of the shipped ones.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many items of each split.")] = None,
    behavior: Annotated[str | None, typer.Option(help="What a trait task is about: a name or a trait file.")] = None,
    judge: Annotated[str | None, typer.Option(help="Model that judges; verdicts are not kept.")] = None,
    judge_url: JudgeUrl = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest reply, for tasks with open replies.")] = None,
    k: Annotated[str | None, typer.Option("--k", help="Strengths, e.g. -2,2; default: the card's.")] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts in a batch.")] = 16,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = "auto",
    trust_remote_code: RemoteCode = False,
) -> None:
    """Measure a vector on one task: each k against the base, item by item.

    Example: weightsteer measure runs/syc/vector --task false_beliefs --data questions.jsonl --k=-2,2
    """
    wanted = numbers(k) if k else None
    from ..tasks import TaskSpec, load_task

    load = partial(load_lm, device=device, dtype=dtype, trust=trust_remote_code)
    reader = reader_of(judge, judge_url, None, load)
    items = load_task(TaskSpec(task, data, limit, behavior=behavior, judge=reader, max_new_tokens=max_new_tokens))
    vector, lm = vector_and_lm(folder, model, device, dtype, trust_remote_code)
    from ..cells import Cell
    from ..records import CHANGE

    ks = wanted or [k for k in shown_strengths(vector) if k]
    with vector.applied(lm, 0.0) as dial:
        base: Cell | None = None
        for strength in [0.0, *ks]:
            dial.k = strength
            with shown(f"{task} at k = {strength:g}") as progress:
                values = items.measure(lm, batch_size=batch_size, progress=progress)
            cell = Cell("k", strength, task, tuple(items.ids), ("test",) * len(items.ids), values)
            base = base or cell
            rows = {row.metric: row for row in cell.rows(base)}
            for metric in values:
                if f"{metric}{CHANGE}" not in rows:  # an item that counts at this k need not count for the base
                    print(f"k = {strength:<6g} {metric:<9} no item counts")
                    continue
                row, change = rows[metric], rows[f"{metric}{CHANGE}"]
                print(
                    f"k = {strength:<6g} {metric:<9} {row.value:8.4f} ± {row.stderr:.4f}   "
                    f"change {change.value:+.4f} ± {change.stderr:.4f}   n = {row.n}",
                    flush=True,
                )


VERBS = (run, report, sweep, compare, measure)
