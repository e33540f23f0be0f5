"""Two fine-tunes -> the weight vector between them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from ..checkpoints.checkpoint import (
    ADAPTER_CONFIG,
    fingerprint,
    is_checkpoint,
    refuse_quantised,
    stored_tensors,
    tied_twins,
)
from ..checkpoints.locate import checkpoint_folder, source_folder
from ..checkpoints.safetensors_file import Stored, same_bytes
from ..errors import SteerError
from ..files import read_json
from ..run_card import CARD_FILE, RunCard
from .delta import Delta, LazyDeltas, Part, Streamed, add_deltas, scale_delta
from .low_rank import Layout, LowRank
from .peft_adapter import read_adapter
from .vector_folder import DENSE_FILE, dense_file, open_vector
from .weight_vector import WeightVector, require_same_base

Makers = Mapping[str, Callable[[], Delta]]


@dataclass(frozen=True)
class _Side:
    """One fine-tune: what it adds to parameters of the base, and what it puts in their place."""

    folder: Path
    card: RunCard
    deltas: Makers = field(default_factory=dict)
    whole: Mapping[str, Stored] = field(default_factory=dict)
    dora: Mapping[str, Callable[[Stored], Part]] = field(default_factory=dict)
    is_model: bool = False  # a full checkpoint: `whole` holds every parameter

    @property
    def names(self) -> list[str]:
        return [*self.deltas, *self.dora, *self.whole]

    def replaces(self, name: str) -> bool:
        """Whether the side gives the parameter itself, not what is added to the base's."""
        return name in self.whole or name in self.dora


def subtract_finetunes(positive: str | Path, negative: str | Path, *, base: str | Path | None = None) -> WeightVector:
    """w = tau+ - tau- = theta+ - theta- (paper, section 2), exact.

    Each side is a folder or hub id: a PEFT adapter (LoRA, rsLoRA, DoRA, with `modules_to_save` or biases), a bias
    fine-tune, a full checkpoint, or a saved vector, in any mix. Two LoRA adapters give rank r+ + r- in every matrix,
    nothing dense; what lies in full checkpoints stays there, and is read block by block when the vector is used.
    `base` (a folder, hub id or the embedded model's name) is needed where one side gives a parameter and the other a
    change of it; by default the base that the fine-tunes name.

    Raises:
        SteerError: a folder that is not a fine-tune, two bases, a NaN, or an adapter feature that has no exact form.
    """
    sides = _read_side(positive), _read_side(negative)
    require_same_base(sides[0].card, sides[1].card)
    return WeightVector(_difference(*sides, base), _vector_card(base, *sides))


def task_vector(folder: str | Path, *, base: str | Path | None = None) -> WeightVector:
    """tau = theta_ft - theta_pre of one fine-tune (see `subtract_finetunes`); LoRA's (alpha/r) is folded into B.

    Raises:
        SteerError: as `subtract_finetunes`.
    """
    side = _read_side(folder)
    if side.card.kind == "vector":
        return WeightVector.load(side.folder)
    nothing = _Side(side.folder, side.card)
    return WeightVector(_difference(side, nothing, base), _vector_card(base, side))


def _read_side(name: str | Path) -> _Side:
    folder = source_folder(name)
    card = _card_of(folder)
    if card.kind == "vector":
        deltas = open_vector(folder)[0]
        return _Side(folder, card, {name: partial(deltas.__getitem__, name) for name in deltas})
    if (folder / ADAPTER_CONFIG).is_file():
        adapter = read_adapter(folder)
        return _Side(folder, card, adapter.deltas, adapter.whole, adapter.dora)
    if (folder / DENSE_FILE).is_file():
        biases = dense_file(folder / DENSE_FILE)
        return _Side(folder, card, {name: partial(biases.__getitem__, name) for name in biases})
    if is_checkpoint(folder):
        return _Side(folder, card, whole=_parameters(folder), is_model=True)
    raise SteerError(
        f"{folder}: not a fine-tune; expected {ADAPTER_CONFIG} (a PEFT adapter), {DENSE_FILE} (biases) or a checkpoint"
    )


