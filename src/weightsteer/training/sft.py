"""One side of the data -> one fine-tune folder, taken up again after a kill."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..behavior import Example, example_rows
from ..chat_template import last_words
from ..errors import SteerError
from ..files import digest
from ..fitting import kept_in
from ..lm import LM
from ..locks import hold
from ..model_parts import is_packed, width_of
from ..progress import Progress, silent
from ..ranks import agreed, by_first, join, refuse_differences, world
from ..run_card import RunCard
from ..thinking import split_thinking
from ..vectors.visibility import BASE_NORM
from .combinations import refuse_combination, refuse_packed
from .defaults import held_out, held_out_share, resolve
from .job import Encoded, Job
from .launch import launch
from .lora_targets import base_norm
from .lr_search import search
from .mean import parts_of
from .neutral import neutral_rows
from .one_training import MakeTrainer
from .order import known_of, order_of, refuse_idle
from .output import (
    ROWS,
    as_begun,
    claimed,
    finetune_card,
    finish,
    memory_saved,
    rate_folder,
    refuse_placement,
    work_folder,
)
from .settings import PAPER, TrainSettings, WholeSettings, filled, identity_of
from .trainables import refuse_rank
from .trainer import IGNORED, make_trainer
from .weighted_trainer import make_weighted_trainer

MOST_KEPT = 32  # held-out examples in a fine-tune's card
FEW_PROMPTS = 2  # are held out at least where prompts have several answers


def train_side(
    lm: LM,
    examples: Sequence[Example],
    out: str | Path,
    *,
    settings: TrainSettings | None = None,
    progress: Progress = silent,
) -> Path:
    """Train on one side of the data and save the fine-tune with its card; `lm` is left as it was.

    The output is a PEFT adapter (lora), a file of biases (bias) or a checkpoint (full), and the
    snapshots that the settings ask for (`list_snapshots`). While it is made, checkpoints lie in
    `<out>.work`; after a kill the same call goes on from the last one and gives the same result.
    An output that is already there from the same inputs is kept.

    Args:
        settings: what they leave open is found from the number of examples and the model (see `training.defaults`).
        progress: called with steps done, steps in all, and the loss.

    Raises:
        SteerError: too few examples, a rank above the model's own, no learning rate that brings the validation loss
            below the base's, too little memory, or `out` holds something else or a fine-tune of other inputs.
    """
    out, given = Path(out), settings or TrainSettings()
    refuse_combination(given, "side", lm.load_options, base=lm.name)
    refuse_placement(lm, given)
    join(on_cpu=lm.device.type == "cpu")
    with by_first(hold(out)):
        return train_held(lm, examples, out, given, progress)


def train_held(
    lm: LM, examples: Sequence[Example], out: Path, given: TrainSettings, progress: Progress = silent
) -> Path:
    """`train_side` for who holds `out`; where more processes are asked for than there are, they are started."""
    wanted = resolve(given, examples=len(examples), width=width_of(lm.model))
    refuse_packed(wanted, lm.name, packed=is_packed(lm.model))
    card = finetune_card(lm, {"examples": digest(example_rows(examples))}, identity_of(wanted))
    card, settings = agreed(lambda: as_begun(out, card, wanted, filled(given, PAPER)))
    refuse_differences(known_of(card))
    work = agreed(lambda: work_folder(out, card))
    if work is None:
        return out
    refuse_rank(lm.model, settings)
    rows = encode(lm, examples, settings.max_length)
    cut = {"cut_examples": count_cut(lm, examples, rows, settings.max_length)}
    refuse_idle(len(split_validation(rows, settings)[0]), settings)
    if settings.processes > world():
        return launch(order_of(lm, out, given), example_rows(examples), lm, progress)
    measured = {**cut, **size_of_base(lm, settings), **memory_saved(lm, settings)}
    card = replace(card, measured=measured, held_out=held_out_rows(examples, rows, settings))
    jobs = jobs_of(lm, rows, settings, work, card)
    with by_first(claimed(work, card)), kept_in(work / ROWS):
        outcomes = search(jobs, _maker(lm, settings), progress)
    return agreed(lambda: finish(out, work, card, outcomes))


def _maker(lm: LM, settings: WholeSettings) -> MakeTrainer:
    """The plain trainer, unless something is added to its loss."""
    return partial(make_weighted_trainer, neutral=neutral_rows(lm)) if settings.kl_weight else make_trainer


def jobs_of(lm: LM, rows: Sequence[Encoded], settings: WholeSettings, work: Path, card: RunCard) -> list[Job]:
    """One job for each learning rate, on the same split of the rows; where a mean is wanted, on its first part."""
    train, validation = split_validation(rows, settings)
    first, *others = parts_of(train, settings.finetunes)
    return [
        Job(lm, first, validation, settings, rate, rate_folder(work, rate), card, tuple(others))
        for rate in settings.learning_rates
    ]


def size_of_base(lm: LM, settings: WholeSettings) -> dict[str, float]:
    """The norm of the weights that LoRA changes, for the card: a vector's size is told beside it."""
    return {BASE_NORM: base_norm(lm.model)} if settings.kind == "lora" else {}


