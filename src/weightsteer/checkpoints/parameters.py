"""A checkpoint's tensors as the parameters of the model that they make, whatever the files call and cut them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import SteerError
from .architecture import Architecture, Place, architecture_of, is_buffer_name
from .checkpoint import INDEX, SINGLE, is_checkpoint, stored_tensors, tied_twins, ties, vocabulary_tables
from .plain_names import plain_name
from .quantised import quantised, refuse_quantised
from .recognise import what_it_holds
from .safetensors_file import FLOATS, Stored, matrix_shape, same_bytes


@dataclass(frozen=True, eq=False)
class Assembled:
    """A parameter that lies in files as several tensors (the experts of a mixture), or as a part of one."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[tuple[Place, Stored], ...]  # by their first row in the parameter

    @property
    def dtype(self) -> str:
        """As safetensors writes it."""
        return self.pieces[0][1].dtype

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for two handles of one parameter."""
        return self.name, *(stored.key for _, stored in self.pieces)

    @property
    def stored(self) -> list[Stored]:
        """The tensors that it lies in."""
        return [tensor for _, tensor in self.pieces]

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of the matrix form, in the stored dtype: (stop - start, columns)."""
        found = []
        for place, stored in self.pieces:
            first, last = max(start, place.at), min(stop, place.at + place.rows)
            if first < last:
                shift = place.start - place.at
                found.append(stored.rows(first + shift, last + shift))
        return torch.cat(found)


Whole = Stored | Assembled  # a parameter that a file gives


def same_values(first: Whole, second: Whole, block: int = 4096) -> bool:
    """Whether two parameters are equal bit for bit, whatever tensors they lie in."""
    if isinstance(first, Stored) and isinstance(second, Stored):
        return same_bytes(first, second)
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    count = matrix_shape(first.shape)[0]
    return all(
        torch.equal(first.rows(at, end).view(torch.uint8), second.rows(at, end).view(torch.uint8))
        for at in range(0, count, block)
        for end in [min(at + block, count)]
    )


@dataclass(frozen=True)
class Checkpoint:
    """A model's folder: its stored tensors, and which parameters of the model in memory they hold."""

    folder: Path
    tensors: Mapping[str, Stored]
    places: Mapping[str, tuple[Place, ...]]  # of every stored tensor that holds parameters
    shapes: Mapping[str, tuple[int, ...]]  # of the parameters
    tied: frozenset[str]  # parameters that stand in two places of the model, under each of their names
    architecture: Architecture | None = None

    def name_of(self, name: str) -> str:
        """What this checkpoint's model calls a parameter; a name that it does not know stays as it is."""
        if name in self.shapes or name in self.tied or self.architecture is None:
            return name
        return self.architecture.alias_of(name) or self.architecture.name_of(name) or name

    def parameters(self) -> dict[str, Whole]:
        """The parameters by the names that the model in memory gives them; tied ones once.

        Raises:
            SteerError: a parameter of which only a part is stored, or two tensors with other numbers for one.
        """
        pieces: dict[str, list[tuple[Place, Stored]]] = {}
        for stored, places in self.places.items():
            for place in places:
                pieces.setdefault(place.name, []).append((place, self.tensors[stored]))
        return {name: self._assembled(name, parts) for name, parts in pieces.items()}

    def _assembled(self, name: str, parts: list[tuple[Place, Stored]]) -> Whole:
        count = matrix_shape(self.shapes[name])[0]
        first = parts[0][1]
        if parts[0][0].rows == count == matrix_shape(first.shape)[0]:
            for _, other in parts[1:]:
                if not same_bytes(first, other):
                    raise _twice(self.folder, name, [stored.name for _, stored in parts])
            return first
        parts = sorted(parts, key=lambda part: part[0].at)
        ends = [0, *(place.at + place.rows for place, _ in parts)]
        if ends[:-1] != [place.at for place, _ in parts] or ends[-1] != count:
            raise SteerError(
                f"{self.folder}: the {len(parts)} tensors of {name} do not make up its {count} rows "
                f"({parts[0][1].name} is the first of them); the checkpoint is damaged"
            )
        return Assembled(name, self.shapes[name], tuple(parts))


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint folder; nothing is read yet. Buffers, and what transformers would leave out, hold no parameter.

    Raises:
        SteerError: no checkpoint, a quantised or empty one, or one saved with its adapter inside.
    """
    if not is_checkpoint(folder):
        raise SteerError(
            f"{folder}: expected a checkpoint in safetensors ({SINGLE} or {INDEX}); {what_it_holds(folder)}"
        )
    tensors = stored_tensors(folder)
    refuse_quantised(folder, tensors)
    _refuse_wrapped(folder, tensors)
    _refuse_empty(folder, tensors)
    architecture = architecture_of(folder)
    if architecture is None or not any(map(architecture.places, tensors)):  # the config is of something else
        return _by_file_names(folder, tensors)
    return _by_model(folder, tensors, architecture)


def read_parameters(folder: Path) -> dict[str, Whole]:
    """A checkpoint's parameters by the names that the model in memory gives them (see `open_checkpoint`)."""
    return open_checkpoint(folder).parameters()


