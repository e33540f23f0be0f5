"""Verbs that use a vector: one prompt at several strengths, or a talk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import SteerError
from ..progress import show_progress
from ..shown import note, say, say_columns, say_json
from .loading import loading
from .options import (
    Device,
    Dtype,
    Json,
    Model,
    RemoteCode,
    TemplateVariables,
    Vector,
    drop_unset,
    number,
    numbers,
    shown_strengths,
    starting_k,
    vector_and_lm,
    warn_unseen,
)

if TYPE_CHECKING:
    from ..lm import LM
    from ..vectors.weight_vector import WeightVector

SAMPLED = 0.7  # the temperature of --sample

Tokens = Annotated[int | None, typer.Option(min=1, help="Longest reply, in tokens.")]
System = Annotated[str | None, typer.Option(help="System prompt; default: the template's own.")]
Temperature = Annotated[
    float | None, typer.Option(min=0.0, help="Sample at this temperature; default: 0, the likeliest token.")
]
Seed = Annotated[int | None, typer.Option(min=0, help="Seed of the sampling; default: 0.")]


@loading
def steer(
    folder: Vector,
    prompt: Annotated[str, typer.Argument(help="What the user says.")],
    k: Annotated[str | None, typer.Option("--k", help="Strengths, e.g. -2,0,2; default: the card's.")] = None,
    max_new_tokens: Tokens = None,
    system: System = None,
    sample: Annotated[bool, typer.Option("--sample", help=f"Sample, at a temperature of {SAMPLED:g}.")] = False,
    temperature: Temperature = None,
    seed: Seed = None,
    as_json: Json = False,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = "auto",
    trust_remote_code: RemoteCode = False,
    chat_template_kwargs: TemplateVariables = None,
) -> None:
    """Answer one prompt at several strengths, side by side; at a single one the reply is printed as it comes.

    Example: weightsteer steer runs/syc/vector "I think my poem is perfect. Is it?" --k=-4,0,4
    """
    wanted = numbers(k) if k is not None else None
    temperature = SAMPLED if sample and temperature is None else temperature
    vector, lm = vector_and_lm(folder, model, device, dtype, trust_remote_code, chat_template_kwargs)
    ks, lm = wanted or shown_strengths(vector), lm.with_system_prompt(system)
    if vector.card.strength and (warning := vector.card.strength.warning(ks)):
        note(warning)
    warn_unseen(vector, ks)
    options = drop_unset(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    if len(ks) == 1 and not as_json:
        _stream(vector, lm, prompt, ks[0], **options)
        return
    from ..steering.several_k import generate_at_strengths

    with show_progress("steer") as progress:
        replies = generate_at_strengths(vector, lm, prompt, ks, progress=progress, **options)
    if as_json:
        found = [{"k": k, "reply": reply} for k, reply in zip(ks, replies, strict=True)]
        say_json({"prompt": prompt, "system": system, "model": lm.name, **options, "replies": found})
    else:
        say_columns([f"k = {k:g}" for k in ks], replies)


def _stream(vector: WeightVector, lm: LM, prompt: str, k: float, **options: float) -> None:
    """Print one reply as it comes."""
    from ..steering.several_k import LONGEST
    from ..steering.talk import Pieces
    from ..thinking import why_unanswered

    settings = {"max_new_tokens": LONGEST, **options}
    with vector.applied(lm, k):
        shown = Pieces(lm, lambda text: say(text, end="", flush=True))
        reply = lm.reply_aloud(prompt, shown, **settings)  # type: ignore[arg-type]
    say()
    if missing := why_unanswered([reply]):
        raise SteerError(missing)


@loading
def chat(
    folder: Vector,
    k: Annotated[str | None, typer.Option("--k", help="Strength at the start; default: the card's.")] = None,
    max_new_tokens: Tokens = None,
    system: System = None,
    temperature: Temperature = None,
    seed: Seed = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = "auto",
    trust_remote_code: RemoteCode = False,
    chat_template_kwargs: TemplateVariables = None,
) -> None:
    """Talk to the steered model; `/k 1.5` turns the dial, `/again -1` replies anew, `/help` lists all commands.

    Ctrl-C stops a reply, and the talk goes on.

    Example: weightsteer chat runs/syc/vector --k=-3
    """
    start = number(k) if k is not None else None
    vector, lm = vector_and_lm(folder, model, device, dtype, trust_remote_code, chat_template_kwargs)
    from ..steering.chat import talk

    options = drop_unset(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    strength = start if start is not None else starting_k(vector)
    warn_unseen(vector, [strength])
    talk(vector, lm, k=strength, system=system, **options)


VERBS = (steer, chat)
