"""Every method under one shape: weights, activations, or a prompt, each with a strength k."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol

from .activations import ActivationVector
from .behavior import Behavior
from .errors import SteerError
from .lm import LM
from .progress import Progress, silent
from .tasks.task import Task
from .vector import WeightVector


class Steering(Protocol):
    """A way to steer: inside `applied` the LM behaves as the method at strength k makes it."""

    @property
    def name(self) -> str: ...
    def applied(self, lm: LM, k: float) -> AbstractContextManager[LM]:
        """The steered LM; k = 0 is the base bit for bit, k > 0 adds the behaviour."""
        ...


@dataclass(frozen=True)
class Direction:
    """k times a vector: theta + k w (contrastive, tau+, -tau-), or x_l + k a_l on a layer's activations."""

    name: str
    vector: WeightVector | ActivationVector

    @contextmanager
    def applied(self, lm: LM, k: float) -> Iterator[LM]:
        """See `Steering.applied`."""
        with self.vector.applied(lm, k):
            yield lm


@dataclass(frozen=True)
class Steps:
    """Models that were trained, rather than a direction: at k the change that was trained for just that k.

    Fine-tuned checkpoints: k is the share of the training on D+ that is done, or minus that on D-. Joint
    fine-tuning: k is how often the desired examples are in the data, and the change replaces the fine-tune's own.
    """

    name: str
    changes: Mapping[float, WeightVector]

    @contextmanager
    def applied(self, lm: LM, k: float) -> Iterator[LM]:
        """See `Steering.applied`.

        Raises:
            SteerError: nothing was trained for this k.
        """
        if k == 0.0:
            yield lm
            return
        if k not in self.changes:
            known = ", ".join(f"{k:g}" for k in sorted(self.changes))
            raise SteerError(f"{self.name}: was trained for k of {known}; found {k:g}")
        with self.changes[k].applied(lm, 1.0):
            yield lm


@dataclass(frozen=True)
class SystemPrompt:
    """Ask for it: a system prompt for the behaviour (k = 1) or against it (k = -1)."""

    name: str
    behavior: Behavior

    @contextmanager
    def applied(self, lm: LM, k: float) -> Iterator[LM]:
        """See `Steering.applied`.

        Raises:
            SteerError: k is not -1, 0 or 1.
        """
        prompts = {1.0: self.behavior.positive_prompts[0], -1.0: self.behavior.negative_prompts[0]}
        if k not in (0.0, *prompts):
            raise SteerError(f"{self.name}: a prompt has no strength; expected k of -1, 0 or 1, found {k:g}")
        yield lm.with_system_prompt(prompts[k]) if k else lm


def best_layer(
    lm: LM,
    vector: ActivationVector,
    task: Task,
    *,
    metric: str = "margin",
    step: int = 1,
    k: float = 1.0,
    progress: Progress = silent,
) -> int:
    """The layer that moves `metric` most between -k and k, scanning every `step`-th layer.

    The paper's choice of layer; give it validation items that are not the test.
    """
    layers = sorted(vector.layers)[step // 2 :: step]
    if not layers:
        raise SteerError(f"layer step {step}: no layer left of {len(vector.layers)}")
    spans = {}
    for done, layer in enumerate(layers, start=1):
        spans[layer] = _span(lm, vector.only(layer), task, metric, k)
        progress(done, len(layers), f"layer {layer}: {spans[layer]:+.2f}")
    if not any(math.isfinite(span) for span in spans.values()):
        raise SteerError(f"{task.name} / {metric}: no layer gives a finite change; use a smaller k, or another metric")
    return max(spans, key=lambda layer: spans[layer])


def _span(lm: LM, vector: ActivationVector, task: Task, metric: str, k: float) -> float:
    """The metric's change from -k to k; a layer that breaks the model, or leaves no item to count, is out."""
    with vector.applied(lm, k) as dial:
        ends = []
        for end in (k, -k):
            dial.k = end
            ends.append([value for value in task.measure(lm)[metric] if value is not None])
    if not all(ends):
        return -math.inf
    span = fmean(ends[0]) - fmean(ends[1])
    return span if math.isfinite(span) else -math.inf