def _by_file_names(folder: Path, tensors: Mapping[str, Stored]) -> Checkpoint:
    """Of a model that transformers does not know: the names as they are, wrappers taken off."""
    twins = tied_twins(folder, tensors)
    places, shapes = {}, {}
    for name, tensor in tensors.items():
        if tensor.dtype in FLOATS and not is_buffer_name(name):
            plain = plain_name(twins.get(name, name))
            places[name] = (Place(plain, 0, 0, matrix_shape(tensor.shape)[0]),)
            shapes[plain] = tensor.shape
    tied = vocabulary_tables(folder, tensors) if ties(folder, tensors) else []
    return Checkpoint(folder, tensors, places, shapes, frozenset(map(plain_name, tied)))


def _by_model(folder: Path, tensors: Mapping[str, Stored], architecture: Architecture) -> Checkpoint:
    places, strangers = {}, []
    for name in tensors:
        found = architecture.places(name)
        if found:
            _require_shape(folder, tensors[name], found, architecture)
            places[name] = found
        elif not architecture.is_known_extra(name) and not _is_mask(tensors[name]):
            strangers.append(name)
    _refuse_packed(folder, strangers, architecture)
    held = {place.name for found in places.values() for place in found}
    _tell(folder, strangers, f"are no parameters of {architecture.kind} and are left out, as transformers does")
    lacking = [name for name in architecture.shapes if name not in held]
    _tell(folder, lacking, f"of {architecture.kind} are not stored; transformers would fill them with random numbers")
    untied = _untied(tensors, places, architecture)
    shapes = {place.name: architecture.shapes[place.name] for found in places.values() for place in found}
    for name, alias in untied.items():
        places[name] = (Place(alias, 0, 0, places[name][0].rows),)
        shapes[alias] = tensors[name].shape
    tied = {*architecture.tied, *architecture.tied.values()} if not untied else set()
    return Checkpoint(folder, tensors, places, shapes, frozenset(tied), architecture)


def _refuse_packed(folder: Path, strangers: list[str], architecture: Architecture) -> None:
    """Raise if a layer is stored as something that its model does not have: scales, codes, packed numbers."""
    for name in strangers:
        parts = plain_name(name).split(".")
        owners = [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]
        layer = next((owner for owner in owners[:2] if architecture.name_of(f"{owner}.weight")), None)
        if layer and parts[-1] != "_extra_state":  # what TransformerEngine keeps beside plain weights
            raise quantised(folder, f"there is {name}, which a plain {layer} does not have")


def _is_mask(tensor: Stored) -> bool:
    """Whether a tensor is a causal mask, which older models saved: (1, 1, length, length)."""
    return len(tensor.shape) == 4 and tensor.shape[:2] == (1, 1) and tensor.shape[2] == tensor.shape[3]


def _tell(folder: Path, names: list[str], what: str) -> None:
    if names:
        warnings.warn(f"{folder}: {len(names)} tensors {what}: {', '.join(sorted(names)[:3])}", stacklevel=4)


def _untied(
    tensors: Mapping[str, Stored], places: Mapping[str, tuple[Place, ...]], architecture: Architecture
) -> dict[str, str]:
    """Tensor -> its own name, where the config ties it to another that is stored too and differs: so untied."""
    holding: dict[tuple[Place, ...], list[str]] = {}
    for name, where in places.items():
        holding.setdefault(where, []).append(name)
    found = {}
    for copies in (names for names in holding.values() if len(names) > 1):
        for name in copies:
            alias = next((tied for tied in architecture.tied if f".{plain_name(name)}".endswith(f".{tied}")), None)
            keeper = next(other for other in copies if other != name)
            if alias and not same_bytes(tensors[name], tensors[keeper]):
                found[name] = alias
    return found


def _require_shape(folder: Path, tensor: Stored, places: tuple[Place, ...], architecture: Architecture) -> None:
    """Raise unless the stored tensor has the form that the model's config gives it."""
    expected = architecture.shapes[places[0].name]
    whole = len(places) == 1 and places[0].rows == matrix_shape(expected)[0]
    rows, columns = matrix_shape(tensor.shape)
    fits = tensor.shape == expected if whole else rows == sum(p.rows for p in places) and columns == expected[-1]
    if not fits:
        raise SteerError(
            f"{folder}: {tensor.name} has shape {tensor.shape}, by its config.json {architecture.kind} has "
            f"{expected if whole else f'{columns} columns'} there; the two do not belong together"
        )


def _twice(folder: Path, name: str, stored: list[str]) -> SteerError:
    return SteerError(
        f"{folder}: {name} is stored twice, with different numbers, as {' and as '.join(stored)}; expected one tensor "
        "for each parameter"
    )


def _refuse_wrapped(folder: Path, tensors: Mapping[str, Stored]) -> None:
    """Raise for a model that was saved with its LoRA layers still in it: their scale is written nowhere."""
    lora = next((name for name in tensors if ".lora_A." in name or ".lora_embedding_A" in name), None)
    if lora:
        raise SteerError(
            f"{folder}: is a model saved with its adapter's layers still in it ({lora}); save the adapter alone "
            "(PeftModel.save_pretrained), or the model after merge_and_unload()"
        )


def _refuse_empty(folder: Path, tensors: Mapping[str, Stored]) -> None:
    if all(0 in tensor.shape for tensor in tensors.values()):
        raise SteerError(
            f"{folder}: its tensors have no entries; parallel training (DeepSpeed ZeRO-3, FSDP) saves such empty "
            "shells where the weights were not gathered: save them gathered "
            "(stage3_gather_16bit_weights_on_model_save, or zero_to_fp32.py)"
        )
