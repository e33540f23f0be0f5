"""Mean response activations of D+ minus D-: the activation-steering baseline (persona vectors, Chen et al. 2025)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..batches import batches_by_length, pad_right
from ..behavior import Example, example_rows
from ..checkpoints.safetensors_file import load_tensors, save_tensors
from ..errors import SteerError
from ..files import digest
from ..fitting import in_parts
from ..lm import LM
from ..model_parts import decoder_blocks, projecting_only, width_of
from ..progress import Progress, part_of, silent
from ..run_card import RunCard, new_folder
from ..schema import shown
from ..vectors.handle import SteeringHandle
from ..vectors.steerable import Steerable, claim, model_of

ACTIVATION_FILE = "activations.safetensors"


@dataclass(frozen=True, eq=False)
class ActivationVector:
    """a_l for each block l: mean over answer tokens of its output on D+, minus the same on D-.

    Layer l is the output of block l, counted from 0; a_l has shape (hidden,).
    """

    layers: Mapping[int, Tensor]
    card: RunCard

    def only(self, layer: int) -> ActivationVector:
        """The same vector on one layer."""
        if layer not in self.layers:
            raise SteerError(f"layer {layer}: the vector has layers 0 to {max(self.layers)}")
        return replace(self, layers={layer: self.layers[layer]})

    def increments(self) -> ActivationVector:
        """All-layers steering: at block l what its mean gains over the block before, a_l - a_(l-1).

        Added at every block with the same k, the increments sum up to k a_l at the output of each.
        """
        before = {layer: self.layers.get(layer - 1) for layer in self.layers}
        gains = {i: a if (last := before[i]) is None else a - last for i, a in self.layers.items()}
        return replace(self, layers=gains)

    @contextmanager
    def applied(self, lm: Steerable, k: float | Tensor = 1.0) -> Iterator[SteeringHandle]:
        """x_l <- x_l + k a_l at the output of every layer of the vector, until the block is left.

        `lm` is an `LM`, a transformers model or a `PeftModel`.
        """
        handle = SteeringHandle(k, lm)
        model = model_of(lm)
        blocks = decoder_blocks(model)
        if max(self.layers) >= len(blocks):
            raise SteerError(f"the vector has layer {max(self.layers)}, this model {len(blocks)} blocks")
        found = {len(direction) for direction in self.layers.values()}
        if hasattr(model, "config") and found != {width_of(model)}:
            made = f"; it was made on {self.card.base_model}" if self.card.base_model else ""
            raise SteerError(f"the vector is {max(found)} wide, this model {width_of(model)}{made}")
        with claim(model), ExitStack() as stack:
            for layer, direction in self.layers.items():
                registered = blocks[layer].register_forward_hook(_adding(direction, handle))
                stack.callback(registered.remove)
            yield handle

    def save(self, folder: str | Path) -> Path:
        """Write the vector as safetensors with its card."""
        with new_folder(Path(folder), "activations") as part:
            tensors = {f"layer.{layer}": a.contiguous() for layer, a in self.layers.items()}
            save_tensors(tensors, part / ACTIVATION_FILE)
            self.card.save(part)
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> ActivationVector:
        """Read what `save` wrote.

        Raises:
            SteerError: no such folder, or tensors that are not one finite vector of one length for each layer.
        """
        path = Path(folder) / ACTIVATION_FILE
        layers = {_layer_of(path, name): _vector_of(path, name, a) for name, a in load_tensors(path).items()}
        if len({len(a) for a in layers.values()}) != 1:
            raise SteerError(f"{path}: expected vectors of one length, found {len(layers)} of different ones")
        return cls(dict(sorted(layers.items())), RunCard.load(Path(folder)))


def _layer_of(path: Path, name: str) -> int:
    found = re.fullmatch(r"layer\.([0-9]{1,5})", name)
    if not found:
        raise SteerError(f"{path}: expected tensors called layer.0, layer.1 and so on, found {shown(name)}")
    return int(found[1])


def _vector_of(path: Path, name: str, tensor: Tensor) -> Tensor:
    if tensor.ndim != 1 or not tensor.is_floating_point() or not bool(torch.isfinite(tensor.float()).all()):
        form = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
        raise SteerError(f"{path}: {name}: expected one vector of finite numbers, found {form} or NaN in it")
    return tensor


def _adding(direction: Tensor, handle: SteeringHandle) -> Any:
    def add(module: nn.Module, args: Any, output: Any) -> Any:
        if handle.is_zero:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        moved = handle.add_to(hidden, direction.to(hidden).expand_as(hidden))
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    return add


def activation_vector(
    lm: LM,
    positive: Sequence[Example],
    negative: Sequence[Example],
    *,
    batch_size: int = 8,
    progress: Progress = silent,
) -> ActivationVector:
    """a_l of every block from D+ and D-; each answer token weighs the same.

    Raises:
        SteerError: a side without an example.
    """
    sides = (positive, negative)
    if not all(sides):
        raise SteerError(f"activations: expected examples of both sides, found {len(positive)} and {len(negative)}")
    means = [
        _mean_activations(lm, side, batch_size, part_of(progress, number, len(sides)))
        for number, side in enumerate(sides)
    ]
    layers = {layer: means[0][layer] - means[1][layer] for layer in means[0]}
    data = {name: digest(example_rows(side)) for name, side in zip(("positive", "negative"), sides, strict=True)}
    data |= lm.template_identity
    card = RunCard.now("activations", base_model=lm.name, base_revision=lm.revision, data_sha256=data)
    return ActivationVector(layers, card)


@torch.no_grad()
def _mean_activations(lm: LM, examples: Sequence[Example], batch_size: int, progress: Progress) -> dict[int, Tensor]:
    """Mean output of each block over all answer tokens: layer -> (hidden,)."""
    exchanges = [lm.exchange(e.prompt, e.answer) for e in examples]
    rows = [(exchange.head, exchange.answer) for exchange in exchanges]
    lengths = [len(head) + len(answer) for head, answer in rows]
    sums: dict[int, Tensor] = {}

    def add(part: list[int]) -> list[int]:
        tokens, mask = pad_right([rows[i][0] + rows[i][1] for i in part], lm.pad_id, lm.device)
        answer, _ = pad_right([[0] * len(rows[i][0]) + [1] * len(rows[i][1]) for i in part], 0, lm.device)
        with (
            summing(lm, answer.flatten().nonzero()[:, 0]) as found,
            projecting_only(lm.model, torch.zeros_like(answer).bool()),
        ):
            lm.model(input_ids=tokens, attention_mask=mask, use_cache=False)
        for layer, total in found.items():  # only once all blocks have run: a part may be computed again
            sums[layer] = sums[layer] + total if layer in sums else total
        return part

    for batch in batches_by_length(lengths, batch_size, progress):
        in_parts(lm.model, "activations", batch, lengths, add)
    count = sum(len(answer) for _, answer in rows)
    return {layer: (total.cpu().double() / count).float() for layer, total in sums.items()}


@contextmanager
def summing(lm: LM, places: Tensor) -> Iterator[dict[int, Tensor]]:
    """Yield what comes to be each block's output, (hidden,), summed over places of the batch's flattened positions.

    The sum is made where the block is, in float64; a device without that sums in float32, and hands the sum on.
    """
    sums: dict[int, Tensor] = {}
    at: dict[torch.device, Tensor] = {places.device: places}

    def adding(layer: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            where = at.setdefault(hidden.device, places.to(hidden.device))
            chosen = hidden.flatten(0, 1).index_select(0, where)
            if hidden.device.type == "mps":  # knows no float64; torch sums a column pairwise, so little is lost
                sums[layer] = chosen.sum(dim=0, dtype=torch.float32).cpu().double()
            else:
                sums[layer] = chosen.sum(dim=0, dtype=torch.float64)

        return hook

    with ExitStack() as stack:
        for layer, block in enumerate(lm.blocks):
            stack.callback(block.register_forward_hook(adding(layer)).remove)
        yield sums
