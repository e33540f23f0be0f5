"""Verbs that look at directions: one vector, many beside each other, a training run against them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import SteerError
from ..files import is_empty, refuse_inputs
from ..locks import hold
from ..outputs import refuse_foreign_file
from ..progress import show_progress
from ..shown import csv_cell, note, one_line, say, say_json
from .options import Base, Device, Json, warn_unseen
from .show_run import card_fields, finetune_facts, is_run, refuse_nothing, run_facts

if TYPE_CHECKING:
    from ..monitor import Reading
    from ..monitor.alerts import AnyAlert
    from ..vectors.similarity import Similarity
    from ..vectors.weight_vector import WeightVector


def show(
    folder: Annotated[Path, typer.Argument(help="A saved weight vector, a fine-tune, or a run's folder.")],
    others: Annotated[
        list[Path] | None, typer.Argument(help="Vectors to compare it with: other seeds, others.")
    ] = None,
    positive: Annotated[
        Path | None, typer.Option(help="The fine-tune on D+; default: `positive` beside the vector.")
    ] = None,
    negative: Annotated[Path | None, typer.Option(help="The fine-tune on D-; default: `negative` beside it.")] = None,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Show a vector: base, training, range of k, and its geometry: energy, ranks, the two sides, likeness to others.

    Of a run's folder it shows what is finished, of a fine-tune its training and its geometry.

    Example: weightsteer show runs/syc/vector runs/syc-seed1/vector runs/gloomy/vector
    """
    refuse_nothing(folder)
    if is_run(folder):
        _show_run(folder, as_json, others)
        return
    from ..vectors.difference import task_vector
    from ..vectors.geometry import facts, geometry
    from ..vectors.visibility import size_in_words

    vector = task_vector(folder, base=base)
    card, found = vector.card, geometry(vector)
    lines = {
        "base": card.base_model + (f" ({card.base_revision[:12]})" if card.base_revision else ""),
        "made": card.made + ("" if card.seed is None else f", seed {card.seed}"),
        **finetune_facts(folder),
        "k": card.strength.described if card.strength else "not measured",
        **{f"k {model[:7]}": f"{there.described}, on this model" for model, there in card.strengths.items()},
        **({"budget": _budget(card.strength.budget)} if card.strength and card.strength.budget else {}),
        **size_in_words(vector),
        **facts(found, _sides(folder, positive, negative, base)),
    }
    likeness = {str(other): _likeness(vector, other, base) for other in others or []}
    if as_json:
        fields = {"folder": str(folder), "card": card_fields(folder), "geometry": asdict(found), "others": likeness}
        say_json(fields)
        return
    for name, text in lines.items():
        say(f"{name:<9} {one_line(text)}")
    warn_unseen(vector, card.strength.shown if card.strength else (-1.0, 1.0))
    for other, both in likeness.items():
        _print_likeness(other, both)
    _print_shares("layer", {f"{layer}": share for layer, share in found.by_layer.items()})
    _print_shares("module", found.by_module)


def _show_run(folder: Path, as_json: bool, others: Sequence[Path] | None) -> None:
    if others:
        raise SteerError(f"{folder}: is a run's folder; name its vector to compare it, {folder / 'vector'}")
    found = run_facts(folder)
    if as_json:
        say_json({"folder": str(folder), **found})
        return
    for name, text in found.items():
        say(f"{name:<9} {one_line(text)}")


def _budget(budget: Mapping[str, float]) -> str:
    """Which losses the recommended k may cost: "prose/nll up to 0.1"."""
    return ", ".join(f"{metric} up to {limit:g}" for metric, limit in budget.items())


def _sides(
    folder: Path, positive: Path | None, negative: Path | None, base: str | None
) -> tuple[WeightVector, WeightVector] | None:
    """The task vectors of the two fine-tunes, given or beside the vector; None where they are not there."""
    from ..run_folder import RunFolder
    from ..vectors.difference import task_vector

    run = RunFolder(folder.parent)
    two = [positive or run.finetune("positive"), negative or run.finetune("negative")]
    if not (positive or negative) and (folder in two or not all(side.is_dir() for side in two)):
        return None
    return task_vector(two[0], base=base), task_vector(two[1], base=base)


def _likeness(vector: WeightVector, folder: Path, base: str | None) -> dict[str, float]:
    """Cosine and shared main directions of two vectors, as far as they have them: a zero vector has no direction."""
    from ..vectors.difference import task_vector
    from ..vectors.geometry import overlap

    other = task_vector(folder, base=base)
    if not (vector.norm() and other.norm()):
        return {}
    shared = overlap(vector, other)
    return {"cosine": vector.cosine(other), **(asdict(shared) if shared else {})}


