"""Verbs to start with: a folder for a behaviour of one's own, the whole way to a dial, and a vector's range of k."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..evaluation.calibration import BUDGET, table
from ..locks import hold
from ..progress import show_progress
from ..shown import one_line, say, say_table
from .options import Device, Dtype, Model, RemoteCode, TemplateVariables, Vector, vector_and_lm

if TYPE_CHECKING:
    from ..evaluation.calibration import Calibration

Budget = Annotated[float, typer.Option(help="Nats per token that ordinary text may cost.")]


def calibrate(
    folder: Vector,
    pairs: Annotated[
        str | None, typer.Option(help="Pairs that were not trained on; default: those that the vector's card holds.")
    ] = None,
    budget: Budget = BUDGET,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = "auto",
    trust_remote_code: RemoteCode = False,
    chat_template_kwargs: TemplateVariables = None,
) -> None:
    """Find the range of k that the model bears and the k to use on each side, and write both into the vector's card.

    At each k: the loss on ordinary text, the KL to the base, the behaviour on held-out pairs, and replies that loop.

    Example: weightsteer calibrate runs/mine/vector
    """
    from ..evaluation.dial import calibrate as measure
    from ..run_card import RunCard

    with hold(folder):
        vector, lm = vector_and_lm(folder, model, device, dtype, trust_remote_code, chat_template_kwargs)
        with show_progress("calibrate") as progress:
            found = measure(vector, lm, pairs, budget=budget, progress=progress)
        found.written_into(RunCard.load(folder)).save(folder)
    _print_calibration(found)


def _print_calibration(found: Calibration) -> None:
    """The table of all k, what it means, and the recommended k."""
    say_table(table(found))
    on = f"on {found.pairs} held-out pairs" if found.pairs else "not measured"
    say(
        f"loss, KL and behaviour in nats per token, changes from k = 0; behaviour {on}; loops: the share of "
        f"{len(found.prompts)} replies that repeat themselves"
    )
    for note in found.notes:
        say(one_line(note))
    say(f"recommended k: {found.strength.recommended:g} (more) and {found.strength.negative:g} (less)")


VERBS = (calibrate,)
