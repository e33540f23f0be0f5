"""A folder of checkpoints, read one after the other; those that are not whole yet are left for the next time."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

from ..checkpoints.checkpoint import ADAPTER_CONFIG, DENSE_FILE, INDEX, fingerprint, is_checkpoint
from ..errors import SteerError
from ..files import append_jsonl, digest, read_finished
from ..locks import hold
from ..progress import Progress, silent
from ..schema import checked
from ..training.callbacks import SNAPSHOTS
from ..vectors.base_identity import is_same_base, on_base
from ..vectors.delta import Delta, rows_of
from ..vectors.difference import task_vector
from ..vectors.parameter_names import refuse_two_spellings
from ..vectors.row_products import Diagonal, row_of_products
from ..vectors.weight_vector import WeightVector
from .dictionary import Dictionary
from .readings import KeptReading, Products, Reading, read_off, refuse_zero, require_known

READINGS_FILE = "readings.jsonl"
NUMBERED = (re.compile(r"(?:checkpoint|step)\D?(\d+)"), re.compile(r"(\d+)\D*$"))  # the first that is found counts


def list_checkpoints(folder: str | Path) -> dict[int, Path]:
    """Step -> checkpoint: the folders in `folder` that are PEFT adapters or models and have a number.

    A Trainer's `checkpoint-500` and a fine-tune's own snapshots are found, wherever the folder keeps them. A folder
    that is a model itself comes one step after its checkpoints, and alone at step 0 unless its name has a number; one
    with snapshots of its own does not count. A warning names folders that are left out: without a number, or beside
    another of the same.

    Raises:
        SteerError: there are none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SteerError(f"{folder}: no such folder; expected one with checkpoints")
    found = _numbered([path for path in folder.iterdir() if path.is_dir() and _looks_like_one(path)])
    if (folder / SNAPSHOTS).is_dir():
        found |= list_checkpoints(folder / SNAPSHOTS)
    elif found and (is_checkpoint(folder) or (folder / ADAPTER_CONFIG).is_file()):
        found[max(found) + 1] = folder
    if not found and _looks_like_one(folder):
        return {max(_step_of(folder), 0): folder}
    if not found:
        raise SteerError(
            f"{folder}: no checkpoints; expected folders such as checkpoint-100 that hold PEFT adapters or models"
        )
    return dict(sorted(found.items()))


def _numbered(folders: Sequence[Path]) -> dict[int, Path]:
    """Step -> folder; of two with one number the one with the shorter name."""
    found: dict[int, Path] = {}
    for path in sorted(folders, key=lambda path: (len(path.name), path.name)):
        step = _step_of(path)
        if step < 0:
            warnings.warn(f"{path.name} is left out: its name has no number, which would be its step", stacklevel=3)
        elif step in found:
            warnings.warn(f"{path.name} is left out: {found[step].name} is step {step} already", stacklevel=3)
        else:
            found[step] = path
    return found


def _step_of(path: Path) -> int:
    match = next(filter(None, (form.search(path.name) for form in NUMBERED)), None)
    return int(match[1]) if match else -1


def _looks_like_one(path: Path) -> bool:
    marks = (ADAPTER_CONFIG, "config.json", INDEX, DENSE_FILE, "trainer_state.json")
    return is_checkpoint(path) or any((path / mark).is_file() for mark in marks)


