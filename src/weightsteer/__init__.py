"""Contrastive weight steering: w = theta+ - theta-, and k times w on any model of the family.

The public names load lazily: `import weightsteer` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .activations import ActivationVector as ActivationVector
    from .activations import activation_vector as activation_vector
    from .behavior import Behavior as Behavior
    from .behavior import ContrastPair as ContrastPair
    from .behavior import Example as Example
    from .behavior import load_examples as load_examples
    from .behavior import load_pairs as load_pairs
    from .behavior import sides_of as sides_of
    from .contrast import ContrastSettings as ContrastSettings
    from .contrast import build_sides as build_sides
    from .errors import SteerError as SteerError
    from .export import export_adapter as export_adapter
    from .expression import combine as combine
    from .extract import contrast_vector as contrast_vector
    from .extract import task_vector as task_vector
    from .finetune import Preference as Preference
    from .finetune import TrainSettings as TrainSettings
    from .finetune import list_snapshots as list_snapshots
    from .finetune import preferences_of as preferences_of
    from .finetune import train_preference as train_preference
    from .finetune import train_side as train_side
    from .lint import lint_sides as lint_sides
    from .lm import LM as LM
    from .lowrank import LowRank as LowRank
    from .merge import MergeSettings as MergeSettings
    from .merge import export_merged as export_merged
    from .monitor import Reading as Reading
    from .monitor import SteeringMonitor as SteeringMonitor
    from .monitor import list_checkpoints as list_checkpoints
    from .monitor import read_checkpoints as read_checkpoints
    from .records import Row as Row
    from .records import RunCard as RunCard
    from .scoring import mean_kl as mean_kl
    from .scoring import prompt_log_probs as prompt_log_probs
    from .scoring import score_choices as score_choices
    from .scoring import score_texts as score_texts
    from .similarity import Similarity as Similarity
    from .similarity import similarities as similarities
    from .vector import WeightVector as WeightVector

HOMES = {
    "activations": ("ActivationVector", "activation_vector"),
    "behavior": ("Behavior", "ContrastPair", "Example", "load_examples", "load_pairs", "sides_of"),
    "contrast": ("ContrastSettings", "build_sides"),
    "errors": ("SteerError",),
    "export": ("export_adapter",),
    "expression": ("combine",),
    "extract": ("contrast_vector", "task_vector"),
    "finetune": ("Preference", "TrainSettings", "list_snapshots", "preferences_of", "train_preference", "train_side"),
    "lint": ("lint_sides",),
    "lm": ("LM",),
    "lowrank": ("LowRank",),
    "merge": ("MergeSettings", "export_merged"),
    "monitor": ("Reading", "SteeringMonitor", "list_checkpoints", "read_checkpoints"),
    "records": ("Row", "RunCard"),
    "scoring": ("mean_kl", "prompt_log_probs", "score_choices", "score_texts"),
    "similarity": ("Similarity", "similarities"),
    "vector": ("WeightVector",),
}
_HOME_OF = {name: module for module, names in HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'weightsteer' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
