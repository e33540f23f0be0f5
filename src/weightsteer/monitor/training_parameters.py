"""What of a model trains, read off the model: whole parameters, and PEFT's LoRA in its several forms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from ..checkpoints.plain_names import plain_name
from ..errors import SteerError
from ..vectors.adapter_config import changes_base
from ..vectors.steerable import unwrapped
from .live_forms import Live, LiveExperts, LiveLora, LiveWhole, gather


def live_parameters(model: nn.Module) -> tuple[dict[str, Live], list[str]]:
    """Name of the base's parameter -> how it trains; and the names of what trains in a form that we cannot read.

    Raises:
        SteerError: two trained parameters have one name, or the adapter began with a part of the base's weights.
    """
    model = unwrapped(model)
    _refuse_moved_base(model)
    found: dict[str, Live] = {}
    unknown: list[str] = []
    read: set[int] = set()  # the tensors that a reading uses
    for name, live, used in [*_lora_of(model), *_whole_of(model)]:
        read |= {id(tensor) for tensor in used}
        if live is None:
            unknown.append(name)
        elif name in found:
            raise SteerError(
                f"SteeringMonitor: {name} is trained in two places of the model; watch a run of one of them"
            )
        else:
            found[name] = live
    rest = [name for name, tensor in model.named_parameters() if tensor.requires_grad and id(tensor) not in read]
    return found, unknown + rest


def _refuse_moved_base(model: nn.Module) -> None:
    for config in dict(getattr(model, "peft_config", None) or {}).values():
        init = getattr(config, "init_lora_weights", None)
        if changes_base(init):
            raise SteerError(
                f"SteeringMonitor: init_lora_weights={init!r} moves a part of the base's weights into the adapter, so "
                "that what the adapter holds is not the change; train with init_lora_weights=True, or 'gaussian'"
            )


Reading = tuple[str, Live | None, list[Tensor]]  # a parameter's name, how it trains, the tensors that this uses


def _lora_of(model: nn.Module) -> Iterator[Reading]:
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            leaf = module.parameter_name if isinstance(module, ParamWrapper) else "weight"
            yield from _readings(plain_name(f"{path}.{leaf}", _adapters(model)), module)


def _readings(name: str, layer: Any) -> Iterator[Reading]:
    """One LoRA layer's weight, and its bias if that trains too."""
    embedded = bool(len(layer.lora_embedding_A))
    tensors = [tensor for part, tensor in layer.named_parameters() if "lora_" in part.partition(".")[0]]
    tables = (layer.lora_embedding_A, layer.lora_embedding_B) if embedded else (layer.lora_A, layer.lora_B)
    active = [adapter for adapter in layer.active_adapters if adapter in tables[0]]
    if not active:
        return
    plain = len(active) == 1 and not layer.lora_variant and not layer.merged
    biased = not embedded and any(layer.lora_B[adapter].bias is not None for adapter in active)
    if not plain or biased:
        yield name, None, tensors
        return
    A, B = (table[active[0]] if embedded else table[active[0]].weight for table in tables)
    scale = float(layer.scaling[active[0]])
    yield name, _live_of(layer, B, A, scale, embedded), tensors


def _live_of(layer: Any, B: Tensor, A: Tensor, scale: float, embedded: bool) -> Live | None:
    if isinstance(layer, ParamWrapper):
        if layer.num_experts > 1:
            return LiveExperts(B, A, scale, layer.num_experts, turned=not layer._did_swap_in_out_features)
        return LiveLora(B, A, scale) if layer.get_param().ndim == 2 else None
    if A.ndim != 2 or B.ndim != 2 or isinstance(layer.get_base_layer(), nn.MultiheadAttention):
        return None  # a convolution's, or the joint projection of attention
    return LiveLora(B, A, scale, turned=embedded or bool(getattr(layer, "fan_in_fan_out", False)))


def _whole_of(model: nn.Module) -> Iterator[Reading]:
    """Parameters that train themselves: those of the base, and the copies that PEFT trains of whole modules."""
    adapters = [f"{path}." for path, module in model.named_modules() if _is_adapter(module)]
    for path, parameter in model.named_parameters():
        around = max((adapter for adapter in adapters if path.startswith(adapter)), key=len, default="")
        if parameter.requires_grad and (not around or path.removeprefix(around).startswith("base_layer.")):
            yield plain_name(path, _adapters(model)), LiveWhole(parameter, gather(parameter).clone()), [parameter]


def _is_adapter(module: nn.Module) -> bool:
    """Whether a module's own parameters are an adapter's; PEFT's copies of whole modules are not."""
    other = isinstance(module, AuxiliaryTrainingWrapper) and not isinstance(module, ModulesToSaveWrapper)
    return isinstance(module, BaseTunerLayer) or other


def _adapters(model: nn.Module) -> set[str]:
    return set(getattr(model, "peft_config", None) or {}) | {"default"}
