"""Weights that bitsandbytes has packed into 4 or 8 bits, as numbers again."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

LARGEST_INT8 = 127.0


def unpacked(layer: nn.Module) -> Tensor | None:
    """A packed linear layer's weight (d_out, d_in) as the layer multiplies by it; None where we cannot read it.

    Nothing of the layer changes; PEFT's function for this leaves an 8-bit layer's state otherwise than it was.
    """
    weight: Any = layer._parameters.get("weight")
    kind = type(weight).__name__
    if kind == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        if weight.quant_state is None:
            return None
        found: Tensor = dequantize_4bit(weight.data, weight.quant_state)
        return found.reshape(weight.quant_state.shape)
    if kind == "Int8Params":
        scale = weight.SCB if weight.SCB is not None else getattr(getattr(layer, "state", None), "SCB", None)
        if scale is None:
            return None
        whole: Tensor = weight.data.float() * (scale.float() / LARGEST_INT8)[:, None]
        return whole
    return None
