"""What is searched for on a few validation items: the k at a stated loss increase or KL, and the layer to steer at."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from statistics import fmean

from ..errors import SteerError
from ..lm import LM
from ..progress import Progress, silent
from ..steering.activations import ActivationVector
from ..steering.steering import Steering
from .tasks.task import Task, mean_of

NEAR = 0.15  # of the aim: a search ends within it
TRIES = 6  # of a search
FAR = 16.0  # a rise of so many times the aim, which four times the k gives, says little of where the aim is


def k_at_loss_increase(
    lm: LM,
    method: Steering,
    texts: Task,
    *,
    loss_increase: float,
    sign: int,
    metric: str = "nll",
    tries: int = TRIES,
    most: float = math.inf,
) -> float:
    """The k on one side (`sign` 1 or -1) at which `metric` on `texts` has risen by about `loss_increase`.

    The loss rises about with k^2, so each try takes the k that a parabola through the tries on both
    sides of the aim gives (before there are two, k is scaled, by a factor of 4 at most; a quarter of it is tried
    after a k at which the loss overflows). The search stops within 15% of the aim, or takes the nearest try.
    This is what makes methods comparable: each is swept over the same range of loss increase whatever its units of k.

    Args:
        most: the largest |k| that is tried; it is taken where the loss has not risen so far even there.
    """
    base = mean_of(texts.measure(lm)[metric])

    def rise(k: float) -> float:
        with method.applied(lm, k) as handle:
            return mean_of(texts.measure(handle.lm)[metric]) - base

    return search_k(rise, loss_increase, sign, tries, most)


def k_at_kl(
    lm: LM, method: Steering, texts: Task, *, kl: float, sign: int, metric: str = "p95", tries: int = TRIES
) -> float:
    """The k on one side at which the token KL to the base on `texts` is about `kl` nats; see `k_at_loss_increase`.

    Args:
        texts: a task `token_kl`; `metric` `p95` is the mean over texts of the 95th percentile of their tokens' KL.
    """
    held = texts.against(lm)

    def rise(k: float) -> float:
        with method.applied(lm, k) as handle:
            found = held.measure(handle.lm)[metric]
        return math.inf if any(v is None or math.isnan(v) for v in found) else mean_of(found)

    return search_k(rise, kl, sign, tries)


def search_k(
    rise: Callable[[float], float],
    aim: float,
    sign: int,
    tries: int = TRIES,
    most: float = math.inf,
    start: float = 1.0,
) -> float:
    """The k of one sign at which `rise(k)`, which grows about with k^2, is about `aim`; see `k_at_loss_increase`.

    Args:
        start: the |k| that is tried first.
    """
    below, above = (0.0, 0.0), None  # (|k|, rise) of the tries nearest the aim
    tried: dict[float, float] = {}  # |k| -> how far its rise is from the aim
    size = min(start, most)
    while len(tried) < tries and min(tried.values(), default=aim) > NEAR * aim:
        found = rise(sign * size)
        found = found if math.isfinite(found) else math.inf  # it overflowed
        tried[size] = abs(found - aim)
        if found < aim:
            if size >= most:
                return sign * most
            below = (size, found)
        else:
            above = (size, found)
        size = min(_next_size(below, above, aim), most)
    nearest = min(tried, key=lambda size: (tried[size], size))
    if above and math.isinf(above[1]) and tried[nearest] > aim / 2:
        warnings.warn(
            f"k = {sign * nearest:.2g}: expected a rise of about {aim:g} nats there; at {sign * above[0]:.2g} the "
            f"model's output is no number, and {len(tried)} tries came no nearer than {tried[nearest]:.2g} nats",
            stacklevel=2,
        )
    return float(f"{sign * nearest:.2g}")


def _next_size(below: tuple[float, float], above: tuple[float, float] | None, aim: float) -> float:
    """The |k| to try next, from the tries (|k|, rise) below and above the aim; the rise above may be infinite."""
    if above is None:
        size, found = below
        return size * min(4.0, math.sqrt(aim / max(found, aim / 16)))
    if above[1] > FAR * aim and below[0] > 0:
        return math.sqrt(below[0] * above[0])
    if math.isinf(above[1]):
        return above[0] / 4
    share = (aim - below[1]) / (above[1] - below[1])
    squares = below[0] ** 2, above[0] ** 2
    return math.sqrt(squares[0] + share * (squares[1] - squares[0]))


def best_layer(
    lm: LM,
    vector: ActivationVector,
    task: Task,
    *,
    metric: str = "margin",
    way: int = 1,
    step: int = 1,
    k: float = 1.0,
    progress: Progress = silent,
) -> int:
    """The layer that moves `metric` most between -k and k, scanning every `step`-th layer.

    The paper's choice of layer; give it validation items that are not the test.

    Args:
        way: where more of the behaviour moves the metric, 1 up or -1 down.
    """
    layers = layers_to_scan(vector, step)
    spans = {}
    for done, layer in enumerate(layers, start=1):
        spans[layer] = layer_span(lm, vector, layer, task, metric=metric, way=way, k=k)
        progress(done, len(layers), f"layer {layer}: {spans[layer]:+.2f}")
    return layer_of_widest(spans, f"{task.name} / {metric}")


def layers_to_scan(vector: ActivationVector, step: int) -> list[int]:
    """Every `step`-th layer of the vector.

    Raises:
        SteerError: none is left.
    """
    layers = sorted(vector.layers)[step // 2 :: step]
    if not layers:
        raise SteerError(f"layer step {step}: no layer left of {len(vector.layers)}")
    return layers


def layer_of_widest(spans: Mapping[int, float], what: str) -> int:
    """The layer of the largest span; `what` names the metric.

    Raises:
        SteerError: no span is finite.
    """
    if not any(math.isfinite(span) for span in spans.values()):
        raise SteerError(f"{what}: no layer gives a finite change; use a smaller k, or another metric")
    return max(spans, key=lambda layer: spans[layer])


def layer_span(
    lm: LM, vector: ActivationVector, layer: int, task: Task, *, metric: str = "margin", way: int = 1, k: float = 1.0
) -> float:
    """The metric's change from -k to k at one layer, up or down by `way`; -inf where it breaks or no item counts."""
    with vector.only(layer).applied(lm, k) as handle:
        ends = []
        for end in (k, -k):
            handle.k = end
            ends.append([value for value in task.measure(lm)[metric] if value is not None])
    if not all(ends):
        return -math.inf
    span = way * (fmean(ends[0]) - fmean(ends[1]))
    return span if math.isfinite(span) else -math.inf
