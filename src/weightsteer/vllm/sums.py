"""A sum of adapters as one: the factors side by side, every scale and strength in B. It takes the engine's torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapter_files import ADAPTER_FILE
from ..checkpoints.plain_names import PEFT_PREFIX
from ..errors import SteerError
from ..vectors.adapter_config import AdapterConfig, read_adapter_config
from .limits import FACTOR_ENDINGS, factor_modules

if TYPE_CHECKING:
    from torch import Tensor

Factors = tuple["Tensor", "Tensor"]  # A (r, d_in) and B (d_out, r)


def write_sum(parts: Sequence[tuple[Path, float]], target: Path) -> dict[str, Any]:
    """Write the sum of k times each adapter, and give the config that belongs to the file.

    The rank is the same for every module, padded with zeros, and lora_alpha equals it: engines read this form alike.

    Raises:
        SteerError: an adapter that has no plain form, or two that do not fit each other.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(folder / ADAPTER_FILE, "pt")) for folder, _ in parts]
        configs = [read_adapter_config(folder) for folder, _ in parts]
        held = [factor_modules(file.keys()) for file in files]
        modules = sorted({module for modules in held for module in modules})
        summed = {}
        for module, ending in modules:
            owners = [i for i, named in enumerate(held) if (module, ending) in named]
            pieces = (scaled(files[i], configs[i], parts[i][1], module, ending) for i in owners)
            summed[module, ending] = side_by_side(module, pieces)
        rank = max(A.shape[0] for A, _ in summed.values())
        save_file(dict(_padded(summed, rank)), target, metadata={"format": "pt"})
    return _config(configs, [module for module, _ in modules], rank)


def scaled(file: Any, config: AdapterConfig, k: float, module: str, ending: str) -> Factors:
    """One module's factors in float32, k and the adapter's own scale folded into B."""
    A = file.get_tensor(module + ending).float()
    B = file.get_tensor(module + FACTOR_ENDINGS[ending]).float()
    return A, B * (k * config.scale(module.removeprefix(PEFT_PREFIX), A.shape[0]))


def side_by_side(module: str, pieces: Iterable[Factors]) -> Factors:
    """The factors of a sum: (r1 + r2, d_in) and (d_out, r1 + r2).

    Raises:
        SteerError: they are of two sizes.
    """
    import torch

    found = list(pieces)
    sizes = {(B.shape[0], A.shape[1]) for A, B in found}
    if len(sizes) > 1:
        raise SteerError(f"{module}: has two shapes, {sorted(sizes)}; sum vectors of one base")
    return torch.cat([A for A, _ in found], dim=0), torch.cat([B for _, B in found], dim=1)


def _padded(summed: dict[tuple[str, str], Factors], rank: int) -> Iterator[tuple[str, Tensor]]:
    from torch.nn.functional import pad

    for (module, ending), (A, B) in summed.items():
        missing = rank - A.shape[0]
        yield module + ending, pad(A, (0, 0, 0, missing)).contiguous()
        yield module + FACTOR_ENDINGS[ending], pad(B, (0, missing)).contiguous()


def _config(configs: Sequence[AdapterConfig], modules: Sequence[str], rank: int) -> dict[str, Any]:
    if len({config.fan_in_fan_out for config in configs}) > 1:
        raise SteerError("the vectors store their weights in two ways (fan_in_fan_out); sum vectors of one base")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": configs[0].base_model,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": sorted(module.removeprefix(PEFT_PREFIX) for module in modules),
        "fan_in_fan_out": configs[0].fan_in_fan_out,
        "use_rslora": False,
        "bias": "none",
        "inference_mode": True,
    }
