"""The weight vector: parameter name -> delta, its algebra, and its place on disk."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .apply import Dial, steered
from .errors import SteerError
from .lowrank import ACCUMULATE, LowRank
from .records import CARD_FILE, RunCard, current_umask, new_folder

if TYPE_CHECKING:
    from .apply import HasModel

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
DENSE_FILE = "delta.safetensors"
PEFT_PREFIX = "base_model.model."

Delta = LowRank | Tensor


@dataclass(frozen=True, eq=False)
class WeightVector:
    """A direction in weight space: w = theta+ - theta- (paper, section 2), or any sum of such.

    `deltas` maps parameter names of the base model ("model.layers.0.mlp.down_proj.weight") to a
    `LowRank` or a dense Tensor of the parameter's shape; a name that is absent is zero.
    """

    deltas: Mapping[str, Delta]
    card: RunCard

    def __add__(self, other: WeightVector) -> WeightVector:
        """Exact sum. Ranks add up; a factored and a dense delta of one parameter give a dense one."""
        require_same_base(self.card, other.card)
        deltas = dict(self.deltas)
        for name, delta in other.deltas.items():
            deltas[name] = _add(name, deltas[name], delta) if name in deltas else delta
        return WeightVector(deltas, _derived_card(self.card))

    def __mul__(self, scale: float) -> WeightVector:
        """The vector times a number."""
        return WeightVector({name: delta * scale for name, delta in self.deltas.items()}, _derived_card(self.card))

    __rmul__ = __mul__

    def __neg__(self) -> WeightVector:
        return self * -1.0

    def __sub__(self, other: WeightVector) -> WeightVector:
        """Exact difference; `w - w` has norm exactly 0 (the same delta object cancels away)."""
        require_same_base(self.card, other.card)
        deltas: dict[str, Delta] = {}
        for name in [*self.deltas, *(n for n in other.deltas if n not in self.deltas)]:
            mine, theirs = self.deltas.get(name), other.deltas.get(name)
            if theirs is None or mine is None:
                deltas[name] = theirs * -1.0 if mine is None and theirs is not None else self.deltas[name]
            elif not _identical(mine, theirs):
                deltas[name] = _add(name, mine, theirs * -1.0)
        return WeightVector(deltas, _derived_card(self.card))

    def dot(self, other: WeightVector) -> float:
        """Sum over all parameters of the products of entries, in float64."""
        return math.fsum(
            delta_dot(delta, other.deltas[name]) for name, delta in self.deltas.items() if name in other.deltas
        )

    def norm(self) -> float:
        """Frobenius norm over all parameters."""
        return math.sqrt(max(self.dot(self), 0.0))

    def cosine(self, other: WeightVector) -> float:
        """Cosine over all parameters (paper, section 6: monitoring).

        Raises:
            SteerError: the bases differ, or one of the vectors is zero.
        """
        require_same_base(self.card, other.card)
        norms = self.norm() * other.norm()
        if norms == 0.0:
            raise SteerError("cosine: one of the vectors is zero, so it has no direction")
        return max(-1.0, min(1.0, self.dot(other) / norms))

    def norms(self) -> dict[str, float]:
        """Frobenius norm of each parameter's delta."""
        return {name: math.sqrt(max(delta_dot(delta, delta), 0.0)) for name, delta in self.deltas.items()}

    def applied(self, lm: HasModel, k: float | Tensor = 1.0) -> AbstractContextManager[Dial]:
        """Steer `lm` to theta + k w inside a `with` block; leaving it restores every bit.

        `k` is in multiples of w: a number, or a tensor (batch,) with one k per row. The block's
        handle changes it in place: `with w.applied(lm, k=1) as dial: ...; dial.k = 2`.

        Raises:
            SteerError: a parameter is missing in the model, or has another shape.
        """
        return steered(lm.model, self.deltas, k)

    def save(self, folder: str | Path) -> Path:
        """Write the vector as a PEFT adapter folder plus our card (see `save_vector`)."""
        return save_vector(self, Path(folder))

    @classmethod
    def load(cls, folder: str | Path) -> WeightVector:
        """Read a folder that `save` wrote.

        Raises:
            SteerError: not a vector's folder, a damaged file, or a NaN or infinite entry.
        """
        return load_vector(Path(folder))


def delta_dot(first: Delta, second: Delta) -> float:
    """<first, second> for any mix of factored and dense, never forming B @ A."""
    if isinstance(first, LowRank):
        return first.dot(second)
    if isinstance(second, LowRank):
        return second.dot(first)
    return float((first.to(ACCUMULATE) * second.to(ACCUMULATE)).sum())


def require_same_base(first: RunCard, second: RunCard) -> None:
    """Raise unless both artifacts were made on the same base model."""
    known = first.base_revision and second.base_revision
    ours, theirs = (card.base_revision if known else card.base_model for card in (first, second))
    if ours and theirs and ours != theirs:
        raise SteerError(
            f"the vectors have different bases: {first.base_model} ({first.base_revision[:12]}) and "
            f"{second.base_model} ({second.base_revision[:12]}); only vectors of one base can be combined"
        )


def _derived_card(card: RunCard) -> RunCard:
    """The card of a result of algebra: same base, but the range of k was measured for other weights."""
    return replace(card, strength=None, measured={})


