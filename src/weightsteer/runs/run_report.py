"""The report of a run, from what its folder holds: no task, model or judge is loaded, and nothing is measured."""

from __future__ import annotations

from pathlib import Path

from ..behavior import Behavior
from ..data_building.sampling import cut_answers, unusable_verdicts
from ..errors import SteerError
from ..evaluation.compare import compare_at_loss
from ..evaluation.metrics import MetricKey, metric_key
from ..evaluation.results import BASE, MetricRow, read_rows
from ..files import read_jsonl
from ..reporting.report import Report, write_report
from ..reporting.samples import Sample
from ..run_card import StrengthRange
from ..run_folder import RunFolder
from ..steering.methods import METHODS
from ..vectors.difference import task_vector
from ..vectors.geometry import facts, geometry
from ..vectors.weight_vector import WeightVector
from .artifacts import read_layer
from .own_data import OWN, described
from .recipe import Recipe
from .samples import read_samples


def write_run_report(recipe: Recipe, folder: RunFolder, *, command: str = "") -> Path:
    """Write a finished run's page and PNG; returns the page's path. The folder may be somebody else's.

    Raises:
        SteerError: the run is not finished, or a file of it cannot be read.
    """
    again = f"{folder.path}: the sweep is not finished; run `weightsteer run` again"
    if not (folder.vector.is_dir() and folder.rows.is_file()):
        raise SteerError(again)
    vector = WeightVector.load(folder.vector)
    if vector.card.strength is None:
        raise SteerError(again)
    rows = read_rows(folder.rows)
    plotted, (name, description) = _keys_to_plot(recipe, rows), _behavior_of(recipe)
    both = folder.finetune("positive"), folder.finetune("negative")
    sides = (task_vector(both[0]), task_vector(both[1])) if all(side.is_dir() for side in both) else None
    report = Report(
        title=f"Weight steering: {name}",
        description=description,
        rows=rows,
        metrics=recipe.metrics,
        costs=read_rows(folder.costs) if folder.costs.is_file() else [],
        comparisons={key: compare_at_loss([folder.path], key, draws=200) for key in plotted},
        card=vector.card.shared(),
        strength=vector.card.strength,
        norms=vector.norms(),
        geometry=facts(geometry(vector), sides),
        samples=_samples(folder, vector.card.strength),
        command=command,
        behaviors=plotted,
        notes=_notes(recipe, folder),
        meanings={**{name: method.summary for name, method in METHODS.items()}, **recipe.sweep.variants},
    )
    return write_report(report, folder)


def _behavior_of(recipe: Recipe) -> tuple[str, str]:
    """Name and description of the recipe's behaviour; of a trait file that is not here, the file's name."""
    if recipe.behavior == OWN:
        return recipe.name, described(recipe.data)
    try:
        behavior = Behavior.load(recipe.behavior)
    except SteerError:
        return Path(recipe.behavior).stem, ""
    return behavior.name, behavior.description


def _samples(folder: RunFolder, strength: StrengthRange) -> list[Sample]:
    """The replies at up to five strengths: 0, the recommended k and what was made nearest to their halves."""
    kept = read_samples(folder.samples)
    ks = kept.shown_ks(strength)
    return [Sample(row.prompt, {k: row.replies.get(f"{k:g}", "") for k in ks}) for row in kept.rows]


def _keys_to_plot(recipe: Recipe, rows: list[MetricRow]) -> list[MetricKey]:
    """The behaviours to draw, of those that have a value for some item."""
    found = {(row.task, row.metric) for row in rows if row.split == "test" and row.method == BASE}
    return [key for key in map(metric_key, recipe.plot) if key in found]


def _notes(recipe: Recipe, folder: RunFolder) -> list[str]:
    """What a reader has to know of how the numbers were made."""
    notes = []
    if folder.layer.exists():
        notes.append(_activation_note(recipe, folder))
    if lost := unusable_verdicts(folder.sampled):
        notes.append(f"Of the answers that D+ and D- were chosen from, {lost} are on neither side: no usable verdict.")
    if cut := cut_answers(folder.sampled):
        notes.append(f"Of the answers that D+ and D- were chosen from, {cut} were cut off and are on neither side.")
    return notes


def _activation_note(recipe: Recipe, folder: RunFolder) -> str:
    """How the activation baseline was made, so that a smaller effort for it does not pass unseen."""
    sweep, examples = recipe.sweep, len(read_jsonl(folder.examples("positive")))
    used = min(sweep.activation_pairs or examples, examples)
    return (
        f"The activation vector comes from {used} of the {examples} examples a side and is added to the output of "
        f"block {read_layer(folder)}, chosen among one block in {sweep.layer_step} on {sweep.search_items} "
        "validation items."
    )
