"""What is trained: LoRA by PEFT, a bias on each MLP's output, or every weight; undone on leaving."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from ..errors import SteerError
from ..progress import quiet_transformers
from ..tensorfile import save_tensors
from ..vector import DENSE_FILE
from .settings import TrainSettings

MLP_OUTPUTS = ("down_proj", "c_proj", "fc2", "dense_4h_to_h", "w2")  # a block's last MLP layer, by family

Ready = tuple[nn.Module, Callable[[Path], None]]  # the model to train, and how to save what was trained


@contextmanager
def trainable(model: PreTrainedModel, settings: TrainSettings) -> Iterator[Ready]:
    """Yield the model ready for training and a function that saves what was trained; undo all on leaving."""
    prepare = {"lora": _with_lora, "bias": _with_bias, "full": _whole}[settings.kind]
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        with quiet_transformers(), prepare(model, settings) as ready:
            yield ready
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])
            parameter.grad = None
        model.eval()


@contextmanager
def _with_lora(model: PreTrainedModel, settings: TrainSettings) -> Iterator[Ready]:
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    try:
        yield adapted, lambda folder: adapted.save_pretrained(str(folder))
    finally:
        adapted.unload()
        with contextlib.suppress(AttributeError):
            del model.peft_config


@contextmanager
def _with_bias(model: PreTrainedModel, settings: TrainSettings) -> Iterator[Ready]:
    """Give each block's last MLP layer a bias and train the biases alone (paper, bias-only contrast)."""
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if name.rpartition(".")[2] in MLP_OUTPUTS and isinstance(layer, nn.Linear) and ".mlp." in f".{name}."
    }
    if not layers or any(layer.bias is not None for layer in layers.values()):
        raise SteerError(
            f"kind bias: expected MLP output layers without bias named {', '.join(MLP_OUTPUTS)}; "
            f"found {len(layers)} in {type(model).__name__}; use kind lora"
        )
    model.requires_grad_(False)
    for layer in layers.values():
        layer.bias = nn.Parameter(layer.weight.new_zeros(layer.out_features))

    def save(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        biases = {f"{name}.bias": layer.bias.detach().cpu() for name, layer in layers.items()}
        save_tensors(biases, folder / DENSE_FILE)

    try:
        yield model, save
    finally:
        for layer in layers.values():
            layer.bias = None  # type: ignore[assignment]


@contextmanager
def _whole(model: PreTrainedModel, settings: TrainSettings) -> Iterator[Ready]:
    originals = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
    model.requires_grad_(True)
    try:
        yield model, lambda folder: model.save_pretrained(str(folder))
    finally:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(originals[name])
