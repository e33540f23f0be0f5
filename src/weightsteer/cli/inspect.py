"""Verbs that look at directions: one vector, many beside each other, a training run against them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import SteerError
from ..files import is_empty, refuse_inputs
from ..locks import hold
from ..outputs import refuse_foreign_file
from ..progress import show_progress
from ..shown import csv_cell, one_line, say
from .options import Base, Vector, warn_unseen

if TYPE_CHECKING:
    from ..monitor import Reading
    from ..vectors.weight_vector import WeightVector


def show(
    folder: Vector,
    others: Annotated[
        list[Path] | None, typer.Argument(help="Vectors to compare it with: other seeds, others.")
    ] = None,
    positive: Annotated[
        Path | None, typer.Option(help="The fine-tune on D+; default: `positive` beside the vector.")
    ] = None,
    negative: Annotated[Path | None, typer.Option(help="The fine-tune on D-; default: `negative` beside it.")] = None,
) -> None:
    """Show a vector: base, training, range of k, and its geometry: energy, ranks, the two sides, likeness to others.

    Example: weightsteer show runs/syc/vector runs/syc-seed1/vector runs/gloomy/vector
    """
    from ..run_folder import RunFolder
    from ..vectors.difference import task_vector
    from ..vectors.geometry import facts, geometry
    from ..vectors.visibility import SEEN, relative_norm
    from ..vectors.weight_vector import WeightVector

    vector = WeightVector.load(folder)
    card, strength = vector.card, vector.card.strength
    say(f"base      {one_line(card.base_model)} ({one_line(card.base_revision[:12])})")
    say(f"made      {one_line(card.created)}, seed {card.seed}")
    measured = f"{strength.negative:g} (less) and {strength.recommended:g} (more)" if strength else "not measured"
    say(f"k         {measured}")
    if strength:
        say(f"tested    {strength.low:g} to {strength.high:g}, budget {dict(strength.budget)}")
    run = RunFolder(folder.parent)
    two = [positive or run.finetune("positive"), negative or run.finetune("negative")]
    sides = None
    if positive or negative or all(side.is_dir() for side in two):
        sides = task_vector(two[0]), task_vector(two[1])
    found = geometry(vector)
    share = relative_norm(vector)
    if share is not None:
        say(f"size      {share:.2g} of the norm of the base's linear layers; a behaviour shows from about {SEEN:g} on")
    for name, text in facts(found, sides).items():
        say(f"{name:<9} {one_line(text)}")
    warn_unseen(vector, strength.shown if strength else (-1.0, 1.0))
    for other in others or []:
        _print_likeness(vector, other)
    _print_shares("layer", {f"{layer}": share for layer, share in found.by_layer.items()})
    _print_shares("module", found.by_module)


def _print_likeness(vector: WeightVector, folder: Path) -> None:
    from ..vectors.geometry import overlap
    from ..vectors.weight_vector import WeightVector

    other = WeightVector.load(folder)
    both = overlap(vector, other)
    say(
        f"{folder}: cosine {vector.cosine(other):+.4f}; shared main directions: written {both.outputs:.3f} "
        f"(chance {both.chance_outputs:.3f}), read {both.inputs:.3f} (chance {both.chance_inputs:.3f})"
    )


def _print_shares(what: str, shares: Mapping[str, float]) -> None:
    largest, width = max(shares.values()), max(len(name) for name in shares)
    say(f"energy by {what}")
    for name, share in shares.items():
        say(f"  {name:>{width}} {share:7.2%} {'#' * round(40 * share / largest)}")


def cosine(
    sources: Annotated[list[str], typer.Argument(help="Vectors, adapters or checkpoints: folders or hub ids.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write OUT.csv, .npz, .png and .html too.")] = None,
    base: Base = None,
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
        found = similarities(vectors, progress=progress)
    say(table(found.names, found.cosines))
    if out:
        from ..files import write_bytes
        from ..reporting.charts import png
        from ..reporting.direction_charts import heatmap
        from ..reporting.pages import write_figures

        found.save(out)
        chart = heatmap(found.names, found.cosines)
        write_bytes(out.with_name(f"{out.name}.png"), png(chart))
        page = out.with_name(f"{out.name}.html")
        write_figures(page, "Cosines", [(chart.to_dict(), "Over all parameters; like vectors are neighbours.")])
        say(f"{out}.csv, {out}.npz, {out}.png, {page}")


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
    vectors: Annotated[list[str], typer.Option("--vectors", help="Folders of vectors.")],
    controls: Annotated[
        list[str] | None, typer.Option("--controls", help="Vectors and fine-tunes that are there for the null band.")
    ] = None,
    base: Base = None,
    alert: Annotated[str | None, typer.Option(help="Exit with 3 if a reading gets there, such as z=4.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the readings, table and charts.")] = Path(
        "monitor"
    ),
) -> None:
    """Watch a training run in weight space: cosine, projection and z of every checkpoint against saved vectors.

    Run it again while the training goes on: only new checkpoints are read.

    Example: weightsteer monitor outputs/run --vectors runs/evil/vector runs/sycophancy/vector -o monitor
    """
    from ..monitor import WHOLE, Alert, describe, list_checkpoints, read_checkpoints
    from ..monitor.checkpoints import READINGS_FILE
    from ..vectors.difference import task_vector
    from ..vectors.similarity import labels

    limit = Alert.parse(alert) if alert is not None else None
    sources = [*vectors, *(controls or [])]
    refuse_inputs(out, checkpoints, *sources, base)
    if out.exists() and not (out / READINGS_FILE).exists() and (not out.is_dir() or not is_empty(out)):
        raise SteerError(f"{out}: exists and was not made by weightsteer; choose another output")
    names = labels(sources)
    loaded = {name: task_vector(source, base=base) for name, source in zip(names, sources, strict=True)}
    controlling, found = names[len(vectors) :], list_checkpoints(checkpoints)
    with hold(out):
        with show_progress("monitor") as progress:
            readings = read_checkpoints(found, loaded, base=base, controls=controlling, out=out, progress=progress)
        whole = [reading for reading in readings if reading.part == WHOLE]
        rows = [[one_line(cell) for cell in row] for row in _table(whole)]
        for row in rows:
            say("  ".join(f"{cell:>{max(len(other[i]) for other in rows)}}" for i, cell in enumerate(row)))
        _write_trends(out, checkpoints, readings, whole, rows)
    say(f"{out}/readings.csv, cosines.png, monitor.html")
    raised = limit.raised(reading for reading in whole if reading.vector in names[: len(vectors)]) if limit else []
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
    out: Path, run: Path, readings: Sequence[Reading], whole: Sequence[Reading], rows: Sequence[Sequence[str]]
) -> None:
    """The readings as CSV, the main chart as PNG, and the page with both and the layers."""
    import csv
    import io

    from ..files import write_bytes, write_text
    from ..reporting.charts import png
    from ..reporting.direction_charts import over_steps, parts_over_steps
    from ..reporting.pages import write_figures

    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(asdict(readings[0])))
    writer.writeheader()
    for reading in readings:
        writer.writerow({name: csv_cell(value) for name, value in asdict(reading).items()})
    write_text(out / "readings.csv", table.getvalue())
    lines = [asdict(reading) for reading in whole]
    chart = over_steps(lines)
    write_bytes(out / "cosines.png", png(chart))
    figures = [(chart.to_dict(), "Over all parameters. Shaded: what the cosine is by chance.")]
    layers = [asdict(reading) for reading in readings if reading.part.startswith("layer ")]
    if layers:
        figures.append((parts_over_steps(layers).to_dict(), "The cosine within each layer."))
    intro = "tau = theta at the step - theta of the base, against saved vectors."
    write_figures(out / "monitor.html", f"Training run {run.name}", figures, intro=intro, table=rows)


VERBS = (show, cosine, monitor)
