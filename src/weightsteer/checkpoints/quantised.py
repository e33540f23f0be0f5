"""Quantised checkpoints, recognised by what lies in them, since their config.json often does not say so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..errors import SteerError
from ..files import read_json
from .safetensors_file import FLOATS, Stored

SIDE_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quant_strategy.json")
FIELDS = ("quantization_config", "quantization", "compression_config")  # transformers, MLX, compressed-tensors
# What packed weights are called: GPTQ and AWQ, compressed-tensors and fp8, bitsandbytes, HQQ, GGUF-like scales.
ENDINGS = (
    ".qweight",
    ".qzeros",
    ".g_idx",
    ".weight_packed",
    ".weight_scale",
    ".weight_scale_inv",
    ".weight_scale_2",
    ".weight_zero_point",
    ".weight.absmax",
    ".weight.quant_map",
    ".SCB",
    ".W_q",
    ".weight._data",
    "_weight_qdata",
    ".codebooks",
    ".codes",
    ".centroids.weight",
    "_proj_blocks",
    "_proj_scales",
)


def refuse_quantised(folder: Path, tensors: Mapping[str, Stored]) -> None:
    """Raise, with the way out, if a checkpoint's weights are quantised.

    Raises:
        SteerError: its config, a file beside it, a tensor's name or a tensor's dtype says so.
    """
    found = _sign_of_packing(folder, tensors)
    if found:
        raise quantised(folder, found)


def quantised(folder: Path, sign: str) -> SteerError:
    """The error for a checkpoint whose weights are packed, and the sign by which that was seen."""
    return SteerError(
        f"{folder}: its weights are quantised ({sign}), and theta + k w cannot be rounded into them; give the "
        "16-bit checkpoint that they were made from, or use `weightsteer export peft` and serve the adapter over them"
    )


def _sign_of_packing(folder: Path, tensors: Mapping[str, Stored]) -> str:
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    field = next((name for name in FIELDS if isinstance(config, dict) and config.get(name)), "")
    if field:
        return f"config.json has {field}"
    side = next((name for name in SIDE_FILES if (folder / name).is_file()), "")
    if side:
        return f"{side} lies beside them"
    for name, tensor in tensors.items():
        if name.endswith(ENDINGS):
            return f"there is {name}"
        if name.endswith(("weight", "_proj")) and tensor.dtype not in {*FLOATS, "F64"}:
            return f"{name} has dtype {tensor.dtype}"
    return ""
