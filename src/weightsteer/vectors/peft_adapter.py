"""PEFT's LoRA adapter folders: what each tensor in one changes, and a vector's factors written as one."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.checkpoint import ADAPTER_CONFIG
from ..checkpoints.safetensors_file import SafeFile, Stored
from ..errors import SteerError
from ..files import read_json
from ..run_card import RunCard
from .delta import Delta, Part, require_finite
from .low_rank import Layout, LowRank
from .parameter_names import PEFT_PREFIX, base_name

ADAPTER_FILE = "adapter_model.safetensors"
FACTOR_ENDINGS = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}  # of A and of B

# Adapter features whose change is neither (alpha / r) B A nor a whole tensor, so that it cannot be taken over exactly.
UNSUPPORTED = (
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "use_bdlora",
    "use_qalora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)


@dataclass(frozen=True)
class Adapter:
    """What an adapter changes, by parameter name of the base.

    `deltas` are added to the base; `whole` replace its parameters (`modules_to_save`, trained biases); `dora` give
    the fine-tuned parameter from the base's.
    """

    deltas: Mapping[str, Callable[[], Delta]]
    whole: Mapping[str, Stored]
    dora: Mapping[str, Callable[[Stored], Part]]


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter folder's names and shapes; factors are read when they are asked for.

    Raises:
        SteerError: no LoRA, a damaged file, or a tensor whose effect has no exact form here.
    """
    config = read_json(folder / ADAPTER_CONFIG)
    refuse_unsupported(folder, config)
    file = SafeFile(folder / ADAPTER_FILE)
    rest = dict(file.tensors)
    deltas: dict[str, Callable[[], Delta]] = {}
    dora: dict[str, Callable[[Stored], Part]] = {}
    for key in sorted(name for name in rest if name.endswith(tuple(FACTOR_ENDINGS))):
        lora = _take_lora(file, rest, key, config)
        if lora.magnitude is None:
            deltas[f"{lora.module}.weight"] = lora.factors
        else:
            dora[f"{lora.module}.weight"] = partial(DoraWeight, lora.factors, lora.magnitude)
        if lora.bias is not None:
            name = f"{lora.module}.bias"
            deltas[name] = partial(_bias, name, lora.bias, lora.scale)
    return Adapter(deltas, _whole(file, rest, deltas.keys() | dora.keys()), dora)


@dataclass(frozen=True)
class _Lora:
    """One module's LoRA as it is stored."""

    module: str
    scale: float
    factors: Callable[[], LowRank]
    magnitude: Stored | None  # DoRA's
    bias: Stored | None


def _take_lora(file: SafeFile, rest: dict[str, Stored], key: str, config: Mapping[str, Any]) -> _Lora:
    """Take the tensors of one module's LoRA out of `rest`; `key` is that of its A.

    Raises:
        SteerError: half of it is missing, or it has no exact form here.
    """
    ending = next(ending for ending in FACTOR_ENDINGS if key.endswith(ending))
    prefix = key.removesuffix(ending)
    module = prefix.removeprefix(PEFT_PREFIX)
    A, B = rest.pop(key), rest.pop(prefix + FACTOR_ENDINGS[ending], None)
    if B is None:
        raise SteerError(f"{file.path}: {key} has no lora_B beside it; the adapter is damaged")
    if len(A.shape) != 2 or len(B.shape) != 2:
        raise SteerError(f"{file.path}: {module} is a convolution's LoRA, which is not supported; retrain without it")
    layout = _layout_of(ending, config)
    magnitude = rest.pop(f"{prefix}.lora_magnitude_vector", None)
    if magnitude is not None and layout != "linear":
        raise SteerError(f"{file.path}: {module} is DoRA on a {layout}, which is not supported; retrain without DoRA")
    scale = _scale(config, module, A.shape[0])
    factors = partial(_factors, f"{module}.weight", A, B, scale, layout)
    return _Lora(module, scale, factors, magnitude, rest.pop(f"{prefix}.lora_B.bias", None))


def _layout_of(ending: str, config: Mapping[str, Any]) -> Layout:
    if ending == ".lora_embedding_A":
        return "embedding"
    return "conv1d" if config.get("fan_in_fan_out") else "linear"


