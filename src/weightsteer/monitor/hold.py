"""Hold a line while a model trains: vectors that stay applied until the end, and a pull back along others.

With k w applied during training and taken away afterwards, the data need not push the model along w to fit what w
already does: preventative steering (Chen et al., arXiv 2507.21509, for activations), here in weight space.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

from torch import Tensor, nn

from ..errors import SteerError
from ..vectors.delta import read_delta
from ..vectors.low_rank import LowRank
from ..vectors.weight_vector import WeightVector
from .live_forms import LiveLora, LiveWhole, gather
from .training_parameters import live_parameters


class Held:
    """sum_i k_i w_i on a model until `release`: the adapter that trains is learned beside it, and does not hold it.

    Raises:
        SteerError: a parameter that trains is changed where it stands, as those outside linear layers are.
    """

    def __init__(self, model: nn.Module, vectors: Mapping[str, WeightVector], strengths: Mapping[str, float]) -> None:
        self._stack = ExitStack()
        scaled = [vectors[name] * k for name, k in strengths.items() if k]
        if scaled:
            trains = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
            self._stack.enter_context(sum(scaled[1:], start=scaled[0]).applied(model))
            there = set(map(id, model.parameters()))
            if lost := [name for place, name in trains.items() if place not in there]:
                self.release()
                raise SteerError(
                    f"hold: the vector changes {lost[0]} where it stands, and so it would not be trained; hold the "
                    "part of the vector that is in linear layers (`filter`), or train an adapter"
                )

    def release(self) -> None:
        """Take them away; every bit is as it was, but for what was trained."""
        self._stack.close()


class Pull:
    """A penalty on how many multiples p of a vector lie in tau: weight * p^2, in the units of the loss.

    Its gradient is added before each step of the optimizer, in closed form: d p / d tau = w / <w, w>.

    Raises:
        SteerError: nothing that trains is changed by the vector in a form that it can be pulled in.
    """

    def __init__(self, model: nn.Module, vector: WeightVector, weight: float) -> None:
        live, _ = live_parameters(model)
        self.weight, self.square = weight, vector.dot(vector)
        self.parts: list[tuple[LiveLora | LiveWhole, LowRank]] = []
        for name, form in live.items():
            delta = read_delta(name, vector.deltas[name]) if name in vector.deltas else None
            if isinstance(delta, LowRank) and isinstance(form, LiveLora | LiveWhole):
                factors = LowRank(delta.B.to(form.device).float(), delta.A.to(form.device).float())
                self.parts.append((form, factors))
        if not self.parts or not self.square:
            raise SteerError("resist: the vector and the training have no factored parameter in common")

    def projection(self) -> float:
        """<tau, w> / <w, w> over what trains."""
        return sum(_product(form, factors) for form, factors in self.parts) / self.square

    def add_gradient(self) -> None:
        """Add the penalty's gradient to what the loss has left on the parameters."""
        slope = 2 * self.weight * self.projection() / self.square
        for form, factors in self.parts:
            if isinstance(form, LiveWhole):
                _add(form.now, slope * (factors.B @ factors.A))
            else:
                dB, dA = (factors.A.T, factors.B.T) if form.turned else (factors.B, factors.A)
                B, A = gather(form.B).float(), gather(form.A).float()
                _add(form.B, slope * form.scale * (dB @ (dA @ A.T)))
                _add(form.A, slope * form.scale * ((B.T @ dB) @ dA))


def _product(form: LiveLora | LiveWhole, factors: LowRank) -> float:
    if isinstance(form, LiveWhole):
        tau = gather(form.now).float() - form.start.float()
        return float(((tau @ factors.A.T) * factors.B).sum())
    dB, dA = (factors.A.T, factors.B.T) if form.turned else (factors.B, factors.A)
    B, A = gather(form.B).float(), gather(form.A).float()
    return float(((B.T @ dB) * (A @ dA.T)).sum()) * form.scale


def _add(parameter: Tensor, gradient: Tensor) -> None:
    if hasattr(parameter, "full_tensor"):
        raise SteerError("resist: works with parameters that each process holds whole; train with DDP")
    if parameter.grad is None:
        parameter.grad = gradient.to(parameter)
    else:
        parameter.grad.add_(gradient.to(parameter.grad))
