"""w as other engines take it: a PEFT adapter with k folded in, or a merged checkpoint theta + k w."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import opened, shards_of
from .errors import SteerError
from .lowrank import LowRank
from .progress import Progress, silent
from .records import RunCard, new_folder, read_json
from .vector import Delta, WeightVector, require_finite, save_tensors, save_vector

SKIPPED = (".safetensors", ".bin", ".pt", ".pth", ".gguf")  # weights in other forms are not carried over
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class MergeReport:
    """What one rounding to the base's dtype left of k w."""

    changed_tensors: int
    delta_error: float  # |realised - intended| / |intended|
    unchanged_share: float  # of the entries of changed tensors


def export_adapter(vector: WeightVector, folder: str | Path, *, k: float) -> Path:
    """Write k w as a PEFT adapter for vLLM, PEFT or llama.cpp's converter: at their scale 1 it is k.

    Raises:
        SteerError: the vector has dense parts, which an adapter cannot hold.
    """
    dense = [name for name, delta in vector.deltas.items() if not isinstance(delta, LowRank)]
    if dense:
        raise SteerError(
            f"{dense[0]}: is dense, which a LoRA adapter cannot hold; use --to merged, or steer in memory where "
            "the base has no such parameter (a bias)"
        )
    card = replace(vector.card, settings={**vector.card.settings, "k": k}, strength=None)
    return save_vector(WeightVector((vector * k).deltas, card), Path(folder))


def export_merged(
    vector: WeightVector, base: Path, folder: str | Path, *, k: float, progress: Progress = silent
) -> MergeReport:
    """Write theta + k w as a checkpoint with the base's shards, dtype, config and tokenizer.

    One shard in memory at a time; float32 arithmetic from the factors, one rounding; tensors that
    the vector does not touch keep every byte; the folder appears only when whole. The card and
    the result tell how much of k w survived the rounding.

    Raises:
        SteerError: a quantised base, a parameter that the base lacks or has in another shape, or
            an output that would overwrite something.
    """
    folder = Path(folder)
    require_finite(vector.deltas)
    _check_base(vector.deltas, base)
    shards = shards_of(base)
    tally = _Tally()
    with new_folder(folder, "merged") as part:
        for number, shard in enumerate(shards):
            progress(number, len(shards), shard.name)
            save_tensors(_merged_shard(shard, vector.deltas, k, tally), part / shard.name)
        for file in base.iterdir():
            if file.is_file() and file.suffix not in SKIPPED and not (part / file.name).exists():
                shutil.copyfile(file, part / file.name)
        report = tally.report()
        card = RunCard.now(
            "merged",
            base_model=vector.card.base_model,
            base_revision=vector.card.base_revision,
            data_sha256=vector.card.data_sha256,
            settings={"k": k},
            measured=vars(report),
        )
        card.save(part)
    progress(len(shards), len(shards), "done")
    return report


def _check_base(deltas: Mapping[str, Delta], base: Path) -> None:
    config = read_json(base / "config.json")
    if config.get("quantization_config"):
        raise SteerError(
            f"{base}: its weights are quantised, and theta + k w cannot be rounded into them; "
            "export with --to peft and serve the adapter over them"
        )
    shapes = {}
    for shard in shards_of(base):
        with opened(shard) as file:
            shapes.update({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})  # noqa: SIM118
    for name, delta in deltas.items():
        if name not in shapes:
            raise SteerError(
                f"{name}: the vector changes it, but {base} has no such tensor; use the vector's base, "
                "or steer in memory if it is a bias that this architecture lacks"
            )
        if shapes[name] != tuple(delta.shape):
            raise SteerError(
                f"{name}: the vector was made on a base of shape {tuple(delta.shape)}, {base} has {shapes[name]}; "
                "use the base named in the vector's card"
            )


def _merged_shard(shard: Path, deltas: Mapping[str, Delta], k: float, tally: _Tally) -> dict[str, Tensor]:
    merged = {}
    with opened(shard) as file:
        for name in file.keys():  # noqa: SIM118
            theta = file.get_tensor(name)
            merged[name] = merge_tensor(name, theta, deltas[name], k, tally) if name in deltas and k else theta
    return merged


def merge_tensor(name: str, theta: Tensor, delta: Delta, k: float, tally: _Tally) -> Tensor:
    """theta + k delta in float32, rounded once to theta's dtype."""
    if theta.dtype not in FLOATS:
        raise SteerError(f"{name}: has dtype {theta.dtype}, expected float32, bfloat16 or float16")
    dense = delta.dense() if isinstance(delta, LowRank) else delta
    intended = k * dense.float()
    result = (theta.float() + intended).to(theta.dtype)
    tally.add(theta, intended, result)
    return result


class _Tally:
    """Sums over all merged tensors: squared error, squared size, entries left as they were."""

    def __init__(self) -> None:
        self.tensors = self.entries = self.unchanged = 0
        self.error = self.size = 0.0

    def add(self, theta: Tensor, intended: Tensor, result: Tensor) -> None:
        realised = result.double() - theta.double()
        self.tensors += 1
        self.entries += theta.numel()
        self.unchanged += int((result == theta).sum())
        self.error += float((realised - intended.double()).square().sum())
        self.size += float(intended.double().square().sum())

    def report(self) -> MergeReport:
        error = math.sqrt(self.error / self.size) if self.size else 0.0
        return MergeReport(self.tensors, error, self.unchanged / max(self.entries, 1))
