"""The vectors that are served, by name: which strengths a request asks for, and whether these were tested."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from ..errors import SteerError
from ..schema import shown
from ..strength_names import is_name, on_grid, parse_strengths
from ..vectors.weight_vector import WeightVector
from .described import OutOfRange, described

UNTESTED_K = 1.0  # w itself: what a list of models offers of a vector without a recommended k


def out_of_range_named(text: str) -> OutOfRange:
    """What to do with a k beyond the tested range.

    Raises:
        SteerError: no such way.
    """
    for way in get_args(OutOfRange):
        if text == way:
            return way
    raise SteerError(f"out of range: expected {', '.join(get_args(OutOfRange))}, found {shown(text)}")


class RequestError(SteerError):
    """A request that cannot be answered, with its HTTP status, and the field and the kind of mistake it is about."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


@dataclass(frozen=True)
class Setting:
    """The strengths of a request, without those that are 0, and what to say of them ("" if nothing)."""

    strengths: Mapping[str, float]
    warning: str = ""


@dataclass(frozen=True)
class Dial:
    """A base and the vectors that are served on it."""

    base: str
    vectors: Mapping[str, WeightVector]
    out_of_range: OutOfRange = "warn"

    def __post_init__(self) -> None:
        for name in self.vectors:
            if not is_name(name):
                raise SteerError(
                    f"{shown(name)}: no name that requests can carry; expected letters, digits, _ . and -, as in "
                    "NAME=FOLDER"
                )
        if self.base in self.vectors:
            raise SteerError(f"{self.base}: is the base's name too; call the vector otherwise, by NAME=FOLDER")

    def setting(self, model: str | None, k: float | Mapping[str, float] | None = None) -> Setting:
        """What a request's model and its field `k` ask for.

        Raises:
            RequestError: no such model or vector, two strengths for one vector, or out of range where that is refused.
        """
        named = {} if model is None or model == self.base else self._named(model)
        if k is None:
            wanted = {name: self._recommended(name) if value is None else value for name, value in named.items()}
        else:
            wanted = self._with_k(named, k)
        return self._within_range(wanted)

    def _named(self, model: str) -> dict[str, float | None]:
        try:
            return parse_strengths(model, self.vectors)
        except SteerError as error:
            known = ", ".join((self.base, *self.vectors))
            raise RequestError(
                f"{error}; the names here are {known}", status=404, param="model", code="model_not_found"
            ) from None

    def _recommended(self, name: str) -> float:
        strength = self.vectors[name].card.strength
        if strength is None or not strength.recommended:
            raise RequestError(
                f"{name}: its card recommends no k; name one, as in {name}@{UNTESTED_K:g}, or calibrate the vector",
                param="model",
            )
        return on_grid(strength.recommended)

    def _with_k(self, named: Mapping[str, float | None], k: float | Mapping[str, float]) -> dict[str, float]:
        if any(value is not None for value in named.values()):
            raise RequestError("k: the model's name has a strength already; give one of the two", param="k")
        if isinstance(k, Mapping):
            return self._of_mapping(named, k)
        names = list(named or self.vectors)
        if len(names) != 1:
            raise RequestError(
                f"k: is one number, and there are {len(names)} vectors ({', '.join(names) or 'none'}); give an object "
                "of names and numbers, or name one vector as the model",
                param="k",
            )
        return {names[0]: _grid(k, "k")}

    def _of_mapping(self, named: Mapping[str, float | None], k: Mapping[str, float]) -> dict[str, float]:
        for name in k:
            if name not in self.vectors:
                known = ", ".join(self.vectors) or "none"
                raise RequestError(
                    f"k: no vector {shown(name)} among {known}", status=404, param="k", code="model_not_found"
                )
        missing = [name for name in named if name not in k]
        if missing:
            raise RequestError(f"k: has no number for {missing[0]}, which the model's name names", param="k")
        return {name: _grid(value, f"k: {name}") for name, value in k.items()}

    def _within_range(self, wanted: Mapping[str, float]) -> Setting:
        """The strengths as they are used, by what is to be done beyond the tested range."""
        used, warnings = {}, []
        for name, k in wanted.items():
            strength = self.vectors[name].card.strength
            used[name] = k
            if strength is None or not (warning := strength.warning([k])):
                continue
            if self.out_of_range == "refuse":
                raise RequestError(f"{name}: {warning}; this server refuses it", param="k", code="out_of_range")
            if self.out_of_range == "clamp":
                used[name] = on_grid(min(max(k, strength.low), strength.high))
                warning += f"; k = {used[name]:g} was taken"
            warnings.append(f"{name}: {warning}")
        return Setting({name: k for name, k in used.items() if k}, "; ".join(warnings))

    @property
    def models(self) -> list[str]:
        """Names that a request can give as its model: the base, and each vector at the k to begin with."""
        found = [self.base]
        for name, vector in self.vectors.items():
            strength = vector.card.strength
            found.append(name if strength and strength.recommended else f"{name}@{UNTESTED_K:g}")
        return found

    def described(self) -> dict[str, Any]:
        """What `/dial` answers."""
        cards = {name: vector.card for name, vector in self.vectors.items()}
        return described(self.base, cards, "weightsteer", self.out_of_range)


def _grid(k: float, where: str) -> float:
    try:
        return on_grid(k, where)
    except SteerError as error:
        raise RequestError(str(error), param="k") from None
