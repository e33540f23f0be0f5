"""A fine-tune's folder: whose work is in progress beside it, what is put into it, what it holds."""

from __future__ import annotations

import json
import math
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import ADAPTER_CONFIG
from ..checkpoints.embedded_model import public_base
from ..checkpoints.whole import is_whole
from ..disk import sync_folder
from ..errors import SteerError
from ..files import digest, is_empty, read_json, write_json, write_text
from ..lm import LM
from ..places import public_name
from ..ranks import world
from ..run_card import CARD_FILE, RunCard, is_emptied, new_folder, refuse_foreign, refuse_here
from .callbacks import SNAPSHOTS
from .combinations import spread_already
from .job import Outcome
from .lr_search import best_rate, require_gain
from .mean import further_folders, write_mean
from .one_training import BEST, outcome_in
from .resume import SEAL
from .settings import ADDED, TrainSettings, WholeSettings, identity_of

STAMP = "job.json"  # in a work folder: whose it is
AVERAGED = "averaged"  # in a card's measured: of how many fine-tunes it is the mean, where several were asked for
ROWS = "batches.json"  # in it: how many tokens memory allowed at once
READ_AS, DTYPE = "system prompt and chat template", "dtype"  # in a card, of the base
LATER = (READ_AS, DTYPE)  # a card of an earlier version says nothing of these


def finetune_card(lm: LM, data: Mapping[str, str], settings: Mapping[str, Any]) -> RunCard:
    """The card of a fine-tune of `lm`, before anything is measured; `data` maps a name to a hash.

    A quantised base has the revision of the one that it was made from, so that what is said of it is in the settings.
    """
    return RunCard.now(
        "finetune",
        base_model=lm.name,
        base_revision=lm.revision,
        data_sha256={**data, READ_AS: digest([lm.system_prompt, lm.tokenizer.chat_template]), **lm.template_identity},
        settings={**settings, DTYPE: str(lm.model.dtype).removeprefix("torch."), **lm.load_options.identity},
        seed=settings["seed"],
    )


def memory_saved(lm: LM, settings: WholeSettings) -> dict[str, Any]:
    """By what memory was saved, for the card: the options that the base was loaded by, and checkpointing."""
    load = lm.load_options.described
    return {
        **({"load": load} if load else {}),
        **({"gradient_checkpointing": True} if settings.gradient_checkpointing else {}),
    }


def refuse_placement(lm: LM, settings: TrainSettings) -> None:
    """Raise where the Trainer would place the model elsewhere than it lies."""
    if max(settings.processes, world()) > 1:
        placed: Mapping[str, Any] = getattr(lm.model, "hf_device_map", None) or {}
        if len(set(map(str, placed.values()))) > 1:
            raise spread_already()
    elif lm.device.type == "cuda" and lm.device.index not in (None, 0):
        raise SteerError(
            f"training uses the first visible GPU, found the model on {lm.device}; "
            f"set CUDA_VISIBLE_DEVICES={lm.device.index} and use device cuda"
        )


def differences(found: RunCard, asked: RunCard) -> list[str]:
    """What two artifacts are made from that is not the same, each as `rank: 4 there, 8 asked`."""
    ours, theirs = _inputs(found), _inputs(asked)
    if _same_base(found, asked):
        theirs["base"] = ours["base"]
    told = [name for name in {**ours, **theirs} if name not in LATER or name in ours.keys() & theirs.keys()]
    names = [name for name in told if ours.get(name) != theirs.get(name)]
    return [_said(name, ours.get(name), theirs.get(name)) for name in names]


def _same_base(found: RunCard, asked: RunCard) -> bool:
    """A base is its content, and its name a hint."""
    if found.base_revision and asked.base_revision:
        return found.base_revision == asked.base_revision
    return public_name(found.base_model) == public_name(asked.base_model)


def _inputs(card: RunCard) -> dict[str, Any]:
    """What an artifact is made from, by name, as JSON would give it back."""
    base = f"{card.base_model} {card.base_revision[:12]}".strip()
    made = {"kind of artifact": card.kind, "base": base, **card.data_sha256}
    inputs: dict[str, Any] = json.loads(json.dumps({**made, **ADDED, **card.settings, "seed": card.seed}))
    return inputs


