"""The fields of PEFT's adapter_config.json, each read as the type that it must have."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import SteerError
from .module_patterns import compile_pattern, is_end_of, is_named

MOST_RANK = 1_000_000
MOST_LAYERS = 100_000
LAYER = re.compile(r".*\.[^.]*\.(\d+)\.")  # how PEFT finds a layer's number, where no layers_pattern is given


@dataclass(frozen=True)
class Targets:
    """Which modules PEFT puts a LoRA on; tensors of others it does not load."""

    names: tuple[str, ...] | None = None  # target_modules as a list; None where it is not one
    pattern: re.Pattern[str] | None = None  # target_modules as a pattern
    excluded: tuple[str, ...] = ()  # exclude_modules as a list
    excluded_pattern: re.Pattern[str] | None = None  # exclude_modules as a pattern
    layers: tuple[int, ...] | None = None
    layer_names: tuple[str, ...] = ()  # what stands before a layer's number
    given: bool = True  # without target_modules PEFT takes a few modules that depend on the kind of model

    def refusal(self, spellings: Sequence[str], *, sure: bool) -> str:
        """Which field leaves a module out; "" where none does.

        Args:
            spellings: the module's names, of which one must be meant: the adapter's and the model's may differ.
            sure: the model's own name is among them; else a pattern of whole names tells nothing.
        """
        if any(is_named(module, self.excluded) for module in spellings):
            return "exclude_modules names it"
        if self.excluded_pattern is not None and any(map(self.excluded_pattern.match, spellings)):
            return "exclude_modules fits it"
        if self.pattern is not None and sure and not any(map(self.pattern.match, spellings)):
            return "target_modules does not fit it"
        if not self.given:
            return "target_modules is not given"
        if self.names is None:
            return ""
        if not any(is_named(module, self.names) or is_end_of(module, self.names) for module in spellings):
            return "target_modules does not name it"
        if self.layers is not None and not any(m in self.names or self._layer_of(m) in self.layers for m in spellings):
            return f"layers_to_transform has {', '.join(map(str, self.layers))} alone"
        return ""

    def _layer_of(self, module: str) -> int | None:
        if self.layer_names:
            found = [re.match(rf".*\.{re.escape(name)}\.(\d+)\.", module) for name in self.layer_names]
            return next((int(match[1]) for match in found if match), None)
        match = LAYER.match(module)
        return int(match[1]) if match else None


@dataclass(frozen=True)
class Fields:
    """The fields of one config."""

    path: Path
    fields: Mapping[str, Any]

    def number(self, name: str, default: float | None) -> float:
        """A number above 0."""
        return self._number(name, self.fields.get(name, default))

    def count(self, name: str, default: int) -> int:
        """A whole number above 0."""
        return self._count(name, self.fields.get(name, default))

    def _number(self, name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
            raise self._wrong(name, "a number above 0", value)
        return float(value)

    def _count(self, name: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= MOST_RANK:
            raise self._wrong(name, f"a whole number from 1 to {MOST_RANK}", value)
        return value

    def flag(self, name: str) -> bool:
        """True or false; what is absent is false."""
        value = self.fields.get(name)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(name, "true or false", value)
        return bool(value)

    def text(self, name: str) -> str:
        """A text, "" where it is absent."""
        value = self.fields.get(name)
        if value is not None and not isinstance(value, str):
            raise self._wrong(name, "a text", value)
        return value or ""

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts, empty where it is absent."""
        value = self.fields.get(name)
        if value is not None and not _are_texts(value):
            raise self._wrong(name, "a list of texts", value)
        return tuple(value or ())

    def patterns(self, name: str, *, whole: bool = False) -> tuple[tuple[re.Pattern[str], float], ...]:
        """Module patterns as PEFT reads them, in their order: the first that fits counts.

        Args:
            whole: the numbers are whole.
        """
        value = self.fields.get(name)
        if value is not None and not isinstance(value, dict):
            raise self._wrong(name, "an object of module patterns and numbers", value)
        found = []
        for pattern, number in (value or {}).items():
            place = f"{name}, {pattern!r}"
            checked = self._count(place, number) if whole else self._number(place, number)
            found.append((self._pattern(name, pattern, anywhere=True), float(checked)))
        return tuple(found)

    def targets(self) -> Targets:
        """What says which modules have a LoRA."""
        named = self.fields.get("target_modules")
        if named is not None and not isinstance(named, str) and not _are_texts(named):
            raise self._wrong("target_modules", "a text or a list of texts", named)
        excluded = self.fields.get("exclude_modules")
        if excluded is not None and not isinstance(excluded, str) and not _are_texts(excluded):
            raise self._wrong("exclude_modules", "a text or a list of texts", excluded)
        is_pattern = isinstance(named, str) and named != "all-linear"
        return Targets(
            names=tuple(named) if isinstance(named, list) else None,
            pattern=self._fullmatch(str(named)) if is_pattern else None,
            excluded=tuple(excluded) if isinstance(excluded, list) else (),
            excluded_pattern=self._excluded(excluded),
            layers=self._layers(),
            layer_names=self._layer_names(),
            given=named is not None,
        )

    def _excluded(self, value: object) -> re.Pattern[str] | None:
        """The pattern of whole names that PEFT leaves out, where it is one."""
        return self._pattern("exclude_modules", value, anywhere=False) if isinstance(value, str) and value else None

    def _fullmatch(self, text: str) -> re.Pattern[str] | None:
        """The pattern of a target; None for one that would take long, as Unsloth's do: it is not tried at all."""
        try:
            return compile_pattern(text, anywhere=False)
        except re.error as error:
            raise self._wrong("target_modules", f"a pattern of modules ({error})", text) from None

    def _layers(self) -> tuple[int, ...] | None:
        value = self.fields.get("layers_to_transform")
        if value is None:
            return None
        listed = value if isinstance(value, list) else [value]
        if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < MOST_LAYERS for n in listed):
            raise self._wrong("layers_to_transform", "numbers of layers", value)
        return tuple(listed) or None

    def _layer_names(self) -> tuple[str, ...]:
        value = self.fields.get("layers_pattern")
        return (value,) if isinstance(value, str) and value else () if value == "" else self.texts("layers_pattern")

    def _pattern(self, name: str, text: str, *, anywhere: bool) -> re.Pattern[str]:
        try:
            compiled = compile_pattern(text, anywhere=anywhere)
        except re.error as error:
            raise self._wrong(name, f"module patterns ({text!r}: {error})", text) from None
        if compiled is None:
            raise self._wrong(name, "patterns that end soon, without repeats of repeats", text)
        return compiled

    def _wrong(self, name: str, expected: str, value: object) -> SteerError:
        return SteerError(f"{self.path}: field {name}: expected {expected}, found {json.dumps(value)[:80]}")


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)
