"""The commands that serve a set of adapters with SGLang, LoRAX and mlx-lm, and what a request then says."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import SteerError
from ..run_card import RunCard

HOST = "127.0.0.1"


@dataclass(frozen=True)
class EngineCommand:
    """A command to paste, and in words how a request names a strength."""

    words: Sequence[str]
    asking: str


def sglang_command(model: str, adapters: Mapping[str, Path], rank: int) -> EngineCommand:
    """SGLang loads every adapter at its start; a request's model is `BASE:syc@-0.5`."""
    words = ["python", "-m", "sglang.launch_server", "--model-path", model, "--host", HOST, "--enable-lora"]
    words += ["--max-lora-rank", str(rank), "--max-loras-per-batch", str(len(adapters))]
    words += ["--lora-paths", *(f"{name}={folder}" for name, folder in adapters.items())]
    return EngineCommand(words, json.dumps({"model": f"{model}:{next(iter(adapters))}"}))


def lorax_command(model: str, adapters: Mapping[str, Path], rank: int) -> EngineCommand:
    """LoRAX loads an adapter when a request names its folder."""
    words = ["lorax-launcher", "--model-id", model, "--hostname", HOST, "--adapter-source", "local"]
    first = next(iter(adapters.values()))
    return EngineCommand(words, json.dumps({"parameters": {"adapter_id": str(first), "adapter_source": "local"}}))


def mlx_command(model: str, adapters: Mapping[str, Path], rank: int) -> EngineCommand:
    """mlx-lm's server loads the model anew for each other adapter; `default_model` as a name would pass over it."""
    words = ["mlx_lm.server", "--model", model, "--host", HOST]
    return EngineCommand(words, json.dumps({"model": model, "adapters": str(next(iter(adapters.values())))}))


SET_ENGINES: Mapping[str, tuple[str, Callable[[str, Mapping[str, Path], int], EngineCommand]]] = {
    "sglang": ("peft", sglang_command),  # with the layout of the set that it reads
    "lorax": ("peft", lorax_command),
    "mlx": ("mlx", mlx_command),
}


def set_command(engine: str, model: str, card: RunCard, adapters: Mapping[str, Path]) -> EngineCommand:
    """The command of an engine for a set that `export_adapter_set` wrote.

    Raises:
        SteerError: the set is empty, or in the layout of another engine.
    """
    layout, command = SET_ENGINES[engine]
    if card.settings.get("layout") != layout:
        raise SteerError(
            f"{engine}: reads the layout {layout}, and the set is {card.settings.get('layout')}; "
            f"write it with `weightsteer export adapters VECTOR --layout {layout}`"
        )
    if not adapters:
        raise SteerError("the set has no adapters; write it again with `weightsteer export adapters`")
    return command(model, adapters, int(card.settings.get("rank", 1)))
