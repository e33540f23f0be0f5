"""What transformers' model of a config.json calls its parameters, and which rows of them a stored tensor holds.

One parameter has several names: files keep the hub's (one tensor for each expert, the names before transformers 4.52),
the model in memory has today's. The name in memory is the one that we use everywhere, found by transformers' own
conversion tables.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SteerError
from ..files import read_json
from ..progress import quiet_transformers
from .bounded import bounded_modules, count_stored
from .plain_names import plain_name
from .safetensors_file import matrix_shape


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
    renaming: _Renaming = field(repr=False)

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
        return next((name for name in self._spellings(stored) if name in self.tied), None)

    def row_count(self, name: str) -> int:
        """Rows of a parameter's matrix form."""
        return matrix_shape(self.shapes[name])[0]

    def is_known_extra(self, stored: str) -> bool:
        """Whether a stored tensor is no parameter but something that the model has or had: a buffer, a mask."""
        return any(name in self.others for name in self._spellings(stored)) or is_buffer_name(stored)

    def _spellings(self, stored: str) -> Iterator[str]:
        """The name as it is, under its present name, and with the base model's prefix less or more."""
        plain = plain_name(stored)
        renamed = self.renaming.now_called(plain)
        for name in (plain, renamed):
            yield name
            yield from self.renaming.with_other_prefix(name)


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
class _Renaming:
    """transformers' renamings for one architecture, and the prefix that its inner model has."""

    transforms: tuple[Any, ...]
    prefix: str  # "model", "transformer", "gpt_neox"

    def now_called(self, name: str) -> str:
        from transformers.core_model_loading import apply_renamings

        return apply_renamings(name, list(self.transforms))

    def with_other_prefix(self, name: str) -> Iterator[str]:
        """The name with the inner model's prefix put on, or taken off as often as it is there."""
        if not self.prefix:
            return
        yield f"{self.prefix}.{name}"
        while name.startswith(f"{self.prefix}."):
            name = name.removeprefix(f"{self.prefix}.")
            yield name
            yield f"{self.prefix}.{name}"


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
    return _architecture(folder, json.dumps(config, sort_keys=True))


@lru_cache(maxsize=8)
def _architecture(folder: Path, config: str) -> Architecture | None:
    """The architecture of a folder, read again if its config has changed."""
    with quiet_transformers():
        try:
            with bounded_modules(count_stored(folder)):
                model = _empty_model(folder, json.loads(config))
        except SteerError as error:
            raise SteerError(f"{folder / 'config.json'}: {error}") from None
        except Exception:  # whatever an unknown or newer config makes transformers raise: it is not known here
            return None
        return None if model is None else _described(model)


def _empty_model(folder: Path, fields: dict[str, Any]) -> nn.Module | None:
    """transformers' model on the meta device: names and shapes, no memory."""
    import transformers
    from transformers import AutoConfig

    if fields.get("model_type") not in transformers.CONFIG_MAPPING:
        return None  # older than such fields, newer than this transformers, or with code of its own
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    named = fields.get("architectures") or [None]
    built: Any = getattr(transformers, str(named[0]), None)
    with torch.device("meta"), _default_float32():
        if built is not None:
            return built(config)
        return transformers.AutoModelForCausalLM.from_config(config)


@contextmanager
def _default_float32() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _described(model: Any) -> Architecture:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming
    from transformers.pytorch_utils import Conv1D

    names = {id(parameter): name for name, parameter in model.named_parameters()}
    every = dict(model.named_parameters(remove_duplicate=False))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    tied = {name: names[id(parameter)] for name, parameter in every.items() if names[id(parameter)] != name}
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    return Architecture(
        kind=type(model).__name__,
        shapes=shapes,
        tied=tied,
        transposed=frozenset(
            name
            for name, module in model.named_modules()
            if isinstance(module, Conv1D) or getattr(module, "is_transposed", False)
        ),
        others=frozenset(name for name in model.state_dict() if name not in every),
        files=_files_of(model, shapes),
        renaming=_Renaming(tuple(renamings), str(getattr(model, "base_model_prefix", "") or "")),
    )


def _files_of(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[Place, ...] | None]:
    """The hub's tensors that are called otherwise than the parameters, and which rows of these they hold.

    transformers' own conversion is given numbered rows in the parameters' place; where they come out is where the
    rows lie in a file.
    """
    from transformers.core_model_loading import revert_weight_conversion

    names, numbered, first = list(shapes), {}, 0
    starts = []
    for name in names:
        count = matrix_shape(shapes[name])[0]
        starts.append(first)
        numbered[name] = torch.arange(first, first + count).reshape(_row_shape(shapes[name]))
        first += count
    found = revert_weight_conversion(model, dict(numbered))
    bounds = torch.tensor([*starts, first])
    return {stored: _places(rows, names, bounds) for stored, rows in found.items() if stored not in shapes}


def _row_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if len(shape) < 2 else (*shape[:-1], 1)


def _places(rows: Tensor, names: list[str], bounds: Tensor) -> tuple[Place, ...] | None:
    """Runs of rows that follow each other in one parameter; None where the last dimension took part."""
    if rows.ndim > 1 and rows.shape[-1] != 1:
        return None
    flat = rows.reshape(-1)
    if not flat.numel():
        return None
    owner = torch.searchsorted(bounds, flat, right=True) - 1
    breaks = (torch.diff(flat) != 1) | (torch.diff(owner) != 0)
    edges = [0, *(torch.nonzero(breaks).flatten() + 1).tolist(), flat.numel()]
    return tuple(
        Place(names[int(owner[start])], int(flat[start] - bounds[owner[start]]), start, stop - start)
        for start, stop in pairwise(edges)
    )
