"""One LoRA adapter at several signs in one batch: what it adds to each row is multiplied by the row's sign."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..errors import SteerError


class RowSigns:
    """The signs of a batch's rows: 1 is theta + w, -1 is theta - w, and 0 the base. None: 1 for all.

    The signs hold until they are set anew, so that a pass that is computed again for its gradients sees the same ones.
    """

    def __init__(self, model: nn.Module) -> None:
        """Hook every LoRA layer of the model; the hooks go with these layers."""
        self.signs: Tensor | None = None  # (batch,)
        for name, layer in model.named_modules():
            if isinstance(layer, LoraLayer):
                for second in layer.lora_B.values():
                    second.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def multiply(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            if self.signs is None:
                return None
            if output.shape[0] != len(self.signs) or output.ndim < 3:
                raise SteerError(
                    f"{name}: sees tokens of several rows as one list, so that each row cannot have its own sign; "
                    "train the two sides apart (method contrastive)"
                )
            return output * self.signs.to(output).reshape(-1, *[1] * (output.ndim - 1))

        return multiply
