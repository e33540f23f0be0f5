from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from weightsteer.errors import SteerError
from weightsteer.locks import LOCKS, hold, lock_of

HOLDING = "import sys, pathlib; from weightsteer.locks import hold\nwith hold(pathlib.Path(sys.argv[1])):\n"


def holder(folder: Path) -> subprocess.Popen[str]:
    """A process that holds a folder until its input ends."""
    code = f"{HOLDING}    print('held', flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_says_who_holds_it(tmp_path: Path) -> None:
    process = holder(tmp_path / "out")
    before = sorted(tmp_path.iterdir())
    with (
        pytest.raises(SteerError, match=rf"out: process {process.pid} on .*, since 2.* is writing it; wait"),
        hold(tmp_path / "out"),
    ):
        pass
    assert sorted(tmp_path.iterdir()) == before == [lock_of(tmp_path / "out")]
    process.communicate()
    with hold(tmp_path / "out"), hold(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_dies_gives_its_folder_free(tmp_path: Path) -> None:
    process = holder(tmp_path / "out")
    process.kill()
    process.communicate()
    assert lock_of(tmp_path / "out").exists()
    with hold(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_one_folder_by_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    process = holder(tmp_path / "link")
    monkeypatch.chdir(tmp_path / "out")
    for name in (Path(), Path("../out"), Path("../link"), tmp_path / "out"):
        with pytest.raises(SteerError, match=f"process {process.pid}"), hold(name):
            pass
    process.communicate()


def test_another_writer_is_waited_for(tmp_path: Path) -> None:
    process = holder(tmp_path / "out")
    ends = threading.Timer(0.3, process.communicate)
    ends.start()
    with pytest.warns(UserWarning, match=f"waits until process {process.pid} on"), hold(tmp_path / "out", wait=True):
        assert lock_of(tmp_path / "out").exists()
    ends.join()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP])
def test_without_locks_the_user_decides(tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(handle: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(SteerError, match=f"keeps no locks .* go on with {LOCKS}=off"), hold(tmp_path / "out"):
        pass
    monkeypatch.setenv(LOCKS, "off")
    with hold(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []
