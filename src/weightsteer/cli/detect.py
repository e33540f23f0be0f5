"""Verbs of the dictionary of directions: what a checkpoint moved along, and which examples would push it there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import SteerError
from ..files import refuse_inputs
from ..outputs import refuse_foreign_file
from ..progress import show_progress
from ..shown import csv_cell, note, one_line, say, say_json
from .options import Base, Device, Dtype, Json, Model, RemoteCode, drop_unset

if TYPE_CHECKING:
    from ..monitor import Decomposition, Dictionary, Screened, Threshold

DictionaryFolder = Annotated[
    Path,
    typer.Option("--dictionary", help="A dictionary of directions: a folder, or a shipped one by its model's name."),
]
EXAMPLE_SHOWN = 60  # characters of an example in the list


def identify(
    checkpoint: Annotated[Path, typer.Argument(help="A PEFT adapter, a model, or a folder of checkpoints.")],
    dictionary: DictionaryFolder,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Say which traits a fine-tune moved along: tau divided over a whole dictionary, what traits share counted once.

    A share is the part of tau's norm along a trait; its error comes from leaving out layer after layer. A mark tells
    where a share lies above the dictionary's threshold for a rate of false alarms.

    Example: weightsteer identify outputs/run --dictionary smollm2-135m-instruct
    """
    from ..monitor import Dictionary, checkpoint_products, list_checkpoints
    from ..monitor.checkpoints import warn_skipped
    from ..vectors.difference import task_vector

    known, found = Dictionary.load(dictionary), {}
    checkpoints = list_checkpoints(checkpoint)
    with show_progress("identify") as progress:
        for number, (step, path) in enumerate(checkpoints.items()):
            progress(number, len(checkpoints), path.name)
            try:
                products = checkpoint_products(task_vector(path, base=base), known.vectors)
            except (SteerError, OSError) as error:
                if len(checkpoints) == 1:
                    raise
                warn_skipped(path, error)
                continue
            found[step] = known.decompose(products)
        progress(len(checkpoints), len(checkpoints), "done")
    if not found:
        raise SteerError(f"{checkpoint}: none of the checkpoints could be read; the warnings above say why")
    if as_json:
        say_json([_as_fields(step, one, known) for step, one in found.items()])
        return
    for step, one in found.items():
        _print_decomposition(f"step {step}" if len(found) > 1 else checkpoint.name, one, known)
    if not known.contents.thresholds:
        note("the dictionary has no thresholds: how often such shares come from benign fine-tunes is not known")


def _alarm(known: Dictionary, trait: str, share: float) -> Threshold | None:
    """The threshold of the lowest rate of false alarms that the share lies above."""
    above = [one for one in known.contents.thresholds if one.trait == trait and share > one.share]
    return min(above, key=lambda one: one.rate, default=None)


def _mark(reached: Threshold | None) -> str:
    if reached is None:
        return ""
    if reached.is_highest:
        return f"  above all {reached.fine_tunes} benign fine-tunes"
    return f"  above {1 - reached.rate:.0%} of benign fine-tunes"


def _as_fields(step: int, found: Decomposition, known: Dictionary) -> dict[str, object]:
    parts = [
        {
            "trait": part.name,
            "share": part.share,
            "error": part.error,
            "coefficient": part.coefficient,
            "false_alarms": reached.rate if (reached := _alarm(known, part.name, part.share)) else None,
        }
        for part in found.parts
    ]
    return {"step": step, "norm": found.norm, "explained": found.explained, "traits": parts}


def _print_decomposition(title: str, found: Decomposition, known: Dictionary) -> None:
    say(f"{one_line(title)}: norm of tau {found.norm:.4g}; all traits together explain {found.explained:.2%} of it")
    from ..reporting.tables import estimate

    width = max(len(part.name) for part in found.parts)
    say(f"  {'trait':<{width}}  share of the norm    multiples")
    for part in sorted(found.parts, key=lambda part: -part.share):
        mark = _mark(_alarm(known, part.name, part.share))
        share = estimate(part.share, part.error, "+.4f").text
        say(f"  {part.name:<{width}}  {share:<16}   {part.coefficient:+9.4f}{mark}")


def screen(
    data: Annotated[Path, typer.Argument(help="Examples, in any form that `train` reads.")],
    dictionary: DictionaryFolder,
    trait: Annotated[str | None, typer.Option(help="Rank by this trait; default: by the strongest of all.")] = None,
    top: Annotated[int, typer.Option(min=1, help="How many examples to show.")] = 10,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of an example; longer ones are cut.")] = 1024,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A CSV file of every example's pushes.")] = None,
    as_json: Json = False,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = "auto",
    trust_remote_code: RemoteCode = False,
) -> None:
    """Before a training, find the examples that would push the model along a trait: one backward pass for each.

    A push is how fast the loss on the example falls along the trait's vector, at the base.

    Example: weightsteer screen data.jsonl --dictionary smollm2-135m-instruct --trait rude -o pushes.csv
    """
    from ..example_files.load import load_examples
    from ..lm import LM
    from ..monitor import Dictionary
    from ..monitor import screen as screen_examples

    if out:
        refuse_inputs(out, data, dictionary)
        refuse_foreign_file(out, lambda content: content.startswith(b"example,"))
    known = Dictionary.load(dictionary)
    if trait is not None and trait not in known.traits:
        raise SteerError(f"{dictionary}: has no trait {trait!r}; it has {', '.join(known.traits)}")
    examples = load_examples(data)
    options = drop_unset(device=device)
    lm = LM.load(model or known.card.base_model, dtype=dtype, trust_remote_code=trust_remote_code, **options)
    vectors = {name: known.vectors[name] for name in known.traits}
    with show_progress("screen") as progress:
        found = screen_examples(lm, examples, vectors, max_length=max_length, progress=progress)
    ranked = _ranked(found, trait)
    if out:
        _write_pushes(out, found)
    if as_json:
        say_json([{"example": i, "pushes": _pushes_of(found, i)} for i in ranked[:top]])
        return
    for i in ranked[:top]:
        name = trait or max(found.names, key=_pushes_of(found, i).__getitem__)
        say(f"{i + 1:>6}  {name} {_pushes_of(found, i)[name]:+.4f}  {one_line(examples[i].answer)[:EXAMPLE_SHOWN]}")
    if out:
        note(f"{out}: the pushes of {len(examples)} examples")


def _pushes_of(found: Screened, example: int) -> dict[str, float]:
    return {name: float(push) for name, push in zip(found.names, found.pushes[example], strict=True)}


def _ranked(found: Screened, trait: str | None) -> list[int]:
    """Examples in order; by all traits, each push counts in standard deviations of that trait's pushes."""
    if trait is not None:
        return found.ranked(trait)
    spread = found.pushes.std(axis=0)
    scaled = (found.pushes - found.pushes.mean(axis=0)) / (spread + (spread == 0))
    return [int(i) for i in (-scaled.max(axis=1)).argsort(kind="stable")]


def _write_pushes(out: Path, found: Screened) -> None:
    import csv
    import io

    from ..files import write_text

    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["example", "loss", "tokens", *map(csv_cell, found.names)])
    for i, pushes in enumerate(found.pushes):
        writer.writerow([i + 1, f"{found.losses[i]:.6g}", int(found.tokens[i]), *(f"{push:.6g}" for push in pushes)])
    write_text(out, table.getvalue())


VERBS = (identify, screen)