def _said(name: str, found: object, asked: object) -> str:
    if name in ("examples", "preferences", READ_AS):
        return f"other {name}"
    if isinstance(found, list) and isinstance(asked, list):
        found, asked = (", ".join(map(str, values)) for values in (found, asked))
    return f"{name}: {str(found)[:60]} there, {str(asked)[:60]} asked"


def _identity(card: RunCard) -> str:
    """A hash of what a fine-tune is made from."""
    base = card.base_revision or card.base_model
    return digest([card.kind, base, dict(card.data_sha256), dict(card.settings), card.seed])


def _is_begun(work: Path, card: RunCard) -> bool:
    """Whether a work folder is for the fine-tune of this card, by our stamp or that of an earlier version."""
    former = replace(card, data_sha256=_without_later(card.data_sha256), settings=_without_later(card.settings))
    return _stamp(work) in (_identity(card), _identity(former))


def _without_later(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in LATER}


def as_begun(out: Path, card: RunCard, wanted: WholeSettings, former: WholeSettings) -> tuple[RunCard, WholeSettings]:
    """The card and settings to go on with: the former ones where `out`, or the work on it, was begun by them.

    The first version took the paper's numbers for what the user left open.

    Args:
        card: made from `wanted`.
    """
    begun = replace(card, settings={**card.settings, **identity_of(former)})
    there = (out / CARD_FILE).exists() and not is_emptied(out / CARD_FILE)
    finished = there and not differences(RunCard.load(out), begun)
    return (begun, former) if finished or _is_begun(_work_of(out), begun) else (card, wanted)


def _work_of(out: Path) -> Path:
    return out.absolute().with_name(f"{out.name}.work")


def work_folder(out: Path, card: RunCard) -> Path | None:
    """Where the work on a fine-tune goes on, beside it; None if `out` is made from the same inputs already.

    Raises:
        SteerError: `out` holds something else, or a fine-tune of other inputs; the message names them.
    """
    work = _work_of(out)
    refuse_here(out)
    refuse_foreign(out, card.kind)
    if not (out / CARD_FILE).exists() or is_emptied(out / CARD_FILE):
        return work
    if differing := differences(RunCard.load(out), card):
        raise SteerError(
            f"{out}: holds a finished {card.kind} made otherwise ({'; '.join(differing)}); choose another output, or "
            "delete it"
        )
    if not is_whole(out):
        return work
    if _is_ours(work):
        _clear(work)
    return None


@contextmanager
def claimed(work: Path, card: RunCard) -> Iterator[None]:
    """Make the work folder, or keep it if it belongs to the same fine-tune; an older one's is cleared.

    What fails before there is anything to go on from leaves no work folder.

    Raises:
        SteerError: the folder is not ours.
    """
    if not _is_begun(work, card):
        if work.exists() and not _is_ours(work):
            raise SteerError(f"{work}: is in the way of the checkpoints, and not from a training; move it")
        if _stamp(work):
            warnings.warn(f"{work}: holds the unfinished work on another fine-tune, which is begun anew", stacklevel=4)
        _clear(work)
        write_text(work / STAMP, json.dumps(_identity(card)))
    try:
        yield
    except BaseException:
        if not (any(work.glob("lr-*/result.json")) or any(work.glob("lr-*/checkpoint-*"))):
            _clear(work)
        raise


def _is_ours(work: Path) -> bool:
    """Whether a work folder was made by a training, or holds nothing yet."""
    return work.is_dir() and not work.is_symlink() and (is_empty(work) or bool(_stamp(work)))


def _stamp(work: Path) -> str:
    """Which fine-tune a work folder is for; "" if it does not say."""
    try:
        stamp = read_json(work / STAMP)
    except SteerError:
        return ""
    return stamp if isinstance(stamp, str) and re.fullmatch(r"[0-9a-f]{64}", stamp) else ""