def _identical(first: Delta, second: Delta) -> bool:
    if isinstance(first, LowRank) and isinstance(second, LowRank):
        return torch.equal(first.B, second.B) and torch.equal(first.A, second.A)
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.equal(first, second)
    return False


def _add(name: str, first: Delta, second: Delta) -> Delta:
    if tuple(first.shape) != tuple(second.shape):
        raise SteerError(
            f"{name}: shapes differ, {tuple(first.shape)} and {tuple(second.shape)}; "
            "the vectors were made on different models"
        )
    if isinstance(first, LowRank) and isinstance(second, LowRank):
        return first + second
    dense = [delta.dense() if isinstance(delta, LowRank) else delta for delta in (first, second)]
    return dense[0] + dense[1]


def save_vector(vector: WeightVector, folder: Path) -> Path:
    """Write a vector so that `PeftModel.from_pretrained(base, folder)` is theta + 1 w.

    Factored weights go to `adapter_model.safetensors` with lora_alpha = r (scale 1, everything in
    B; lower ranks are padded with zeros, since engines differ in how they scale them), other deltas
    to `delta.safetensors`, which PEFT ignores; the card to `weightsteer.json`.

    Raises:
        SteerError: a NaN or infinite entry, or a folder that holds something else.
    """
    require_finite(vector.deltas)
    factored = {n: d for n, d in vector.deltas.items() if isinstance(d, LowRank)}
    dense = {n: d.contiguous() for n, d in vector.deltas.items() if isinstance(d, Tensor)}
    with new_folder(folder, "vector") as part:
        if factored or not dense:
            tensors = {}
            rank = max((delta.rank for delta in factored.values()), default=1)
            for name, delta in factored.items():
                module = PEFT_PREFIX + name.removesuffix(".weight")
                missing = rank - delta.rank
                tensors[f"{module}.lora_A.weight"] = nn.functional.pad(delta.A, (0, 0, 0, missing)).contiguous()
                tensors[f"{module}.lora_B.weight"] = nn.functional.pad(delta.B, (0, missing)).contiguous()
            save_tensors(tensors, part / ADAPTER_FILE)
            config = _adapter_config(factored, rank, vector.card)
            (part / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        if dense:
            save_tensors(dense, part / DENSE_FILE)
        vector.card.save(part)
    return folder


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file with the permissions that the umask gives (its writer makes 0600)."""
    save_file(dict(tensors), path, metadata={"format": "pt"})
    path.chmod(0o666 & ~current_umask())


def _adapter_config(factored: Mapping[str, LowRank], rank: int, card: RunCard) -> dict[str, object]:
    """The few fields that PEFT, vLLM and llama.cpp's converter read."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": card.base_model,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": sorted(name.removesuffix(".weight") for name in factored),
        "use_rslora": False,
        "bias": "none",
        "inference_mode": True,
    }


def load_vector(folder: Path) -> WeightVector:
    """Read what `save_vector` wrote (see `WeightVector.load`)."""
    if not (folder / CARD_FILE).is_file():
        raise SteerError(
            f"{folder}: not a saved weight vector (no {CARD_FILE}); "
            "make one with `weightsteer subtract PLUS MINUS -o OUT`"
        )
    card = RunCard.load(folder)
    if card.kind != "vector":
        raise SteerError(f"{folder}: holds a {card.kind}, expected a vector; see `weightsteer show`")
    deltas: dict[str, Delta] = {}
    if (folder / ADAPTER_FILE).exists():
        factors = lora_factors(folder / ADAPTER_FILE)
        deltas.update({f"{module}.weight": LowRank(B, A) for module, (B, A) in factors.items()})
    if (folder / DENSE_FILE).exists():
        deltas.update(load_tensors(folder / DENSE_FILE))
    require_finite(deltas)
    return WeightVector(deltas, card)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; a damaged one is an error that names it."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise SteerError(f"{path}: cannot be read as safetensors ({error}); the file is damaged") from None


def lora_factors(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> (B, A) of an adapter file; every tensor in it is consumed, or it is an error."""
    tensors = load_tensors(path)
    factors = {}
    for key in sorted(key for key in tensors if key.endswith(".lora_A.weight")):
        module = key.removesuffix(".lora_A.weight")
        B, A = tensors.pop(f"{module}.lora_B.weight", None), tensors.pop(key)
        if B is None:
            raise SteerError(f"{path}: {key} has no lora_B beside it; the adapter is damaged")
        factors[module.removeprefix(PEFT_PREFIX)] = (B, A)
    if tensors:
        raise SteerError(f"{path}: {next(iter(tensors))} is not part of a plain LoRA, so it cannot be taken over")
    return factors


def require_finite(deltas: Mapping[str, Delta]) -> None:
    """Raise, naming the tensor, if any entry is NaN or infinite."""
    for name, delta in deltas.items():
        parts = {"lora_A": delta.A, "lora_B": delta.B} if isinstance(delta, LowRank) else {"delta": delta}
        for part, tensor in parts.items():
            if not bool(torch.isfinite(tensor).all()):
                raise SteerError(f"{name} ({part}): holds NaN or infinite entries; the training diverged")
