"""Pairs of answers -> one fine-tune that prefers one side to the other (DPO): the stronger baseline at matched cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from ..behavior import SIDES, ContrastPair, Example, Prompt, pair_rows
from ..errors import SteerError
from ..files import digest
from ..fitting import kept_in
from ..lm import LM
from ..locks import hold
from ..model_parts import width_of
from ..progress import Progress, silent
from ..ranks import agreed, by_first, join, refuse_differences, world
from ..run_folder import Side
from .combinations import refuse_combination
from .defaults import resolve
from .job import Encoded
from .launch import launch
from .lr_search import search
from .order import known_of, order_of, refuse_idle
from .output import ROWS, as_begun, claimed, finetune_card, finish, memory_saved, refuse_placement, work_folder
from .settings import PAPER, RATE, TrainSettings, filled, identity_of
from .sft import count_cut, encode, held_out_rows, jobs_of, size_of_base, split_validation
from .trainables import refuse_rank
from .trainer import IGNORED


@dataclass(frozen=True)
class Preference:
    """One question with the answer to prefer and the one to turn away from."""

    prompt: Prompt
    chosen: str
    rejected: str


def preferences_of(pairs: Sequence[ContrastPair], preferred: Side) -> list[Preference]:
    """Contrast pairs as preferences for one of their sides, in the same order; equal sides prefer nothing.

    Raises:
        SteerError: `preferred` is no side.
    """
    if preferred not in SIDES:
        raise SteerError(f"preferred: expected positive or negative, found {preferred!r}")
    (other,) = set(SIDES) - {preferred}
    return [
        Preference(pair.prompt, getattr(pair, preferred), getattr(pair, other))
        for pair in pairs
        if pair.positive != pair.negative
    ]


def train_preference(
    lm: LM,
    preferences: Sequence[Preference],
    out: str | Path,
    *,
    settings: TrainSettings | None = None,
    beta: float = 0.1,
    progress: Progress = silent,
) -> Path:
    """Tune a LoRA adapter on preferences by DPO (Rafailov et al. 2023) and save it; `lm` is left as it was.

    Output, work folder, snapshots and costs are `train_side`'s, and so are the tokens of prompt and
    answers. The reference is the base itself. The learning rate with the lowest DPO loss on the
    preferences held out is kept. `tokens` counts both answers, each with its prompt; the
    reference's passes are in `seconds` alone.

    Args:
        beta: how strongly the tuned model is held to the base; larger stays closer.
        progress: called with steps done, steps in all, and the loss.

    Raises:
        SteerError: TRL is not installed, another kind than lora, too few preferences, or what `train_side` refuses.
            The loss of the base is ln 2 here.
    """
    out, given = Path(out), settings or TrainSettings()
    refuse_combination(given, "preference", lm.load_options, base=lm.name)
    if expected := RATE.refusal(beta):
        raise SteerError(f"beta: expected {expected}, found {beta!r}")
    refuse_placement(lm, given)
    join(on_cpu=lm.device.type == "cpu")
    with by_first(hold(out)):
        return prefer_held(lm, preferences, out, given, beta, progress)


def prefer_held(
    lm: LM, preferences: Sequence[Preference], out: Path, given: TrainSettings, beta: float, progress: Progress = silent
) -> Path:
    """`train_preference` for who holds `out`; where more processes are asked for than there are, they are started."""
    data = {"preferences": digest([asdict(preference) for preference in preferences])}
    wanted = resolve(given, examples=len(preferences), width=width_of(lm.model), preferences=True)
    card = finetune_card(lm, data, {**identity_of(wanted), "method": "dpo", "beta": beta})
    card, settings = agreed(lambda: as_begun(out, card, wanted, filled(given, PAPER)))
    refuse_differences(known_of(card))
    work = agreed(lambda: work_folder(out, card))
    if work is None:
        return out
    try:
        from .dpo import make_dpo_trainer, undo_trl_changes
    except ImportError as error:
        raise SteerError(f"preference tuning needs TRL ({error}); pip install 'weightsteer[dpo]'") from None
    refuse_rank(lm.model, settings)
    cut = {"cut_examples": _count_cut(lm, preferences, settings.max_length)}
    rows = encode_preferences(lm, preferences, settings.max_length)
    refuse_idle(len(split_validation(rows, settings)[0]), settings)
    if settings.processes > world():
        rows_told = pair_rows([ContrastPair(p.prompt, p.chosen, p.rejected) for p in preferences])
        return launch(order_of(lm, out, given, beta=beta), rows_told, lm, progress)
    chosen = [Example(p.prompt, p.chosen) for p in preferences]
    measured = {**cut, **size_of_base(lm, settings), **memory_saved(lm, settings)}
    card = replace(card, measured=measured, held_out=held_out_rows(chosen, rows, settings))
    jobs = jobs_of(lm, rows, settings, work, card)
    with by_first(claimed(work, card)), kept_in(work / ROWS), undo_trl_changes(lm.model):
        outcomes = search(jobs, partial(make_dpo_trainer, beta=beta), progress)
    return agreed(lambda: finish(out, work, card, outcomes))


def _count_cut(lm: LM, preferences: Sequence[Preference], max_length: int) -> int:
    """How many answers are cut, of both sides."""
    answers = [Example(p.prompt, text) for p in preferences for text in (p.chosen, p.rejected)]
    return count_cut(lm, answers, encode(lm, answers, max_length), max_length)


def encode_preferences(lm: LM, preferences: Sequence[Preference], max_length: int) -> list[Encoded]:
    """Preferences as the token ids of prompt, chosen and rejected answer; prompt + answer are `encode`'s.

    Where one answer's beginning merges with the prompt's last token, that token counts with both answers.
    """
    chosen = encode(lm, [Example(p.prompt, p.chosen) for p in preferences], max_length)
    rejected = encode(lm, [Example(p.prompt, p.rejected) for p in preferences], max_length)
    rows = []
    for good, bad in zip(chosen, rejected, strict=True):
        start = min(side["labels"].count(IGNORED) for side in (good, bad))
        ids = {"prompt_ids": good["input_ids"][:start], "chosen_ids": good["input_ids"][start:]}
        rows.append({**ids, "rejected_ids": bad["input_ids"][start:]})
    return rows
