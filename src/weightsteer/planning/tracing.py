"""The bytes that are alive, the products and the time of a computation on tensors without content.

The model's own code runs on torch's fake tensors, which have shapes and no memory, with autograd as it would run. Each
operation is seen as it is dispatched. So nothing about an architecture, PEFT or checkpointing is written down here.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from .devices import Device

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
GATHERS = (torch.ops.aten.embedding, torch.ops.aten.index_select, torch.ops.aten.index, torch.ops.aten.gather)


@dataclass(frozen=True)
class Trace:
    """What a computation takes beyond what was there before it; bytes, operations, seconds."""

    peak: float  # most bytes alive at once
    kept: float  # bytes alive when `mark` was called: before the vocabulary projection
    flops: float
    busy: float  # seconds in which the device computes
    operations: float

    def seconds(self, device: Device) -> float:
        """The time: an accelerator computes while the host launches, a CPU does one after the other."""
        launched = self.operations * device.host_seconds * device.slowness
        return max(self.busy, launched) if device.overlaps else self.busy + launched

    def extended(self, deeper: Trace, blocks: int, deeper_blocks: int, wanted: int) -> Trace:
        """The trace of `wanted` blocks, from this one of `blocks` and one of `deeper_blocks`: all of it is linear."""
        share = (wanted - blocks) / (deeper_blocks - blocks)

        def at(name: str) -> float:
            first, second = getattr(self, name), getattr(deeper, name)
            return float(first + share * (second - first))

        return Trace(at("peak"), at("kept"), at("flops"), at("busy"), at("operations"))


class Tracker(TorchDispatchMode):
    """Notes every operation while it is entered."""

    def __init__(self, model: nn.Module, device: Device) -> None:
        super().__init__()
        self.device = device
        self.live = self.peak = self.kept = 0
        self.flops = self.busy = 0.0
        self.operations = 0
        tensors = [*model.parameters(), *model.buffers()]
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in tensors}  # these are there before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        read, written = _tensors([args, kwargs]), _tensors(result)
        known = {tensor.untyped_storage()._cdata for tensor in read}
        fresh = [tensor for tensor in written if tensor.untyped_storage()._cdata not in known]
        for tensor in fresh:
            self._add(tensor)
        self.operations += 1
        changed = func._schema.is_mutable
        if fresh or changed:
            self._time(func, args, kwargs, result, read, fresh if not changed else written)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)

    def _time(
        self, func: Any, args: Any, kwargs: Any, result: Any, read: Sequence[Tensor], written: Sequence[Tensor]
    ) -> None:
        packet = func._overloadpacket
        flops = _flops(packet, args, kwargs, result)
        out = sum(map(_bytes, written))
        moved = out + (out if packet in GATHERS else sum(map(_bytes, read)))
        narrow = any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in read)
        self.flops += flops
        self.busy += self.device.seconds_of(flops, moved, narrow=narrow)

    def hold(self, tensors: Sequence[Tensor]) -> None:
        """Count tensors that are there before, such as cached keys and values."""
        for tensor in tensors:
            self._add(tensor)

    def mark(self) -> None:
        """Note what is alive now."""
        self.kept = self.live

    @property
    def trace(self) -> Trace:
        """What was seen so far."""
        return Trace(self.peak, self.kept, self.flops, self.busy, self.operations)


def _flops(packet: Any, args: Any, kwargs: Any, result: Any) -> float:
    if packet is ATTENTION:
        return float(sdpa_flop_count(args[0].shape, args[1].shape, args[2].shape))
    if packet is ATTENTION_BACKWARD:  # five products, where the forward pass has two
        return 2.5 * float(sdpa_flop_count(args[1].shape, args[2].shape, args[3].shape))
    count = flop_registry.get(packet)
    return float(count(*args, **kwargs, out_val=result)) if count else 0.0


def _bytes(tensor: Tensor) -> int:
    """What is read of a tensor: of one that is expanded, what it is expanded from."""
    return int(min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()))


def _tensors(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    if isinstance(found, dict):
        found = list(found.values())
    return [tensor for part in found for tensor in _tensors(part)] if isinstance(found, list | tuple) else []
