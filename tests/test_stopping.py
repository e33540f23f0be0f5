from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from weightsteer import cli
from weightsteer.cli import app
from weightsteer.cli.stopping import GO_ON
from weightsteer.run_card import new_folder


def ending(work: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of a command that does `work`."""
    kept = list(app.registered_commands)
    app.command("work")(work)
    monkeypatch.setattr(sys, "argv", ["weightsteer", "work"])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        app.registered_commands[:] = kept
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_takes_away_what_is_half_written_and_says_how_to_go_on(
    number: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)

    def work() -> None:
        with new_folder(tmp_path / "out", "vector") as part:
            (part / "a").write_text("x")
            os.kill(os.getpid(), number)

    assert ending(work, monkeypatch) == code
    assert capsys.readouterr().err == f"weightsteer: {GO_ON}\n"
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(number) is before


def test_a_library_that_turns_the_signal_into_its_own_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except BaseException:
            raise ImportError("cannot load module twice") from None

    assert ending(work, monkeypatch) == 130
    assert capsys.readouterr().err == f"weightsteer: {GO_ON}\n"


def test_other_errors_and_other_threads_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ending(fails, monkeypatch)

    def ends() -> None:
        raise typer.Exit(3)

    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(ending(ends, monkeypatch)))
    thread.start()
    thread.join()
    assert codes == [3]
