"""Verbs that make vectors: data, training, subtraction, sums."""

from __future__ import annotations

import keyword
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import SteerError
from ..files import refuse_inputs
from ..locks import hold
from ..outputs import refuse_foreign_file
from ..progress import show_progress
from ..ranks import by_first
from ..shown import note, say, say_json
from .arguments import refuse_twice
from .engine import Concurrency, Engine, EngineUrl, served_model
from .loading import loading
from .options import (
    Base,
    Device,
    Dtype,
    Json,
    JudgeUrl,
    KeyEnv,
    Model,
    Out,
    RemoteCode,
    TemplateVariables,
    data_files,
    default,
    drop_unset,
    judge_model,
    lm_arguments,
    load_lm,
    number,
    read_sides,
    refuse_beside,
    refuse_same,
    special_tokens_of,
    warn_unseen,
)
from .show_run import finetune_facts

if TYPE_CHECKING:
    from ..vectors.weight_vector import WeightVector


@loading
def sample(
    behavior: Annotated[str, typer.Argument(help="A shipped behaviour or a trait file.")],
    out: Out,
    positive: Annotated[Path | None, typer.Option(help="Your own D+ instead of sampling.")] = None,
    negative: Annotated[Path | None, typer.Option(help="Your own D- instead of sampling.")] = None,
    judge: Annotated[str | None, typer.Option(help="Model that judges; default: the likelihood of S+ and S-.")] = None,
    judge_url: JudgeUrl = None,
    key_env: KeyEnv = None,
    samples: Annotated[int | None, typer.Option(help="Answers for each question and prompt.")] = None,
    questions: Annotated[int | None, typer.Option(help="Use the first so many questions.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer, in tokens.")] = None,
    keep_cut: Annotated[bool, typer.Option("--keep-cut", help="Keep answers that --max-new-tokens cuts off.")] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
    engine: Engine = None,
    engine_url: EngineUrl = None,
    concurrency: Concurrency = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = "auto",
    trust_remote_code: RemoteCode = False,
    chat_template_kwargs: TemplateVariables = None,
) -> None:
    """Build D+ and D-: the model answers its own questions under S+ and S-, a judge filters.

    With --engine-url, a server that serves the model answers, and of the model only its tokenizer is read here.

    Example: weightsteer sample sycophancy --samples 2 --questions 20 -o data/syc
    """
    from ..behavior import Behavior

    refuse_inputs(out, *data_files(behavior, positive, negative))
    described = Behavior.load(behavior)
    if positive or negative:
        asked = {"samples": samples, "questions": questions, "max_new_tokens": max_new_tokens, "keep_cut": keep_cut}
        served = {"engine": engine, "engine_url": engine_url, "concurrency": concurrency, "model": model}
        judging = {"judge": judge, "judge_url": judge_url, "key_env": key_env, "seed": seed, "device": device}
        refuse_beside("nothing is sampled where both sides are given", **asked, **served, **judging)
        with hold(out):
            counts = _write_own_sides(out, positive, negative)
    else:
        from ..data_building.sampling import Answering, cut_answers, sample_sides, unusable_verdicts
        from ..data_building.sampling_settings import SamplingSettings
        from ..judges.judge import LikelihoodJudge, RubricJudge, rubric_of
        from ..run_folder import RunFolder

        load = partial(load_lm, device=device, dtype=dtype, trust=trust_remote_code)
        chat_model = judge_model(judge, judge_url, RunFolder(out).judge_cache, load, key_env)
        chosen = RubricJudge(chat_model, rubric_of(described)) if chat_model else None
        answering: AbstractContextManager[tuple[Answering, int]]
        if engine_url and (device or dtype != "auto") and not (judge and not judge_url):
            raise SteerError("--device, --dtype: the server computes, and no model is loaded here; leave them out")
        if engine_url:
            answering = served_model(engine_url, engine, concurrency, model, chat_template_kwargs)
        elif engine or concurrency:
            raise SteerError("--engine, --concurrency: name the server that they are of, by --engine-url")
        else:
            answering = nullcontext((load(model, template=chat_template_kwargs), 1))
        settings = SamplingSettings(
            **drop_unset(samples=samples, questions=questions, max_new_tokens=max_new_tokens, seed=seed),
            cut_answers="keep" if keep_cut else "drop",
        )
        with answering as (lm, at_once), show_progress("sample") as progress:
            judges = chosen or LikelihoodJudge(lm, described)
            counts = sample_sides(lm, described, judges, out, settings=settings, at_once=at_once, progress=progress)
        if chosen is not None:
            lost = unusable_verdicts(out)
            again = "; the same command asks for them again" if lost else ""
            say(f"{lost} verdicts were unusable; their answers are on neither side{again}")
        if cut := cut_answers(out):
            limit = settings.max_new_tokens
            say(f"{cut} answers were cut off at {limit} tokens and are on neither side; --max-new-tokens raises that")
    say(f"{counts[0]} examples in {out / 'positive.jsonl'}, {counts[1]} in {out / 'negative.jsonl'}")


