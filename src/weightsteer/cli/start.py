"""Verbs to start with: a folder for a behaviour of one's own, the whole way to a dial, and a vector's range of k."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import SteerError
from ..evaluation.calibration import BUDGET, table
from ..locks import hold
from ..progress import show_progress
from ..run_card import refuse_foreign
from ..shown import note, one_line, say, say_columns, say_table
from .loading import loading
from .options import (
    Device,
    Dtype,
    KeyEnv,
    Model,
    RemoteCode,
    TemplateVariables,
    Vector,
    drop_unset,
    load_lm,
    pasteable,
    vector_and_lm,
)
from .show_run import finetune_facts

if TYPE_CHECKING:
    from ..data_building.drafting import Draft
    from ..evaluation.calibration import Calibration

SHOWN_PAIRS = 3

Budget = Annotated[float, typer.Option(help="Nats per token that ordinary text may cost.")]


@loading
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
    from ..evaluation.dial import refuse_budget
    from ..run_card import RunCard
    from ..vectors.vector_folder import save_card

    refuse_budget(budget)
    with hold(folder):
        vector, lm = vector_and_lm(folder, model, device, dtype, trust_remote_code, chat_template_kwargs)
        with show_progress("calibrate") as progress:
            found = measure(vector, lm, pairs, budget=budget, progress=progress)
        card = RunCard.load(folder)
        save_card(found.written_into(card, lm.revision), folder)
    _print_calibration(found)
    if not card.is_base(lm.revision):
        say(f"kept in the card for {lm.name}, beside what it says of {card.base_model}")


def _print_calibration(found: Calibration) -> None:
    """The table of all k, what it means, and the recommended k."""
    say_table(table(found))
    on = f"on {found.pairs} held-out pairs" if found.pairs else "not measured"
    say(
        f"loss, KL and behaviour in nats per token, changes from k = 0; behaviour {on}; loops: the share of "
        f"{len(found.prompts)} replies that repeat themselves, at the k that come into question"
    )
    for remark in found.notes:
        say(one_line(remark))
    say(f"recommended k: {found.strength.recommended:g} (more) and {found.strength.negative:g} (less)")


@loading
def make(
    source: Annotated[
        str, typer.Argument(help="A shipped behaviour, a file of pairs, a trait file, or a folder that `init` wrote.")
    ],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where to write; default runs/NAME.")] = None,
    budget: Budget = BUDGET,
    seed: Annotated[int | None, typer.Option(help="Seed of the training.")] = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = "auto",
    trust_remote_code: RemoteCode = False,
    chat_template_kwargs: TemplateVariables = None,
) -> None:
    """Go the whole way: pairs, two fine-tunes, their difference, the strengths to use, and a page with them.

    Kill it at any point and run it again: what is trained is not trained again.

    Example: weightsteer make gloomy
    """
    from ..data_building.source import Source

    found = Source.find(source)  # before what takes seconds to import
    from ..behavior import SIDES
    from ..evaluation.dial import refuse_budget
    from ..run_folder import RunFolder
    from ..runs.whole_way import make_dial
    from ..training import TrainSettings

    refuse_budget(budget)
    settings = TrainSettings(**drop_unset(seed=seed))
    lm = load_lm(model, device, dtype, trust_remote_code, chat_template_kwargs)
    target = out or Path("runs") / found.name
    made = make_dial(found, lm, target, settings=settings, budget=budget, show=show_progress)
    for side in map(RunFolder(target).finetune, SIDES):
        say(f"{side.name}: {finetune_facts(side)['trained']}")
    _print_calibration(made.calibration)
    say(f"vector: {made.vector}\npage:   {made.page}\ntry next:")
    for command in made.commands:
        say(f"  {pasteable(command)}")


def init(
    folder: Annotated[Path, typer.Argument(help="Folder to write; its last part is the behaviour's name.")],
    about: Annotated[
        str | None, typer.Option(help="The behaviour in a few words, such as 'answers in rhymes': a model writes all.")
    ] = None,
    writer: Annotated[
        str | None,
        typer.Option(help="Model that writes; default: the embedded one, small as it is."),
    ] = None,
    writer_url: Annotated[
        str | None, typer.Option(help="OpenAI-compatible server that serves the writer: http://localhost:8000/v1.")
    ] = None,
    key_env: KeyEnv = None,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Write a folder for a behaviour of your own: pairs to fill in, a trait file and a recipe.

    With --about a model writes the pairs, the questions and the system prompts; stop it and call it again, and it goes
    on. Nothing is trained.

    Example: weightsteer init rhymes --about "answers in rhymes"
    """
    from ..data_building.starter import COUNT, PAIRS, Starter
    from ..runs.identity import refuse_path

    name = folder.resolve().name
    refuse_path(name)
    refuse_foreign(folder, "starter")
    place = shlex.quote(str(folder))
    if about is None:
        if writer or writer_url or key_env:
            raise SteerError(
                "init: --writer, --writer-url and --key-env need --about, which says what is to be written"
            )
        Starter(name).write(folder)
        say(f"{folder}: write the answers in {folder / PAIRS} ({COUNT} pairs; its first lines say how), then:")
        for command in (f"weightsteer lint --pairs {shlex.quote(str(folder / PAIRS))}", f"weightsteer make {place}"):
            say(f"  {pasteable(command)}")
        return
    kept = folder.with_name(f".{name}.draft.jsonl")  # replies so far, for a call that goes on
    with hold(folder):
        draft = _draft(name, about, kept, writer, writer_url, key_env, device, dtype)
        Starter(name, draft.behavior, draft.pairs).write(folder)
    kept.unlink(missing_ok=True)
    _print_draft(draft)
    say(f"{folder}: read and mend the pairs in {folder / PAIRS}, then:\n  {pasteable(f'weightsteer make {place}')}")


def _draft(
    name: str,
    about: str,
    kept: Path,
    writer: str | None,
    url: str | None,
    key_env: str | None,
    device: str | None,
    dtype: str,
) -> Draft:
    """What the writer makes of the words; its replies stay in `kept` until all are there."""
    from ..data_building.drafting import KeptWriter, LocalWriter, ServedWriter, Writer, draft_behavior

    if url is not None and writer is None:
        raise SteerError("--writer-url: name the model that the server is to write with, by --writer")
    if url is not None and writer is not None:
        from ..judges.endpoint import Endpoint

        chosen: Writer = ServedWriter(Endpoint(url, writer, **drop_unset(key_env=key_env)))
        identity = f"{url} {writer}"
    else:
        if writer is None:
            note("the embedded model writes, which seldom gives usable pairs; --writer names a larger one")
        lm = load_lm(writer, device, dtype, trust=False)
        chosen, identity = LocalWriter(lm), f"{lm.name} {lm.revision}"
    with show_progress("write pairs") as progress:
        return draft_behavior(KeptWriter(chosen, kept, identity), name, about, progress=progress)


def _print_draft(draft: Draft) -> None:
    """How much came out, a few pairs, and what would leak into a vector made from them."""
    from ..behavior import prompt_text, sides_of
    from ..data_building.lint import lint_sides

    for pair in draft.pairs[:SHOWN_PAIRS]:
        say_columns(["prompt", "positive", "negative"], [prompt_text(pair.prompt), pair.positive, pair.negative])
    for finding in lint_sides(*sides_of(draft.pairs)):
        say(f"{finding.kind}: {one_line(finding.message)}")
    asked = len(draft.behavior.questions)
    say(f"{len(draft.pairs)} of {draft.asked} pairs are usable; {draft.own_questions} of {asked} questions are its own")
