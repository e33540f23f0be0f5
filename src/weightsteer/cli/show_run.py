"""What `weightsteer show` says of a run's folder: what is finished in it, and what to do next."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..behavior import SIDES
from ..errors import SteerError
from ..run_card import CARD_FILE, RunCard
from ..run_folder import RunFolder


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run: it has the recipe, the vector or a fine-tune inside."""
    run = RunFolder(folder)
    return folder.is_dir() and any(place.exists() for place in (run.recipe, run.vector, *map(run.finetune, SIDES)))


def run_facts(folder: Path) -> dict[str, Any]:
    """What is known of a run, by name, in the order in which it is shown; what it does not have is left out."""
    run, found = RunFolder(folder), dict[str, Any]()
    if run.recipe.exists():
        from ..runs.recipe import Recipe

        recipe = Recipe.load_kept(run.recipe)
        found |= {"recipe": f"{recipe.name} ({run.recipe})", "base": recipe.model}
    for side in SIDES:
        if (run.finetune(side) / CARD_FILE).is_file():
            found[side] = f"{run.finetune(side)}: {_training(RunCard.load(run.finetune(side)))}"
    if (run.vector / CARD_FILE).is_file():
        card = RunCard.load(run.vector)
        found.setdefault("base", card.base_model)
        found["vector"] = str(run.vector)
        found["k"] = card.strength.described if card.strength else "not measured"
    if run.measurements.exists():
        found["measured"] = str(run.measurements)
    if run.page.exists():
        found["report"] = str(run.page)
    found["next"] = _next(run)
    return found


def _training(card: RunCard) -> str:
    losses = card.measured.get("validation_loss")
    loss = losses.get(f"{card.measured.get('learning_rate', 0):g}") if isinstance(losses, dict) else None
    before = card.measured.get("base_validation_loss")
    if not isinstance(loss, int | float) or not isinstance(before, int | float):
        return "trained"
    steps = card.measured.get("steps", "?")
    fell = f"validation loss {before:.3f} -> {loss:.3f}"
    if (count := card.measured.get("averaged", card.settings.get("finetunes", 1))) != 1:
        return f"the mean of the best points of {count} fine-tunes, {steps} steps; of the first alone: {fell}"
    return f"{steps} steps, the best point kept: {fell}"


def _next(run: RunFolder) -> str:
    """The command that a user would want now."""
    if run.vector.exists():
        vector = shlex.quote(str(run.vector))
        return f"weightsteer show {vector}; weightsteer chat {vector}"
    if run.recipe.exists():
        return shlex.join(["weightsteer", "run", str(run.recipe), "--out", str(run.path)])
    both = [run.finetune(side) for side in SIDES]
    if all(side.exists() for side in both):
        return shlex.join(["weightsteer", "subtract", *map(str, both), "-o", str(run.vector)])
    return "the same `weightsteer train` again goes on"


def finetune_facts(folder: Path) -> dict[str, str]:
    """How a fine-tune was trained, as far as its card says."""
    if not (folder / CARD_FILE).is_file():
        return {}
    card = RunCard.load(folder)
    return {"trained": _training(card)} if card.kind == "finetune" else {}


def card_fields(folder: Path) -> dict[str, Any]:
    """The card beside an artifact, for programs; {} where there is none."""
    return asdict(RunCard.load(folder)) if (folder / CARD_FILE).is_file() else {}


def refuse_nothing(folder: Path) -> None:
    """Raise for a folder that is not there, with what `show` takes."""
    if not folder.exists():
        raise SteerError(
            f"{folder}: no such folder, so not a saved weight vector; expected a vector, a fine-tune or a run's folder"
        )
