from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

from conftest import random_vector, tiny_lm
from weightsteer.cli import main
from weightsteer.errors import SteerError
from weightsteer.files import append_jsonl, current_umask, write_text
from weightsteer.vectors.weight_vector import WeightVector


def special(folder: Path, kind: str) -> Path:
    path = folder / kind
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        there = Path.cwd()
        os.chdir(folder)  # a socket's address is short
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(kind)
        os.chdir(there)
    elif kind == "device":
        return Path("/dev/null")
    else:
        (folder / "theirs").mkdir(exist_ok=True)
        (folder / "theirs.jsonl").write_text("keep\n")
        path.symlink_to(folder / {"link": "theirs.jsonl", "folder link": "theirs", "loose link": "nothing"}[kind])
    return path


KINDS = ("pipe", "socket", "device", "link", "folder link", "loose link")


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_written_over_a_device_a_pipe_or_a_link(kind: str, tmp_path: Path) -> None:
    path = special(tmp_path, kind)
    before = path.lstat()
    for write in (
        lambda: write_text(path, "x"),
        lambda: append_jsonl(path, [{"a": 1}]),
        lambda: random_vector(tiny_lm()).save(path),
    ):
        with pytest.raises(SteerError, match="choose another output"):
            write()
    after = path.lstat()
    assert (before.st_mode, before.st_ino) == (after.st_mode, after.st_ino)
    if kind == "link":
        assert path.read_text() == "keep\n"


def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["weightsteer", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out + err


@pytest.mark.parametrize("kind", KINDS)
def test_every_verb_refuses_such_an_output_before_it_works(
    kind: str, vector: WeightVector, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, w = str(special(tmp_path, kind)), str(vector.save(tmp_path / "w"))
    pairs = ["--pairs", "sycophancy"]
    for arguments in (
        ["combine", "w", f"w={w}"],
        ["subtract", w, w],
        ["generate", "gcd", "--count", "4"],
        ["export", "peft", w, "--k=1"],
        ["export", "merged", w, "--k=1", "-m", str(tmp_path / "no")],
        ["train", *pairs, "-m", str(tmp_path / "no")],
        ["sample", "sycophancy", "-m", str(tmp_path / "no")],
        ["monitor", w, "--vectors", w],
    ):
        code, text = command(capsys, monkeypatch, *arguments, "-o", path)
        assert code == 1, arguments
        assert "choose another output" in text, (arguments, text)


def test_what_somebody_else_made_is_not_replaced(
    vector: WeightVector, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    w, other = (str(random_vector(tiny_lm(), seed=seed).save(tmp_path / f"w{seed}")) for seed in (1, 2))
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name in ("mine.csv", "mine.jsonl", "notes.txt"):
        (theirs / name).write_text("keep")
    for arguments in (
        ["cosine", w, other, "-o", str(theirs / "mine")],
        ["generate", "gcd", "--count", "4", "-o", str(theirs / "mine.jsonl")],
        ["monitor", str(tmp_path), "--vectors", w, "-o", str(theirs)],
        ["combine", "w", f"w={w}", "-o", str(theirs)],
    ):
        code, text = command(capsys, monkeypatch, *arguments)
        assert code == 1, arguments
        assert "weightsteer: " in text
        assert "Traceback" not in text
    assert {path.name: path.read_text() for path in theirs.iterdir()} == dict.fromkeys(
        ("mine.csv", "mine.jsonl", "notes.txt"), "keep"
    )


def test_what_we_made_is_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    w, other = (str(random_vector(tiny_lm(), seed=seed).save(tmp_path / f"w{seed}")) for seed in (1, 2))
    for arguments in (
        ["cosine", w, other, "-o", str(tmp_path / "table")],
        ["generate", "gcd", "--count", "4", "-o", str(tmp_path / "gcd.jsonl")],
        ["combine", "2*w", f"w={w}", "-o", str(tmp_path / "sum")],
    ):
        for _ in range(2):
            assert command(capsys, monkeypatch, *arguments)[0] == 0


def test_the_working_folder_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell in it would be left in a folder that is gone."""
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    w = random_vector(tiny_lm())
    for target in (".", inner, "..", tmp_path / "a"):
        with pytest.raises(SteerError, match="is the folder in which the command runs, or holds it"):
            w.save(target)
    assert inner.samefile(Path())
    w.save("w")
    assert (inner / "w" / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o666 & ~current_umask()
