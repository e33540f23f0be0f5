"""One side of the data -> one fine-tune: LoRA, MLP bias or full, with the best point kept; preference tuning beside it.

Plain `transformers.Trainer`, PEFT and, for preferences, TRL; ours are the loss at answer positions
only, the search over learning rates, and taking up a killed run where it stopped.
"""

from .both_sides import train_vector
from .output import list_snapshots
from .preference import Preference, preferences_of, train_preference
from .settings import KINDS, TrainSettings
from .sft import encode, split_validation, train_side
from .trainer import IGNORED

__all__ = [
    "IGNORED",
    "KINDS",
    "Preference",
    "TrainSettings",
    "encode",
    "list_snapshots",
    "preferences_of",
    "split_validation",
    "train_preference",
    "train_side",
    "train_vector",
]
