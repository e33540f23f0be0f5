"""What a layer does with its parameters, decided by the layer itself and by no config."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

PLAIN_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # what a change can be added to


def is_linear(module: nn.Module) -> bool:
    """Whether the module has a linear layer's sizes: Linear, its quantised kin, and Conv1D."""
    return hasattr(module, "out_features") or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, whose weight is stored (d_in, d_out)."""
    return hasattr(module, "nx") and hasattr(module, "nf")


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a call of the module is x W^T + b and nothing else: a subclass may do more, as routers do."""
    if not is_linear(module):
        return False
    from transformers.pytorch_utils import Conv1D

    known = _forward_of(module) in (nn.Linear.forward, Conv1D.forward)
    return known or (isinstance(module, nn.Linear) and _is_linear_on_trial(module))


@torch.no_grad()
def _is_linear_on_trial(module: nn.Linear) -> bool:
    """Whether a subclass's own forward pass gives x W^T + b on random x, small and large."""
    weight = module.weight
    if _forward_of(module) is not type(module).forward or not is_plain(weight):
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, module.in_features, generator=generator).to(weight)
    for tokens in (x, 1000.0 * x):
        try:
            found = type(module).forward(module, tokens)
        except Exception:  # whatever a subclass raises for what it does not expect
            return False
        expected = nn.functional.linear(tokens, weight, module.bias)
        if not isinstance(found, Tensor) or found.shape != expected.shape:
            return False
        slack = 8 * torch.finfo(weight.dtype).eps * float(expected.abs().max())
        if not torch.allclose(found, expected, rtol=0.0, atol=slack):
            return False
    return True


def is_plain(parameter: Tensor | None) -> bool:
    """Whether the parameter is there as numbers: not packed by a quantisation, not offloaded, not sharded."""
    return (
        parameter is not None
        and parameter.dtype in PLAIN_DTYPES
        and not parameter.is_meta
        and not hasattr(parameter, "full_tensor")
    )


def parameter_shape(module: nn.Module, leaf: str) -> tuple[int, ...] | None:
    """Logical shape of a parameter: quantised modules store it packed, but know their features; None if there is none.

    A linear layer's bias counts as there: one that the base lacks can be added.
    """
    parameter = module._parameters.get(leaf)
    if is_linear(module) and leaf in ("weight", "bias") and (leaf == "bias" or not is_plain(parameter)):
        d_out, d_in = _features(module)
        return (d_out,) if leaf == "bias" else (d_in, d_out) if is_conv1d(module) else (d_out, d_in)
    return None if parameter is None else tuple(parameter.shape)


def _features(module: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a linear layer."""
    sized: Any = module
    return (int(sized.nf), int(sized.nx)) if is_conv1d(module) else (int(sized.out_features), int(sized.in_features))


def embedding_scale(module: nn.Module) -> float | None:
    """c where a call of the module gives c W[tokens], 1 for a plain embedding; None where it does something else.

    Found by running the forward pass on a table of two rows, of ones and of twos, in the parameter's dtype: a scale is
    rounded as the module rounds it.
    """
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        return None
    if _forward_of(module) is nn.Embedding.forward:
        return 1.0
    if _forward_of(module) is not type(module).forward:
        return None
    weight = module.weight
    table = torch.tensor([1.0, 2.0], dtype=weight.dtype, device=weight.device).reshape(2, 1).expand(2, weight.shape[1])
    tokens = torch.tensor([[1, 0]], device=weight.device)
    twin = copy.copy(module)  # without the module's hooks, and with its own dict of parameters
    twin._parameters = {**module._parameters, "weight": nn.Parameter(table, requires_grad=False)}
    try:
        with torch.no_grad():
            rows = type(module).forward(twin, tokens)
    except Exception:  # whatever a subclass raises for what are no tokens to it
        return None
    expected = (1, 2, weight.shape[1])
    if not isinstance(rows, Tensor) or tuple(rows.shape) != expected:
        return None
    scale = float(rows[0, 1, 0])
    return scale if torch.equal(rows, scale * table[tokens]) else None


def is_plain_lora(layer: Any) -> bool:
    """Whether nothing or plain LoRA wraps a layer: DoRA and others read the weight that they wrap."""
    if layer is None:
        return True
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(layer, BaseTunerLayer):
        return True
    return isinstance(layer, LoraLayer) and not getattr(layer, "lora_variant", None)


def _forward_of(module: nn.Module) -> object:
    """The function that a call of the module runs; under accelerate's hook the one that it wraps."""
    patched = vars(module).get("_old_forward", vars(module).get("forward"))
    return type(module).forward if patched is None else getattr(patched, "__func__", patched)
