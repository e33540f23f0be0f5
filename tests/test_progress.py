from __future__ import annotations

import sys

import pytest

from weightsteer import progress
from weightsteer.progress import show_progress


def test_a_log_gets_lines_with_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    with show_progress("work") as update:
        update(0, 4)
        update(1, 4, "loss 2")
        update(4, 4)
    lines = capsys.readouterr().err.splitlines()
    assert "just begun" in lines[0]
    assert "1/4" in lines[1]
    assert "s left  loss 2" in lines[1]
    assert "4/4" in lines[2]


def test_a_log_is_not_flooded(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress("work") as update:
        for done in range(1000):
            update(done, 1000)
        update(1000, 1000)
    assert len(capsys.readouterr().err.splitlines()) <= 3


def test_bars_run_inside_one_another(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with show_progress("outer") as outer:
        outer(1, 2, "note")
        with show_progress("inner") as inner:
            inner(2, 2)
        outer(2, 2)
    text = capsys.readouterr().err
    assert "outer" in text
    assert "inner" in text
