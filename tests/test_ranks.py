"""How many processes train together, as the environment says it."""

from __future__ import annotations

import pytest

from weightsteer.errors import SteerError
from weightsteer.ranks import join, world


@pytest.mark.parametrize("count", ["two", "0", "-1", "1.5"])
def test_what_is_no_number_of_processes_is_refused(count: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", count)
    with pytest.raises(SteerError, match="WORLD_SIZE: expected a number of processes, found"):
        world()


def test_nothing_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "")
    assert world() == 1


def test_processes_that_nothing_leads_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a job of two nodes whose own launcher set this alone."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SteerError, match="WORLD_SIZE is 2, but LOCAL_RANK, MASTER_ADDR, MASTER_PORT say nothing"):
        join(on_cpu=True)
