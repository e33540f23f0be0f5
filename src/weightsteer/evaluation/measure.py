"""One vector on one task: the base, then each k, item by item against it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..lm import LM
from ..progress import Progress, silent
from ..steering.activations import ActivationVector
from ..vectors.weight_vector import WeightVector
from .results import Measurement, MetricRow
from .tasks.task import Task, without_nan


def measure_strengths(
    vector: WeightVector | ActivationVector,
    lm: LM,
    task: Task,
    ks: Sequence[float],
    *,
    batch_size: int = 8,
    progress: Progress = silent,
) -> Iterator[tuple[Measurement, list[MetricRow]]]:
    """Measure `task` at k = 0 and at each of `ks`; all items count as test items.

    Yields:
        For each strength what was measured, and its rows: every metric, and its paired change from the base. A metric
        for which no item counts has no row.

    Raises:
        SteerError: the model gives no number for any item, as one that is steered too far does.
    """
    base: Measurement | None = None
    task = task.against(lm)
    with vector.applied(lm, 0.0) as handle:
        for k in (0.0, *ks):
            handle.k = k
            values = without_nan(task.measure(lm, batch_size=batch_size, progress=progress), task.name)
            found = Measurement("k", k, task.name, tuple(task.ids), ("test",) * len(task.ids), values)
            base = base or found
            yield found, found.rows(base)