def _parameters(folder: Path) -> dict[str, Stored]:
    """A checkpoint's tensors; one that only repeats a tied twin is left out, so that it is counted once."""
    refuse_quantised(folder)
    tensors = stored_tensors(folder)
    twins = tied_twins(folder, tensors)
    return {name: tensor for name, tensor in tensors.items() if name not in twins}


def _difference(positive: _Side, negative: _Side, base: str | Path | None) -> Mapping[str, Delta]:
    """positive - negative, by parameter; what both sides hold alike is left out (zero)."""
    if positive.is_model and negative.is_model:
        _require_same_names(positive.folder, positive.whole, negative.folder, negative.whole)
    pair = _Pair(positive, negative, _layout({**positive.whole, **negative.whole}))
    names = list(dict.fromkeys([*positive.names, *negative.names]))
    mixed = [name for name in names if pair.needs_base(name)]
    origin = _base_tensors(positive, negative, base, mixed[0]) if mixed else {}
    for name in mixed:
        if name not in origin:
            raise SteerError(
                f"{name}: is in a fine-tune, but the base has no such tensor; its embeddings may be tied or resized: "
                "give the base that was trained"
            )
    makers = {name: maker for name in names if (maker := pair.maker(name, origin)) is not None}
    if not makers:
        raise SteerError(f"{positive.folder} and {negative.folder}: are identical; there is no direction between them")
    return LazyDeltas(makers)