def read_checkpoints(
    checkpoints: Mapping[int, Path],
    vectors: Mapping[str, WeightVector],
    *,
    base: str | Path | None = None,
    controls: Sequence[str] = (),
    dictionary: Dictionary | None = None,
    out: str | Path | None = None,
    progress: Progress = silent,
) -> list[Reading]:
    """Read every checkpoint against every vector (paper, section 6: monitoring), one parameter in memory at a time.

    A checkpoint that cannot be read (half-written, of another base, with NaN entries) is skipped with a warning that
    says why; it is tried again the next time.

    Args:
        checkpoints: step -> PEFT adapter or full model.
        vectors: name -> vector; those named in `controls` give a null band (see `read_off`).
        base: the base model, needed where full models are among the checkpoints; it overrules what they and the
            vectors say of theirs.
        dictionary: where the vectors are those of a dictionary, it; whole-model readings then have shares.
        out: a folder that keeps the readings, so that a later call reads new checkpoints only. Those of checkpoints
            that are gone stay, as long as others of their folder are read.

    Raises:
        SteerError: no vectors, a control that is none of them, none of the checkpoints can be read, or another process
            writes `out`.
    """
    if not vectors:
        raise SteerError("monitor: expected at least one vector")
    require_known(controls, vectors, "controls")
    with hold(Path(out)) if out else nullcontext():
        key = _key_of(vectors, controls, dictionary, base)
        store = _Kept(Path(out) / READINGS_FILE if out else None, key, controls, dictionary)
        store.take_kept({_place_of(path) for path in checkpoints.values()})
        return _read_all(checkpoints, vectors, base, store, progress)


def _read_all(
    checkpoints: Mapping[int, Path],
    vectors: Mapping[str, WeightVector],
    base: str | Path | None,
    kept: _Kept,
    progress: Progress,
) -> list[Reading]:
    based = {name: replace(vector, card=on_base(vector.card, base)) for name, vector in vectors.items()}
    diagonal = diagonal_of(based)
    for number, (step, path) in enumerate(checkpoints.items()):
        progress(number, len(checkpoints), path.name)
        try:
            weights = fingerprint(path) if path.exists() else ""
            if kept.has(path, weights):
                continue
            products = checkpoint_products(task_vector(path, base=base), based, diagonal=diagonal)
        except (SteerError, OSError) as error:
            warn_skipped(path, error)
            continue
        refuse_zero(product.squares for product in products)
        kept.add(path, weights, kept.read_off(products, _label(path), step))
    progress(len(checkpoints), len(checkpoints), "done")
    if not kept.readings:
        raise SteerError("monitor: none of the checkpoints could be read; the warnings above say why")
    return sorted((one for found in kept.readings.values() for one in found), key=lambda reading: reading.step)


def _key_of(
    vectors: Mapping[str, WeightVector],
    controls: Sequence[str],
    dictionary: Dictionary | None,
    base: str | Path | None,
) -> str:
    """What readings depend on beside the checkpoint: what the vectors are, and on which base all are read."""
    made = {name: [dict(vector.card.data_sha256), _first_rows(vector)] for name, vector in vectors.items()}
    return digest([sorted(vectors), sorted(controls), made, str(base or ""), dictionary is not None])


def _first_rows(vector: WeightVector) -> str:
    """A hash of each parameter's first row, by which a vector that was made anew is told from the former one."""
    firsts = ((name, rows_of(vector.deltas[name], 0, 1)) for name in sorted(vector.deltas))
    return digest([[name, f"{float(row.clamp(min=0.0).sum()):.4g}"] for name, row in firsts])


def warn_skipped(checkpoint: Path, error: Exception) -> None:
    """Say of a checkpoint that it could not be read, and why."""
    warnings.warn(f"{checkpoint.name} is skipped: {' '.join(str(error).split())}", stacklevel=3)


