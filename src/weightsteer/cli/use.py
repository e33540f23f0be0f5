"""Verbs that use a vector: steer, talk, hand it to other engines."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import SteerError
from ..progress import shown
from .options import (
    Device,
    Dtype,
    Model,
    Out,
    RemoteCode,
    Vector,
    given,
    number,
    numbers,
    refuse_input,
    require_base,
    shown_strengths,
    vector_and_lm,
)

if TYPE_CHECKING:
    from ..vector import WeightVector


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
) -> None:
    """Answer one prompt at several strengths, side by side.

    Example: weightsteer steer runs/syc/vector "I think my poem is perfect. Is it?" --k=-4,0,4
    """
    wanted = numbers(k) if k else None
    vector, lm = vector_and_lm(folder, model, device, dtype, trust_remote_code)

    ks = wanted or shown_strengths(vector)
    from ..fan import fan

    _print_side_by_side(ks, fan(vector, lm.with_system_prompt(system), prompt, ks, max_new_tokens=max_new_tokens))


def _print_side_by_side(ks: Sequence[float], replies: Sequence[str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*[f"k = {k:g}" for k in ks], box=box.SIMPLE_HEAD)
    table.add_row(*[Text(reply) for reply in replies])  # Text: a model's brackets are not markup
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def chat(
    folder: Vector,
    k: Annotated[str | None, typer.Option("--k", help="Strength at the start; default: the card's.")] = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = "auto",
    trust_remote_code: RemoteCode = False,
) -> None:
    """Talk to the steered model; `/k 1.5` changes the strength, `/reset` forgets, `/quit` ends.

    Example: weightsteer chat runs/syc/vector --k=-3
    """
    start = number(k) if k else None
    vector, lm = vector_and_lm(folder, model, device, dtype, trust_remote_code)
    from ..chat import talk

    talk(vector, lm, k=start if start is not None else _recommended(vector))


def _base_folder(vector: WeightVector, model: str | None) -> Path:
    from ..locate import checkpoint_folder

    if model:
        return checkpoint_folder(model)
    require_base(vector.card)
    return checkpoint_folder(vector.card.base_model, revision=vector.card.base_commit)


def _recommended(vector: WeightVector) -> float:
    if vector.card.strength is None or not vector.card.strength.recommended:
        raise SteerError("the vector's card has no recommended k (see `weightsteer show`); give one with --k")
    return vector.card.strength.recommended


def export(
    source: Annotated[
        str, typer.Argument(help="A saved vector; a fine-tune, with --minus for the other side; gguf: activations.")
    ],
    out: Out,
    to: Annotated[
        str, typer.Option("--to", help="peft (adapter), merged (checkpoint) or gguf (llama.cpp's control vector).")
    ] = "peft",
    k: Annotated[str | None, typer.Option("--k", help="Strength to fold in; default: the card's.")] = None,
    minus: Annotated[str | None, typer.Option(help="The fine-tune on D-: w = SOURCE - MINUS.")] = None,
    base: Annotated[str | None, typer.Option(help="The base of SOURCE, where a checkpoint or DoRA needs it.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="merged, gguf: the base or a later fine-tune of it.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="merged: float32, bfloat16 or float16; default: as it is.")] = None,
    rounding: Annotated[str | None, typer.Option(help="merged: nearest or stochastic.")] = None,
    seed: Annotated[int | None, typer.Option(help="merged: seed of stochastic rounding.")] = None,
    workers: Annotated[int | None, typer.Option(help="merged: threads; default: one a core.")] = None,
    max_rank: Annotated[int | None, typer.Option(help="peft: cut to the nearest of this rank.")] = None,
    layer: Annotated[
        int | None, typer.Option(help="gguf: the layer to steer at, from 1 up; layer 0 is out of its reach.")
    ] = None,
) -> None:
    """Write k w for other engines: a PEFT adapter, a merged checkpoint theta + k w, or k a as a control vector.

    Example: weightsteer export runs/syc/vector --to peft --k=-3 -o candid-adapter
    """
    if to not in ("peft", "merged", "gguf"):
        raise SteerError(f"--to: expected peft or merged (of a vector), or gguf (of activations), found {to!r}")
    chosen = number(k) if k else None
    refuse_input(out, source, minus, base, model)
    merging = given(dtype=dtype, rounding=rounding, seed=seed, workers=workers)
    if merging and to != "merged":
        raise SteerError(f"--{next(iter(merging))}: is for --to merged; the other forms keep float32")
    if max_rank is not None and to != "peft":
        raise SteerError("--max-rank: is for --to peft; the other forms have no rank")
    if to == "gguf":
        if minus or base:
            raise SteerError("--minus and --base: are for weights; --to gguf takes a folder of saved activations")
        _export_control(Path(source), out, chosen, layer, model)
        return
    if layer is not None:
        raise SteerError("--layer: is for --to gguf; weights are steered in every layer that was trained")
    from ..extract import contrast_vector, task_vector

    vector = contrast_vector(source, minus, base=base) if minus else task_vector(source, base=base)
    strength = chosen if chosen is not None else _recommended(vector)
    if to == "peft":
        from ..export import export_adapter

        error = export_adapter(vector, out, k=strength, max_rank=max_rank)
        cut = f", cut to rank {max_rank}: {error:.2%} of the vector is lost" if max_rank else ""
        print(f"{out}: PEFT adapter at k = {strength:g}{cut}")
        return
    from ..merge import MergeSettings, export_merged

    with shown("merge") as progress:
        merged = export_merged(
            vector, _base_folder(vector, model), out, k=strength, settings=MergeSettings(**merging), progress=progress
        )
    print(
        f"{out}: merged at k = {strength:g} in {merged.dtype}; rounding missed {merged.delta_error:.1%} of the change "
        f"and left {merged.unchanged_share:.1%} of the entries as they were"
    )
    for name, shares in merged.other_dtypes.items():
        if name != merged.dtype:
            print(f"  --dtype {name}: {shares['delta_error']:.1%} and {shares['unchanged_share']:.1%}")


def _export_control(folder: Path, out: Path, k: float | None, layer: int | None, model: str | None) -> None:
    from ..activations import ACTIVATION_FILE, ActivationVector
    from ..control import export_control, model_type_of

    if k is None:
        raise SteerError("--k: is needed with --to gguf; activations have no measured range of k")
    if not (folder / ACTIVATION_FILE).is_file():
        raise SteerError(
            f"{folder}: no saved activations ({ACTIVATION_FILE}); expected what `ActivationVector.save` or a run wrote"
        )
    vector = ActivationVector.load(folder)
    if layer is None and len(vector.layers) > 1:
        raise SteerError(
            f"--layer: is needed with --to gguf; {folder} holds layers {min(vector.layers)} to {max(vector.layers)}, "
            "of which activation steering takes one"
        )
    chosen = vector if layer is None else vector.only(layer)
    if not model:
        require_base(vector.card)
    revision = None if model else vector.card.base_commit
    kind = model_type_of(model or vector.card.base_model, revision=revision)
    export_control(chosen, out, k=k, model_type=kind)
    (steered,) = chosen.layers
    print(f"{out}: control vector for llama.cpp at k = {k:g}, layer {steered}; use it with --control-vector")


VERBS = (steer, chat, export)
