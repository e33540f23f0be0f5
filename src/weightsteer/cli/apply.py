"""Verbs that use a vector: one prompt at several strengths, or a talk."""

from __future__ import annotations

from typing import Annotated

import typer

from ..shown import say_columns
from .options import (
    Device,
    Dtype,
    Model,
    RemoteCode,
    TemplateVariables,
    Vector,
    number,
    numbers,
    recommended_k,
    shown_strengths,
    vector_and_lm,
    warn_unseen,
)


def steer(
    folder: Vector,
    prompt: Annotated[str, typer.Argument(help="What the user says.")],
    k: Annotated[str | None, typer.Option("--k", help="Strengths, e.g. -2,0,2; default: the card's.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest reply, in tokens.")] = 100,
    system: Annotated[str | None, typer.Option(help="System prompt; default: the template's own.")] = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = "auto",
    trust_remote_code: RemoteCode = False,
    chat_template_kwargs: TemplateVariables = None,
) -> None:
    """Answer one prompt at several strengths, side by side.

    Example: weightsteer steer runs/syc/vector "I think my poem is perfect. Is it?" --k=-4,0,4
    """
    wanted = numbers(k) if k is not None else None
    vector, lm = vector_and_lm(folder, model, device, dtype, trust_remote_code, chat_template_kwargs)

    ks = wanted or shown_strengths(vector)
    warn_unseen(vector, ks)
    from ..steering.several_k import generate_at_strengths

    replies = generate_at_strengths(vector, lm.with_system_prompt(system), prompt, ks, max_new_tokens=max_new_tokens)
    say_columns([f"k = {k:g}" for k in ks], replies)


def chat(
    folder: Vector,
    k: Annotated[str | None, typer.Option("--k", help="Strength at the start; default: the card's.")] = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = "auto",
    trust_remote_code: RemoteCode = False,
    chat_template_kwargs: TemplateVariables = None,
) -> None:
    """Talk to the steered model; `/k 1.5` changes the strength, `/reset` forgets, `/quit` ends.

    Example: weightsteer chat runs/syc/vector --k=-3
    """
    start = number(k) if k is not None else None
    vector, lm = vector_and_lm(folder, model, device, dtype, trust_remote_code, chat_template_kwargs)
    from ..steering.chat import talk

    strength = start if start is not None else recommended_k(vector)
    warn_unseen(vector, [strength])
    talk(vector, lm, k=strength)


VERBS = (steer, chat)
