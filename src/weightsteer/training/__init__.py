"""One side of the data -> one fine-tune: LoRA, MLP bias or full, with the best point kept; preference tuning beside it.

Plain `transformers.Trainer`, PEFT and, for preferences, TRL; ours are the loss at answer positions
only, the search over learning rates, and taking up a killed run where it stopped.
The names load lazily: `--help` shows the defaults, and does not import torch for it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .both_sides import train_vector as train_vector
    from .output import list_snapshots as list_snapshots
    from .preference import Preference as Preference
    from .preference import preferences_of as preferences_of
    from .preference import train_preference as train_preference
    from .settings import KINDS as KINDS
    from .settings import PAPER as PAPER
    from .settings import TrainSettings as TrainSettings
    from .sft import encode as encode
    from .sft import split_validation as split_validation
    from .sft import train_side as train_side
    from .trainer import IGNORED as IGNORED
    from .two_way import train_two_way as train_two_way
    from .two_way import two_way_vector as two_way_vector

HOMES = {
    "both_sides": ("train_vector",),
    "output": ("list_snapshots",),
    "preference": ("Preference", "preferences_of", "train_preference"),
    "settings": ("KINDS", "PAPER", "TrainSettings"),
    "sft": ("encode", "split_validation", "train_side"),
    "trainer": ("IGNORED",),
    "two_way": ("train_two_way", "two_way_vector"),
}
_HOME_OF = {name: module for module, names in HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'weightsteer.training' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
