from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from weightsteer.disk import make_folder, sync_tree, telling_of_disk
from weightsteer.errors import SteerError
from weightsteer.files import append_jsonl, read_finished, write_text
from weightsteer.leftovers import sweep_beside, sweep_within
from weightsteer.run_card import RunCard, new_folder

TENSORS = {"x": torch.zeros(100_000)}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
def test_what_a_disk_refuses_is_one_line(code: int, tmp_path: Path) -> None:
    for error in (OSError(code, os.strerror(code)), RuntimeError(f"I/O error: {os.strerror(code)} (os error {code})")):
        with pytest.raises(SteerError, match=f"out: {os.strerror(code)}; ") as said, telling_of_disk(tmp_path / "out"):
            raise error
        assert "\n" not in str(said.value)
    with pytest.raises(SteerError, match="^named: "), telling_of_disk(tmp_path):
        raise OSError(code, os.strerror(code), "named")
    with pytest.raises(KeyError), telling_of_disk(tmp_path):
        raise KeyError("no concern of the disk")


@pytest.mark.parametrize("save", [lambda path: save_file(TENSORS, path), lambda path: torch.save(TENSORS, path)])
def test_what_the_libraries_say_of_a_disk_without_room(save: Callable[[Path], None], tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(SteerError, match="make room there"), telling_of_disk(tmp_path / "a"):
            save(tmp_path / "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_in_the_way_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(SteerError, match="file: File exists; choose another place"):
        make_folder(tmp_path / "file" / "a" / "b")
    with pytest.raises(SteerError, match="choose another place"), new_folder(tmp_path / "file" / "out", "vector"):
        pass


def test_an_append_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, [{"a": 1}, {"a": 2}])
    append_jsonl(path, [{"a": "é"}, {"a": 4}, {"a": 5}])
    content = path.read_bytes()
    first = content.index(b'{"a": "')
    for cut in range(first, len(content)):
        path.write_bytes(content[:cut])
        assert read_finished(path) == [{"a": 1}, {"a": 2}], cut
        assert path.read_bytes() == content[:first]
        path.write_bytes(content[:cut])
        append_jsonl(path, [{"a": "é"}, {"a": 4}, {"a": 5}])
        assert path.read_bytes() == content
        path.write_bytes(content[:cut] + bytes(len(content) - cut))
        assert read_finished(path) == [{"a": 1}, {"a": 2}], cut
    path.write_bytes(content)

    write = os.write

    def full(handle: int, some: bytes) -> int:
        if len(some) > 9:
            return write(handle, some[:9])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(SteerError, match="rows.jsonl: No space left on device; make room there"):
        append_jsonl(path, [{"a": "more than there is room for"}])
    assert path.read_bytes() == content


def test_a_damaged_line_is_left_out_with_a_warning_and_a_foreign_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \xff\n{"a": 3}\n')
    with pytest.warns(UserWarning, match="line 2: is damaged and left out"):
        assert read_finished(path) == [{"a": 1}, {"a": 3}]
    for foreign in ("my notes", "my notes\nof today\n", "[1]\n"):
        path.write_text(foreign)
        with pytest.raises(SteerError, match="line 1: not JSON"):
            read_finished(path)
        assert path.read_text() == foreign


def test_the_next_writer_sweeps_what_the_dead_left(tmp_path: Path) -> None:
    dead = 2**22 + 5  # above the largest number of a process
    kept = [f".page.html.{os.getpid()}.0123abcd.part", f".other.html.{dead}.0123abcd.part", ".page.html.part"]
    swept = [f".page.html.{dead}.0123abcd.part", f".page.html.{dead}.part"]
    kept += [f".page.html.{dead}.fedcba.0123abcd.part"]  # of another machine that shares the folder
    swept += [f".page.html.{dead}.fedcba.89abcdef.part"]  # the same, of the day before yesterday
    for name in (*kept, *swept):
        (tmp_path / name).write_text("x")
    os.utime(tmp_path / swept[-1], (0, 0))
    write_text(tmp_path / "page.html", "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "page.html"])


def test_the_part_of_a_longer_name_is_another_ones(tmp_path: Path) -> None:
    other = tmp_path / ".w.2.abcdefgh.part"
    other.mkdir()
    sweep_beside(tmp_path / "w")
    assert other.exists()
    sweep_beside(tmp_path / "w.2")
    assert not other.exists()


def test_a_whole_tree_is_swept(tmp_path: Path) -> None:
    run = tmp_path / "run"
    RunCard("vector").save(run / "vector")
    (run / "vector" / ".replaced.part").mkdir()
    RunCard("vector", base_model="older").save(run / ".negative.abcdefgh.part" / ".replaced.part")
    (run / ".vector.lock").touch()
    (run / ".mine").write_text("kept")
    sweep_within(run)
    assert sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()) == [
        ".mine",
        "negative/weightsteer.json",
        "vector/weightsteer.json",
    ]


def test_a_new_folder_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    sync, rename = os.fsync, os.rename

    def synced(handle: int) -> None:
        done.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        sync(handle)

    def renamed(old: Path, new: Path) -> None:
        done.append("rename")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    with new_folder(tmp_path / "out", "vector") as part:
        (part / "sub").mkdir()
        (part / "sub" / "a").write_text("x")
        (part / "b").write_text("x")
    assert done.index("a") < done.index("sub") < done.index(part.name) < done.index("rename")
    assert "b" in done[: done.index("rename")]
    assert done[-1] == tmp_path.name
    sync_tree(tmp_path)
