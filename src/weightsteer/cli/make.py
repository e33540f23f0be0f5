"""Verbs that make vectors: data, training, subtraction, sums."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..errors import SteerError
from ..progress import shown
from .options import (
    Device,
    Dtype,
    JudgeUrl,
    Model,
    Out,
    RemoteCode,
    given,
    load_lm,
    number,
    read_sides,
    reader_of,
    refuse_input,
)


def contrast(
    behavior: Annotated[str, typer.Argument(help="A shipped behaviour or a trait file.")],
    out: Out,
    positive: Annotated[Path | None, typer.Option(help="Your own D+ (JSONL) instead of sampling.")] = None,
    negative: Annotated[Path | None, typer.Option(help="Your own D- (JSONL) instead of sampling.")] = None,
    judge: Annotated[str | None, typer.Option(help="Model that judges; default: the likelihood of S+ and S-.")] = None,
    judge_url: JudgeUrl = None,
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
        from ..contrast import JUDGE_FILE, ContrastSettings, build_sides, unusable_verdicts
        from ..judge import LikelihoodJudge, RubricJudge, rubric_of

        load = partial(load_lm, device=device, dtype=dtype, trust=trust_remote_code)
        reader = reader_of(judge, judge_url, out / JUDGE_FILE, load)
        chosen = RubricJudge(reader, rubric_of(described)) if reader else None
        lm = load(model)
        settings = ContrastSettings(
            **given(samples=samples, questions=questions, max_new_tokens=max_new_tokens, seed=seed)
        )
        with shown("contrast") as progress:
            counts = build_sides(
                lm, described, chosen or LikelihoodJudge(lm, described), out, settings=settings, progress=progress
            )
        if chosen is not None:
            print(f"{unusable_verdicts(out)} verdicts were unusable; their answers are on neither side")
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


def generate(
    family: Annotated[str, typer.Argument(help="gcd, addition or larger.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write (JSONL).")],
    kinds: Annotated[str, typer.Option(help="query, correct, incorrect, separated by commas.")] = "query,correct",
    count: Annotated[int, typer.Option(help="Examples in all.")] = 400,
    split: Annotated[str, typer.Option(help="train or test: their numbers are disjoint.")] = "train",
    seed: Annotated[int, typer.Option(help="Seed of numbers and wordings.")] = 0,
) -> None:
    """Write arithmetic examples: questions, correct and incorrect solutions to check (paper, experiment 2).

    Example: weightsteer generate gcd --kinds query,correct --count 7620 -o gcd.jsonl
    """
    from ..behavior import example_rows
    from ..records import write_jsonl
    from ..tasks.arithmetic import arithmetic_examples

    examples = arithmetic_examples(family, kinds.split(","), count, seed=seed, split=split)
    write_jsonl(out, example_rows(examples))
    print(f"{out}: {len(examples)} examples")


def train(
    out: Out,
    pairs: Annotated[str | None, typer.Option(help="A shipped behaviour or a file of pairs.")] = None,
    positive: Annotated[Path | None, typer.Option(help="D+ (JSONL).")] = None,
    negative: Annotated[Path | None, typer.Option(help="D- (JSONL).")] = None,
    kind: Annotated[
        str | None, typer.Option(help="lora, bias or full; dpo: lora by preference tuning, on --pairs.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="LoRA rank.")] = None,
    lr: Annotated[str | None, typer.Option(help="Learning rate, or several separated by commas.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples in a step.")] = None,
    snapshots: Annotated[int | None, typer.Option(help="Points of each training to keep besides the best.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of adapter and order.")] = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = "auto",
    trust_remote_code: RemoteCode = False,
) -> None:
    """Fine-tune both sides: OUT/plus and OUT/minus. Kill it and run it again to go on.

    With --kind dpo, plus prefers the positive answer of each pair to the negative one, and minus the reverse.

    Example: weightsteer train --pairs sycophancy --lr 1e-4,3e-4 --snapshots 4 -o runs/syc
    """
    if kind == "dpo" and not pairs:
        raise SteerError("--kind dpo: expected --pairs, both answers to the same questions")
    sides = read_sides(pairs, positive, negative)
    rates = tuple(number(rate, "--lr") for rate in lr.split(",")) if lr else None
    from ..finetune import Preference, TrainSettings, train_preference, train_side

    settings = TrainSettings(
        **given(kind=None if kind == "dpo" else kind, rank=rank, learning_rates=rates, epochs=epochs),
        **given(batch_size=batch_size, snapshots=snapshots, seed=seed),
    )
    lm = load_lm(model, device, dtype, trust_remote_code)
    for name, side, other in zip(("plus", "minus"), sides, sides[::-1], strict=True):
        with shown(f"train {name}") as progress:
            if kind == "dpo":
                both = zip(side, other, strict=True)
                wanted = [Preference(a.prompt, a.answer, b.answer) for a, b in both if a.answer != b.answer]
                path = train_preference(lm, wanted, out / name, settings=settings, progress=progress)
            else:
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


VERBS = (contrast, generate, lint, train, subtract, combine)
