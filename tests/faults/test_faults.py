from __future__ import annotations

import random

import pytest

from faults import FAULTS
from harness import Harness

QUICK = [(fault, name) for fault in FAULTS for name in ("merge", "combine")] + [("kills", "sample")]


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    return Harness(tmp_path_factory.mktemp("faults") / "place")


@pytest.mark.parametrize(("fault", "name"), QUICK)  # `make faults` does it to every command, by the hundred
def test_nothing_is_lost_doubled_or_blocked(harness: Harness, fault: str, name: str) -> None:
    assert FAULTS[fault](harness, harness.commands[name], random.Random(f"{fault} {name}")) == ""
