"""Two fine-tunes -> the weight vector between them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..behavior import ContrastPair, pair_rows
from ..checkpoints.architecture import Architecture, architecture_of
from ..checkpoints.checkpoint import fingerprint
from ..checkpoints.locate import base_of, checkpoint_folder
from ..checkpoints.parameters import Whole, read_parameters, same_values
from ..errors import SteerError
from ..example_files.load import examples_from
from ..run_card import RunCard
from .base_identity import FINGERPRINT, on_base, on_named_base, require_same_base
from .delta import Delta, LazyDeltas, Part, Streamed, add_deltas, scale_delta
from .fine_tune import FineTune, Makers, base_architecture, read_finetune
from .low_rank import Layout, LowRank
from .parameter_names import layer_of, refuse_two_spellings
from .weight_vector import WeightVector


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
    sides = read_finetune(positive, base), read_finetune(negative, base)
    if base is None:
        require_same_base(sides[0].card, sides[1].card)
    return WeightVector(_difference(*sides, base), _vector_card(base, *sides))


def task_vector(folder: str | Path, *, base: str | Path | None = None) -> WeightVector:
    """tau = theta_ft - theta_pre of one fine-tune (see `subtract_finetunes`); LoRA's (alpha/r) is folded into B.

    Raises:
        SteerError: as `subtract_finetunes`.
    """
    side = read_finetune(folder, base)
    if side.card.kind == "vector":
        vector = WeightVector.load(side.folder)
        return replace(vector, card=side.card)
    nothing = FineTune(side.folder, side.card)
    return WeightVector(_difference(side, nothing, base), _vector_card(base, side), name=side.folder.name)


def _difference(positive: FineTune, negative: FineTune, base: str | Path | None) -> Mapping[str, Delta]:
    """positive - negative, by parameter; what both sides hold alike is left out (zero)."""
    if positive.is_model and negative.is_model:
        _require_same_names(positive, negative)
    refuse_two_spellings(positive.names, negative.names, f"{positive.folder} and {negative.folder}")
    names = list(dict.fromkeys([*positive.names, *negative.names]))
    architecture = _architecture(positive, negative, base)
    tied = architecture.tied if architecture else {}
    for head, embedding in tied.items():  # given for both places by one side, and for one of them by the other
        ways = [head in side.tied for side in (positive, negative) if embedding in side.names]
        if head not in names and any(ways) and not all(ways):
            names.append(head)
    apart = frozenset(name for pair in tied.items() if pair[0] in names for name in pair)
    shared = frozenset(tied.values()) - apart
    pair = _Pair(positive, negative, _transposed(positive, negative, architecture), apart, shared)
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
        alike = (
            "is identical to its base" if positive.folder == negative.folder else f"is identical to {negative.folder}"
        )
        raise SteerError(f"{positive.folder}: {alike}; there is no direction between them")
    return LazyDeltas(makers)


@dataclass(frozen=True)
class _Pair:
    """Two fine-tunes, and how each parameter's difference is made from them."""

    positive: FineTune
    negative: FineTune
    transposed: frozenset[str]  # modules that store weights (d_in, d_out)
    apart: frozenset[str]  # parameters that the base ties, and these fine-tunes change each by itself
    shared: frozenset[str]  # embeddings that the base ties to its head

    def needs_base(self, name: str) -> bool:
        """Whether the base takes part: one side gives the parameter and the other a change of it, or DoRA scales it."""
        replaced = self.positive.replaces(name), self.negative.replaces(name)
        return replaced[0] != replaced[1] or name in self.positive.dora or name in self.negative.dora

    def maker(self, name: str, origin: Mapping[str, Whole]) -> Callable[[], Delta] | None:
        """What makes the parameter's delta when it is asked for; None where both sides hold the same."""
        if not (self.positive.replaces(name) or self.negative.replaces(name)):
            return partial(_of_changes, name, self.positive.deltas, self.negative.deltas)
        stored = [side.given(name) or origin.get(name) for side in (self.positive, self.negative)]
        _require_same_form(name, stored, self.positive.folder, self.negative.folder)
        if self._is_unchanged(name, *stored):
            return None
        terms = (*_value(self.positive, name, origin, 1.0), *_value(self.negative, name, origin, -1.0))
        shape = next(tensor.shape for tensor in stored if tensor)
        return partial(_sum, name, terms, shape, self._layout(name, shape))

    def _is_unchanged(self, name: str, first: Whole | None, second: Whole | None) -> bool:
        changed = any(name in side.deltas or name in side.dora for side in (self.positive, self.negative))
        return not changed and bool(first and second and same_values(first, second))

    def _layout(self, name: str, shape: tuple[int, ...]) -> Layout:
        """How the matrix's factors are stored; "module" where an adapter trained a copy for one place alone.

        What lies inside a block has one place.
        """
        adapters = [side for side in (self.positive, self.negative) if not side.is_model]
        alone = any(name in side.whole and name not in side.tied.values() for side in adapters)
        if len(shape) == 2 and (name in self.apart or (alone and layer_of(name) is None)):
            return "module"
        if name in self.shared:
            return "shared"
        return "conv1d" if name.removesuffix(".weight") in self.transposed else "linear"


