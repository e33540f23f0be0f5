"""Pairs of answers -> one adapter w of rank r such that theta + w fits D+ and theta - w fits D-, trained at once.

What both sides share pulls w one way at +w and the other way at -w, so that it cancels in each gradient.
The model's answer to w has an even part all the same, which no such gradient sees; `even_weight` holds it down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..behavior import ContrastPair, Example, pair_rows
from ..errors import SteerError
from ..files import digest
from ..fitting import kept_in
from ..lm import LM
from ..locks import hold
from ..model_parts import width_of
from ..progress import Progress, silent
from ..run_card import RunCard
from ..vectors.difference import task_vector
from ..vectors.weight_vector import WeightVector
from .combinations import refuse_combination
from .defaults import resolve
from .job import Encoded
from .lr_search import search
from .neutral import neutral_rows
from .output import (
    ROWS,
    as_begun,
    claimed,
    finetune_card,
    finish,
    memory_saved,
    refuse_placement,
    work_folder,
)
from .settings import PAPER, TrainSettings, filled, identity_of
from .sft import MOST_KEPT, count_cut, encode, held_out_places, jobs_of, size_of_base
from .trainables import refuse_rank
from .weighted_trainer import SIDE, make_weighted_trainer


def train_two_way(
    lm: LM,
    pairs: Sequence[ContrastPair],
    out: str | Path,
    *,
    settings: TrainSettings | None = None,
    progress: Progress = silent,
) -> Path:
    """Train one LoRA adapter on both sides, D+ at sign 1 and D- at sign -1 in each step; `lm` is left as it was.

    Output, work folder, snapshots and costs are `train_side`'s; a batch holds so many pairs, both answers of each.
    `two_way_vector` reads the vector from it. `kl_weight` and `even_weight` of the settings add terms to the loss
    (see `weighted_trainer`); with `even_weight` each answer is read at both signs, and counts twice in `tokens`.

    Raises:
        SteerError: another kind than lora, or what `train_side` refuses.
    """
    out, given = Path(out), settings or TrainSettings()
    refuse_combination(given, "two-way", lm.load_options, base=lm.name)
    refuse_placement(lm, given)
    wanted = resolve(given, examples=len(pairs), width=width_of(lm.model))
    card = finetune_card(lm, {"pairs": digest(pair_rows(pairs))}, {**identity_of(wanted), "method": "two-way"})
    with hold(out):
        card, settings = as_begun(out, card, wanted, filled(given, PAPER))
        work = work_folder(out, card)
        if work is None:
            return out
        refuse_rank(lm.model, settings)
        answers = [Example(p.prompt, text) for p in pairs for text in (p.positive, p.negative)]
        cut = {"cut_examples": count_cut(lm, answers, encode(lm, answers, settings.max_length), settings.max_length)}
        rows = encode_pairs(lm, pairs, settings.max_length)
        held = sorted(held_out_places(rows, settings))[:MOST_KEPT]
        kept = tuple(pair_rows([pairs[place] for place in held]))
        measured = {**cut, **size_of_base(lm, settings), **memory_saved(lm, settings)}
        card = replace(card, measured=measured, held_out=kept)
        jobs = jobs_of(lm, rows, settings, work, card)
        neutral = neutral_rows(lm) if settings.kl_weight else []
        with claimed(work, card), kept_in(work / ROWS):
            outcomes = search(jobs, partial(make_weighted_trainer, neutral=neutral), progress)
        return finish(out, work, card, outcomes)


def encode_pairs(lm: LM, pairs: Sequence[ContrastPair], max_length: int) -> list[Encoded]:
    """Pairs as the token ids of both conversations, each as `encode` makes it."""
    positive = encode(lm, [Example(p.prompt, p.positive) for p in pairs], max_length)
    negative = encode(lm, [Example(p.prompt, p.negative) for p in pairs], max_length)
    names = ("input_ids", "labels")
    return [
        {**{name: row[name] for name in names}, **{f"{SIDE}{name}": other[name] for name in names}}
        for row, other in zip(positive, negative, strict=True)
    ]


def two_way_vector(folder: str | Path) -> WeightVector:
    """The vector that `train_two_way` put into a folder, of the adapter's own rank; its card keeps the held-out pairs.

    Raises:
        SteerError: not a two-way fine-tune.
    """
    made = RunCard.load(Path(folder))
    if made.settings.get("method") != "two-way":
        raise SteerError(f"{folder}: expected a two-way fine-tune, found a {made.kind} made otherwise")
    vector = task_vector(folder)
    return replace(vector, card=replace(vector.card, held_out=made.held_out))