class _Kept:
    """Readings by checkpoint, those of earlier calls with the same vectors included, and the file that keeps them."""

    def __init__(self, store: Path | None, key: str, controls: Sequence[str], dictionary: Dictionary | None) -> None:
        self.store, self.key, self.controls, self.dictionary = store, key, tuple(controls), dictionary
        self.readings: dict[str, list[Reading]] = {}
        self.weights: dict[str, str] = {}  # checkpoint -> hash of the weights that were read

    def take_kept(self, places: Collection[str]) -> None:
        """The rows of checkpoints that lie, or lay, at these places."""
        for number, row in enumerate(read_finished(self.store) if self.store else (), start=1):
            kept = checked(KeptReading, row, f"{self.store}, row {number}")
            if kept.key == self.key and kept.folder in places:
                self._take(kept)

    def _take(self, kept: KeptReading) -> None:
        """One row of the file; rows of other weights of the same checkpoint replace those before them."""
        reading = kept.reading
        if self.weights.get(reading.checkpoint) != kept.weights:
            self.readings[reading.checkpoint] = []
        self.weights[reading.checkpoint] = kept.weights
        self.readings[reading.checkpoint].append(reading)

    def read_off(self, products: Sequence[Products], checkpoint: str, step: int) -> list[Reading]:
        """The readings of one checkpoint."""
        found = read_off(products, checkpoint=checkpoint, step=step, controls=self.controls)
        return self.dictionary.with_shares(found, products) if self.dictionary else found

    def has(self, path: Path, weights: str) -> bool:
        """Whether the checkpoint was read with these weights; one that is gone ("") counts as it was."""
        label = _label(path)
        return label in self.readings and weights in ("", self.weights[label])

    def add(self, path: Path, weights: str, readings: list[Reading]) -> None:
        """Take in a checkpoint's readings, and append them to the file."""
        self.readings[_label(path)], self.weights[_label(path)] = readings, weights
        if self.store:
            marks = {"key": self.key, "weights": weights, "folder": _place_of(path)}
            append_jsonl(self.store, [{**asdict(reading), **marks} for reading in readings])


def _label(path: Path) -> str:
    """What a checkpoint is called in readings, which are shared, and paths are not: its folder and the run's."""
    return "/".join(path.absolute().parts[-2:])


def _place_of(checkpoint: Path) -> str:
    """Which folder a checkpoint lies in, as a hash: readings are shared, and paths are not."""
    return digest(str(checkpoint.parent.resolve()))


def checkpoint_products(
    tau: WeightVector, vectors: Mapping[str, WeightVector], *, diagonal: Diagonal | None = None
) -> list[Products]:
    """Inner products of a task vector with vectors of its base, parameter by parameter.

    Args:
        diagonal: of the same vectors, where products of several checkpoints are taken: it is computed once.

    Raises:
        SteerError: another base, two shapes of one parameter, or no parameter in common.
    """
    for name, vector in vectors.items():
        revisions = tau.card.base_revision, vector.card.base_revision
        if all(revisions) and not is_same_base(tau.card, vector.card):
            raise SteerError(
                f"its base is {tau.card.base_model} ({revisions[0][:12]}), that of {name!r} is "
                f"{vector.card.base_model} ({revisions[1][:12]}); if these are one model, say so with --base MODEL"
            )
        refuse_two_spellings(tau.deltas, vector.deltas, f"the checkpoint and {name!r}")
        if not tau.deltas.keys() & vector.deltas.keys():
            example = next(iter(vector.deltas), "nothing")
            raise SteerError(f"has no parameter in common with {name!r}, which changes {example} and the like")
    diagonal = diagonal or diagonal_of(vectors)
    parameters = dict.fromkeys([*tau.deltas, *(name for vector in vectors.values() for name in vector.deltas)])
    return [_products_of(parameter, tau.deltas, diagonal) for parameter in parameters]


def diagonal_of(vectors: Mapping[str, WeightVector]) -> Diagonal:
    """The vectors' products with themselves, which are the same whatever the checkpoint."""
    return Diagonal({name: vector.deltas for name, vector in vectors.items()})


def _products_of(parameter: str, tau: Mapping[str, Delta], diagonal: Diagonal) -> Products:
    squares = diagonal.of(parameter)
    if parameter not in tau:
        return Products(parameter, squares.size, 0.0, dict.fromkeys(squares.by_name, 0.0), squares.by_name)
    row = row_of_products(parameter, tau, diagonal.vectors)
    return Products(parameter, row.size, row.own, row.crossed, squares.by_name)
