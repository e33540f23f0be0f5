"""SECURITY.md: each promise has a test, and the tests that no other file holds."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
import shutil
import sys
from pathlib import Path

import pytest

from conftest import random_vector, tiny_lm
from weightsteer.cli import main
from weightsteer.errors import SteerError
from weightsteer.export.merge import MergeSettings, export_merged
from weightsteer.lm import LM
from weightsteer.vectors.difference import task_vector
from weightsteer.vectors.weight_vector import WeightVector

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "SECURITY.md"


def test_each_promise_has_a_test() -> None:
    trees = [ast.parse(path.read_text()) for path in TESTS.glob("test_*.py")]
    known = {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    promised = PAGE.read_text().partition("## What is promised")[2].partition("## What is not promised")[0]
    items = re.split(r"\n- ", promised)[1:]
    assert len(items) > 15
    for item in items:
        named = re.findall(r"\[(test_\w+)\]", item)
        assert named, f"no test is named: {item}"
        assert set(named) <= known, f"no such test: {set(named) - known}"


class Planted:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def plant_pickles(folder: Path, mark: Path) -> list[str]:
    names = [
        *("pytorch_model.bin", "adapter_model.bin", "model.pt", "optimizer.pt", "training_args.bin", "scheduler.pt"),
        *("rng_state.pth", "consolidated.00.pth", "vocab.pkl", "tokenizer.model.pkl"),
    ]
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(pickle.dumps(Planted(mark)))
    return names


def test_no_pickle_is_opened(checkpoint: Path, vector: WeightVector, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    plant_pickles(checkpoint, mark)
    LM.load(checkpoint, device="cpu")
    plant_pickles(tmp_path / "bare", mark)
    shutil.copy(checkpoint / "config.json", tmp_path / "bare" / "config.json")
    for read in (task_vector, LM.load):
        with pytest.raises(SteerError):
            read(tmp_path / "bare")
    made = vector.save(tmp_path / "w")
    plant_pickles(made, mark)
    assert task_vector(made).norm() > 0
    assert not mark.exists()


def test_a_merge_copies_no_code_and_no_pickle(checkpoint: Path, vector: WeightVector, tmp_path: Path) -> None:
    planted = plant_pickles(checkpoint, tmp_path / "mark")
    for name in ("modeling_evil.py", ".env", "id_rsa", "notes.txt", "handler.py", "tokenizer.py"):
        (checkpoint / name).write_text("secret")
        planted.append(name)
    export_merged(vector, checkpoint, tmp_path / "merged", k=1.0)
    assert not {path.name for path in (tmp_path / "merged").rglob("*")} & set(planted)
    assert LM.load(tmp_path / "merged", device="cpu")
    assert not (tmp_path / "mark").exists()


LINKED = ("config.json", "tokenizer.json", "generation_config.json", "model.safetensors.index.json", "shard")


@pytest.mark.parametrize("name", [*LINKED, "LICENSE", "vocab.txt", "chat_template.jinja"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_merge_follows_no_link_out(
    name: str, dtype: str | None, checkpoint: Path, vector: WeightVector, tmp_path: Path
) -> None:
    file = next(checkpoint.glob("model-00001*")) if name == "shard" else checkpoint / name
    outside = tmp_path / "private" / file.name
    outside.parent.mkdir()
    if file.exists():
        file.rename(outside)
    else:
        outside.write_text("private")
    file.symlink_to(outside)
    with pytest.raises(SteerError, match="is a link out of the model's folder"):
        export_merged(vector, checkpoint, tmp_path / "merged", k=1.0, settings=MergeSettings(dtype=dtype))
    assert not (tmp_path / "merged").exists()
    file.unlink()
    outside.rename(checkpoint / f"real-{file.name}")
    file.symlink_to(f"real-{file.name}")  # within the folder it may lead
    export_merged(vector, checkpoint, tmp_path / "merged", k=1.0)
    assert not any(path.is_symlink() for path in (tmp_path / "merged").rglob("*"))


def test_a_merge_follows_the_hub_caches_own_links(checkpoint: Path, vector: WeightVector, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--o--m" / "snapshots" / ("0" * 40)
    blobs = snapshot.parent.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(checkpoint.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    export_merged(vector, snapshot, tmp_path / "merged", k=1.0)
    shutil.rmtree(tmp_path / "merged")
    (tmp_path / "elsewhere").write_text("private")
    (blobs / "x").symlink_to(tmp_path / "elsewhere")
    (snapshot / "LICENSE").symlink_to("../../blobs/x")
    with pytest.raises(SteerError, match="link out"):
        export_merged(vector, snapshot, tmp_path / "merged", k=1.0)


def test_an_adapter_beside_a_model_is_refused(checkpoint: Path, vector: WeightVector, tmp_path: Path) -> None:
    adapter = vector.save(tmp_path / "w")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, checkpoint / name)
    for use in (
        lambda: LM.load(checkpoint, device="cpu"),
        lambda: export_merged(vector, checkpoint, tmp_path / "merged", k=1.0),
    ):
        with pytest.raises(SteerError, match="holds an adapter .*beside the model.*folder of its own"):
            use()
    (checkpoint / "adapter_config.json").unlink()
    (checkpoint / "adapter_model.safetensors").unlink()
    assert LM.load(checkpoint, device="cpu")


def test_the_page_runs_nothing_of_what_it_shows(tmp_path: Path) -> None:
    from weightsteer.reporting.pages import write_figures

    hostile = "</script><script>alert(1)</script><img src=x onerror=alert(1)>{{7*7}}"
    spec = {"title": hostile, "data": {"values": [{"a": hostile}]}, "mark": "bar"}
    page = write_figures(tmp_path / "p.html", hostile, [(spec, hostile)], intro=hostile, table=[[hostile], [hostile]])
    text = page.read_text()
    assert "<script>alert" not in text
    assert "<img src=x" not in text
    assert "default-src 'none'" in text


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["weightsteer", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["combine", "w", "w=W", "w=W2", "-o", "x"], "combine: 'w' is given twice"),
        (["combine", "w", "w=W", "-o", "x", "--out", "y"], "--out: is given twice"),
        (["combine", "w", "w=W", "-ox", "-o", "y"], "-o: is given twice"),
        (["steer", "W", "Hi", "--k=1", "--k", "2"], "--k: is given twice"),
        (["export", "peft", "W", "--k=1", "-o", "x", "--k=2"], "--k: is given twice"),
        (["steer", "W", "Hi", "--k", ""], "k: expected a number"),
        (["steer", "W", "Hi", "--k="], "k: expected a number"),
        (["chat", "W", "--k", ""], "k: expected a number"),
        (["export", "peft", "W", "--k", "", "-o", "x"], "k: expected a number"),
        (["export", "gguf", "W", "--k", "", "-o", "x"], "k: expected a number"),
        (["measure", "W", "--task", "facts", "--k", ""], "k: expected a number"),
        (["monitor", "W", "--vectors", "W", "--alert", ""], "expected z=NUMBER"),
        (["train", "--pairs", "sycophancy", "--lr", "", "-o", "x"], "--lr: expected a number"),
        (["combine", "w", "=W", "-o", "x"], "expected name=FOLDER"),
        (["combine", "w", "w=", "-o", "x"], "expected name=FOLDER"),
    ],
)
def test_what_is_given_twice_or_empty_is_refused(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("W", "W2"):
        random_vector(tiny_lm()).save(tmp_path / name)
    assert command(monkeypatch, *arguments) == 1
    assert said in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"W", "W2"}


def test_lists_may_be_given_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    w, other = (str(random_vector(tiny_lm(), seed=seed).save(tmp_path / f"w{seed}")) for seed in (1, 2))
    arguments = ["monitor", w, "--vectors", w, "--vectors", other, "-o", str(tmp_path / "seen")]
    assert command(monkeypatch, *arguments) == 0
    rows = [json.loads(line) for line in (tmp_path / "seen" / "readings.jsonl").read_text().splitlines()]
    assert {row["vector"] for row in rows} == {"w1", "w2"}


def test_a_reply_cannot_act_on_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from weightsteer.cli import options
    from weightsteer.steering import several_k

    lm, w = tiny_lm(), random_vector(tiny_lm()).save(tmp_path / "w")
    monkeypatch.setattr(options, "load_lm", lambda *a, **o: lm)
    monkeypatch.setattr(several_k, "generate_at_strengths", lambda *a, **o: ["\x1b]0;pwned\x07 \u202e", "\x9b2J[/]"])
    assert command(monkeypatch, "steer", str(w), "Hi", "--k=0,1") == 0
    out = capsys.readouterr().out
    assert "pwned" in out
    assert "\x1b" not in out
    assert not set(out) & set("\x07\x9b\u202e")
    assert command(monkeypatch, "show", "no\x1b[2Jthing") == 1
    assert "\x1b" not in capsys.readouterr().err
