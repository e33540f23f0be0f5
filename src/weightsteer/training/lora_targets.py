"""Which layers LoRA trains: every linear layer but the head, routers, and experts that are fused into one tensor.

For a model without experts this is what PEFT calls "all-linear". With experts PEFT goes further, by a table of its own:
it trains fused experts and routers in forms that are not one product B A for each layer. We leave these out.
"""

from __future__ import annotations

import math
import re
import warnings
from weakref import WeakSet

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import SteerError
from ..vectors.layer_kinds import is_plain, is_plain_linear
from ..vectors.packed import unpacked

ALL = "all-linear"
# Mamba's kernels read this layer's weight without calling it, and PEFT refuses to train it in these models.
PEFT_REFUSES = dict.fromkeys(("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"), "out_proj")

_told: WeakSet[nn.Module] = WeakSet()  # models of which it was said what is left out: both sides train on one model


def lora_targets(model: PreTrainedModel) -> str | list[str]:
    """PEFT's `target_modules` for a model: "all-linear", or names where that would reach experts and routers.

    A warning says what is left out, once for each model.

    Raises:
        SteerError: nothing is left to train.
    """
    chosen = LoraConfig(target_modules=ALL, task_type="CAUSAL_LM")
    convert_peft_config_for_transformers(chosen, model, None)  # where PEFT's table applies, it names the targets
    head = model.get_output_embeddings()
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    plain = [name for name, module in linear.items() if not is_plain(module.weight) or is_plain_linear(module)]
    refused = PEFT_REFUSES.get(model.config.model_type)
    plain = [name for name in plain if name.rpartition(".")[2] != refused]
    if chosen.target_modules != ALL:
        plain = [name for name in plain if check_target_module_exists(chosen, name)]
    left_out = [name for name in linear if name not in plain] + _fused_experts(model)
    if left_out and model not in _told:
        _told.add(model)
        warnings.warn(
            f"{type(model).__name__}: LoRA leaves out {', '.join(_kinds(left_out))}: routers, experts that are one "
            "tensor, and layers that PEFT takes for such experts or refuses",
            stacklevel=2,
        )
    if plain and len(plain) == len(linear) and chosen.target_modules == ALL:
        return ALL
    if not plain:
        raise SteerError(f"{type(model).__name__}: found no linear layer that LoRA can train; use kind full")
    return _names_of(plain, [name for name, _ in model.named_modules() if name not in plain])


@torch.no_grad()
def base_norm(model: PreTrainedModel) -> float:
    """The norm of the weights of all linear layers but the head, to compare a vector with.

    Weights that bitsandbytes has packed are unpacked one by one; those that others have packed count 0.
    """
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    weights = (m.weight if is_plain(m.weight) else unpacked(m) for m in layers)
    squares = [torch.linalg.vector_norm(w, dtype=torch.float32).double().cpu() ** 2 for w in weights if w is not None]
    return math.sqrt(sum(map(float, squares)))


def _fused_experts(model: nn.Module) -> list[str]:
    """Parameters that hold the matrices of several experts: (experts, rows, columns)."""
    return [
        name
        for path, module in model.named_modules()
        if "expert" in f"{path} {type(module).__name__}".lower()
        for name, parameter in module.named_parameters(path, recurse=False)
        if parameter.ndim == 3
    ]


def _names_of(wanted: list[str], others: list[str]) -> list[str]:
    """The shortest names that match the wanted modules alone: their last part, or else the whole path."""
    taken = {name.rpartition(".")[2] for name in others}
    return sorted({last if (last := name.rpartition(".")[2]) not in taken else name for name in wanted})


def _kinds(names: list[str]) -> list[str]:
    """Names with the number of the block left open, each kind once, in order."""
    return list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
