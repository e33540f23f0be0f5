"""What a training's terms read beside the answers of one side, and what learned coefficients and activations read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..behavior import ContrastPair
from ..lm import LM
from ..runs.recipe_fields import DialRecipe
from ..training.job import Encoded
from ..training.learned_dial import CHECKS, FIND_K, KL_ROWS, MAX_LENGTH, DialSettings
from ..training.neutral import PROMPTS, REPLY_TOKENS, neutral_prompts
from ..training.settings import WholeSettings
from ..training.trainer import IGNORED
from ..training.two_way import encode_pairs
from ..training.weighted_trainer import SIDE
from .counting import Work
from .passes import Reading, Step

NEUTRAL = DialSettings.neutral  # neutral replies in a step of the coefficients


def neutral_length(lm: LM) -> int:
    """Tokens of a neutral prompt with its reply, on average."""
    prompts = [len(lm.chat_ids(prompt)) for prompt in neutral_prompts()]
    return round(sum(prompts) / len(prompts)) + REPLY_TOKENS


def longer_rows(positive: Sequence[Encoded], negative: Sequence[Encoded]) -> list[Encoded]:
    """Of each pair of rows the longer, as which both count in a two-way training."""
    return [max(pair, key=lambda row: len(row["input_ids"])) for pair in zip(positive, negative, strict=False)]


def with_terms(work: Work, settings: WholeSettings, neutral: int, *, two_way: bool) -> Work:
    """The passes of `training_work` with the rows that `weighted_trainer` adds: other signs, and neutral replies.

    Args:
        neutral: tokens of a neutral row.
    """
    signs = 2 if two_way else 1
    copies, drawn, found = signs * (2 if settings.even_weight else 1), 0.0, Work()
    for made, times in work.passes.items():
        kept = made.rows if settings.kl_weight else 0  # a neutral row for each example
        length, answers = (made.length, made.answers) if isinstance(made, Step) else (made.new, made.projected)
        length = max(length, neutral) if kept else length
        rows = copies * made.rows + signs * kept
        projected = copies * answers + signs * kept * REPLY_TOKENS
        still, of_base = kept, kept * REPLY_TOKENS  # rows that the base reads too
        if settings.even_weight:
            still, of_base = still + signs * made.rows, of_base + signs * answers
        if isinstance(made, Step):
            drawn += times * kept
            found.make(replace(made, rows=rows, length=length, answers=projected), times)
        else:
            found.make(replace(made, rows=rows, new=length, projected=projected), times)
        if still:
            found.make(Reading(still, length, 0, of_base, made.rank), times)
    found.trained = copies * work.trained + drawn * signs * neutral
    return found


def coefficient_work(lm: LM, pairs: Sequence[ContrastPair], still: Sequence[ContrastPair], dial: DialRecipe) -> Work:
    """The learned dial: its steps, its search for k, and its measurements before, on the way and after."""
    work, neutral = Work(), neutral_length(lm)
    measurements = 2 + min(CHECKS, dial.steps)
    for some in filter(None, (pairs, still)):
        length, answers, tokens = _sizes(encode_pairs(lm, some, MAX_LENGTH))
        count = min(dial.batch_size, len(some))
        work.make(Step(4 * count, length, 2 * count * answers), dial.steps)  # both answers at both signs
        work.make(Reading(4 * count, length, 0, 2 * count * answers), (measurements + 0.5) * len(some) / count)
        work.trained += 2 * tokens * (dial.steps * count + measurements * len(some))
    work.make(Step(2 * NEUTRAL, neutral, 2 * NEUTRAL * REPLY_TOKENS), dial.steps)
    work.make(Reading(NEUTRAL, neutral, 0, NEUTRAL * REPLY_TOKENS), dial.steps)
    measured = FIND_K * KL_ROWS + measurements * PROMPTS  # neutral rows, read at both signs and by the base
    work.make(Reading(3 * KL_ROWS, neutral, 0, 3 * KL_ROWS * REPLY_TOKENS), measured / KL_ROWS)
    work.trained += 2 * neutral * (dial.steps * NEUTRAL + measured)
    return work


def activation_work(lm: LM, pairs: Sequence[ContrastPair], settings: WholeSettings) -> Work:
    """An activation vector that is trained at both signs."""
    work = Work()
    length, answers, tokens = _sizes(encode_pairs(lm, pairs, settings.max_length))
    steps = -(-len(pairs) * max(1, round(settings.epochs)) // settings.batch_size)
    work.make(Step(2 * settings.batch_size, length, settings.batch_size * answers), steps)
    work.trained = steps * settings.batch_size * tokens
    return work


def _sizes(rows: Sequence[Encoded]) -> tuple[int, int, int]:
    """The longest conversation, and of a pair on average: the answers' tokens, and those of both conversations."""
    both = [(row[name], row[other]) for row in rows for name, other in _NAMES]
    answers = sum(label != IGNORED for _, labels in both for label in labels)
    tokens = sum(len(ids) for ids, _ in both)
    return max(len(ids) for ids, _ in both), round(answers / len(rows)), round(tokens / len(rows))


_NAMES = (("input_ids", "labels"), (f"{SIDE}input_ids", f"{SIDE}labels"))
