"""Contrastive weight steering: w = theta+ - theta-, and k times w on any model of the family.

The public names load lazily: `import weightsteer` does not import torch.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from .former_names import PYTHON_NAMES

if TYPE_CHECKING:
    from .behavior import Behavior as Behavior
    from .behavior import ContrastPair as ContrastPair
    from .behavior import Example as Example
    from .behavior import sides_of as sides_of
    from .checkpoints.load_options import LoadOptions as LoadOptions
    from .data_building.lint import lint_sides as lint_sides
    from .data_building.sampling import sample_sides as sample_sides
    from .data_building.sampling_settings import SamplingSettings as SamplingSettings
    from .errors import SteerError as SteerError
    from .evaluation.calibration import Calibration as Calibration
    from .evaluation.dial import calibrate as calibrate
    from .evaluation.measure import measure_strengths as measure_strengths
    from .evaluation.results import MetricRow as MetricRow
    from .evaluation.task_spec import TaskSpec as TaskSpec
    from .evaluation.tasks import load_task as load_task
    from .example_files.load import load_examples as load_examples
    from .example_files.load import load_pairs as load_pairs
    from .export.merge import MergeSettings as MergeSettings
    from .export.merge import export_merged as export_merged
    from .lm import LM as LM
    from .monitor import Reading as Reading
    from .monitor import SteeringMonitor as SteeringMonitor
    from .monitor import list_checkpoints as list_checkpoints
    from .monitor import read_checkpoints as read_checkpoints
    from .run_card import RunCard as RunCard
    from .scoring import mean_kl as mean_kl
    from .scoring import prompt_log_probs as prompt_log_probs
    from .scoring import score_choices as score_choices
    from .scoring import score_texts as score_texts
    from .steering.activations import ActivationVector as ActivationVector
    from .steering.activations import activation_vector as activation_vector
    from .steering.several_k import generate_at_strengths as generate_at_strengths
    from .training import Preference as Preference
    from .training import TrainSettings as TrainSettings
    from .training import list_snapshots as list_snapshots
    from .training import preferences_of as preferences_of
    from .training import train_preference as train_preference
    from .training import train_side as train_side
    from .training import train_vector as train_vector
    from .vectors.difference import subtract_finetunes as subtract_finetunes
    from .vectors.difference import task_vector as task_vector
    from .vectors.expression import combine as combine
    from .vectors.low_rank import LowRank as LowRank
    from .vectors.similarity import Similarity as Similarity
    from .vectors.similarity import similarities as similarities
    from .vectors.weight_vector import WeightVector as WeightVector

HOMES = {
    "behavior": ("Behavior", "ContrastPair", "Example", "sides_of"),
    "checkpoints.load_options": ("LoadOptions",),
    "data_building.lint": ("lint_sides",),
    "data_building.sampling": ("sample_sides",),
    "data_building.sampling_settings": ("SamplingSettings",),
    "errors": ("SteerError",),
    "evaluation.calibration": ("Calibration",),
    "evaluation.dial": ("calibrate",),
    "evaluation.measure": ("measure_strengths",),
    "evaluation.results": ("MetricRow",),
    "evaluation.task_spec": ("TaskSpec",),
    "evaluation.tasks": ("load_task",),
    "example_files.load": ("load_examples", "load_pairs"),
    "export.merge": ("MergeSettings", "export_merged"),
    "lm": ("LM",),
    "monitor": ("Reading", "SteeringMonitor", "list_checkpoints", "read_checkpoints"),
    "run_card": ("RunCard",),
    "scoring": ("mean_kl", "prompt_log_probs", "score_choices", "score_texts"),
    "steering.activations": ("ActivationVector", "activation_vector"),
    "steering.several_k": ("generate_at_strengths",),
    "training": (
        "Preference",
        "TrainSettings",
        "list_snapshots",
        "preferences_of",
        "train_preference",
        "train_side",
        "train_vector",
    ),
    "vectors.difference": ("subtract_finetunes", "task_vector"),
    "vectors.expression": ("combine",),
    "vectors.low_rank": ("LowRank",),
    "vectors.similarity": ("Similarity", "similarities"),
    "vectors.weight_vector": ("WeightVector",),
}
_HOME_OF = {name: module for module, names in HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)
__version__ = importlib.metadata.version("weightsteer")


def __getattr__(name: str) -> Any:
    if name in PYTHON_NAMES:
        raise AttributeError(f"module 'weightsteer': {name} is called {PYTHON_NAMES[name]} now")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'weightsteer' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
