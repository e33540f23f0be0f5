"""One fine-tune as it lies in a folder: what it adds to parameters of the base, and what it puts in their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ..checkpoints.adapted import card_of
from ..checkpoints.architecture import Architecture, architecture_of
from ..checkpoints.checkpoint import ADAPTER_CONFIG, ADAPTER_FILE, DENSE_FILE, is_checkpoint
from ..checkpoints.locate import local_base, local_folder, source_folder
from ..checkpoints.parameters import Whole, read_parameters
from ..checkpoints.recognise import what_it_holds
from ..errors import SteerError
from ..run_card import RunCard
from .base_identity import on_base
from .delta import Delta, Part
from .mlx_adapter import MLX_FILE, is_mlx_adapter, read_mlx_adapter
from .peft_adapter import Adapter, read_adapter, refuse_empty
from .vector_folder import dense_file, open_vector

Makers = Mapping[str, Callable[[], Delta]]


@dataclass(frozen=True)
class FineTune:
    """What a fine-tune adds to parameters of the base, and what it puts in their place, by the base's names."""

    folder: Path
    card: RunCard
    deltas: Makers = field(default_factory=dict)
    whole: Mapping[str, Whole] = field(default_factory=dict)
    dora: Mapping[str, Callable[[Whole], Part]] = field(default_factory=dict)
    is_model: bool = False  # a full checkpoint: `whole` holds every parameter
    tied: Mapping[str, str] = field(default_factory=dict)  # another name of a parameter that is given -> its name

    @property
    def names(self) -> list[str]:
        return [*self.deltas, *self.dora, *self.whole]

    def replaces(self, name: str) -> bool:
        """Whether the fine-tune gives the parameter itself, not what is added to the base's."""
        return name in self.dora or self.given(name) is not None

    def given(self, name: str) -> Whole | None:
        """The parameter as the fine-tune has it; of a tied model under either name."""
        return self.whole.get(name) or self.whole.get(self.tied.get(name, ""))


def read_finetune(name: str | Path, base: str | Path | None = None) -> FineTune:
    """Read an adapter (PEFT's or mlx-lm's), a bias fine-tune, a full checkpoint or a saved vector.

    `base` overrules what the fine-tune says of its base; with the base at hand (given, or named and on this machine)
    every parameter gets the name that it has in the model in memory.

    Raises:
        SteerError: a folder that is none of these, and what it is instead.
    """
    folder = source_folder(name)
    card = card_of(folder)
    if card.kind == "vector":
        deltas = open_vector(folder)[0]
        return FineTune(folder, on_base(card, base), {name: partial(deltas.__getitem__, name) for name in deltas})
    if is_mlx_adapter(folder):
        refuse_empty(folder / MLX_FILE)
        return _of_adapter(folder, card, read_mlx_adapter(folder, base_architecture(card, base)))
    if (folder / ADAPTER_CONFIG).is_file() and (folder / ADAPTER_FILE).is_file():
        refuse_empty(folder / ADAPTER_FILE)
        return _of_adapter(folder, card, read_adapter(folder, base_architecture(card, base)))
    if (folder / DENSE_FILE).is_file():
        biases = dense_file(folder / DENSE_FILE)
        return FineTune(folder, card, {name: partial(biases.__getitem__, name) for name in biases})
    if is_checkpoint(folder):
        architecture = architecture_of(folder)
        tied = architecture.tied if architecture else {}
        return FineTune(folder, card, whole=read_parameters(folder), is_model=True, tied=tied)
    raise SteerError(
        f"{folder}: not a fine-tune ({ADAPTER_CONFIG} with {ADAPTER_FILE}, {DENSE_FILE} or a checkpoint in "
        f"safetensors): {what_it_holds(folder)}"
    )


def _of_adapter(folder: Path, card: RunCard, adapter: Adapter) -> FineTune:
    return FineTune(folder, card, adapter.deltas, adapter.whole, adapter.dora, tied=adapter.shared)


def base_architecture(card: RunCard, base: str | Path | None) -> Architecture | None:
    """The base's architecture, if the base is given or lies on this machine under the name that the card has."""
    folder = local_folder(str(base)) if base else local_base(card)
    return architecture_of(folder) if folder else None