def _of_changes(name: str, positive: Makers, negative: Makers) -> Delta:
    """tau+ - tau- of a parameter that both sides change by adding to it, or one of them."""
    if name not in negative:
        return positive[name]()
    if name not in positive:
        return scale_delta(negative[name](), -1.0)
    return add_deltas(name, positive[name](), negative[name](), -1.0)


Value = tuple[float, Whole | Callable[[], Part | Delta]]


def _value(side: FineTune, name: str, origin: Mapping[str, Whole], sign: float) -> list[Value]:
    """The fine-tuned parameter as a sum of parts: itself, DoRA's form of it, or the base and what is added."""
    given = side.given(name)
    if given is not None:
        return [(sign, given)]
    if name in side.dora:
        return [(sign, partial(side.dora[name], origin[name]))]
    return [(sign, origin[name]), *([(sign, side.deltas[name])] if name in side.deltas else [])]


def _sum(name: str, terms: tuple[Value, ...], shape: tuple[int, ...], layout: Layout) -> Delta:
    total: Delta = Streamed((), shape, layout)
    for sign, part in terms:
        made = part() if callable(part) else part
        delta = made if isinstance(made, (LowRank, Streamed)) else Streamed(((1.0, made),), shape, layout)
        total = add_deltas(name, total, delta, sign)
    return total


def _base_tensors(positive: FineTune, negative: FineTune, base: str | Path | None, name: str) -> dict[str, Whole]:
    """The base's parameters, for one that one side gives and the other only changes; tied ones under both names."""
    card = next((side.card for side in (positive, negative) if side.card.base_model), positive.card)
    try:
        named = str(base or base_of(card))
        if not named:
            raise SteerError("none is named in the fine-tunes")
        folder = checkpoint_folder(named, revision=None if base else card.base_commit)
        tensors = read_parameters(folder)
    except SteerError as error:
        if positive.folder == negative.folder:
            raise SteerError(
                f"{positive.folder}: gives parameters themselves ({name}) and not what was added to them, so that the "
                f"change takes the base model; give it as base (--base; {error})"
            ) from None
        raise SteerError(
            f"{name}: is replaced in {positive.folder} or {negative.folder} and not in the other, so the difference "
            f"takes the base model; give it as base ({error})"
        ) from None
    if FINGERPRINT.fullmatch(card.base_revision) and fingerprint(folder) != card.base_revision:
        raise SteerError(f"{folder}: is not the base that was trained, {card.base_model} ({card.base_revision[:12]})")
    for side in (positive, negative):
        if side.is_model:
            _require_same_names(side, FineTune(folder, side.card, whole=tensors, is_model=True, tied=side.tied))
    architecture = architecture_of(folder)
    tied = architecture.tied if architecture else {}
    return {**{alias: tensors[keeper] for alias, keeper in tied.items() if keeper in tensors}, **tensors}