def _print_likeness(name: str, both: Mapping[str, float]) -> None:
    if not both:
        say(f"{name}: one of the two is zero, so that they have no cosine")
        return
    if len(both) == 1:
        say(f"{name}: cosine {both['cosine']:+.4f}; no matrix of which both have factors")
        return
    say(
        f"{name}: cosine {both['cosine']:+.4f}; shared main directions: written {both['outputs']:.3f} "
        f"(chance {both['chance_outputs']:.3f}), read {both['inputs']:.3f} (chance {both['chance_inputs']:.3f})"
    )


def _print_shares(what: str, shares: Mapping[str, float]) -> None:
    largest, width = max(shares.values(), default=0.0), max(map(len, shares), default=0)
    if not largest:  # the vector is zero
        return
    say(f"energy by {what}")
    for name, share in shares.items():
        say(f"  {name:>{width}} {share:7.2%} {'#' * round(40 * share / largest)}")


def cosine(
    sources: Annotated[list[str], typer.Argument(help="Vectors, adapters or checkpoints: folders or hub ids.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write OUT.csv, .npz, .png and .html too.")] = None,
    base: Base = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Cosines of vectors and fine-tunes of one base, each with each: a table, and a heat map with like ones together.

    Example: weightsteer cosine runs/syc/vector runs/gloomy/vector runs/mine/positive -o similarity
    """
    from ..vectors.difference import task_vector
    from ..vectors.similarity import labels, similarities, table

    if len(sources) < 2:
        raise SteerError("cosine: expected two or more vectors")
    if out:
        _refuse_foreign_outputs(out, *sources, base)
    vectors = {name: task_vector(source, base=base) for name, source in zip(labels(sources), sources, strict=True)}
    with show_progress("cosine") as progress:
        found = similarities(vectors, device=device, progress=progress)
    if as_json:
        say_json({"names": list(found.names), "cosines": [[float(value) for value in row] for row in found.cosines]})
    else:
        say(table(found.names, found.cosines))
    if out:
        found.save(out)
        page = _draw_heatmap(out, found)
        (note if as_json else say)(f"{out}.csv, {out}.npz, {out}.png, {page}")


def _draw_heatmap(out: Path, found: Similarity) -> Path:
    """The picture, and the page with every pair in a table; returns the page's path."""
    from ..files import write_bytes
    from ..reporting.charts import png
    from ..reporting.direction_charts import heatmap
    from ..reporting.pages import write_figures

    names, cosines = found.names, found.cosines
    write_bytes(out.with_name(f"{out.name}.png"), png(heatmap(names, cosines)))
    pairs = [
        [names[i], names[j], f"{cosines[i, j]:+.4f}"]
        for i, j in sorted(combinations(range(len(names)), 2), key=lambda pair: -abs(cosines[pair]))
    ]
    return write_figures(
        out.with_name(f"{out.name}.html"),
        "Cosines",
        [(heatmap(names, cosines, fill=True).to_dict(), "")],
        intro="Over all parameters; like vectors are neighbours. 1 is the same direction, 0 nothing in common.",
        table=[["Vector", "Other vector", "Cosine"], *pairs],
        wide=True,
    )


def _refuse_foreign_outputs(out: Path, *sources: str | None) -> None:
    """Check that what `cosine` writes is free, or was written by it: then the table of numbers is among it."""
    files = [out.with_name(f"{out.name}.{suffix}") for suffix in ("csv", "npz", "png", "html")]
    for path in files:
        refuse_inputs(path, *sources)
    ours = files[1].is_file() and b"cosines.npy" in files[1].read_bytes()
    for path in files:
        refuse_foreign_file(path, lambda _: ours)


def monitor(
    checkpoints: Annotated[Path, typer.Argument(help="Folder of checkpoints: PEFT adapters or full models.")],
    vectors: Annotated[list[str] | None, typer.Option("--vectors", help="Folders of vectors.")] = None,
    controls: Annotated[
        list[str] | None, typer.Option("--controls", help="Vectors and fine-tunes that are there for the null band.")
    ] = None,
    dictionary: Annotated[
        Path | None, typer.Option(help="A dictionary of directions (folder, or a shipped one): its traits are watched.")
    ] = None,
    base: Base = None,
    alert: Annotated[
        str | None, typer.Option(help="Exit with 3 if a reading gets there: z=4, or 'evil: fpr=0.01' by a dictionary.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the readings, table and charts.")] = Path(
        "monitor"
    ),
) -> None:
    """Watch a training run in weight space: cosine, projection and z of every checkpoint against saved vectors.

    Run it again while the training goes on: only new checkpoints are read.

    Example: weightsteer monitor outputs/run --vectors runs/evil/vector runs/sycophancy/vector -o monitor
    """
    from ..monitor import WHOLE, Alert, Dictionary, describe, list_checkpoints, read_checkpoints, verdict
    from ..monitor.checkpoints import READINGS_FILE
    from ..vectors.difference import task_vector
    from ..vectors.similarity import labels

    refuse_inputs(out, checkpoints, *(vectors or []), *(controls or []), dictionary, base)
    known = Dictionary.load(dictionary) if dictionary else None
    limit = Alert.parse(alert, known) if alert is not None else None
    watching, sources = vectors or [], [*(vectors or []), *(controls or [])]
    if not watching and not known:
        raise SteerError("monitor: expected vectors (--vectors) or a dictionary of directions (--dictionary)")
    if out.exists() and not (out / READINGS_FILE).exists() and (not out.is_dir() or not is_empty(out)):
        raise SteerError(f"{out}: exists and was not made by weightsteer; choose another output")
    names = labels(sources) if sources else []
    loaded = {name: task_vector(source, base=base) for name, source in zip(names, sources, strict=True)}
    benign, found = [*names[len(watching) :], *(known.controls if known else ())], list_checkpoints(checkpoints)
    if known and (twice := loaded.keys() & known.vectors.keys()):
        raise SteerError(f"monitor: {min(twice)!r} is a vector and in the dictionary; name it once")
    loaded |= known.vectors if known else {}
    with hold(out):
        with show_progress("monitor") as progress:
            readings = read_checkpoints(
                found, loaded, base=base, controls=benign, dictionary=known, out=out, progress=progress
            )
        unseen = known.controls if known else ()
        whole = [reading for reading in readings if reading.part == WHOLE and reading.vector not in unseen]
        rows = [[one_line(cell) for cell in row] for row in _table(whole)]
        for row in rows:
            say("  ".join(f"{cell:>{max(len(other[i]) for other in rows)}}" for i, cell in enumerate(row)))
        watched = [reading for reading in whole if reading.vector not in benign]
        _write_trends(out, checkpoints, readings, whole, rows, limit, verdict(watched, limit))
    say(f"{out}/readings.csv, cosines.png, monitor.html")
    raised = limit.raised(watched) if limit else []
    for reading in raised:
        say(describe(reading))
    if raised:
        raise typer.Exit(3)


def _table(readings: Sequence[Reading]) -> list[list[str]]:
    """A head and one line a reading."""
    head = ["step", "vector", "cosine", "chance", "z", "projection", "norm of tau"]
    return [
        head,
        *(
            [
                str(r.step),
                r.vector,
                f"{r.cosine:+.4f}",
                f"{r.centre:+.4f} ± {r.band:.4f}",
                f"{r.z:+.1f}",
                f"{r.projection:+.4f}",
                f"{r.norm:.4g}",
            ]
            for r in readings
        ),
    ]


def _write_trends(
    out: Path,
    run: Path,
    readings: Sequence[Reading],
    whole: Sequence[Reading],
    rows: Sequence[Sequence[str]],
    alert: AnyAlert | None,
    verdict: str,
) -> None:
    """The readings as CSV, the main chart as PNG, and the page with both and the layers."""
    import csv
    import io

    from ..files import write_bytes, write_text
    from ..reporting.charts import png
    from ..reporting.direction_charts import layer_panels, over_steps, step_panels
    from ..reporting.pages import write_figures

    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(asdict(readings[0])))
    writer.writeheader()
    for reading in readings:
        writer.writerow({name: csv_cell(value) for name, value in asdict(reading).items()})
    write_text(out / "readings.csv", table.getvalue())
    lines = [asdict(reading) for reading in whole]
    limits = {"alert": getattr(alert, "z", None), "share": getattr(alert, "share", None)}
    write_bytes(out / "cosines.png", png(over_steps(lines, **limits)))
    figures = [(chart.to_dict(), title) for title, chart in step_panels(lines, **limits).items()]
    layers = layer_panels([asdict(reading) for reading in readings])
    figures += [(chart.to_dict(), f"Cosine in each layer: {vector}") for vector, chart in layers.items()]
    intro = (
        "tau is theta at the step minus theta of the base: what the training changed so far. It is compared with saved "
        "vectors over all parameters; z says how many standard deviations a cosine is from chance."
    )
    if alert:
        intro += f" The dashed lines are the alert's threshold, {alert.threshold}."
    write_figures(out / "monitor.html", f"Training run {run.name}", figures, verdict=verdict, intro=intro, table=rows)


VERBS = (show, cosine, monitor)
