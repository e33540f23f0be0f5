"""A dictionary of directions: vectors of many traits, benign fine-tunes to hold them against, and what alarms cost.

FOLDER/weightsteer.json     the card: of which base
FOLDER/dictionary.json      traits, controls and thresholds, in words and numbers
FOLDER/traits/NAME          the vector of a trait
FOLDER/controls/NAME        the task vector of a benign fine-tune
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..adapter_files import ADAPTER_FILE
from ..checkpoints.safetensors_file import load_tensors, save_tensors
from ..errors import SteerError
from ..files import read_json, write_json
from ..run_card import RunCard, new_folder
from ..schema import checked, shown
from ..strength_names import is_name
from ..vectors.base_identity import require_same_base
from ..vectors.delta import Delta
from ..vectors.parameter_names import layer_of
from ..vectors.similarity import parameter_products
from ..vectors.weight_vector import WeightVector
from .decompose import Decomposition, Grams, by_layer, decompose
from .readings import WHOLE, Products, Reading

DICTIONARY_FILE = "dictionary.json"
KIND = "dictionary"


@dataclass(frozen=True)
class Entry:
    """A direction, by name, and in words what it is."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    name: str
    about: str = ""


@dataclass(frozen=True)
class Threshold:
    """The share of tau along a trait above which an alarm is false at a known rate.

    `fine_tunes` is the number of benign ones that it was found on: no rate below 1 / fine_tunes can be told.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "allow_inf_nan": False}

    trait: str
    rate: float  # of false alarms
    share: float  # see `decompose.Part`
    fine_tunes: int

    @property
    def is_highest(self) -> bool:
        """Whether it is the largest share of them all: too few for the rate to be told."""
        return self.rate * self.fine_tunes < 1


@dataclass(frozen=True)
class Contents:
    """What `dictionary.json` holds."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    traits: tuple[Entry, ...]
    controls: tuple[Entry, ...] = ()
    thresholds: tuple[Threshold, ...] = ()


class Dictionary:
    """Directions of one base, opened; their numbers are read when they are used."""

    def __init__(self, card: RunCard, contents: Contents, vectors: Mapping[str, WeightVector], name: str = "") -> None:
        self.card, self.contents, self.vectors, self.name = card, contents, dict(vectors), name

    @classmethod
    def load(cls, folder: str | Path) -> Dictionary:
        """Open a folder that `write_dictionary` wrote, or a shipped dictionary by its model's name.

        Raises:
            SteerError: none, an empty one, one name twice, or a vector of another base.
        """
        folder = _folder_of(Path(folder))
        card = RunCard.load(folder)
        contents = checked(Contents, read_json(folder / DICTIONARY_FILE), str(folder / DICTIONARY_FILE))
        _refuse_contents(contents, str(folder))
        places = {entry.name: folder / "traits" / entry.name for entry in contents.traits}
        places |= {entry.name: folder / "controls" / entry.name for entry in contents.controls}
        vectors = {name: WeightVector.load(place) for name, place in places.items()}
        for vector in vectors.values():
            require_same_base(card, vector.card)
        return cls(card, contents, vectors, folder.absolute().name)

    @property
    def traits(self) -> tuple[str, ...]:
        """Names of the traits."""
        return tuple(entry.name for entry in self.contents.traits)

    @property
    def controls(self) -> tuple[str, ...]:
        """Names of the benign fine-tunes."""
        return tuple(entry.name for entry in self.contents.controls)

    def threshold(self, trait: str, rate: float) -> Threshold | None:
        """The threshold of a trait at a rate of false alarms; None where none was found.

        Raises:
            SteerError: no such trait.
        """
        if trait not in self.traits:
            raise SteerError(f"{self.name}: has no trait {trait!r}; it has {', '.join(self.traits)}")
        kept = (one for one in self.contents.thresholds if one.trait == trait and abs(one.rate - rate) < 1e-9)
        return next(kept, None)

    @cached_property
    def among(self) -> dict[str, np.ndarray]:
        """Parameter -> inner products of all directions, (N, N), in the order of `vectors`."""
        members: list[Mapping[str, Delta]] = [vector.deltas for vector in self.vectors.values()]
        parameters = dict.fromkeys(name for deltas in members for name in deltas)
        return {name: parameter_products(name, members).numpy() for name in parameters}

    def grams(self, products: Sequence[Products]) -> Grams:
        """A checkpoint's products with `vectors`, and theirs among themselves, by layer."""
        layers, place = by_layer({one.parameter: layer_of(one.parameter) for one in products})
        names = tuple(self.vectors)
        tau, crossed = np.zeros(len(layers)), np.zeros((len(layers), len(names)))
        among = np.zeros((len(layers), len(names), len(names)))
        for one in products:
            at = place[one.parameter]
            tau[at] += one.tau
            crossed[at] += [one.crossed[name] for name in names]
            if one.parameter in self.among:
                among[at] += self.among[one.parameter]
        return Grams(names, tau, crossed, among)

    def decompose(self, products: Sequence[Products]) -> Decomposition:
        """How a checkpoint divides into the traits, in the space that the controls whiten (see `decompose`)."""
        return decompose(self.grams(products), benign=self.controls)

    def with_shares(self, readings: Sequence[Reading], products: Sequence[Products]) -> list[Reading]:
        """The readings of a checkpoint, those of the whole model with their share of tau."""
        if not any(one.tau for one in products):
            return list(readings)
        found = self.decompose(products)
        return [
            replace(one, share=found[one.vector].share, error=_number(found[one.vector].error))
            if one.part == WHOLE and one.vector in self.traits
            else one
            for one in readings
        ]


