"""A parameter's name without what wrappers put around it: compilers, parallel training, PEFT, value heads."""

from __future__ import annotations

import re
from collections.abc import Collection

PEFT_PREFIX = "base_model.model."  # before every name in a PEFT model and in its adapter's file

# Parts of a name that torch.compile, FSDP and activation checkpointing put in; they are no part of any model.
INSERTED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
WRAPPERS = re.compile(rf"(?:^|(?<=\.))(?:{'|'.join(INSERTED)})\.")
PEFT_LAYERS = ("base_layer", "original_module")  # where PEFT keeps the layer that it wraps
# What stands before the whole model: DDP's and DeepSpeed's `module`, a value head's `pretrained_model`, PEFT's own.
OUTERMOST = re.compile(r"^(?:module\.|_module\.|_forward_module\.|policy\.|pretrained_model\.|base_model\.model\.)+")


def without_wrappers(name: str) -> str:
    """The name without what compilers, parallel training, value heads and PEFT's prefix put in; PEFT's parts stay."""
    return OUTERMOST.sub("", WRAPPERS.sub("", name))


def plain_name(name: str, adapters: Collection[str] = ()) -> str:
    """The name as the bare model has it: wrappers gone, and PEFT's `base_layer` and `modules_to_save` too.

    `adapters` are the names of the model's adapters, which may follow `modules_to_save`; where they are not known, a
    word between it and the parameter is taken for one.
    """
    one_of = "|".join(map(re.escape, adapters))
    saved = (
        rf"\.modules_to_save(?:\.(?:{one_of}))?\." if adapters else r"\.modules_to_save(?:\.\w+)?\.(?=weight$|bias$)"
    )
    bare = re.sub(saved, ".", without_wrappers(name))
    return bare.replace(".base_layer.", ".").replace(".original_module.", ".")
