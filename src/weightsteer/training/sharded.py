"""Weights that are spread over the processes (FSDP2): gathered from all of them, and given out to them.

Each function also takes weights that are not spread, so that its callers need not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import SteerError
from ..lm import LM
from ..model_parts import decoder_blocks
from ..ranks import is_first


def fsdp_arguments(model: nn.Module) -> dict[str, Any]:
    """The Trainer's arguments that spread a model by accelerate: each decoder block is gathered when its turn comes."""
    return {
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "transformer_layer_cls_to_wrap": sorted({type(block).__name__ for block in decoder_blocks(model)}),
            "reshard_after_forward": True,
            "cpu_ram_efficient_loading": True,  # the first process's weights are given to the others
            "state_dict_type": "FULL_STATE_DICT",
        },
    }


def is_sharded(model: nn.Module) -> bool:
    """Whether a training has spread the model over the processes."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def unsharded(lm: LM) -> LM:
    """The model, loaded anew where an earlier training has spread it, which FSDP does not take back.

    Raises:
        SteerError: it was made in memory, so that it cannot be loaded.
    """
    if not is_sharded(lm.model):
        return lm
    if lm.origin is None:
        raise SteerError(
            "shard fsdp: a second training (of several learning_rates, or of finetunes) needs a model that LM.load can "
            "load anew; give one rate, and finetunes 1"
        )
    model: nn.Module = lm.model
    model.to("meta")
    return replace(LM.load(**{**lm.origin, "device": "cpu"}), origin=lm.origin, system_prompt=lm.system_prompt)


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor, on the CPU in the first process; all processes have to ask for it."""
    if not isinstance(tensor, DTensor):
        return tensor.detach().cpu()
    spread: Any = tensor.detach()
    whole: Tensor = spread.full_tensor()
    return whole.cpu() if is_first() else whole


def put(parameter: Tensor, whole: Tensor) -> None:
    """Give a parameter its value; of one that is spread, each process takes its part of `whole`."""
    with torch.no_grad():
        if not isinstance(parameter, DTensor):
            parameter.copy_(whole)
            return
        own = parameter.to_local()
        own.copy_(_part_of(whole, parameter).to(own.dtype))


def _part_of(whole: Tensor, like: DTensor) -> Tensor:
    """This process's part of a tensor that every process has."""
    placed = whole.to(like.device_mesh.device_type)
    spread = distribute_tensor(placed, like.device_mesh, like.placements, src_data_rank=None)
    return spread.to_local()


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What is trained, whole, by the parameter's name; all processes have to ask for it."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # the last forward pass may have left some gathered
    return {name: gathered(p) for name, p in model.named_parameters() if p.requires_grad}


def put_trained(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give what is trained the values that `trained_tensors` found."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            put(parameter, tensors[name])


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state with whole tensors, as one process would have it; all processes have to ask for it."""
    state = optimizer.state_dict()
    whole = {
        key: {name: gathered(value) if isinstance(value, Tensor) else value for name, value in entry.items()}
        for key, entry in state["state"].items()
    }
    return {**state, "state": whole}


def put_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Give an optimizer the state that `optimizer_state` found."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    spread = {
        key: {name: _like(value, parameters[key]) for name, value in entry.items()}
        for key, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": spread})


def _like(value: Any, parameter: Tensor) -> Any:
    """An entry of the state, spread as its parameter is; a count of steps stays whole."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    part = _part_of(value, parameter)
    return DTensor.from_local(
        part, parameter.device_mesh, parameter.placements, shape=value.shape, stride=value.stride()
    )
