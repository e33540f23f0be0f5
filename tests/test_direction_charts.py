from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from weightsteer.monitor import WHOLE, Alert, Reading, verdict
from weightsteer.reporting.charts import png
from weightsteer.reporting.direction_charts import (
    TITLES,
    cluster_order,
    heatmap,
    layer_panels,
    over_steps,
    step_panels,
)

ROW = {"vector": "v", "part": "all", "cosine": 0.1, "centre": 0.0, "band": 0.02, "z": 5.0, "projection": 0.3}


@given(st.permutations(range(6)))
def test_like_vectors_become_neighbours(order: list[int]) -> None:
    """Two groups of three, in any order."""
    group = np.array([i % 2 for i in order])
    cosines = np.where(group[:, None] == group[None, :], 0.9, -0.1)
    np.fill_diagonal(cosines, 1.0)
    found = [int(group[i]) for i in cluster_order(cosines)]
    assert sorted(cluster_order(cosines)) == list(range(6))
    assert found in ([0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0])


def test_charts_are_drawn() -> None:
    rows = [{**ROW, "step": step} for step in (1, 2)]
    assert png(over_steps(rows)).startswith(b"\x89PNG")
    assert list(layer_panels([{**row, "part": part} for row in rows for part in ("layer 3", "all")])) == ["v"]
    table = np.array([[1.0, 0.5, np.nan], [0.5, 1.0, 0.1], [np.nan, 0.1, 1.0]])
    assert png(heatmap(["a", "b", "c"], table)).startswith(b"\x89PNG")


def test_the_alerts_threshold_is_drawn_where_it_is_set() -> None:
    rows = [{**ROW, "step": step} for step in (1, 2)]
    with_alert, without = (str(step_panels(rows, alert=z)[TITLES["z"]].to_dict()) for z in (4.0, None))
    assert "{'z': 4.0}" in with_alert
    assert "{'z': -4.0}" in with_alert
    assert "{'z': 4.0}" not in without


def test_the_verdict_is_that_of_the_alert() -> None:
    def reading(step: int, z: float) -> Reading:
        return Reading(f"c{step}", step, "evil", WHOLE, z / 100, 0.0, 1.0, 0.0, 0.01, z)

    calm, raised = [reading(1, 1.0), reading(2, -1.5)], [reading(1, 1.0), reading(2, 4.0), reading(3, 5.5)]
    most = "the furthest from chance is toward 'evil' at step 3, z = +5.5."
    assert verdict(raised, Alert(4.0)) == (
        f"Alert: 2 of 3 readings reach the threshold |z| = 4, first at step 2 ('evil'); {most}"
    )
    assert verdict(raised, Alert(6.0)).startswith("No alert: none of 3 readings reaches the threshold |z| = 6;")
    assert verdict(raised, None) == f"Of 3 readings, {most} No alert was asked for."
    assert verdict(calm, None).startswith("Every reading is within 2 standard deviations of chance; the furthest")
    assert "away from 'evil' at step 2" in verdict(calm, None)
    assert verdict([], None) == "No checkpoint has been read yet."
