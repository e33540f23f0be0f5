"""What transformers' model of a config.json calls its parameters, and which rows of them a stored tensor holds.

One parameter has several names: files keep the hub's (one tensor for each expert, the names before transformers 4.52),
the model in memory has today's. The name in memory is the one that we use everywhere, found by transformers' own
conversion tables.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..errors import SteerError
from ..files import digest, read_json, write_text
from ..places import cache_folder
from ..progress import quiet_transformers
from .bounded import bounded_modules, count_stored
from .empty_model import describe, renamings_of
from .plain_names import plain_name
from .safetensors_file import matrix_shape

FORM = 1  # of what is kept in the cache
FIELDS = {"kind", "shapes", "tied", "transposed", "others", "files", "prefix"}


@dataclass(frozen=True)
class Place:
    """Rows of a parameter's matrix form that lie in a stored tensor."""

    name: str  # the parameter, as the model in memory calls it
    at: int  # its first row that is meant
    start: int  # the stored tensor's first row that is meant
    rows: int


@dataclass(frozen=True)
class Architecture:
    """The parameters of a model in memory, without the model."""

    kind: str  # the class, as transformers calls it
    shapes: Mapping[str, tuple[int, ...]]  # every parameter; tied ones once
    tied: Mapping[str, str]  # another name of a parameter -> its name in `shapes`
    transposed: frozenset[str]  # modules that store weights (d_in, d_out): GPT-2's Conv1D, some experts
    others: frozenset[str]  # what a state dict holds besides: buffers
    files: Mapping[str, tuple[Place, ...] | None] = field(repr=False)  # the hub's tensors; None: not made of rows
    prefix: str  # of the inner model's names: "model", "transformer", "gpt_neox"
    renaming: Renaming = field(repr=False)

    def places(self, stored: str) -> tuple[Place, ...] | None:
        """What a stored tensor holds of the parameters; None where the model has no such parameter.

        Raises:
            SteerError: the tensor is stored in another order than the parameter's rows.
        """
        for name in self._spellings(stored):
            known = self.tied.get(name, name)
            if known in self.shapes:
                return (Place(known, 0, 0, matrix_shape(self.shapes[known])[0]),)
            if name in self.files:
                places = self.files[name]
                if places is None:
                    raise SteerError(
                        f"{stored}: is stored in another order than {self.kind} has it in memory, which cannot be "
                        "taken apart here; load the model with transformers and save it anew with "
                        "save_original_format=False"
                    )
                return places
        return None

    def name_of(self, stored: str) -> str | None:
        """The one parameter that a name means, whole; None where there is none or the name means part of one."""
        places = self.places(stored)
        whole = places is not None and len(places) == 1 and places[0].rows == self.row_count(places[0].name)
        return places[0].name if places and whole else None

    def alias_of(self, stored: str) -> str | None:
        """The tied name that is meant, such as lm_head.weight: a place of its own for what changes it alone."""
        known = next((name for name in self._spellings(stored) if name in self.tied or name in self.shapes), "")
        return known if known in self.tied else None

    def row_count(self, name: str) -> int:
        """Rows of a parameter's matrix form."""
        return matrix_shape(self.shapes[name])[0]

    def is_known_extra(self, stored: str) -> bool:
        """Whether a stored tensor is no parameter but something that the model has or had: a buffer, a mask."""
        return any(name in self.others for name in self._spellings(stored)) or is_buffer_name(stored)

    def _spellings(self, stored: str) -> Iterator[str]:
        """The name as it is, under its present name, and with the base model's prefix less or more."""
        plain = plain_name(stored)
        yield plain
        yield from self._with_other_prefix(plain)
        renamed = self.renaming.now_called(plain)
        if renamed != plain:
            yield renamed
            yield from self._with_other_prefix(renamed)

    def _with_other_prefix(self, name: str) -> Iterator[str]:
        """The name with the inner model's prefix put on, or taken off as often as it is there."""
        if not self.prefix:
            return
        yield f"{self.prefix}.{name}"
        while name.startswith(f"{self.prefix}."):
            name = name.removeprefix(f"{self.prefix}.")
            yield name
            yield f"{self.prefix}.{name}"


BUFFERS = (
    "inv_freq",
    "position_ids",
    "masked_bias",
    "token_type_ids",
    "num_batches_tracked",
    "cos_cached",
    "sin_cached",
)


def is_buffer_name(name: str) -> bool:
    """Whether a tensor's name is that of a constant that older versions of transformers saved."""
    return name.rpartition(".")[2] in BUFFERS


@dataclass(frozen=True)
class Renaming:
    """transformers' renamings for one architecture; looked up when a name is met that the model does not have."""

    folder: Path

    def now_called(self, name: str) -> str:
        """The name that a parameter of this name has today."""
        from transformers.core_model_loading import apply_renamings

        return apply_renamings(name, self._transforms)

    @cached_property
    def _transforms(self) -> list[Any]:
        return renamings_of(self.folder)


def architecture_of(folder: Path) -> Architecture | None:
    """The architecture that a model folder's config.json names; None where transformers does not know it.

    Raises:
        SteerError: the config is no JSON object, or asks for far more layers than the folder has tensors.
    """
    path = folder / "config.json"
    if not path.is_file():
        return None
    config = read_json(path)
    if not isinstance(config, dict):
        raise SteerError(f"{path}: expected a JSON object")
    return _architecture(folder, digest([config, version("transformers"), FORM]))


@lru_cache(maxsize=8)
def _architecture(folder: Path, key: str) -> Architecture | None:
    """The architecture of a folder, from the user's cache if one of this config is there.

    transformers takes seconds to be imported and to build a model; what it tells is a page of names and shapes.
    """
    kept = cache_folder() / "architectures" / f"{key}.json"
    found = _kept_fields(kept)
    if found is None:
        with quiet_transformers():
            try:
                with bounded_modules(count_stored(folder)):
                    found = describe(folder)
            except SteerError as error:
                raise SteerError(f"{folder / 'config.json'}: {error}") from None
            except Exception:  # whatever an unknown or newer config makes transformers raise: it is not known here
                return None
        with suppress(OSError, SteerError):  # a cache that cannot be written
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_text(kept, json.dumps(found))
    return Architecture(
        kind=found["kind"],
        shapes={name: tuple(shape) for name, shape in found["shapes"].items()},
        tied=found["tied"],
        transposed=frozenset(found["transposed"]),
        others=frozenset(found["others"]),
        files={
            name: None if places is None else tuple(Place(*place) for place in places)
            for name, places in found["files"].items()
        },
        prefix=found["prefix"],
        renaming=Renaming(folder),
    )


def _kept_fields(path: Path) -> dict[str, Any] | None:
    """What an earlier call kept; None if nothing did, or it cannot be read."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.keys() >= FIELDS else None
