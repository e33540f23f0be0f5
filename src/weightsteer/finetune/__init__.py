"""One side of the data -> one fine-tune: LoRA, MLP bias or full, with the best point kept.

Plain `transformers.Trainer` and PEFT; ours are the loss at answer positions only, the search over
learning rates, and taking up a killed run where it stopped.
"""

from .settings import KINDS, TrainSettings
from .side import encode, is_made_from, split_validation, train_side
from .trainer import IGNORED

__all__ = ["IGNORED", "KINDS", "TrainSettings", "encode", "is_made_from", "split_validation", "train_side"]