def _write_own_sides(out: Path, positive: Path | None, negative: Path | None) -> tuple[int, int]:
    """The user's D+ and D- in the form that sampling gives them; other files are not replaced."""
    from ..behavior import SIDES, example_rows
    from ..files import read_jsonl, write_jsonl

    sides = read_sides(None, positive, negative)
    written = {out / f"{name}.jsonl": example_rows(side) for name, side in zip(SIDES, sides, strict=True)}
    for path, rows in written.items():
        if path.exists() and read_jsonl(path) != rows:
            raise SteerError(f"{path}: exists and holds other examples; choose another output")
    for path, rows in written.items():
        write_jsonl(path, rows)
    return len(sides[0]), len(sides[1])


def lint(
    pairs: Annotated[str | None, typer.Option(help="A shipped behaviour or a file of pairs.")] = None,
    positive: Annotated[Path | None, typer.Option(help="D+: JSON, JSONL, YAML, CSV or Parquet.")] = None,
    negative: Annotated[Path | None, typer.Option(help="D-: JSON, JSONL, YAML, CSV or Parquet.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Look for this model's special tokens in the texts too.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what would leak into the vector besides the behaviour.

    Example: weightsteer lint --pairs sycophancy
    """
    from ..data_building.lint import lint_sides

    sides = read_sides(pairs, positive, negative)
    findings = lint_sides(*sides, special_tokens_of(model) if model else ())
    if as_json:
        counts = {"positive": len(sides[0]), "negative": len(sides[1])}
        say_json({**counts, "findings": [asdict(finding) for finding in findings]})
        return
    for finding in findings:
        say(f"{finding.kind}: {finding.message}")
    say(f"{len(sides[0])} examples in D+, {len(sides[1])} in D-, {len(findings)} findings")


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
    from ..evaluation.tasks.arithmetic import arithmetic_examples
    from ..files import read_jsonl, write_jsonl

    examples = arithmetic_examples(family, [kind.strip() for kind in kinds.split(",")], count, seed=seed, split=split)
    rows = example_rows(examples)
    refuse_foreign_file(out, lambda _: read_jsonl(out) == rows)
    write_jsonl(out, rows)
    say(f"{out}: {len(examples)} examples")


@loading
def train(
    out: Out,
    pairs: Annotated[str | None, typer.Option(help="A shipped behaviour or a file of pairs.")] = None,
    positive: Annotated[Path | None, typer.Option(help="D+: JSON, JSONL, YAML, CSV or Parquet.")] = None,
    negative: Annotated[Path | None, typer.Option(help="D-: JSON, JSONL, YAML, CSV or Parquet.")] = None,
    kind: Annotated[
        str | None,
        typer.Option(help="lora, bias or full; dpo: lora by preference tuning, on --pairs." + default("kind")),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="LoRA rank." + default("rank"))] = None,
    alpha: Annotated[
        int | None, typer.Option(help="LoRA alpha; over the rank it scales the change." + default("alpha"))
    ] = None,
    lr: Annotated[
        str | None,
        typer.Option(
            help="Learning rate, or several separated by commas, of which the best is kept." + default("learning_rates")
        ),
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data." + default("epochs"))] = None,
    max_steps: Annotated[int | None, typer.Option(help="Steps, in place of --epochs." + default("max_steps"))] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples in a step." + default("batch_size"))] = None,
    snapshots: Annotated[
        int | None, typer.Option(help="Points of each training to keep besides the best." + default("snapshots"))
    ] = None,
    kl_weight: Annotated[
        float | None,
        typer.Option(help="Weight of the token KL to the base on neutral prompts." + default("kl_weight")),
    ] = None,
    finetunes: Annotated[
        int | None,
        typer.Option(
            help="Fine-tunes of each side, on parts of its answers, of which the mean is kept." + default("finetunes")
        ),
    ] = None,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option("--gradient-checkpointing", help="Less memory, more time: activations are computed twice."),
    ] = False,
    paper: Annotated[
        bool, typer.Option("--paper", help="The paper's numbers for all that is not given, whatever data and model.")
    ] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of adapter and order." + default("seed"))] = None,
    processes: Annotated[
        int | None, typer.Option(help="Processes that train together, one a GPU." + default("processes"))
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(help="What each of them holds: ddp, the whole model; fsdp, a part of it." + default("shard")),
    ] = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = "auto",
    trust_remote_code: RemoteCode = False,
    chat_template_kwargs: TemplateVariables = None,
) -> None:
    """Fine-tune both sides: OUT/positive and OUT/negative. Kill it and run it again to go on.

    What is not given follows from the number of examples and the model, so that 20 pairs make a vector that shows.
    Several processes are started by --processes, or on several machines by torchrun: see docs/many-gpus.md.
    With --kind dpo, the first prefers the positive answer of each pair to the negative one, and the second the reverse.

    Example: weightsteer train --pairs formal -o runs/formal
    """
    if kind == "dpo" and not pairs:
        raise SteerError("--kind dpo: expected --pairs, both answers to the same questions")
    if kind in ("bias", "full"):
        refuse_beside(f"is of adapters, and --kind {kind} trains none", rank=rank, alpha=alpha)
    if max_steps:
        refuse_beside("--max-steps stands in its place", epochs=epochs)
    from ..example_files.checks import refuse_unfit, warn_unfit

    refuse_inputs(out, *data_files(pairs, positive, negative), model)
    sides = read_sides(pairs, positive, negative)
    refuse_unfit(*sides)
    rates = tuple(number(rate, "--lr") for rate in lr.split(",")) if lr is not None else None
    from ..behavior import SIDES
    from ..fitting import kept_in
    from ..run_folder import RunFolder
    from ..training import PAPER, Preference, TrainSettings, train_preference, train_side
    from ..training.order import load_to_train
    from ..vectors.difference import subtract_finetunes

    settings = replace(
        PAPER if paper else TrainSettings(),
        **drop_unset(kind=None if kind == "dpo" else kind, rank=rank, alpha=alpha, learning_rates=rates),
        **drop_unset(epochs=epochs, max_steps=max_steps, batch_size=batch_size, snapshots=snapshots, seed=seed),
        **drop_unset(processes=processes, shard=shard, kl_weight=kl_weight, finetunes=finetunes),
        gradient_checkpointing=gradient_checkpointing,
    )
    asked = lm_arguments(model, device, dtype, trust_remote_code, chat_template_kwargs)
    lm = load_to_train(settings, asked)
    warn_unfit(*sides, lm.tokenizer)
    with by_first(hold(out)), kept_in(RunFolder(out).batches):
        for name, side, other in zip(SIDES, sides, sides[::-1], strict=True):
            target = RunFolder(out).finetune(name)
            with show_progress(f"train {name}") as progress:
                if kind == "dpo":
                    both = zip(side, other, strict=True)
                    wanted = [Preference(a.prompt, a.answer, b.answer) for a, b in both if a.answer != b.answer]
                    path = train_preference(lm, wanted, target, settings=settings, progress=progress)
                else:
                    path = train_side(lm, side, target, settings=settings, progress=progress)
            say(f"{name}: {path}, {finetune_facts(path)['trained']}")
        warn_unseen(subtract_finetunes(*map(RunFolder(out).finetune, SIDES)))


def _size(vector: WeightVector) -> str:
    """How large a vector is, in words; a note tells of one that is zero."""
    if not (norm := vector.norm()):
        note("the vector is zero: what it is made of holds the same weights, or cancels")
    rank = "dense" if (found := vector.rank) is None else f"rank {found}"
    return f"{len(vector.deltas)} parameters, {rank}, norm {norm:.4g}"


def subtract(
    positive: Annotated[
        str, typer.Argument(help="Fine-tune on D+: adapter, biases or checkpoint; a folder or hub id.")
    ],
    negative: Annotated[str, typer.Argument(help="Fine-tune on D-.")],
    out: Out,
    base: Base = None,
) -> None:
    """Make the weight vector w = theta+ - theta-, exactly.

    Example: weightsteer subtract runs/syc/positive runs/syc/negative -o runs/syc/vector
    """
    refuse_inputs(out, positive, negative, base)
    refuse_same(positive, negative)
    from ..vectors.difference import subtract_finetunes

    vector = subtract_finetunes(positive, negative, base=base)
    vector.save(out)
    say(f"{out}: {_size(vector)}")


def combine(
    expression: Annotated[str, typer.Argument(help="Such as '0.8*honest - 0.5*rude'.")],
    vectors: Annotated[list[str], typer.Argument(help="name=FOLDER for every name in it: vectors or fine-tunes.")],
    out: Out,
    base: Base = None,
) -> None:
    """Add, subtract and scale vectors of one base, exactly; or reshape them.

    In the expression: filter(w, layers="8-20", modules="mlp"), truncate(w, rank=16) or truncate(w, energy=0.99),
    project_out(w, other), scale_by_depth(w, alpha=0.5, beta=1), boost_subspace(w, beta=0.1).

    Example: weightsteer combine "1.0*syc - 0.5*gloomy" syc=runs/syc/vector gloomy=runs/gloomy/vector -o runs/mixed
    """
    from ..vectors.difference import task_vector
    from ..vectors.expression import combine as evaluate
    from ..vectors.expression import derived_card
    from ..vectors.weight_vector import WeightVector

    for text in vectors:
        name, _, folder = text.partition("=")
        if not (name and folder):
            raise SteerError(f"{text!r}: expected name=FOLDER")
        if not name.isidentifier() or keyword.iskeyword(name):
            raise SteerError(f"{name!r}: cannot stand in an expression; take a letter, then letters, digits and _")
    folders = {name: folder for name, _, folder in (text.partition("=") for text in vectors)}
    refuse_twice("combine", [text.partition("=")[0] for text in vectors])
    refuse_inputs(out, base, *folders.values())
    named = {name: task_vector(folder, base=base) for name, folder in folders.items()}
    vector = evaluate(expression, named)
    vector = WeightVector(vector.deltas, derived_card(vector.card, expression, named))
    vector.save(out)
    cut = vector.card.measured.get("truncation_error")
    lost = f", {cut:.2%} of the vector cut away" if cut is not None else ""
    say(f"{out}: {_size(vector)}{lost}")


VERBS = (sample, generate, lint, train, subtract, combine)