def _clear(work: Path) -> None:
    """Remove a work folder of ours; one that a kill leaves in part keeps its stamp, by which the next call knows it."""
    if not work.exists():
        return
    for path in [path for path in work.iterdir() if path.name != STAMP]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    sync_folder(work)
    (work / STAMP).unlink(missing_ok=True)
    work.rmdir()


def rate_folder(work: Path, learning_rate: float) -> Path:
    """Where the run at one learning rate works."""
    return work / f"lr-{learning_rate:g}"


def finish(out: Path, work: Path, card: RunCard, outcomes: Mapping[float, Outcome]) -> Path:
    """Put the best run's best point and snapshots into `out`, with the card; the work folder goes.

    Where the settings ask for several fine-tunes, it is the mean of their best points.

    Raises:
        SteerError: no run is better than the base; the work folder goes, too.
    """
    try:
        require_gain(outcomes)
    except SteerError:
        _clear(work)
        raise
    best = best_rate(outcomes)
    made = rate_folder(work, best)
    further = {folder: outcome_in(folder) for folder in further_folders(made)}
    averaged = [made, *(folder for folder, outcome in further.items() if outcome.gains)]
    if lost := 1 + len(further) - len(averaged):
        told = f"finetunes: {lost} of {1 + len(further)} never fell below the base's loss; left out of the mean"
        warnings.warn(told, stacklevel=3)
    with new_folder(out, "finetune") as part:
        shutil.copytree(made / BEST, part, dirs_exist_ok=True, ignore=shutil.ignore_patterns(SEAL))
        if (made / SNAPSHOTS).exists():
            shutil.copytree(made / SNAPSHOTS, part / SNAPSHOTS, ignore=shutil.ignore_patterns(".*"))
        if len(averaged) > 1:
            write_mean([folder / BEST for folder in averaged], part)
        _name_base_publicly(part, card)
        measured = {**card.measured, **_summarise(outcomes, best, list(further.values()))}
        replace(card, measured=measured).save(part)
    _clear(work)
    return out


def _name_base_publicly(folder: Path, card: RunCard) -> None:
    """Put the base's name where PEFT wrote its path on this machine; its README says nothing but that."""
    for path in folder.rglob(ADAPTER_CONFIG):
        write_json(path, {**read_json(path), "base_model_name_or_path": public_base(card.base_model)})
        (path.parent / "README.md").unlink(missing_ok=True)


def _summarise(outcomes: Mapping[float, Outcome], best: float, further: list[Outcome]) -> dict[str, Any]:
    """Losses by learning rate, and the costs: of the runs that are kept, and of all that were tried for them.

    A learning rate without a finite loss has none. Of a mean, the losses are those of its first fine-tune.
    """
    kept, runs = outcomes[best], [outcomes[best], *(outcome for outcome in further if outcome.gains)]
    losses = {f"{rate:g}": outcome.loss if math.isfinite(outcome.loss) else None for rate, outcome in outcomes.items()}
    return {
        "base_validation_loss": kept.base_loss,
        "validation_loss": losses,
        "learning_rate": best,
        **({AVERAGED: len(runs)} if further else {}),
        "steps": sum(run.steps for run in runs),
        "tokens": sum(run.tokens for run in runs),
        "seconds": sum(run.seconds for run in runs),
        "parameters": sum(run.parameters for run in runs),
        "search_tokens": sum(outcome.tokens for outcome in [*outcomes.values(), *further]),
        "search_seconds": sum(outcome.seconds for outcome in [*outcomes.values(), *further]),
    }


def list_snapshots(folder: str | Path) -> dict[float, Path]:
    """A fine-tune's snapshots: the share of the training that lies behind each -> its folder, ascending.

    Each folder is a fine-tune that `task_vector` reads; the one at 1.0 is the end of the training,
    which need not be its best point. Empty if none were kept (`TrainSettings.snapshots`).

    Raises:
        SteerError: `folder` is not a fine-tune of ours.
    """
    card = RunCard.load(Path(folder))
    if card.kind != "finetune":
        raise SteerError(f"{folder}: expected a finetune, found a {card.kind}")
    kept = (Path(folder) / SNAPSHOTS).glob("step-*")
    return dict(sorted((RunCard.load(path).measured_number("fraction"), path) for path in kept))
