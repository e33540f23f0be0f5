"""The interface that every steering method implements: weights, activations, trained checkpoints or a prompt.

How k w is added to a model's weights stands in `vectors/hooks.py`, how a method is made in `steering/methods.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from ..behavior import Behavior
from ..errors import SteerError
from ..lm import LM
from ..vectors.handle import SteeringHandle
from ..vectors.weight_vector import WeightVector
from .activations import ActivationVector


class Steering(Protocol):
    """A way to steer: inside `applied` the handle's `lm` behaves as the method at strength k makes it."""

    @property
    def name(self) -> str: ...
    def applied(self, lm: LM, k: float) -> AbstractContextManager[SteeringHandle]:
        """Steer `lm`; k = 0 is the base bit for bit, k > 0 adds the behaviour."""
        ...


@dataclass(frozen=True)
class Direction:
    """k times a vector: theta + k w (contrastive, tau+, -tau-), or x_l + k a_l on a layer's activations."""

    name: str
    vector: WeightVector | ActivationVector

    def applied(self, lm: LM, k: float) -> AbstractContextManager[SteeringHandle]:
        """See `Steering.applied`."""
        return self.vector.applied(lm, k)


@dataclass(frozen=True)
class TrainedCheckpoints:
    """Models that were trained, rather than a direction: at k the change that was trained for just that k.

    Fine-tuned checkpoints: k is the share of the training on D+ that is done, or minus that on D-. Joint
    training: k is how often the desired examples are in the data, and the change replaces the fine-tune's own.
    """

    name: str
    changes: Mapping[float, WeightVector]

    @contextmanager
    def applied(self, lm: LM, k: float) -> Iterator[SteeringHandle]:
        """See `Steering.applied`; the handle's k stays what it is.

        Raises:
            SteerError: nothing was trained for this k.
        """
        if k != 0.0 and k not in self.changes:
            known = ", ".join(f"{k:g}" for k in sorted(self.changes))
            raise SteerError(f"{self.name}: was trained for k of {known}; found {k:g}")
        handle = SteeringHandle(k, lm)
        handle.on_change.append(self._refuse_change)
        with self.changes[k].applied(lm, 1.0) if k else nullcontext():
            yield handle

    def _refuse_change(self) -> None:
        raise SteerError(f"{self.name}: each k is another trained model; apply the method anew to change k")


@dataclass(frozen=True)
class SystemPrompt:
    """Ask for it: a system prompt for the behaviour (k = 1) or against it (k = -1)."""

    name: str
    behavior: Behavior

    @contextmanager
    def applied(self, lm: LM, k: float) -> Iterator[SteeringHandle]:
        """See `Steering.applied`.

        Raises:
            SteerError: k is not -1, 0 or 1.
        """
        handle = SteeringHandle(k, self._prompt(lm, k))

        def follow() -> None:
            handle.lm = self._prompt(lm, float(handle.k))

        handle.on_change.append(follow)
        yield handle

    def prompt_at(self, k: float) -> str | None:
        """The system prompt at k; None at 0.

        Raises:
            SteerError: k is not -1, 0 or 1.
        """
        prompts = {1.0: self.behavior.positive_prompts[0], -1.0: self.behavior.negative_prompts[0]}
        if k not in (0.0, *prompts):
            raise SteerError(f"{self.name}: a prompt has no strength; expected k of -1, 0 or 1, found {k:g}")
        return prompts[k] if k else None

    def _prompt(self, lm: LM, k: float) -> LM:
        text = self.prompt_at(k)
        return lm if text is None else lm.with_system_prompt(text)
