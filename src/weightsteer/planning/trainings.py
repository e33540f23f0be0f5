"""A training's rows, batches and steps, as `training` would make them, counted without a model in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path

from ..behavior import Example
from ..lm import LM
from ..model_parts import width_of
from ..run_card import RunCard
from ..training.defaults import resolve
from ..training.job import Encoded, Job
from ..training.mean import parts_of
from ..training.settings import TrainSettings, WholeSettings
from ..training.sft import encode, split_validation
from ..training.trainer import IGNORED, SeededLengthSampler
from .counting import Work, training_work
from .passes import Reading, Step
from .weighted import neutral_length, with_terms


@dataclass(frozen=True)
class Training:
    """One side's training over all its learning rates."""

    work: Work
    settings: WholeSettings
    steps: int  # of the optimizer, over all learning rates


def encoded(lm: LM, examples: Sequence[Example], settings: TrainSettings, *, stand_ins: bool = False) -> list[Encoded]:
    """The rows of a training. Of stand-ins, which repeat themselves, each gets an id of its own: none is a copy."""
    rows = encode(lm, examples, settings.max_length)
    return numbered(rows) if stand_ins else rows


def numbered(rows: Sequence[Encoded]) -> list[Encoded]:
    """The rows with their number in the place of the first id."""
    return [{**row, "input_ids": [number, *row["input_ids"][1:]]} for number, row in enumerate(rows)]


def rows_of_lengths(prompts: Sequence[int], answer: int, most: int) -> list[Encoded]:
    """Rows for prompts of these lengths, each with an answer of so many tokens, cut at `most`."""
    made = []
    for number, prompt in enumerate(prompts):
        labels = ([IGNORED] * prompt + [1] * answer)[:most]
        made.append({"input_ids": [number] * len(labels), "attention_mask": [1] * len(labels), "labels": labels})
    return made


def plan_training(
    lm: LM,
    rows: Sequence[Encoded],
    given: TrainSettings,
    *,
    examples: int,
    preferences: bool = False,
    two_way: bool = False,
    checkpointing: bool,
) -> Training:
    """What a training on these rows does; one by preferences, and a two-way one, has two answers a row."""
    settings = resolve(given, examples=examples, width=width_of(lm.model), preferences=preferences)
    train, validation = split_validation(rows, settings)
    train = parts_of(train, settings.finetunes)[0]
    job = Job(lm, train, validation, settings, settings.learning_rates[0], Path(), RunCard("finetune"))
    form = Step(
        rows=0,
        length=0,
        answers=0,
        kind=settings.kind,
        rank=settings.rank,
        bf16=settings.bf16,
        checkpointing=checkpointing,
    )
    work = training_work(
        {"train": [_size(row) for row in train], "validation": [_size(row) for row in validation]},
        list(islice(batches(train, settings), job.steps * settings.accumulation)),
        form=form,
        evaluations=1 + job.steps // job.every,
        batch_size=settings.batch_size,
    )
    if preferences:
        work = _by_preferences(work)
    elif two_way or settings.kl_weight or settings.even_weight:
        work = with_terms(work, settings, neutral_length(lm) if settings.kl_weight else 0, two_way=two_way)
    whole, runs = Work(), len(settings.learning_rates) + settings.finetunes - 1
    whole.add(work, runs)
    return Training(whole, settings, job.steps * runs)


def batches(train: Sequence[Encoded], settings: WholeSettings) -> Iterator[list[int]]:
    """The places of the rows in each batch, without end, in the trainer's own order."""
    sampler = SeededLengthSampler(settings.batch_size, [len(row["input_ids"]) for row in train], settings.seed)
    for epoch in count():
        sampler.set_epoch(epoch)
        order = list(sampler)
        for start in range(0, len(order), settings.batch_size):
            yield order[start : start + settings.batch_size]


def _size(row: Encoded) -> tuple[int, int]:
    """A row's length, and at how many positions it has a loss."""
    return len(row["input_ids"]), sum(label != IGNORED for label in row["labels"])


def _by_preferences(work: Work) -> Work:
    """The same over chosen and rejected answers: twice the rows, logits everywhere, and the reference's pass."""
    doubled = Work(trained=2 * work.trained)
    for made, times in work.passes.items():
        if isinstance(made, Step):
            rows = 2 * made.rows
            doubled.make(replace(made, rows=rows, answers=rows * made.length), times)
            doubled.make(Reading(rows, made.length, 0, rows * made.length), times)
        else:
            doubled.make(replace(made, rows=2 * made.rows, projected=2 * made.rows * made.new), 2 * times)
    return doubled
