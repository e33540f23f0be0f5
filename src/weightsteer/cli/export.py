"""`weightsteer export peft|adapters|merged|gguf-lora|gguf`: a vector for other engines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import SteerError
from ..files import refuse_inputs
from ..progress import show_progress
from ..shown import say
from .options import Base, Out, drop_unset, number, numbers, recommended_k, refuse_same, require_base
from .overview import VerbsByUse

if TYPE_CHECKING:
    from ..vectors.weight_vector import WeightVector

app = typer.Typer(
    help="Write k w for other engines: as a PEFT adapter, a merged checkpoint, or files of llama.cpp.",
    cls=VerbsByUse,
    no_args_is_help=True,
    rich_markup_mode=None,
)

Source = Annotated[str, typer.Argument(help="A saved vector, or a fine-tune: a folder or hub id.")]
Strength = Annotated[str | None, typer.Option("--k", help="Strength to fold in; default: the card's.")]
Negative = Annotated[str | None, typer.Option(help="The fine-tune on D-: w = SOURCE - NEGATIVE.")]


@app.command()
def peft(
    source: Source,
    out: Out,
    k: Strength = None,
    negative: Negative = None,
    base: Base = None,
    max_rank: Annotated[int | None, typer.Option(help="Cut to the nearest of this rank.")] = None,
) -> None:
    """Write k w as a PEFT adapter: PEFT, vLLM and llama.cpp's converter take it, and their scale 1 is k.

    Example: weightsteer export peft runs/syc/vector --k=-3 -o candid-adapter
    """
    chosen = number(k) if k is not None else None
    refuse_inputs(out, source, negative, base)
    vector = _vector(source, negative, base)
    strength = chosen if chosen is not None else recommended_k(vector)
    error = vector.export_peft(out, k=strength, max_rank=max_rank)
    cut = f", cut to rank {max_rank}: {error:.2%} of the vector is lost" if max_rank else ""
    say(f"{out}: PEFT adapter at k = {strength:g}{cut}")


@app.command()
def adapters(
    source: Source,
    out: Out,
    k: Annotated[str, typer.Option("--k", help="Strengths, e.g. -1,-0.5,0.5,1.")],
    layout: Annotated[str | None, typer.Option(help="peft, for SGLang and LoRAX, or mlx. Default: peft.")] = None,
    name: Annotated[str | None, typer.Option(help="What to call the vector. Default: its folder's name.")] = None,
    negative: Negative = None,
    base: Base = None,
) -> None:
    """Write k w as a set of adapters, one for each k, and print the command that serves it.

    Engines that cannot make an adapter from a name, as vLLM with our plugin can, take such a set.

    Example: weightsteer export adapters runs/syc/vector --k=-1,-0.5,0.5,1 -o syc-adapters
    """
    ks = numbers(k)
    refuse_inputs(out, source, negative, base)
    from ..export.adapter_set import export_adapter_set, read_adapter_set
    from ..export.set_commands import SET_ENGINES
    from .serve_command import set_line

    vector = _vector(source, negative, base)
    export_adapter_set(vector, out, ks=ks, **drop_unset(name=name, layout=layout))
    card, found = read_adapter_set(out)
    say(f"{out}: {len(found)} adapters of rank {card.settings['rank']}: {', '.join(found)}")
    for engine, (reads, _) in SET_ENGINES.items():
        if reads == card.settings["layout"]:
            say(f"  {engine}: {set_line(engine, base, card, found, out)}")


@app.command()
def merged(
    source: Source,
    out: Out,
    k: Strength = None,
    negative: Negative = None,
    base: Base = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="What to merge into: the base, or a later fine-tune of it.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as it is.")] = None,
    rounding: Annotated[str | None, typer.Option(help="nearest or stochastic.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of stochastic rounding.")] = None,
    workers: Annotated[int | None, typer.Option(help="Threads; default: one a core.")] = None,
) -> None:
    """Write theta + k w as a checkpoint, streamed, and say what rounding left of the change.

    Example: weightsteer export merged runs/syc/vector --k=-3 -o candid-model
    """
    chosen = number(k) if k is not None else None
    refuse_inputs(out, source, negative, base, model)
    from ..export.merge import MergeSettings, export_merged
    from ..export.rounding import describe_rounding

    settings = MergeSettings(**drop_unset(dtype=dtype, rounding=rounding, seed=seed, workers=workers))
    vector = _vector(source, negative, base)
    strength = chosen if chosen is not None else recommended_k(vector)
    change, onto, times = _onto(vector, strength, source, model, base)
    with show_progress("merge") as progress:
        report = export_merged(change, onto, out, k=times, settings=settings, progress=progress)
    say(
        f"{out}: merged at k = {strength:g} in {report.dtype}; {describe_rounding(report.delta_error)}; "
        f"{report.unchanged_share:.1%} of the entries stay as they were"
    )
    for name, shares in report.other_dtypes.items():
        if name != report.dtype:
            say(f"  --dtype {name}: {describe_rounding(shares['delta_error'])}")


@app.command("gguf-lora")
def gguf_lora(
    source: Source,
    out: Out,
    k: Annotated[str, typer.Option("--k", help="Strength to fold in; at 1 llama.cpp's scale is k itself.")] = "1",
    negative: Negative = None,
    base: Base = None,
    max_rank: Annotated[int | None, typer.Option(help="Cut to the nearest of this rank.")] = None,
    leave_out: Annotated[bool, typer.Option("--leave-out", help="Leave out what no such file can hold.")] = False,
) -> None:
    """Write w as a LoRA for llama.cpp, whose scale is then k: one for each request.

    Example: weightsteer export gguf-lora runs/syc/vector -o syc.gguf
    """
    chosen = number(k)
    refuse_inputs(out, source, negative, base)
    from ..checkpoints.locate import base_of
    from ..export.gguf_lora import export_gguf_lora
    from ..export.llama_cpp import config_of

    vector = _vector(source, negative, base)
    if not base:
        require_base(vector.card, "--base")
    name = base or base_of(vector.card, Path(source))
    config = config_of(name, revision=None if base else vector.card.base_commit, option="--base")
    file = export_gguf_lora(vector, out, config=config, k=chosen, max_rank=max_rank, leave_out=leave_out)
    cut = f", {file.error:.2%} of the vector lost" if max_rank else ""
    say(f"{out}: LoRA for llama.cpp at rank {file.rank}{cut}; its scale 1 is k = {chosen:g}")
    if file.left_out:
        more = f" and {len(file.left_out) - 4} more" if file.left_out[4:] else ""
        say(f"  left out: {', '.join(file.left_out[:4])}{more}")


@app.command()
def gguf(
    folder: Annotated[Path, typer.Argument(help="Folder of saved activations.")],
    out: Out,
    k: Annotated[str, typer.Option("--k", help="Strength to fold in.")],
    layer: Annotated[
        int | None, typer.Option(help="The layer to steer at, from 1 up; layer 0 is out of its reach.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The model whose type the file names; default: the card's.")
    ] = None,
) -> None:
    """Write k a as a control vector for llama.cpp: activation steering at one layer.

    Example: weightsteer export gguf runs/syc/activations --k=4 --layer 12 -o syc.gguf
    """
    chosen = number(k)
    refuse_inputs(out, folder, model)
    from ..checkpoints.locate import base_of
    from ..export.llama_cpp import export_control, model_type_of
    from ..steering.activations import ACTIVATION_FILE, ActivationVector

    if not (folder / ACTIVATION_FILE).is_file():
        raise SteerError(
            f"{folder}: no saved activations ({ACTIVATION_FILE}); expected what `ActivationVector.save` or a run wrote"
        )
    vector = ActivationVector.load(folder)
    if layer is None and len(vector.layers) > 1:
        raise SteerError(
            f"--layer: is needed; {folder} holds layers {min(vector.layers)} to {max(vector.layers)}, "
            "of which activation steering takes one"
        )
    steering = vector if layer is None else vector.only(layer)
    if not model:
        require_base(vector.card)
    revision = None if model else vector.card.base_commit
    kind = model_type_of(model or base_of(vector.card, folder), revision=revision)
    export_control(steering, out, k=chosen, model_type=kind)
    (steered,) = steering.layers
    say(f"{out}: control vector for llama.cpp at k = {chosen:g}, layer {steered}; use it with --control-vector")


def _vector(source: str, negative: str | None, base: str | None) -> WeightVector:
    from ..vectors.difference import subtract_finetunes, task_vector

    if negative is None:
        return task_vector(source, base=base)
    refuse_same(source, negative)
    return subtract_finetunes(source, negative, base=base)


def _onto(
    vector: WeightVector, k: float, source: str, model: str | None, base: str | None
) -> tuple[WeightVector, Path, float]:
    """What to merge, into which folder, and how often: of an adapter, its change and k w into its base."""
    from ..checkpoints.adapted import adapted_model
    from ..checkpoints.checkpoint import fingerprint
    from ..checkpoints.locate import base_of, checkpoint_folder
    from ..vectors.difference import task_vector
    from ..vectors.expression import derived_card

    if not model:
        require_base(vector.card)
    onto = model or base_of(vector.card, Path(source))
    if adapter := adapted_model(onto):
        below = None if base and Path(base).resolve() == Path(onto).resolve() else base
        change = task_vector(onto, base=below)
        if vector.card.base_revision == fingerprint(adapter.folder):  # it was trained with the adapter in the model
            name, revision = change.card.base_model, change.card.base_revision
            vector = replace(vector, card=replace(vector.card, base_model=name, base_revision=revision))
        total = change + k * vector
        card = derived_card(vector.card, f"adapter + {k:g} * w", {"adapter": change, "w": vector})
        folder = checkpoint_folder(below or adapter.base, revision=None if below else adapter.revision)
        return replace(total, card=card), folder, 1.0
    return vector, checkpoint_folder(onto, revision=None if model else vector.card.base_commit), k
