"""What is trained: LoRA by PEFT, a bias on each MLP's output, or every weight; undone on leaving."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..checkpoints.checkpoint import DENSE_FILE
from ..checkpoints.safetensors_file import save_tensors
from ..errors import SteerError
from ..lm import LM
from ..progress import quiet_transformers
from ..vectors.layer_kinds import is_linear
from .checkpointing import checkpointed
from .lora_targets import lora_targets
from .settings import TrainSettings
from .sharded import is_sharded, put, trained_tensors

MLP_OUTPUTS = ("down_proj", "c_proj", "fc2", "dense_4h_to_h", "w2")  # a block's last MLP layer, by family


@dataclass(frozen=True)
class Trained:
    """A model that is ready to train, and how what was trained in it is saved."""

    model: nn.Module
    write: Callable[[Path, dict[str, Tensor]], None]  # into a folder, from `tensors()`; the first process calls it

    def tensors(self) -> dict[str, Tensor]:
        """What is trained, as it stands, whole; all processes have to ask for it."""
        return trained_tensors(self.model)


@contextmanager
def trainable(lm: LM, settings: TrainSettings) -> Iterator[Trained]:
    """Yield the model ready for training, with the way to save what was trained; undo all on leaving."""
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


def _with_lora(lm: LM, settings: TrainSettings) -> AbstractContextManager[Trained]:
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        target_modules=lora_targets(lm.model),
        task_type="CAUSAL_LM",
    )
    return _lora_layers(lm.model, config)


@contextmanager
def _lora_layers(model: PreTrainedModel, config: LoraConfig) -> Iterator[Trained]:
    adapted = _adapted(model, config)
    try:
        yield Trained(adapted, lambda folder, tensors: adapted.save_pretrained(str(folder), state_dict=tensors))
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
def _with_bias(lm: LM, settings: TrainSettings) -> Iterator[Trained]:
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

    def write(folder: Path, tensors: dict[str, Tensor]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        changes = {f"{name}.bias": tensors[f"{name}.bias"] - before[name].cpu() for name in layers}
        save_tensors(changes, folder / DENSE_FILE)

    try:
        yield Trained(model, write)
    finally:
        for name, layer in layers.items():
            put(layer.bias, before[name])
        for layer in lacking:
            layer.bias = None


@contextmanager
def _whole(lm: LM, settings: TrainSettings) -> Iterator[Trained]:
    model = lm.model
    originals = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
    model.requires_grad_(True)

    def write(folder: Path, tensors: dict[str, Tensor]) -> None:
        buffers = {name: tensor for name, tensor in model.state_dict().items() if not isinstance(tensor, DTensor)}
        whole: dict[str, Any] = {"state_dict": {**buffers, **tensors}} if is_sharded(model) else {}
        model.save_pretrained(str(folder), **whole)
        lm.tokenizer.save_pretrained(str(folder))  # so that it loads as a model

    try:
        yield Trained(model, write)
    finally:
        for name, parameter in model.named_parameters():
            put(parameter, originals[name])
