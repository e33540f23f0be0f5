"""Verbs that make vectors: data, training, subtraction, the whole road."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import SteerError
from ..progress import shown
from .options import (
    Device,
    Dtype,
    Model,
    Out,
    RemoteCode,
    given,
    load_lm,
    number,
    read_sides,
    refuse_input,
)


def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML).")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Run folder; default runs/<name>.")] = None,
) -> None:
    """Go the whole road of a recipe: train, subtract, sweep, choose k, report.

    Kill it at any point and run it again: nothing done is done twice.

    Example: weightsteer run recipes/demo.yaml
    """
    from ..recipe import Recipe

    loaded = Recipe.load(recipe)
    folder = out or Path("runs") / loaded.name
    command = shlex.join(["weightsteer", "run", str(recipe), *(["--out", str(out)] if out else [])])
    from ..road import Road

    road = Road(loaded, recipe, folder, show=shown, command=command)
    page = road.run()
    _print_table(folder)
    print(f"report: {page}\nplot:   {page.parent / 'behaviour_against_capability.png'}\nvector: {folder / 'vector'}")


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
    road.choose(road.sweep(road.methods()))
    _print_table(folder)


def _road_of(folder: Path) -> Any:
    """The road of a run's folder, with the recipe that is kept in it."""
    from ..recipe import RECIPE_FILE, Recipe

    if not (folder / RECIPE_FILE).exists():
        raise SteerError(f"{folder}: not a run's folder (no {RECIPE_FILE}); make one with `weightsteer run RECIPE`")
    from ..road import Road

    source = folder / RECIPE_FILE
    command = shlex.join(["weightsteer", "run", str(source), "--out", str(folder)])
    return Road(Recipe.load(source), source, folder, show=shown, command=command)


