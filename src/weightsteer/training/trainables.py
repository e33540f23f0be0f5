"""What is trained: LoRA by PEFT, a bias on each MLP's output, or every weight; undone on leaving."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from ..checkpoints.checkpoint import DENSE_FILE
from ..checkpoints.safetensors_file import save_tensors
from ..errors import SteerError
from ..lm import LM
from ..model_parts import is_packed
from ..progress import quiet_transformers
from ..vectors.layer_kinds import is_linear
from .checkpointing import checkpointed
from .lora_targets import lora_targets
from .settings import TrainSettings

MLP_OUTPUTS = ("down_proj", "c_proj", "fc2", "dense_4h_to_h", "w2")  # a block's last MLP layer, by family
Ready = tuple[nn.Module, Callable[[Path], None]]  # the model to train, and how to save what was trained


@contextmanager
def trainable(lm: LM, settings: TrainSettings) -> Iterator[Ready]:
    """Yield the model ready for training and a function that saves what was trained; undo all on leaving."""
    prepare = {"lora": _with_lora, "bias": _with_bias, "full": _whole}[settings.kind]
    model = lm.model
    prepared = prepare(lm, settings)  # outside `quiet_transformers`: it may warn of what is left out
    children = {module: dict(module._modules) for module in model.modules()}
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    attributes = set(vars(model))
    try:
        saving = checkpointed(model) if settings.gradient_checkpointing else contextlib.nullcontext()
        with quiet_transformers(), prepared as ready, saving:
            yield ready
    finally:
        for module, before in children.items():  # PEFT leaves the layers that it made before it failed
            module._modules.clear()
            module._modules.update(before)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])
            parameter.grad = None
        for name in set(vars(model)) - attributes:  # accelerate's mark, and its forward pass in another precision
            delattr(model, name)
        model.eval()


def _with_lora(lm: LM, settings: TrainSettings) -> AbstractContextManager[Ready]:
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        target_modules=lora_targets(lm.model),
        task_type="CAUSAL_LM",
    )
    return _lora_layers(lm.model, config)


@contextmanager
def _lora_layers(model: PreTrainedModel, config: LoraConfig) -> Iterator[Ready]:
    adapted = _adapted(model, config)
    try:
        yield adapted, lambda folder: adapted.save_pretrained(str(folder))
    finally:
        adapted.unload()
        with contextlib.suppress(AttributeError):
            del model.peft_config


def _adapted(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """The model with fresh adapter layers.

    Raises:
        SteerError: PEFT cannot adapt it; the message has PEFT's reason.
    """
    try:
        adapted = get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError, AttributeError) as error:
        raise SteerError(
            f"{type(model).__name__}: PEFT cannot put LoRA on it ({' '.join(str(error).split())}); use kind full"
        ) from None
    assert isinstance(adapted, PeftModel)
    return adapted


def refuse_packed(lm: LM, settings: TrainSettings) -> None:
    """Raise if the base's own weights are to be trained and are quantised: what is packed takes no gradient."""
    if settings.kind != "lora" and is_packed(lm.model):
        raise SteerError(
            f"kind {settings.kind}: trains weights of the model itself, and those of {lm.name} are quantised; use kind "
            "lora, or load the model without quantize"
        )


def refuse_rank(model: nn.Module, settings: TrainSettings) -> None:
    """Raise if the rank of a LoRA is above that of every matrix: what is more than full rank trains nothing more."""
    sizes = [[getattr(layer, name, 0) for name in ("in_features", "out_features")] for layer in model.modules()]
    sizes += [[getattr(layer, name, 0) for name in ("nx", "nf")] for layer in model.modules()]  # GPT-2's linear layers
    ranks = [min(size) for size in sizes if all(isinstance(number, int) and number > 0 for number in size)]
    if settings.kind == "lora" and ranks and settings.rank > max(ranks):
        raise SteerError(
            f"rank: expected at most {max(ranks)}, the full rank of the model's largest matrix, found {settings.rank}"
        )


@contextmanager
def _with_bias(lm: LM, settings: TrainSettings) -> Iterator[Ready]:
    """Train the bias of each block's last MLP layer alone, giving it one where there is none (paper, bias-only)."""
    model = lm.model
    layers: dict[str, Any] = {
        name: layer
        for name, layer in model.named_modules()
        if name.rpartition(".")[2] in MLP_OUTPUTS and is_linear(layer) and ".mlp." in f".{name}."
    }
    if not layers:
        raise SteerError(
            f"kind bias: expected MLP output layers named {', '.join(MLP_OUTPUTS)}; found none in "
            f"{type(model).__name__}; use kind lora"
        )
    model.requires_grad_(False)
    lacking = [layer for layer in layers.values() if layer.bias is None]
    for layer in lacking:
        layer.bias = nn.Parameter(layer.weight.new_zeros(layer.out_features))
    before = {name: layer.bias.detach().clone() for name, layer in layers.items()}
    for layer in layers.values():
        layer.bias.requires_grad_(True)

    def save(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        changes = {f"{name}.bias": (layer.bias.detach() - before[name]).cpu() for name, layer in layers.items()}
        save_tensors(changes, folder / DENSE_FILE)

    try:
        yield model, save
    finally:
        with torch.no_grad():
            for name, layer in layers.items():
                layer.bias.copy_(before[name])
        for layer in lacking:
            layer.bias = None


@contextmanager
def _whole(lm: LM, settings: TrainSettings) -> Iterator[Ready]:
    model = lm.model
    originals = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
    model.requires_grad_(True)

    def save(folder: Path) -> None:
        model.save_pretrained(str(folder))
        lm.tokenizer.save_pretrained(str(folder))  # so that it loads as a model

    try:
        yield model, save
    finally:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(originals[name])
