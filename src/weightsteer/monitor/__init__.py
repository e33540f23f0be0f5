"""Watch a training run in weight space: a folder of checkpoints, or a Trainer while it runs (paper, section 6)."""

from .callback import SteeringMonitor
from .checkpoints import checkpoint_products, list_checkpoints, read_checkpoints
from .readings import WHOLE, Alert, Products, Reading, describe, random_variance, read_off, verdict

__all__ = [
    "WHOLE",
    "Alert",
    "Products",
    "Reading",
    "SteeringMonitor",
    "checkpoint_products",
    "describe",
    "list_checkpoints",
    "random_variance",
    "read_checkpoints",
    "read_off",
    "verdict",
]
