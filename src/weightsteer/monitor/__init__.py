"""Watch a training run in weight space: a folder of checkpoints, or a Trainer while it runs (paper, section 6)."""

from .alerts import Alert, RateAlert, describe, verdict
from .callback import SteeringMonitor
from .checkpoints import checkpoint_products, list_checkpoints, read_checkpoints
from .decompose import Decomposition, Part, decompose
from .dictionary import Dictionary, Threshold, write_dictionary
from .readings import WHOLE, Products, Reading, random_variance, read_off
from .screen import Screened, screen

__all__ = [
    "WHOLE",
    "Alert",
    "Decomposition",
    "Dictionary",
    "Part",
    "Products",
    "RateAlert",
    "Reading",
    "Screened",
    "SteeringMonitor",
    "Threshold",
    "checkpoint_products",
    "decompose",
    "describe",
    "list_checkpoints",
    "random_variance",
    "read_checkpoints",
    "read_off",
    "screen",
    "verdict",
    "write_dictionary",
]
