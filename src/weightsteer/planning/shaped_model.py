"""A model without weights: its config, its sizes, and copies with fewer blocks whose tensors have shapes alone."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..checkpoints.adapted import without_adapters
from ..checkpoints.locate import locate_config
from ..checkpoints.others_errors import read_by_others
from ..errors import SteerError
from ..model_parts import decoder_blocks
from ..progress import quiet_transformers
from .known_models import KNOWN

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Bits of a weight in the blocks' linear layers: 4, with a scale of 8 bits for 64 weights and one of 32 for 256 scales.
QUANTISED_BITS = {"nf4": 4 + 8 / 64 + 32 / (64 * 256), "int8": 8.0}


@dataclass(frozen=True, eq=False)
class ShapedModel:
    """A causal language model's config and dtype."""

    name: str
    config: Any
    dtype: torch.dtype

    @classmethod
    def of(cls, name: str, dtype: str = "auto") -> ShapedModel:
        """The model of a name, a folder or a file, by its config alone; of an adapter, its base.

        Raises:
            SteerError: there is no such model, or its config cannot be fetched and is not among those that we know.
        """
        config = _config_of(name)
        own = getattr(config, "dtype", None)
        return cls(name, config, DTYPES.get(dtype) or (own if isinstance(own, torch.dtype) else torch.float32))

    def in_dtype(self, dtype: torch.dtype) -> ShapedModel:
        """The same model in another dtype."""
        return ShapedModel(self.name, self.config, dtype)

    def with_vocabulary(self, size: int) -> ShapedModel:
        """The same model with so many rows in its embedding."""
        config = copy.deepcopy(self.config)
        config.get_text_config().vocab_size = size
        return ShapedModel(self.name, config, self.dtype)

    @cached_property
    def whole(self) -> PreTrainedModel:
        """All of it on the meta device."""
        return self.with_blocks(self.blocks)

    @property
    def blocks(self) -> int:
        """How many decoder blocks it has."""
        return int(self.config.get_text_config().num_hidden_layers)

    def with_blocks(self, count: int) -> PreTrainedModel:
        """The model with so many blocks, on the meta device and in evaluation mode.

        Raises:
            SteerError: transformers does not build a language model of this config.
        """
        config = copy.deepcopy(self.config)
        text = config.get_text_config()
        if count != self.blocks:
            text.num_hidden_layers = count
            if isinstance(kinds := getattr(text, "layer_types", None), list):
                text.layer_types = kinds[:count]
        with read_by_others(self.name), quiet_transformers(), torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=self.dtype)
        return model.eval()

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Numbers of blocks from which all of them follow: two, if the blocks repeat, else all."""
        period, blocks = self._period, self.blocks
        return (period, 2 * period) if 2 * period < blocks else (blocks,)

    @property
    def _period(self) -> int:
        """After how many blocks the same kinds and shapes come again."""
        kinds = getattr(self.config.get_text_config(), "layer_types", None) or [""] * self.blocks
        forms = [
            (kind, tuple((name, tuple(p.shape)) for name, p in block.named_parameters()))
            for kind, block in zip(kinds, decoder_blocks(self.whole), strict=True)
        ]
        return next(
            step for step in range(1, len(forms) + 1) if all(a == b for a, b in zip(forms, forms[step:], strict=False))
        )

    @cached_property
    def parameters(self) -> int:
        """How many numbers it holds; tied ones count once."""
        return sum(parameter.numel() for parameter in self.whole.parameters())

    @cached_property
    def linear_parameters(self) -> int:
        """Those of linear layers but the head: what quantisation packs, and what LoRA adapts."""
        head = self.whole.get_output_embeddings()
        layers = [m for m in self.whole.modules() if isinstance(m, nn.Linear) and m is not head]
        return sum(layer.weight.numel() for layer in layers)

    def weight_bytes(self, quantize: str | None = None) -> float:
        """Bytes of all weights."""
        size = self.dtype.itemsize
        if quantize is None:
            return float(self.parameters * size)
        packed = self.linear_parameters
        return (self.parameters - packed) * size + packed * QUANTISED_BITS[quantize] / 8

    @property
    def largest_layer(self) -> int:
        """Weights of the largest linear layer of a block: what a packed layer takes while it is unpacked."""
        head = self.whole.get_output_embeddings()
        return max(m.weight.numel() for m in self.whole.modules() if isinstance(m, nn.Linear) and m is not head)


def as_fake(model: nn.Module, fake: FakeTensorMode) -> None:
    """Put torch's fake tensors into the place of a model's meta ones; what is tied stays tied.

    They claim to lie on the CPU, so that autocast and attention do what they do there; no memory is taken.
    """
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = made.setdefault(id(tensor), _fake(tensor, fake))  # type: ignore[assignment]


def _fake(tensor: Tensor, fake: FakeTensorMode) -> Tensor:
    with fake:
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _config_of(name: str) -> Any:
    try:
        with read_by_others(name, "its config "), quiet_transformers():
            return AutoConfig.from_pretrained(**locate_config(without_adapters(name)), trust_remote_code=False)
    except SteerError as error:
        published = KNOWN.get(name)
        if published is None:
            raise SteerError(
                f"{error}; a plan needs the model's config: fetch it, or name a folder that has it"
            ) from None
        config = AutoConfig.for_model(published.kind, **published.fields)
        config.dtype = torch.bfloat16
        return config