def contrast(
    behavior: Annotated[str, typer.Argument(help="A shipped behaviour or a trait file.")],
    out: Out,
    positive: Annotated[Path | None, typer.Option(help="Your own D+ (JSONL) instead of sampling.")] = None,
    negative: Annotated[Path | None, typer.Option(help="Your own D- (JSONL) instead of sampling.")] = None,
    judge: Annotated[str | None, typer.Option(help="Model that judges; default: the likelihood of S+ and S-.")] = None,
    samples: Annotated[int | None, typer.Option(help="Answers for each question and prompt.")] = None,
    questions: Annotated[int | None, typer.Option(help="Use the first so many questions.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer, in tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = "auto",
    trust_remote_code: RemoteCode = False,
) -> None:
    """Build D+ and D-: the model answers its own questions under S+ and S-, a judge filters.

    Example: weightsteer contrast sycophancy --samples 2 --questions 20 -o data/syc
    """
    from ..behavior import Behavior, example_rows
    from ..records import write_jsonl

    described = Behavior.load(behavior)
    if positive or negative:
        sides = read_sides(None, positive, negative)
        for name, side in zip(("positive", "negative"), sides, strict=True):
            write_jsonl(out / f"{name}.jsonl", example_rows(side))
        counts = (len(sides[0]), len(sides[1]))
    else:
        from ..contrast import ContrastSettings, build_sides
        from ..judge import LikelihoodJudge, ModelJudge

        lm = load_lm(model, device, dtype, trust_remote_code)
        chosen = ModelJudge(load_lm(judge, device, dtype, trust_remote_code), described) if judge else None
        settings = ContrastSettings(
            **given(samples=samples, questions=questions, max_new_tokens=max_new_tokens, seed=seed)
        )
        with shown("contrast") as progress:
            counts = build_sides(
                lm, described, chosen or LikelihoodJudge(lm, described), out, settings=settings, progress=progress
            )
    print(f"{counts[0]} examples in {out / 'positive.jsonl'}, {counts[1]} in {out / 'negative.jsonl'}")


def lint(
    pairs: Annotated[str | None, typer.Option(help="A shipped behaviour or a file of pairs.")] = None,
    positive: Annotated[Path | None, typer.Option(help="D+ (JSONL).")] = None,
    negative: Annotated[Path | None, typer.Option(help="D- (JSONL).")] = None,
) -> None:
    """Show what would leak into the vector besides the behaviour.

    Example: weightsteer lint --pairs sycophancy
    """
    from ..lint import lint_sides

    sides = read_sides(pairs, positive, negative)
    findings = lint_sides(*sides)
    for finding in findings:
        print(f"{finding.kind}: {finding.message}")
    print(f"{len(sides[0])} examples in D+, {len(sides[1])} in D-, {len(findings)} findings")


def train(
    out: Out,
    pairs: Annotated[str | None, typer.Option(help="A shipped behaviour or a file of pairs.")] = None,
    positive: Annotated[Path | None, typer.Option(help="D+ (JSONL).")] = None,
    negative: Annotated[Path | None, typer.Option(help="D- (JSONL).")] = None,
    kind: Annotated[str | None, typer.Option(help="lora, bias or full.")] = None,
    rank: Annotated[int | None, typer.Option(help="LoRA rank.")] = None,
    lr: Annotated[str | None, typer.Option(help="Learning rate, or several separated by commas.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples in a step.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of adapter and order.")] = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = "auto",
    trust_remote_code: RemoteCode = False,
) -> None:
    """Fine-tune both sides: OUT/plus and OUT/minus. Kill it and run it again to go on.

    Example: weightsteer train --pairs sycophancy --lr 1e-4,3e-4 -o runs/syc
    """
    sides = read_sides(pairs, positive, negative)
    rates = tuple(number(rate, "--lr") for rate in lr.split(",")) if lr else None
    from ..finetune import TrainSettings, train_side

    settings = TrainSettings(
        **given(kind=kind, rank=rank, learning_rates=rates, epochs=epochs, batch_size=batch_size, seed=seed)
    )
    lm = load_lm(model, device, dtype, trust_remote_code)
    for name, side in zip(("plus", "minus"), sides, strict=True):
        with shown(f"train {name}") as progress:
            path = train_side(lm, side, out / name, settings=settings, progress=progress)
        print(f"{name}: {path}")


def subtract(
    plus: Annotated[str, typer.Argument(help="Fine-tune on D+: adapter, biases or checkpoint; a folder or hub id.")],
    minus: Annotated[str, typer.Argument(help="Fine-tune on D-.")],
    out: Out,
    base: Annotated[
        str | None, typer.Option(help="The base model, for an adapter against a checkpoint, or DoRA.")
    ] = None,
) -> None:
    """Make the weight vector w = theta+ - theta-, exactly.

    Example: weightsteer subtract runs/syc/plus runs/syc/minus -o runs/syc/vector
    """
    refuse_input(out, plus, minus, base)
    from ..extract import contrast_vector

    vector = contrast_vector(plus, minus, base=base)
    vector.save(out)
    print(f"{out}: {len(vector.deltas)} parameters, norm {vector.norm():.4g}")


def combine(
    expression: Annotated[str, typer.Argument(help="Such as '0.8*honest - 0.5*rude'.")],
    vectors: Annotated[list[str], typer.Argument(help="name=FOLDER for every name in it: vectors or fine-tunes.")],
    out: Out,
    base: Annotated[str | None, typer.Option(help="The base model, where a checkpoint or DoRA is among them.")] = None,
) -> None:
    """Add, subtract and scale vectors of one base, exactly; or reshape them.

    In the expression: filter(w, layers="8-20", modules="mlp"), truncate(w, rank=16) or truncate(w, energy=0.99),
    project_out(w, other), lines(w, alpha=0.5, beta=1), boost(w, beta=0.1).

    Example: weightsteer combine "1.0*syc - 0.5*gloomy" syc=runs/syc/vector gloomy=runs/gloomy/vector -o runs/mixed
    """
    from ..expression import combine as evaluate
    from ..expression import derived_card
    from ..extract import task_vector
    from ..vector import WeightVector

    named = {}
    for text in vectors:
        name, equals, folder = text.partition("=")
        if not equals:
            raise SteerError(f"{text!r}: expected name=FOLDER")
        refuse_input(out, folder)
        named[name] = task_vector(folder, base=base)
    vector = evaluate(expression, named)
    vector = WeightVector(vector.deltas, derived_card(vector.card, expression, named))
    vector.save(out)
    cut = vector.card.measured.get("truncation_error")
    lost = f", {cut:.2%} of the vector cut away" if cut is not None else ""
    print(f"{out}: {len(vector.deltas)} parameters, norm {vector.norm():.4g}{lost}")


VERBS = (run, report, sweep, contrast, lint, train, subtract, combine)
