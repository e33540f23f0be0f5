"""A short pass of the fuzzing; `make fuzz` is the long one."""

from __future__ import annotations

from pathlib import Path

import pytest
from formats import FORMATS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from outcomes import GOOD, outcome_of

SLOW = {"gguf_file": 6, "model_files": 10, "run_files": 5, "recipe": 15, "task_items": 15, "adapter_config": 20}
PASSES = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in FORMATS]


@pytest.mark.parametrize("name", PASSES)
def test_a_changed_input_is_read_right_or_refused(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("WEIGHTSTEER_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.chdir(Path(__file__).parents[1] / "data" / "former_run")

    # the same inputs at every run: what is new is looked for by `make fuzz`
    @settings(max_examples=SLOW.get(name, 10), deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 2**32))
    def check(seed: int) -> None:
        found = outcome_of(name, seed)
        assert found.kind in GOOD, f"{name}, seed {seed}: {found.kind}: {found.detail}"

    check()