def _require_same_names(first: FineTune, second: FineTune) -> None:
    """Raise unless two models have the same parameters; one may tie what the other stores twice."""
    odd = sorted(n for n in first.whole.keys() ^ second.whole.keys() if not (first.given(n) and second.given(n)))
    if odd:
        raise SteerError(
            f"{odd[0]}: is in one of {first.folder} and {second.folder} only; expected fine-tunes of one model"
        )


def _require_same_form(name: str, sides: list[Whole | None], positive: Path, negative: Path) -> None:
    first, second = sides
    if not first or not second or first.shape == second.shape:
        return
    if positive == negative:
        raise SteerError(
            f"{name}: has shape {first.shape} in {positive}, and its base {second.shape}; give the base whose "
            "vocabulary has grown alike (--base)"
        )
    raise SteerError(
        f"{name}: has shape {first.shape} in {positive} and {second.shape} in {negative} (or its base); "
        "expected two fine-tunes of one model, with a vocabulary of one size"
    )


def _architecture(positive: FineTune, negative: FineTune, base: str | Path | None) -> Architecture | None:
    """The architecture of the first side of which it is known."""
    sides = (positive, negative)
    found = (architecture_of(s.folder) if s.is_model else base_architecture(s.card, base) for s in sides)
    return next((architecture for architecture in found if architecture), None)


def _transposed(positive: FineTune, negative: FineTune, architecture: Architecture | None) -> frozenset[str]:
    """Modules whose weights are stored (d_in, d_out), as Conv1D's are: by class, or where that is unknown by shape."""
    if architecture:
        return architecture.transposed
    tensors = {**positive.whole, **negative.whole}
    return frozenset(name.removesuffix(".weight") for name in tensors) if _fits_columns(tensors) else frozenset()


def _fits_columns(tensors: Mapping[str, Whole]) -> bool:
    """Whether biases are as long as their matrices have columns."""
    for name, weight in tensors.items():
        bias = tensors.get(f"{name.removesuffix('.weight')}.bias")
        if bias and len(weight.shape) == 2 and weight.shape[0] != weight.shape[1] == bias.shape[0]:
            return True
    return False


def _vector_card(base: str | Path | None, *sides: FineTune) -> RunCard:
    """The vector's card: base, training settings and data of its side(s), and hashes of their weights."""
    data: dict[str, str] = {}
    coarse: set[str] = set()
    for label, side in zip(("positive", "negative"), sides, strict=False):
        data.update({f"{label} {name}": value for name, value in side.card.data_sha256.items()})
        data[f"{label} weights"] = fingerprint(side.folder)
        if side.is_model:
            coarse |= {tensor.dtype for tensor in side.whole.values()} & {"BF16", "F16"}
            coarse |= {"GGUF"} if side.card.kind == "model" and "gguf" in side.card.data_sha256 else set()
    if coarse:
        warnings.warn(
            f"the vector is made from {' and '.join(sorted(coarse))} checkpoints, whose rounding is part of it; "
            "adapters, where they exist, give it exactly",
            stacklevel=3,
        )
    card = on_named_base(on_base(next((side.card for side in sides if side.card.base_model), sides[0].card), base))
    return RunCard.now(
        "vector",
        base_model=card.base_model,
        base_revision=card.base_revision,
        data_sha256=data,
        settings=card.settings,
        seed=card.seed,
        measured={"sides": [side.card.measured for side in sides]},
        held_out=_held_out_pairs(*sides) if len(sides) == 2 else (),
    )


def _held_out_pairs(positive: FineTune, negative: FineTune) -> tuple[dict[str, Any], ...]:
    """What both sides held out of their training, as pairs: where both have the same prompt at the same place."""
    kept = [
        examples_from(side.card.held_out, f"{side.folder}: held_out") if side.card.kind == "finetune" else []
        for side in (positive, negative)
    ]
    both = zip(*kept, strict=False)
    return tuple(pair_rows([ContrastPair(a.prompt, a.answer, b.answer) for a, b in both if a.prompt == b.prompt]))