@dataclass(frozen=True)
class _Pair:
    """Two fine-tunes, and how each parameter's difference is made from them."""

    positive: _Side
    negative: _Side
    layout: Layout  # of the matrices that are given whole

    def needs_base(self, name: str) -> bool:
        """Whether the base takes part: one side gives the parameter and the other a change of it, or DoRA scales it."""
        replaced = self.positive.replaces(name), self.negative.replaces(name)
        return replaced[0] != replaced[1] or name in self.positive.dora or name in self.negative.dora

    def maker(self, name: str, origin: Mapping[str, Stored]) -> Callable[[], Delta] | None:
        """What makes the parameter's delta when it is asked for; None where both sides hold the same."""
        if not (self.positive.replaces(name) or self.negative.replaces(name)):
            return partial(_of_changes, name, self.positive.deltas, self.negative.deltas)
        stored = [side.whole.get(name) or origin.get(name) for side in (self.positive, self.negative)]
        _require_same_form(name, stored, self.positive.folder, self.negative.folder)
        if self._is_unchanged(name, *stored):
            return None
        terms = (*_value(self.positive, name, origin, 1.0), *_value(self.negative, name, origin, -1.0))
        shape = next(tensor.shape for tensor in stored if tensor)
        return partial(_sum, name, terms, shape, "module" if self._is_own_copy(name, shape) else self.layout)

    def _is_unchanged(self, name: str, first: Stored | None, second: Stored | None) -> bool:
        changed = any(name in side.deltas or name in side.dora for side in (self.positive, self.negative))
        return not changed and bool(first and second and same_bytes(first, second))

    def _is_own_copy(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether an adapter trained a copy of the matrix for one module alone, even where the base ties it."""
        adapters = [side for side in (self.positive, self.negative) if not side.is_model]
        return len(shape) == 2 and any(name in side.whole for side in adapters)


def _of_changes(name: str, positive: Makers, negative: Makers) -> Delta:
    """tau+ - tau- of a parameter that both sides change by adding to it, or one of them."""
    if name not in negative:
        return positive[name]()
    if name not in positive:
        return scale_delta(negative[name](), -1.0)
    return add_deltas(name, positive[name](), negative[name](), -1.0)


Value = tuple[float, Stored | Callable[[], Part | Delta]]


def _value(side: _Side, name: str, origin: Mapping[str, Stored], sign: float) -> list[Value]:
    """The fine-tuned parameter as a sum of parts: itself, DoRA's form of it, or the base and what is added."""
    if name in side.whole:
        return [(sign, side.whole[name])]
    if name in side.dora:
        return [(sign, partial(side.dora[name], origin[name]))]
    return [(sign, origin[name]), *([(sign, side.deltas[name])] if name in side.deltas else [])]


def _sum(name: str, terms: tuple[Value, ...], shape: tuple[int, ...], layout: Layout) -> Delta:
    total: Delta = Streamed((), shape, layout)
    for sign, part in terms:
        made = part if isinstance(part, Stored) else part()
        delta = made if isinstance(made, (LowRank, Streamed)) else Streamed(((1.0, made),), shape, layout)
        total = add_deltas(name, total, delta, sign)
    return total


def _base_tensors(positive: _Side, negative: _Side, base: str | Path | None, name: str) -> dict[str, Stored]:
    """The base's tensors, for a parameter that one side gives and the other only changes."""
    card = next((side.card for side in (positive, negative) if side.card.base_model), positive.card)
    named = str(base or card.base_model)
    try:
        if not named:
            raise SteerError("none is named in the fine-tunes")
        folder = checkpoint_folder(named, revision=None if base else card.base_commit)
        tensors = _parameters(folder)
    except SteerError as error:
        raise SteerError(
            f"{name}: is replaced in {positive.folder} or {negative.folder} and not in the other, so the difference "
            f"takes the base model; give it as base ({error})"
        ) from None
    if card.base_revision and not card.base_commit and fingerprint(folder) != card.base_revision:
        raise SteerError(f"{folder}: is not the base that was trained, {card.base_model} ({card.base_revision[:12]})")
    for side in (positive, negative):
        if side.is_model:
            _require_same_names(side.folder, side.whole, folder, tensors)
    return tensors


def _require_same_names(one: Path, ours: Mapping[str, Stored], other: Path, theirs: Mapping[str, Stored]) -> None:
    odd = sorted(ours.keys() ^ theirs.keys())
    if odd:
        raise SteerError(f"{odd[0]}: is in one of {one} and {other} only; expected fine-tunes of one model")


def _require_same_form(name: str, sides: list[Stored | None], positive: Path, negative: Path) -> None:
    first, second = sides
    if first and second and first.shape != second.shape:
        raise SteerError(
            f"{name}: has shape {first.shape} in {positive} and {second.shape} in {negative} (or its base); "
            "expected two fine-tunes of one model, with a vocabulary of one size"
        )


def _layout(tensors: Mapping[str, Stored]) -> Layout:
    """Whether linear weights are stored (d_in, d_out), as Conv1D's are: their biases then fit the columns."""
    for name, weight in tensors.items():
        bias = tensors.get(f"{name.removesuffix('.weight')}.bias")
        if bias and len(weight.shape) == 2 and weight.shape[0] != weight.shape[1] == bias.shape[0]:
            return "conv1d"
    return "linear"


def _card_of(folder: Path) -> RunCard:
    """The fine-tune's card; an adapter from elsewhere has none, but its config names the base."""
    if (folder / CARD_FILE).is_file():
        return RunCard.load(folder)
    config = read_json(folder / ADAPTER_CONFIG) if (folder / ADAPTER_CONFIG).is_file() else {}
    return RunCard(
        "finetune", base_model=config.get("base_model_name_or_path") or "", base_revision=config.get("revision") or ""
    )


def _vector_card(base: str | Path | None, *sides: _Side) -> RunCard:
    """The vector's card: base, training settings and data of its side(s), and hashes of their weights."""
    data: dict[str, str] = {}
    coarse: set[str] = set()
    for label, side in zip(("positive", "negative"), sides, strict=False):
        data.update({f"{label} {name}": value for name, value in side.card.data_sha256.items()})
        data[f"{label} weights"] = fingerprint(side.folder)
        if side.is_model:
            coarse |= {tensor.dtype for tensor in side.whole.values()} & {"BF16", "F16"}
    if coarse:
        warnings.warn(
            f"the vector is made from {' and '.join(sorted(coarse))} checkpoints, whose rounding is part of it; "
            "adapters, where they exist, give it exactly",
            stacklevel=3,
        )
    card = next(
        (side.card for side in sides if side.card.base_model), replace(sides[0].card, base_model=str(base or ""))
    )
    return RunCard.now(
        "vector",
        base_model=card.base_model,
        base_revision=card.base_revision,
        data_sha256=data,
        settings=card.settings,
        seed=card.seed,
        measured={"sides": [side.card.measured for side in sides]},
    )