def shipped_dictionaries() -> dict[str, Path]:
    """Model -> folder of every dictionary that is installed."""
    root = Path(str(resources.files("weightsteer") / "data" / "dictionaries"))
    return {path.parent.name: path.parent for path in sorted(root.glob(f"*/{DICTIONARY_FILE}"))}


def _folder_of(name_or_path: Path) -> Path:
    if (name_or_path / DICTIONARY_FILE).is_file():
        return name_or_path
    shipped = shipped_dictionaries()
    if not name_or_path.exists() and str(name_or_path) in shipped:
        return shipped[str(name_or_path)]
    names = ", ".join(shipped) or "none"
    raise SteerError(f"{name_or_path}: not a dictionary of directions (no {DICTIONARY_FILE}); shipped: {names}")


def write_dictionary(
    folder: str | Path,
    traits: Mapping[str, WeightVector],
    *,
    controls: Mapping[str, WeightVector] | None = None,
    thresholds: Sequence[Threshold] = (),
    about: Mapping[str, str] | None = None,
    rank: int | None = None,
) -> Path:
    """Save directions as a dictionary; `rank` cuts each to the nearest of that rank, in bfloat16, so that it is small.

    Raises:
        SteerError: no traits, one name twice, two bases, or the folder holds something else.
    """
    named, words = {**traits, **(controls or {})}, about or {}
    entries = [tuple(Entry(name, words.get(name, "")) for name in part) for part in (traits, controls or {})]
    contents = Contents(entries[0], entries[1], tuple(thresholds))
    _refuse_contents(contents, str(folder))
    first = next(iter(traits.values())).card
    for vector in named.values():
        require_same_base(first, vector.card)
    card = RunCard.now(KIND, base_model=first.base_model, base_revision=first.base_revision, settings={"rank": rank})
    with new_folder(Path(folder), KIND) as part:
        for name, vector in named.items():
            cut = vector if rank is None else vector.truncate(rank=rank)
            kept = WeightVector(cut.deltas, replace(cut.card, held_out=()))
            place = kept.save(part / ("traits" if name in traits else "controls") / name)
            if rank is not None and (place / ADAPTER_FILE).is_file():
                _halve(place / ADAPTER_FILE)
        write_json(part / DICTIONARY_FILE, asdict(contents))
        card.save(part)
    return Path(folder)


def _halve(adapter: Path) -> None:
    """Store an adapter's factors in bfloat16: their rounding is far below what the cut to a low rank leaves out."""
    save_tensors({name: tensor.bfloat16() for name, tensor in load_tensors(adapter).items()}, adapter)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _refuse_contents(contents: Contents, whose: str) -> None:
    names = [entry.name for entry in (*contents.traits, *contents.controls)]
    if not contents.traits:
        raise SteerError(f"{whose}: an empty dictionary; expected a trait")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise SteerError(f"{whose}: has {twice!r} twice; expected a name for each direction")
    if odd := next((name for name in names if not is_name(name)), None):
        raise SteerError(f"{whose}: {shown(odd)} is no name of a direction; expected letters, digits, and _ . -")
