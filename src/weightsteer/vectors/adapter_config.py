"""PEFT's adapter_config.json: the fields that decide what an adapter's tensors mean, checked where they are read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..adapter_files import ADAPTER_CONFIG
from ..errors import SteerError
from ..files import read_json
from ..schema import shown, suggestion
from .adapter_fields import Fields, Targets

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
    "lora_dropout",
    "bias",
    "modules_to_save",
    "init_lora_weights",
    "megatron_config",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
    "runtime_config",
    "unsloth_fixed",
    "unsloth_version",
)
# Fields that are read here.
READ = (
    "r",
    "lora_alpha",
    "use_rslora",
    "alpha_pattern",
    "rank_pattern",
    "fan_in_fan_out",
    "target_parameters",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "use_dora",
    "lora_bias",
    "ensure_weight_tying",
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
    rank_pattern: tuple[tuple[re.Pattern[str], float], ...] = ()
    use_dora: bool = False
    lora_bias: bool = False
    keeps_tied: bool = False  # what is trained on one of two tied places is saved for both
    targets: Targets = field(default_factory=lambda: Targets())

    def rank_of(self, module: str) -> int:
        """The rank that the config gives a module."""
        return int(next((value for pattern, value in self.rank_pattern if pattern.match(module)), self.rank))

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
    read = Fields(path, fields)
    return AdapterConfig(
        rank=read.count("r", 8),
        alpha=read.number("lora_alpha", None),
        use_rslora=read.flag("use_rslora"),
        alpha_pattern=read.patterns("alpha_pattern"),
        fan_in_fan_out=read.flag("fan_in_fan_out"),
        target_parameters=read.texts("target_parameters"),
        base_model=read.text("base_model_name_or_path"),
        revision=read.text("revision"),
        rank_pattern=read.patterns("rank_pattern", whole=True),
        use_dora=read.flag("use_dora"),
        lora_bias=read.flag("lora_bias"),
        keeps_tied=read.flag("ensure_weight_tying"),
        targets=read.targets(),
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
        value = fields.get(name)
        if value is not None and value is not False:  # PEFT takes an empty object as its feature's defaults
            raise SteerError(
                f"{path}: has {name}={json.dumps(value)[:80]}, whose change is not a plain (alpha/r) B A; "
                "merge it into its base and give that, or retrain without it"
            )
    known = {*HARMLESS, *UNSUPPORTED, *READ}
    for name, value in fields.items():
        if name not in known and value:
            meant = suggestion(name, known)
            raise SteerError(
                f"{path}: has {shown(name)[1:-1]}={json.dumps(value)[:80]}, a field that is not known here and may "
                f"change what the tensors mean{meant}; check its spelling, and take it out if it does not"
            )
    init = fields.get("init_lora_weights", True)
    if init is not None and not isinstance(init, bool | str):
        raise SteerError(f"{path}: field init_lora_weights: expected true, false or a name, found {shown(init)}")
    if changes_base(init):
        raise SteerError(f"{path}: init_lora_weights={init!r} changes the base weights; convert it to plain LoRA first")


def changes_base(init: object) -> bool:
    """Whether an adapter's `init_lora_weights` takes a part of the base's weights into the adapter (PiSSA, OLoRA)."""
    return isinstance(init, str) and init.lower() not in ("gaussian", "eva", "orthogonal")
