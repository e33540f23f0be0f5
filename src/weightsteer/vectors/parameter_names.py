"""What a parameter is called in the base, and where it stands there, read off its name; no table of architectures."""

from __future__ import annotations

import re
from collections.abc import Collection

from ..errors import SteerError

PEFT_PREFIX = "base_model.model."  # before every name in a PEFT model and in its adapter's file
# Before every name of a model that something wraps as a whole: PEFT, distributed training, TRL's value head.
LEADING = (PEFT_PREFIX, "module.", "pretrained_model.")
# Between the names of a module and of its parameter where a part of the model is wrapped: by torch.compile, FSDP,
# activation checkpointing, a PEFT layer.
INSERTED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer", "original_module")


def base_name(name: str, adapters: Collection[str] = ("default",)) -> str:
    """The base's name of a parameter that PEFT, torch.compile or distributed training wrap.

    `adapters` are the names of PEFT adapters that may follow `modules_to_save`.
    """
    plain = name
    for wrapper in INSERTED:
        plain = plain.removeprefix(f"{wrapper}.").replace(f".{wrapper}.", ".")
    while (prefix := next((prefix for prefix in LEADING if plain.startswith(prefix)), None)) is not None:
        plain = plain.removeprefix(prefix)
    choice = "|".join(re.escape(adapter) for adapter in adapters)
    return re.sub(rf"\.modules_to_save(\.({choice}))?\.", ".", plain)


def layer_of(name: str) -> int | None:
    """The block's number: 'model.layers.3.mlp.up_proj.weight' -> 3; None outside the blocks."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def module_of(name: str) -> str:
    """The module inside its block ('mlp.up_proj'); outside the blocks the last two parts of the name."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[-2:]) if at is None else ".".join(parts[at + 1 :]).removesuffix(".weight")


def is_in(name: str, modules: Collection[str]) -> bool:
    """Whether the parameter belongs to one of the modules: 'mlp', 'q_proj' or 'self_attn.q_proj'."""
    return any(f".{module}." in f".{name}." for module in modules)


def layer_numbers(text: str) -> set[int]:
    """'8-20,25' -> the numbers 8 to 20 and 25.

    Raises:
        SteerError: anything but numbers and ranges.
    """
    numbers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise SteerError(f"layers {text!r}: expected numbers and ranges such as '8-20,25'")
        numbers |= set(range(int(first), int(last if dash else first) + 1))
    return numbers