def encode(lm: LM, examples: Sequence[Example], max_length: int) -> list[Encoded]:
    """Examples as the token ids of the whole conversation; labels are IGNORED in the prompt.

    The loss is on all that a model which is served the prompt has to write: the answer and the end of the turn, and
    what the template puts before the answer, such as an empty thought.

    Raises:
        SteerError: a prompt that leaves no room, or an example without an answer.
    """
    rows = []
    for number, example in enumerate(examples, 1):
        exchange = lm.exchange(example.prompt, example.answer)
        if not exchange.answer or split_thinking(example.answer)[1] is None:
            raise SteerError(
                f"the example {last_words(example.prompt)!r} has no answer: it is empty, or ends inside its thinking; "
                "give it one, or take the example out"
            )
        prompt, answer = exchange.prompt, [*exchange.lead, *exchange.answer, *exchange.end]
        ids = (prompt + answer)[:max_length]
        if len(ids) <= len(prompt):
            raise SteerError(
                f"max_length is {max_length} tokens, but the prompt of example {number}, "
                f"{last_words(example.prompt)!r}, alone takes {len(prompt)}; raise max_length or shorten the prompt"
            )
        labels = ([IGNORED] * len(prompt) + answer)[:max_length]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return rows


def count_cut(lm: LM, examples: Sequence[Example], rows: Sequence[Encoded], max_length: int) -> int:
    """How many of the examples are longer than `max_length` tokens, so that rows lack their end; a warning says so."""
    full = [example for example, row in zip(examples, rows, strict=True) if len(row["input_ids"]) >= max_length]
    lengths = [len(row["input_ids"]) for row in encode(lm, full, sys.maxsize)]
    cut = sum(length > max_length for length in lengths)
    if cut:
        warnings.warn(
            f"max_length: {cut} of {len(examples)} examples are longer than {max_length} tokens (up to "
            f"{max(lengths)}) and are trained on without their end; raise max_length or shorten them",
            stacklevel=3,
        )
    return cut


def split_validation(rows: Sequence[Encoded], settings: TrainSettings) -> tuple[list[Encoded], list[Encoded]]:
    """(training, validation) rows; the same rows for the same seed, so that both sides hold out alike.

    What is held out is not trained on: its copies, as upsampling makes them, are left out, and other answers to its
    prompts are held out with it.
    """
    places = held_out_places(rows, settings)
    held = [rows[i] for i in sorted(places)]
    known = {_key(row) for row in held}
    train = [row for i, row in enumerate(rows) if i not in places and _key(row) not in known]
    if not train:
        raise SteerError(
            f"training needs at least 2 different examples a side, found {len(rows)} examples, of which {len(held)} "
            "are held out, with all of their copies"
        )
    return train, held


def held_out_places(rows: Sequence[Encoded], settings: TrainSettings) -> set[int]:
    """Which rows are held out: drawn from the seed, so that sides of the same prompts hold out alike.

    Where prompts have several answers, whole prompts are, `FEW_PROMPTS` at least; of data with very few prompts, rows.
    """
    wanted = held_out(len(rows), settings.validation or held_out_share(len(rows)))
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(_prompt_of(row) or (-1, place), []).append(place)
    drawn = list(groups.values())
    if len(drawn) < 4 * FEW_PROMPTS:
        drawn = [[place] for place in range(len(rows))]
    least = 1 if len(drawn) == len(rows) else FEW_PROMPTS
    held: list[int] = []
    for number in torch.randperm(len(drawn), generator=torch.Generator().manual_seed(settings.seed)).tolist():
        if len(held) >= wanted and least <= 0:
            break
        held += drawn[number]
        least -= 1
    return set(held)


def _prompt_of(row: Encoded) -> tuple[int, ...]:
    """The ids of a row's prompt, as `encode`, `encode_pairs` or `encode_preferences` made it."""
    if "prompt_ids" in row:
        return tuple(row["prompt_ids"])
    labels = row.get("labels", [])
    return tuple(row["input_ids"][: next((i for i, label in enumerate(labels) if label != IGNORED), len(labels))])


def held_out_rows(
    examples: Sequence[Example], rows: Sequence[Encoded], settings: TrainSettings
) -> tuple[dict[str, Any], ...]:
    """The examples that are held out, as a card keeps them: the first `MOST_KEPT` in their order.

    Args:
        rows: what is trained on, made of the examples.
    """
    places = sorted(held_out_places(rows, settings))
    return tuple(example_rows([examples[i] for i in places[:MOST_KEPT]]))


def _key(row: Encoded) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(ids) for ids in row.values())
