"""PEFT's adapter_config.json: the fields that decide what an adapter's tensors mean, checked where they are read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import ADAPTER_CONFIG
from ..errors import SteerError
from ..files import read_json

# Adapter features whose change is neither (alpha / r) B A nor a whole tensor, so that it cannot be taken over exactly.
UNSUPPORTED = (
    "trainable_token_indices",
    "layer_replication",
    "use_bdlora",
    "use_qalora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)
# Fields that say how an adapter was trained or where it sits, which its tensors' names and shapes say too.
HARMLESS = (
    "peft_type",
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "target_modules",
    "exclude_modules",
    "lora_dropout",
    "bias",
    "modules_to_save",
    "init_lora_weights",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "megatron_config",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "use_dora",
    "qalora_group_size",
    "runtime_config",
    "lora_bias",
    "ensure_weight_tying",
    "unsloth_fixed",
    "unsloth_version",
)
NOT_LORA = {
    "ADALORA": "AdaLoRA's ranks are pruned by masks",
    "LOHA": "a Hadamard product is no product of two factors",
    "LOKR": "a Kronecker product is no product of two factors",
    "IA3": "it scales activations",
    "PREFIX_TUNING": "it changes no weights",
    "PROMPT_TUNING": "it changes no weights",
    "P_TUNING": "it changes no weights",
    "OFT": "it rotates weights",
    "BOFT": "it rotates weights",
    "VERA": "its factors are shared random matrices",
}


@dataclass(frozen=True)
class AdapterConfig:
    """What of an adapter's config decides what its tensors mean."""

    rank: int
    alpha: float
    use_rslora: bool
    alpha_pattern: tuple[tuple[re.Pattern[str], float], ...]
    fan_in_fan_out: bool
    target_parameters: tuple[str, ...]
    base_model: str
    revision: str

    def scale(self, module: str, rank: int) -> float:
        """alpha/r, or alpha/sqrt(r) for rsLoRA, with the module's own alpha where a pattern gives one."""
        alpha = next((value for pattern, value in self.alpha_pattern if pattern.match(module)), self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read the config of a PEFT LoRA adapter.

    Raises:
        SteerError: another kind of adapter, a field of a wrong type, or one that changes what the tensors mean in a
            way that has no exact form here.
    """
    path = folder / ADAPTER_CONFIG
    fields = read_json(path)
    if not isinstance(fields, dict):
        raise SteerError(f"{path}: expected a JSON object with PEFT's fields, found a {type(fields).__name__}")
    _require_lora(path, fields)
    _refuse_unsupported(path, fields)
    field = _Fields(path, fields)
    return AdapterConfig(
        rank=int(field.number("r", 8)),
        alpha=field.number("lora_alpha", None),
        use_rslora=field.flag("use_rslora"),
        alpha_pattern=field.patterns("alpha_pattern"),
        fan_in_fan_out=field.flag("fan_in_fan_out"),
        target_parameters=field.texts("target_parameters"),
        base_model=field.text("base_model_name_or_path"),
        revision=field.text("revision"),
    )


def _require_lora(path: Path, fields: Mapping[str, Any]) -> None:
    kind = fields.get("peft_type")
    if kind == "LORA":
        return
    if "fine_tune_type" in fields or "lora_parameters" in fields:
        raise SteerError(f"{path}: is mlx-lm's; its numbers lie in adapters.safetensors, which is not there")
    reason = NOT_LORA.get(str(kind).upper(), "only LoRA's change is (alpha/r) B A")
    raise SteerError(f"{path}: peft_type is {kind}, expected LORA ({reason}); merge it into its base and give that")


def _refuse_unsupported(path: Path, fields: Mapping[str, Any]) -> None:
    for name in UNSUPPORTED:
        if fields.get(name):
            raise SteerError(
                f"{path}: has {name}={json.dumps(fields[name])}, whose change is not a plain (alpha/r) B A; "
                "merge it into its base and give that, or retrain without it"
            )
    known = {*HARMLESS, *UNSUPPORTED, *(name for name in AdapterConfig.__dataclass_fields__), "r", "lora_alpha"}
    for name, value in fields.items():
        if name not in known and value:
            raise SteerError(
                f"{path}: has {name}={json.dumps(value)[:80]}, a field that is not known here and may change what the "
                "tensors mean; check its spelling, and take it out if it does not"
            )
    init = fields.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in ("gaussian", "eva", "orthogonal"):
        raise SteerError(f"{path}: init_lora_weights={init!r} changes the base weights; convert it to plain LoRA first")


@dataclass(frozen=True)
class _Fields:
    """The fields of one config, each read as the type that it must have."""

    path: Path
    fields: Mapping[str, Any]

    def number(self, name: str, default: float | None) -> float:
        return self._number(name, self.fields.get(name, default))

    def _number(self, name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
            raise self._wrong(name, "a number above 0", value)
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.fields.get(name)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(name, "true or false", value)
        return bool(value)

    def text(self, name: str) -> str:
        value = self.fields.get(name)
        if value is not None and not isinstance(value, str):
            raise self._wrong(name, "a text", value)
        return value or ""

    def texts(self, name: str) -> tuple[str, ...]:
        value = self.fields.get(name) or []
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise self._wrong(name, "a list of texts", value)
        return tuple(value)

    def patterns(self, name: str) -> tuple[tuple[re.Pattern[str], float], ...]:
        """Module patterns as PEFT reads them, in their order: the first that fits counts."""
        value = self.fields.get(name) or {}
        if not isinstance(value, dict):
            raise self._wrong(name, "an object of module patterns and numbers", value)
        found = []
        for pattern, number in value.items():
            try:
                compiled = re.compile(rf"(.*\.)?({pattern})$")
            except re.error as error:
                raise self._wrong(name, f"module patterns ({pattern!r}: {error})", value) from None
            found.append((compiled, self._number(f"{name}, {pattern!r}", number)))
        return tuple(found)

    def _wrong(self, name: str, expected: str, value: object) -> SteerError:
        return SteerError(f"{self.path}: field {name}: expected {expected}, found {json.dumps(value)[:80]}")
