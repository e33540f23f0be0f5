"""mlx-lm's LoRA adapters: (d_in, r) and (d_out, r) the other way round than PEFT's, and a scale without alpha."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ..checkpoints.architecture import Architecture
from ..checkpoints.checkpoint import ADAPTER_CONFIG
from ..checkpoints.safetensors_file import SafeFile, Stored
from ..errors import SteerError
from ..files import read_json
from ..schema import LARGEST_FLOAT, shown
from .delta import Delta, require_finite
from .low_rank import LowRank
from .peft_adapter import Adapter

MLX_FILE = "adapters.safetensors"
EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|embed_in|word_embeddings|wte|tok_embeddings)$")


def is_mlx_adapter(folder: Path) -> bool:
    """Whether the folder is what `mlx_lm.lora` writes."""
    return (folder / MLX_FILE).is_file() and not (folder / "adapter_model.safetensors").is_file()


def read_mlx_adapter(folder: Path, architecture: Architecture | None = None) -> Adapter:
    """Read an mlx-lm adapter: each weight changes by scale (a b)^T, a (d_in, r), b (r, d_out).

    Raises:
        SteerError: another kind of fine-tune than LoRA, or a damaged file.
    """
    path = folder / ADAPTER_CONFIG
    scale = _scale(path, read_json(path) if path.is_file() else {})
    file = SafeFile(folder / MLX_FILE)
    rest = dict(file.tensors)
    deltas: dict[str, Callable[[], Delta]] = {}
    for key in sorted(name for name in rest if name.endswith(".lora_a")):
        module = key.removesuffix(".lora_a")
        a, b = rest.pop(key), rest.pop(f"{module}.lora_b", None)
        if b is None or len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] != b.shape[0]:
            found = None if b is None else b.shape
            raise SteerError(
                f"{file.path}: {module}: expected lora_a (d_in, r) and lora_b (r, d_out), found {a.shape} and {found}"
            )
        plain = f"{module}.weight"
        name = plain if architecture is None else architecture.name_of(plain)
        if name is None:
            raise SteerError(
                f"{file.path}: changes {plain}, which its base does not have; give the base that was trained (--base)"
            )
        deltas[name] = partial(_factors, name, a, b, scale, embedding=bool(EMBEDDING.search(module)))
    if rest or not deltas:
        example = next(iter(rest), "nothing")
        raise SteerError(
            f"{file.path}: holds {example}, which is no part of a plain LoRA of linear layers; fuse it with "
            "mlx_lm.fuse and give the model"
        )
    return Adapter(deltas, {}, {})


def _scale(path: Path, config: Any) -> float:
    parameters = config.get("lora_parameters") if isinstance(config, dict) else None
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) <= LARGEST_FLOAT:
        raise SteerError(f"{path}: expected mlx-lm's lora_parameters with a number scale, found {shown(scale)}")
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        raise SteerError(
            f"{path}: fine_tune_type is {kind}, expected lora; fuse it with mlx_lm.fuse and give the model"
        )
    return float(scale)


def _factors(name: str, a: Stored, b: Stored, scale: float, *, embedding: bool) -> LowRank:
    if embedding:  # a (vocabulary, r), b (r, d): a table is not transposed
        delta = LowRank(a.read().float() * scale, b.read().float(), "embedding")
    else:
        delta = LowRank((b.read().float() * scale).T.contiguous(), a.read().float().T.contiguous())
    require_finite(name, delta)
    return delta