def _factors(name: str, A: Stored, B: Stored, scale: float, layout: Layout) -> LowRank:
    if layout == "linear":
        delta = LowRank(_times(B.read().float(), scale), A.read().float(), layout)
    else:  # the parameter is stored transposed: (B A)^T = A^T B^T
        delta = LowRank(_times(A.read().float(), scale).T, B.read().float().T, layout)
    require_finite(name, delta)
    return delta


def _times(tensor: Tensor, scale: float) -> Tensor:
    return tensor if scale == 1.0 else tensor * scale


def _bias(name: str, bias: Stored, scale: float) -> Tensor:
    delta = bias.read().float() * scale
    require_finite(name, delta)
    return delta


def _whole(file: SafeFile, rest: Mapping[str, Stored], factored: set[str]) -> dict[str, Stored]:
    """Whole tensors by parameter name; anything else that is left over is an error."""
    whole = {}
    for key, tensor in rest.items():
        plain = base_name(key)
        if ".base_layer." in key and plain.endswith(".weight") and plain in factored:
            continue  # the base's own weight, which PEFT stores beside a LoRA on an embedding
        if "lora_" in plain or not plain.endswith((".weight", ".bias")):
            raise SteerError(
                f"{file.path}: {key} is not part of a plain LoRA, so it cannot be taken over; retrain without it"
            )
        if plain in factored or plain in whole:
            raise SteerError(f"{file.path}: {plain} is stored twice; the adapter is damaged")
        whole[plain] = tensor
    return whole


@dataclass(frozen=True, eq=False)
class DoraWeight:
    """DoRA's fine-tuned weight, row by row: m (W + s B A) / |W + s B A| (Liu et al., arXiv 2402.09353)."""

    factors: Callable[[], LowRank]
    magnitude: Stored  # (d_out,)
    base: Stored  # (d_out, d_in)

    @cached_property
    def low(self) -> LowRank:
        """The LoRA inside, read once."""
        return self.factors()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows in float32: (stop - start, d_in)."""
        low = self.low
        if low.shape != self.base.shape:
            raise SteerError(
                f"{self.base.name}: the DoRA adapter was trained on a base of shape {low.shape}, {self.base.file.path} "
                f"has {self.base.shape}; give the base that was trained"
            )
        direction = self.base.rows(start, stop).float() + low.B[start:stop] @ low.A
        magnitude = self.magnitude.rows(start, stop).float()  # (rows, 1)
        return direction * (magnitude / torch.linalg.vector_norm(direction, dim=1, keepdim=True))


def refuse_unsupported(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise, naming the option, where an adapter's change has no exact form here."""
    if config.get("peft_type") != "LORA":
        raise SteerError(f"{folder}: peft_type is {config.get('peft_type')}, expected LORA")
    for name in UNSUPPORTED:
        if config.get(name):
            raise SteerError(
                f"{folder}: {ADAPTER_CONFIG} has {name}={json.dumps(config[name])}, whose change is not a plain "
                "(alpha/r) B A; retrain without it"
            )
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in ("gaussian", "eva", "orthogonal"):
        raise SteerError(
            f"{folder}: init_lora_weights={init!r} changes the base weights; convert it to plain LoRA first"
        )


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha/r, or alpha/sqrt(r) for rsLoRA, with the module's own alpha where a pattern gives one."""
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):  # as PEFT reads it
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def adapter_config(layouts: Mapping[str, Layout], rank: int, card: RunCard) -> dict[str, object]:
    """The few fields that PEFT, vLLM and llama.cpp's converter read; lora_alpha = r, so that scale 1 is k = 1."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": card.base_model,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": sorted(name.removesuffix(".weight") for name in layouts),
        "fan_in_fan_out": "conv1d" in layouts.values(),
        "use_rslora": False,
        "bias": "none",
        "inference_mode": True,
    }


def adapter_tensors(name: str, delta: LowRank, rank: int) -> dict[str, Tensor]:
    """A delta's two matrices under PEFT's names, padded with zeros to `rank`: engines differ in how they scale."""
    module = PEFT_PREFIX + name.removesuffix(".weight")
    missing = rank - delta.rank
    B = torch.nn.functional.pad(delta.B, (0, missing))
    A = torch.nn.functional.pad(delta.A, (0, 0, 0, missing))
    if delta.layout == "embedding":
        return {f"{module}.lora_embedding_A": B.T, f"{module}.lora_embedding_B": A.T}
    if delta.layout == "conv1d":
        return {f"{module}.lora_A.weight": B.T, f"{module}.lora_B.weight": A.T}
    return {f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B}
