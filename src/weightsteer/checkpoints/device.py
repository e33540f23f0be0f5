"""Where a model is put: the devices that there are on this machine, by name."""

from __future__ import annotations

import warnings

import torch

from ..errors import SteerError
from ..schema import suggestion
from .load_options import LoadOptions


def placement_of(device: str | None) -> str:
    """The device that is named, or for None the accelerator if there is one.

    Raises:
        SteerError: no such device here; the message lists those that there are.
    """
    known = device_names()
    if device is None:
        return known[1] if len(known) > 2 else known[0]
    if device in known:
        return device
    lacking = "; torch finds no GPU here, or was installed without support for it" if len(known) == 2 else ""
    listed = ", ".join(known)
    raise SteerError(
        f"device {device!r}: is not on this machine; expected one of {listed}{suggestion(device, known)}{lacking}"
    )


def placement_for(device: str | None, load: LoadOptions) -> str:
    """The device for a model: "auto" where options say how it is spread, and else what `placement_of` finds.

    Raises:
        SteerError: no such device here, or one device and a way to spread over several.
    """
    if load.device_map is None and load.max_memory is None:
        return placement_of(device)
    if device not in (None, "auto"):
        named = "device_map" if load.device_map is not None else "max_memory"
        raise SteerError(f"device {device!r}: is one device, and {named} spreads the model; leave one of the two out")
    return "auto"


def device_names() -> list[str]:
    """Every name of a device here: the CPU, the accelerators, and "auto", which spreads a model over them."""
    found = []
    if torch.accelerator.is_available() and (kind := torch.accelerator.current_accelerator()):
        found = [kind.type, *(f"{kind.type}:{number}" for number in range(torch.accelerator.device_count()))]
    return ["cpu", *found, "auto"]


def warn_if_slow(dtype: torch.dtype, way_out: str) -> None:
    """Say so where a model's products would be computed on a processor without instructions for them.

    With an accelerator there is no warning: weights that lie in the CPU's memory are on their way to it.

    Args:
        way_out: what to do about it, for the message.
    """
    if torch.accelerator.is_available() or dtype not in (torch.bfloat16, torch.float16) or _has_products_in(dtype):
        return
    name = str(dtype).removeprefix("torch.")
    warnings.warn(
        f"this processor has no instructions for products in {name}, which makes them many times slower than in "
        f"float32; {way_out}",
        stacklevel=3,
    )


def _has_products_in(dtype: torch.dtype) -> bool:
    """Whether oneDNN, by which torch computes them on a processor, has such products here; yes where it is unknown."""
    if not torch.backends.mkldnn.is_available():
        return True
    known = torch.ops.mkldnn
    asked = known._is_mkldnn_bf16_supported if dtype == torch.bfloat16 else known._is_mkldnn_fp16_supported
    return bool(asked())
